"""Launches of final_layer at the models' shapes."""

import torch

from pyvideo_kernels.kernels.final_layer import final_layer
from pyvideo_kernels.testing.static import Case, meta


def _call(grid, dim, channels, patch=(1, 2, 2), per_token=False, dtype=torch.bfloat16):
    tokens, features = grid[0] * grid[1] * grid[2], channels * patch[0] * patch[1] * patch[2]
    x, modulation = meta((1, tokens, dim), dtype), meta((1, tokens if per_token else 1, dim), torch.float32)
    weight, bias = meta((features, dim), dtype), meta((features,), dtype)
    return lambda: final_layer(x, modulation, modulation, weight, bias, list(grid), list(patch), 1e-6)


CASES = [
    Case("wan-1.3b-480p", _call((21, 30, 52), 1536, 16), matrix=True),
    Case("wan-14b-480p", _call((21, 30, 52), 5120, 16), matrix=True),
    Case("wan-5b", _call((31, 22, 40), 3072, 48), matrix=True),
    Case("wan-5b-per-token", _call((31, 22, 40), 3072, 48, per_token=True), matrix=True),
    Case("wan-1.3b-per-token", _call((21, 30, 52), 1536, 16, per_token=True), matrix=True),
    Case("wan-1.3b-fp32", _call((21, 30, 52), 1536, 16, dtype=torch.float32)),
]
