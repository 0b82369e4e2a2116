"""Launches of linear_gelu at the models' shapes."""

import torch

from pyvideo_kernels.kernels.linear_gelu import linear_gelu
from pyvideo_kernels.testing.static import Case, meta


def _call(tokens, k, n, approximate="tanh", bias=True, dtype=torch.bfloat16):
    x, weight = meta((1, tokens, k), dtype), meta((n, k), dtype)
    return lambda: linear_gelu(x, weight, meta((n,), dtype) if bias else None, approximate)


CASES = [
    Case("wan-1.3b-480p", _call(32760, 1536, 8960), matrix=True),
    Case("wan-14b-480p", _call(32760, 5120, 13824), matrix=True),
    # The image tokens of image-to-video: erf, and no bias, which is not Wan's.
    Case("wan-14b-image", _call(257, 1280, 1280, "none", bias=False), matrix=True),
    # Columns that fill no tile.
    Case("ragged", _call(1000, 1000, 1000), matrix=True),
    Case("wan-1.3b-fp32", _call(4096, 1536, 8960, dtype=torch.float32)),
]
