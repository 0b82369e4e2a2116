"""Attention over chosen tiles: means, choice and the gated sum around the kernel of block_sparse_attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyvideo_kernels.reference.video_sparse_attention import chosen_tiles, mix, tile_scores

from .block_mean import block_mean
from .block_sparse_attention import attend


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
    """``impl="triton"`` of the op: three launches of means, products of tiles in the library, one launch of the rest."""
    scores = tile_scores(block_mean(q, grid, tile), block_mean(k, grid, tile), scale)
    indices, counts = chosen_tiles(scores, grid, tile, top_k, share)
    coarse = None if gate is None else mix(scores, block_mean(v, grid, tile))
    out, _ = attend(q, k, v, indices, counts, grid, tile, None, scale, False, coarse, gate)
    if not return_selection:
        indices, counts = (t.new_empty((0,)) for t in (indices, counts))
    return out, indices, counts
