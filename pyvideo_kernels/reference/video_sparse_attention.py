"""Oracle of video_sparse_attention: tile means, scores, selection, attention, gated sum; and its sample inputs.

The selection works on means and scores of tiles alone, in plain torch and without a synchronisation: the kernels'
implementation shares it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import generator, randn, up
from .block_mean import block_mean, block_sizes, blocks_of
from .block_sparse_attention import attend

# Shares of attention mass are added in integers, in which the order of a sum does not matter. Their products, at most
# 2^60, fit int64.
_MASS, _SHARE = 1 << 40, 1 << 20


def tile_scores(q_mean: Tensor, k_mean: Tensor, scale: float) -> Tensor:
    """``[B, heads, tiles, tiles]``: scores of mean queries and mean keys ``[B, heads, tiles, D]``, fp32 or fp64."""
    groups = k_mean.shape[1]
    grouped = q_mean.unflatten(1, (groups, -1))
    return torch.matmul(grouped * scale, k_mean[:, :, None].transpose(-1, -2)).flatten(1, 2)


def mix(scores: Tensor, v_mean: Tensor) -> Tensor:
    """``[B, heads, tiles, D]``: attention among the tiles, each one a token."""
    weights = torch.softmax(scores, -1).unflatten(1, (v_mean.shape[1], -1))
    return torch.matmul(weights, v_mean[:, :, None]).flatten(1, 2)


def top_tiles(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` tiles of the highest scores in ascending order, and their number; int32."""
    blocks = scores.shape[-1]
    if top_k >= blocks:
        return _all_tiles(scores)
    indices = torch.topk(scores, top_k, sorted=False).indices.sort(-1).values.to(torch.int32)
    return indices, torch.full(scores.shape[:-1], top_k, dtype=torch.int32, device=scores.device)


def tiles_with_share(scores: Tensor, sizes: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The query's own tile and the fewest others that together hold ``share`` of the mass, ascending; int32.

    Lists have a place for every tile; past a list's count they hold anything.
    """
    blocks = scores.shape[-1]
    if share >= 1.0:
        return _all_tiles(scores)
    # A tile weighs what its tokens would, each with the score of the mean key.
    mass = (torch.softmax(scores + sizes.to(scores.dtype).log(), -1) * _MASS).long()
    index = torch.arange(blocks, device=scores.device)
    first = torch.where(index == index[:, None], torch.iinfo(torch.int64).max, mass)
    order = first.argsort(dim=-1, descending=True, stable=True)
    ranked = mass.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    kept = before * _SHARE < ranked.sum(-1, keepdim=True) * max(1, round(share * _SHARE))
    kept = torch.zeros_like(kept).scatter_(-1, order, kept)
    indices = torch.where(kept, index, blocks).sort(-1).values.clamp(max=blocks - 1)
    return indices.to(torch.int32), kept.sum(-1).to(torch.int32)


def _all_tiles(scores: Tensor) -> tuple[Tensor, Tensor]:
    blocks = scores.shape[-1]
    every = torch.arange(blocks, dtype=torch.int32, device=scores.device)
    counts = torch.full(scores.shape[:-1], blocks, dtype=torch.int32, device=scores.device)
    return every.expand(scores.shape).contiguous(), counts


def chosen_tiles(
    scores: Tensor, grid: Sequence[int], tile: Sequence[int], top_k: int | None, share: float | None
) -> tuple[Tensor, Tensor]:
    """Lists ``[B, heads, tiles, listed]`` and their lengths ``[B, heads, tiles]``, by number or by share."""
    if top_k is not None:
        return top_tiles(scores, top_k)
    assert share is not None
    return tiles_with_share(scores, block_sizes(grid, tile, scores.device), share)


def video_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    tile: Sequence[int],
    top_k: int | None,
    share: float | None,
    gate: Tensor | None,
    scale: float,
    return_selection: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both stages in fp32 (fp64 for fp64 inputs), their sum rounded once."""
    scores = tile_scores(block_mean(q, grid, tile), block_mean(k, grid, tile), scale)
    indices, counts = chosen_tiles(scores, grid, tile, top_k, share)
    out, _ = attend(q, k, v, indices, counts, grid, tile, None, scale)
    if gate is not None:
        block, _ = blocks_of(grid, tile, q.device)
        coarse = mix(scores, block_mean(v, grid, tile)).transpose(1, 2)  # [B, tiles, heads, D]
        out = out + up(gate, out.dtype) * coarse[:, block]
    if not return_selection:
        indices, counts = (t.new_empty((0,)) for t in (indices, counts))
    return out.to(q.dtype), indices, counts


def samples(dtype: torch.dtype, head_dim: int | None = None) -> Iterator[dict[str, Any]]:
    """Ragged grids, grouped heads, packed views, both ways to select, gates of every width, every tile, one token.

    ``head_dim``: that of all samples; None: each has its own.
    """
    g = generator()

    def sized(d: int, **rest: Any) -> dict[str, Any]:
        options = {"top_k": None, "share": None, "gate": None, "scale": d**-0.5, "return_selection": True}
        return {**options, "tile": (4, 4, 4), **rest}

    # 2 x 2 x 3 tiles, ragged on every axis; one packed projection.
    d = head_dim or 32
    packed = randn(2, 5 * 6 * 9, 3, 2, d, dtype=dtype, g=g)
    # Tokens of a tile resemble each other, or all means would be near zero and every tile as good as another.
    block, _ = blocks_of((5, 6, 9), (4, 4, 4))
    packed += randn(2, 12, 3, 2, d, dtype=dtype, g=g)[:, block]
    q, k, v = packed.unbind(2)
    gate = randn(2, 5 * 6 * 9, 2, d, dtype=dtype, g=g)
    yield {"q": q, "k": k, "v": v, **sized(d, grid=(5, 6, 9), top_k=3, gate=gate)}
    # Grouped heads; a share of the mass; one gate a head and token.
    d = head_dim or 16
    q = randn(1, 4 * 5 * 10, 4, d, dtype=dtype, g=g)
    k, v = (randn(1, 4 * 5 * 10, 2, d, dtype=dtype, g=g, mean=0.5) for _ in range(2))
    gate = randn(1, 4 * 5 * 10, 4, 1, dtype=dtype, g=g)
    yield {"q": q, "k": k, "v": v, **sized(d, grid=(4, 5, 10), tile=(2, 4, 8), share=0.6, gate=gate)}
    # More than there are: dense, with one gate for all.
    q, k, v = (randn(1, 2 * 3 * 11, 1, d, dtype=dtype, g=g) for _ in range(3))
    gate = torch.full((1, 1, 1, 1), -0.5, dtype=dtype)
    yield {"q": q, "k": k, "v": v, **sized(d, grid=(2, 3, 11), top_k=9, gate=gate, return_selection=False)}
    q, k, v = (randn(1, 1, 1, d, dtype=dtype, g=g) for _ in range(3))
    yield {"q": q, "k": k, "v": v, **sized(d, grid=(1, 1, 1), share=1.0)}
