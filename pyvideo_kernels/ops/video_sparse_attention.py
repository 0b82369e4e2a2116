"""Attention over the tiles of a video that matter to each tile of queries: block_mean, a choice, and
block_sparse_attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import DTypeError, bad_option, bad_shape, check_same_device, check_tensor, refuse_grad
from ..reference import compute_dtype
from ..reference.block_mean import tile_sizes, tiles_of
from ._checks import check_triple
from .block_sparse_attention import check_heads, check_scale, check_tile

_OP = "video_sparse_attention"
# Shares of attention mass are added in integers, in which the order of a sum does not matter: int32, in units of 2^-30.
_MASS, _SHARE = 1 << 30, 1 << 20


def video_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    tile: Sequence[int] = (4, 4, 4),
    top_k: int | None = None,
    select: str = "top_k",
    share: float | None = None,
    gate: Tensor | None = None,
    q_mean: Tensor | None = None,
    k_mean: Tensor | None = None,
    scale: float | None = None,
    return_selection: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention of each tile of the grid over the tiles of keys whose means score highest, a choice a head.

        score[m, n] = scale · q̄[m]·k̄[n]                   of the means of tiles m and n
        chosen[m]   = the top_k tiles n, or as many as hold ``share`` of the estimated mass
        out[i]      = attention of i over the tokens of chosen[tile of i]
                      + gate[i] ⊙ Σ_n softmax_n(score[tile of i, n]) v̄[n]          with a gate

    The choice is made on the device, without a synchronisation. Wants no training with ``select="threshold"``.

    Args:
        q: ``[B, T*H*W, heads, head_dim]``, bf16/fp16/fp32 (fp64 by the reference), tokens in (T, H, W) order; last dim
            contiguous, any other strides (views of a packed QKV too).
        k, v: ``[B, T*H*W, kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        grid: tokens in (time, height, width); any, tiles at the far edges are cut.
        tile: tokens of a tile along each, 64 or 128 in all.
        top_k: tiles of keys for each tile of queries; as many as there are, or more: dense attention.
        select: ``top_k``, or ``threshold``: the query's own tile and the fewest others that together hold ``share``.
        share: of the attention mass, as the means estimate it, in (0, 1]; 1: dense attention.
        gate: weight of the attention among tile means, ``[B, T*H*W, heads, head_dim]`` or what broadcasts to it, in the
            dtype of ``q``; None: that part is left out.
        q_mean, k_mean: means of the tiles of ``q`` and ``k``, ``[B, heads, tiles, head_dim]`` fp32 (fp64 for fp64), as
            `qk_norm_rope_means` gives them; None: computed here, by a pass over each.
        scale: multiplies the scores, positive; None: ``head_dim ** -0.5``.
        return_selection: also return what was chosen, as `block_sparse_attention` takes it.
        impl: ``auto``, ``reference`` or ``triton``; an explicit choice never falls back.
    Returns:
        ``[B, T*H*W, heads, head_dim]``, contiguous, dtype of ``q``; or ``(out, block_indices, block_counts)``, int32,
        ``[B, heads, tiles, listed]`` in ascending order and ``[B, heads, tiles]``.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: inputs that require grad, or what this implementation has not.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic S and grid. head_dim ≤ 256 in Triton.
        Scratch: scores of ``[B, heads, tiles, tiles]`` in fp32.
    Numerics: means, scores and choice in fp32, the sum with the gate rounded once; error ≤ 2 × eager's own against
        float64, for the same choice. Deterministic: yes.
    Source: Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention", arXiv:2505.13389.
    """
    check_heads(_OP, q, k, v)
    sizes, sides = check_triple(_OP, "grid", grid, 1), check_tile(_OP, tile)
    if q.shape[1] != sizes[0] * sizes[1] * sizes[2]:
        bad_shape(_OP, "q", f"[B, T*H*W, heads, head_dim] for grid {sizes}", q)
    if select not in ("top_k", "threshold"):
        bad_option(_OP, "select", "'top_k' or 'threshold'", select)
    if select == "top_k":
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            bad_option(_OP, "top_k", "an integer of at least 1 for select='top_k'", top_k)
        if share is not None:
            bad_option(_OP, "share", "None for select='top_k'", share)
    else:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            bad_option(_OP, "share", "in (0, 1] for select='threshold'", share)
        if top_k is not None:
            bad_option(_OP, "top_k", "None for select='threshold'", top_k)
    if gate is not None:
        check_tensor(_OP, "gate", gate, ndim=4)
        if gate.dtype != q.dtype:
            raise DTypeError(f"{_OP}: `gate` must be {q.dtype} like `q`; got {gate.dtype}")
        check_same_device(_OP, q=q, gate=gate)
        if any(n not in (1, size) for n, size in zip(gate.shape, q.shape, strict=True)):
            bad_shape(_OP, "gate", f"{list(q.shape)}, or 1 along some of these", gate)
    for name, x, mean in (("q_mean", q, q_mean), ("k_mean", k, k_mean)):
        if mean is not None:
            _check_mean(name, mean, x, sizes, sides)
    scale = check_scale(_OP, scale, q)
    refuse_grad(_OP, q=q, k=k, v=v, gate=gate, q_mean=q_mean, k_mean=k_mean)
    ops = torch.ops.pyvideo
    q_mean = ops.block_mean(q, sizes, sides, impl) if q_mean is None else q_mean
    k_mean = ops.block_mean(k, sizes, sides, impl) if k_mean is None else k_mean
    scores = tile_scores(q_mean, k_mean, scale)
    if top_k is not None:
        indices, counts = top_tiles(scores, top_k)
    else:
        assert share is not None
        indices, counts = tiles_with_share(scores, tile_sizes(sizes, sides, q.device), share)
    coarse = None if gate is None else mix(scores, ops.block_mean(v, sizes, sides, impl))
    out, _ = ops.block_sparse_attention(q, k, v, indices, counts, sizes, sides, None, coarse, gate, scale, False, impl)
    return (out, indices, counts) if return_selection else out


def _check_mean(name: str, mean: Tensor, x: Tensor, grid: Sequence[int], tile: Sequence[int]) -> None:
    check_tensor(_OP, name, mean, ndim=4)
    wanted = compute_dtype(x)
    if mean.dtype != wanted:
        raise DTypeError(f"{_OP}: `{name}` must be {wanted}; got {mean.dtype}")
    check_same_device(_OP, **{name[0]: x, name: mean})
    tiles_t, tiles_h, tiles_w = tiles_of(grid, tile)
    expected = [x.shape[0], x.shape[2], tiles_t * tiles_h * tiles_w, x.shape[3]]
    if any(n != size for n, size in zip(mean.shape, expected, strict=True)):
        bad_shape(_OP, name, f"{expected}, a mean a tile", mean)


# Scores and selection: plain torch on one row a tile. Nothing here waits for the device or depends on its values. ----


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
    mass = (torch.softmax(scores + sizes.to(scores.dtype).log(), -1) * _MASS).to(torch.int32)
    index = torch.arange(blocks, device=scores.device)
    order = torch.where(index == index[:, None], _MASS + 1, mass).argsort(dim=-1, descending=True, stable=True)
    ranked = mass.gather(-1, order)
    before = ranked.cumsum(-1, dtype=torch.int32) - ranked
    wanted = (ranked.sum(-1, keepdim=True) * max(1, round(share * _SHARE)) + _SHARE - 1) // _SHARE
    kept = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, before < wanted)
    indices = torch.where(kept, index, blocks).sort(-1).values.clamp(max=blocks - 1)
    return indices.to(torch.int32), kept.sum(-1).to(torch.int32)


def _all_tiles(scores: Tensor) -> tuple[Tensor, Tensor]:
    blocks = scores.shape[-1]
    every = torch.arange(blocks, dtype=torch.int32, device=scores.device)
    counts = torch.full(scores.shape[:-1], blocks, dtype=torch.int32, device=scores.device)
    return every.expand(scores.shape).contiguous(), counts
