"""The VAEs' own code for what an op computes: the eager side of the benchmarks. Clips are ``[B, C, T, H, W]``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_silu(x: Tensor, weight: Tensor) -> Tensor:
    """On ``[B, C, T, H, W]``, as the stock decoder has it; channels last again by a view."""
    no_bias = 0.0  # the module adds it all the same
    y = F.normalize(x.float(), dim=1).type_as(x) * x.shape[1] ** 0.5 * weight.view(-1, 1, 1, 1) + no_bias
    return F.silu(y).permute(0, 2, 3, 4, 1)


def causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor, cache: Tensor) -> Tensor:
    """On ``[B, C, T, H, W]``: concatenate the cache, pad, convolve; channels last again by a view."""
    return F.conv3d(F.pad(torch.cat([cache, x], 2), (1, 1, 1, 1, 0, 0)), weight, bias).permute(0, 2, 3, 4, 1)
