"""The VAEs' own code for what an op computes: the eager side of the benchmarks. Clips are ``[B, C, T, H, W]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_silu(x: Tensor, weight: Tensor) -> Tensor:
    """On ``[B, C, T, H, W]``, as the stock decoder has it; channels last again by a view."""
    no_bias = 0.0  # the module adds it all the same
    y = F.normalize(x.float(), dim=1).type_as(x) * x.shape[1] ** 0.5 * weight.view(-1, 1, 1, 1) + no_bias
    return F.silu(y).permute(0, 2, 3, 4, 1)


def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor, cache: Tensor | None = None, residual: Tensor | None = None,
    pad_mode: str = "zeros", epilogue: str | None = None, factor: Sequence[int] | None = None,
    norm_weight: Tensor | None = None, keep: bool = True,
) -> Any:  # fmt: skip
    """On ``[B, C, T, H, W]``: past, pad and convolution, then what the layer does; channels last again by a view."""
    past, *sides = (n - 1 if i == 0 else n // 2 for i, n in enumerate(weight.shape[2:]))
    space = (sides[1], sides[1], sides[0], sides[0])
    if pad_mode == "replicate":
        y = F.conv3d(F.pad(x, (*space, past, 0), mode="replicate"), weight, bias)
    elif pad_mode == "first_frame":
        y = F.conv3d(torch.cat([x[:, :, :1].repeat(1, 1, past, 1, 1), x], 2), weight, bias, padding=(0, *sides))
    else:
        y = F.conv3d(F.pad(x if cache is None else torch.cat([cache, x], 2), (*space, 0, 0)), weight, bias)
    if epilogue == "interleave":
        b, c, t, h, w = y.shape
        y = y.reshape(b, 2, c // 2, t, h, w)
        y = torch.stack((y[:, 0], y[:, 1]), 3).reshape(b, c // 2, t * 2, h, w)
    elif factor is not None:
        y = y.reshape(y.shape[0], -1, *factor, *y.shape[2:])
        y = y.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    if residual is not None:
        y = y + residual
    clip = y.permute(0, 2, 3, 4, 1)
    if norm_weight is None:
        return clip
    return (clip if keep else clip.new_empty(0)), rms_norm_silu(y, norm_weight)


def upsample_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, packed: Tensor, time_factor: int, first: bool, pad_mode: str
) -> Tensor:
    """On ``[B, C, T, H, W]``: enlarge, then convolve; channels last again by a view. ``packed`` is ours alone."""
    if weight.dim() == 5:
        y = F.conv3d(F.pad(_enlarged(x, time_factor, first), (1, 1, 1, 1, 2, 0), mode=pad_mode), weight, bias)
        return y.permute(0, 2, 3, 4, 1)
    if time_factor == 2:
        frames = _enlarged(x, time_factor, first).permute(0, 2, 1, 3, 4)
        y = F.conv2d(frames.flatten(0, 1), weight, bias, padding=1)
    else:
        frames = x.permute(0, 2, 1, 3, 4)
        images = F.interpolate(frames.flatten(0, 1).float(), scale_factor=2, mode="nearest-exact").type_as(x)
        y = F.conv2d(images, weight, bias, padding=1)
    return y.unflatten(0, frames.shape[:2]).permute(0, 1, 3, 4, 2)


def _enlarged(x: Tensor, time_factor: int, first: bool) -> Tensor:
    """All frames in time and space, the ``first`` one of a clip in space alone."""
    if not first:
        return F.interpolate(x, scale_factor=(time_factor, 2, 2), mode="nearest")
    head = F.interpolate(x[:, :, 0], scale_factor=2, mode="nearest")[:, :, None]
    if x.shape[2] == 1:
        return head
    return torch.cat([head, F.interpolate(x[:, :, 1:].contiguous(), scale_factor=(time_factor, 2, 2))], 2)


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
