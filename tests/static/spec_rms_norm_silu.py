"""Launches of rms_norm_silu at the channel counts of Wan's decoder."""

import torch

from pyvideo_kernels.kernels.rms_norm_silu import rms_norm_silu
from pyvideo_kernels.testing.static import Case, meta


def _call(shape, silu=True, dtype=torch.bfloat16, first=0):
    return lambda: rms_norm_silu(meta(shape, dtype)[:, first:], meta((shape[-1],), dtype), 1e-12, silu)


CASES = [
    Case("wan-96-480p", _call((1, 4, 480, 832, 96))),
    Case("wan-192-240p", _call((1, 4, 240, 416, 192))),
    Case("wan-384-attention", _call((4, 60, 104, 384), silu=False)),
    # Frames of a longer clip, batch of two: rows that do not merge.
    Case("wan-96-frames-of-a-clip", _call((2, 4, 480, 832, 96), first=2)),
    Case("wan-96-float32", _call((1, 4, 480, 832, 96), dtype=torch.float32)),
    Case("width-1024", _call((1, 1, 60, 104, 1024))),
]
