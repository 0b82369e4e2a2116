"""Launches of pixel_norm_silu at the channel counts of LTX's decoder."""

import torch

from pyvideo_kernels.kernels.pixel_norm_silu import pixel_norm_silu
from pyvideo_kernels.testing.static import Case, meta


def _call(shape, modulated=False, dtype=torch.bfloat16, first=0):
    def call():
        scale, shift = (meta((shape[0], shape[-1]), dtype) if modulated else None for _ in range(2))
        pixel_norm_silu(meta(shape, dtype)[:, first:], None, scale, shift, 1e-8, True)

    return call


CASES = [
    Case("ltx-128-512p", _call((1, 121, 128, 192, 128))),
    # Modulated, frames of a longer clip, batch of two: rows that do not merge.
    Case("ltx-512-modulated", _call((2, 16, 16, 24, 512), modulated=True, first=2)),
    Case("ltx-1024", _call((1, 16, 16, 24, 1024))),
    Case(
        "channels-3-float32",
        _call((1, 9, 64, 96, 3), modulated=True, dtype=torch.float32),
        archs=("sm_80", "sm_90", "sm_120", "gfx942"),
    ),
]
