"""Launches of patch_embed3d at the models' shapes."""

import torch

from pyvideo_kernels.kernels.patch_embed3d import patch_embed3d
from pyvideo_kernels.testing.static import Case, meta


def _call(channels, frames, height, width, dim, patch=(1, 2, 2), dtype=torch.bfloat16):
    video = meta((1, channels, frames, height, width), dtype)
    weight, bias = meta((dim, channels, *patch), dtype), meta((dim,), dtype)
    return lambda: patch_embed3d(video, weight, bias, list(patch))


CASES = [
    Case("wan-1.3b-480p", _call(16, 21, 60, 104, 1536), matrix=True),
    Case("wan-14b-i2v-720p", _call(36, 21, 90, 160, 5120), matrix=True),
    Case("wan-5b", _call(48, 31, 44, 80, 3072), matrix=True),
    Case("ltx", _call(128, 13, 16, 24, 2048, patch=(1, 1, 1)), matrix=True),
    Case("large-patch", _call(16, 8, 64, 64, 1024, patch=(2, 8, 8)), matrix=True),
    Case("wan-1.3b-fp32", _call(16, 21, 60, 104, 1536, dtype=torch.float32)),
]
