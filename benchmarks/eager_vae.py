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


def blend_tile_(out: Tensor, tile: Tensor, above: Tensor, left: Tensor, below: Tensor, right: Tensor) -> Tensor:
    """``blend_v`` and ``blend_h``, a row and a column at a time, then the copies to where the tile is needed."""
    n, m = above.shape[3], left.shape[4]
    for y in range(n):
        tile[:, :, :, y, :] = above[:, :, :, y, :] * (1 - y / n) + tile[:, :, :, y, :] * (y / n)
    for x in range(m):
        tile[:, :, :, :, x] = left[:, :, :, :, x] * (1 - x / m) + tile[:, :, :, :, x] * (x / m)
    below.copy_(tile[:, :, :, tile.shape[3] - below.shape[3] :])
    right.copy_(tile[..., tile.shape[4] - right.shape[4] :])
    return out.copy_(tile[..., : out.shape[3], : out.shape[4]])
