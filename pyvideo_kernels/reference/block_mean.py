"""Oracle of block_mean, its sample inputs, and which box of the grid each token lies in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compute_dtype, generator, randn, up


def tiles_of(grid: Sequence[int], tile: Sequence[int]) -> list[int]:
    """How many boxes there are along (time, height, width), the ragged one at the end included."""
    return [(n + side - 1) // side for n, side in zip(grid, tile, strict=True)]


def blocks_of(grid: Sequence[int], tile: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Block of each token of the grid, and the token's place in a whole block; both in (T, H, W) order."""
    at = torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid)).view(-1, 3)
    side = torch.tensor(list(tile), device=device)
    _, tiles_h, tiles_w = tiles_of(grid, tile)
    box, inner = at // side, at % side
    block = (box[:, 0] * tiles_h + box[:, 1]) * tiles_w + box[:, 2]
    place = (inner[:, 0] * tile[1] + inner[:, 1]) * tile[2] + inner[:, 2]
    return block, place


def tile_sizes(grid: Sequence[int], tile: Sequence[int], device: torch.device) -> Tensor:
    """``[tiles]`` int64: tokens in each tile; fewer at the far edges of a ragged grid."""
    sizes = torch.ones((), dtype=torch.int64, device=device)
    for n, side in zip(grid, tile, strict=True):
        along = (n - torch.arange((n + side - 1) // side, device=device) * side).clamp(max=side)
        sizes = sizes[..., None] * along
    return sizes.flatten()


def block_mean(x: Tensor, grid: Sequence[int], tile: Sequence[int]) -> Tensor:
    """The grid filled up to whole boxes with zeros, sums of each, divided by the tokens that are there."""
    t, h, w = (-n % side for n, side in zip(grid, tile, strict=True))
    video = F.pad(up(x, compute_dtype(x)).unflatten(1, list(grid)), (0, 0, 0, 0, 0, w, 0, h, 0, t))
    for axis in (3, 2, 1):
        video = video.unflatten(axis, (-1, tile[axis - 1]))
    sums = video.sum((2, 4, 6)).flatten(1, 3)  # [B, boxes, heads, D]
    return (sums / tile_sizes(grid, tile, x.device)[:, None, None]).transpose(1, 2).contiguous()


def summed(x: Tensor, grid: Sequence[int], tile: Sequence[int]) -> dict[int, Tensor]:
    """√terms Σ|x| / n of each mean."""
    return {0: block_mean(x.abs(), grid, tile) * math.prod(tile) ** 0.5}


def samples(dtype: torch.dtype, head_dim: int | None = None) -> Iterator[dict[str, Any]]:
    """Ragged edges on every axis, whole boxes, one token, runs of a flat sequence; packed views, values off zero.

    ``head_dim``: that of all samples; None: each has its own.
    """
    g = generator()

    def draw(*shape: int, d: int) -> Tensor:
        return randn(*shape, head_dim or d, dtype=dtype, g=g, mean=0.5)

    yield {"x": draw(2, 3 * 5 * 9, 3, 2, d=40)[:, :, 1], "grid": (3, 5, 9), "tile": (2, 4, 4)}
    yield {"x": draw(1, 8 * 4 * 4, 3, d=64), "grid": (8, 4, 4), "tile": (4, 4, 4)}
    yield {"x": draw(1, 1, 1, d=16), "grid": (1, 1, 1), "tile": (4, 4, 4)}
    # Heads outermost in memory.
    yield {"x": draw(1, 2, 150, d=16).transpose(1, 2), "grid": (1, 1, 150), "tile": (1, 1, 128)}
    # A tile whose sides are no powers of two.
    yield {"x": draw(1, 7 * 3 * 5, 2, d=24), "grid": (7, 3, 5), "tile": (3, 2, 5)}
