"""Launches of block_mean at the models' shapes: queries, keys or values of a packed projection."""

import torch

from pyvideo_kernels.kernels.block_mean import block_mean
from pyvideo_kernels.testing.static import Case, meta


def _call(grid, heads, head_dim, tile=(4, 4, 4), dtype=torch.bfloat16):
    packed = meta((1, grid[0] * grid[1] * grid[2], 3, heads, head_dim), dtype)
    return lambda: block_mean(packed[:, :, 1], grid, tile)


CASES = [
    Case("wan-1.3b-480p", _call((21, 30, 52), 12, 128)),
    Case("hunyuan-720p-128", _call((30, 48, 80), 24, 128, (4, 4, 8))),
    Case("cogvideox-480p", _call((13, 30, 45), 48, 64)),
    Case("wan-1.3b-480p-flat", _call((1, 1, 32760), 12, 128, (1, 1, 128)), archs=("sm_90",)),
    Case("fp32", _call((21, 30, 52), 12, 128, dtype=torch.float32), archs=("sm_80", "gfx942")),
    Case("head-dim-40-tile-of-any-size", _call((21, 30, 52), 8, 40, (3, 5, 13)), archs=("sm_90",)),
]
