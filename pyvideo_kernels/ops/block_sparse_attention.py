"""Attention over listed blocks of keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import (
    DTypeError,
    bad_option,
    bad_shape,
    check_last_dim_contiguous,
    check_same_device,
    check_tensor,
    refuse_grad,
)
from ._checks import check_triple

_OP = "block_sparse_attention"
BLOCK_TOKENS = (64, 128)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    *,
    block_size: int | None = None,
    tile: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
    kv_block_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each block of queries over the blocks of keys in its list, a list a head.

        out[i] = Σ_j exp(scale · q[i]·k[j] - lse[i]) v[j],   lse[i] = log Σ_j exp(scale · q[i]·k[j])

    over the keys j of the blocks listed for the block of i. Blocks are runs of ``block_size`` tokens, or boxes of
    ``tile`` tokens of a ``grid``, where they lie: nothing is permuted. The last block along an axis may be short.

    Args:
        q: ``[B, S, heads, head_dim]``, bf16/fp16/fp32 (fp64 by the reference); last dim contiguous, any other strides.
        k, v: ``[B, S, kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``, and query head i uses
            KV head ``i // (heads // kv_heads)``.
        block_indices: ``[B, heads, blocks, listed]`` int32/int64, the blocks of keys of each block of queries, in any
            order (ascending is kindest to the cache); boxes count in (T, H, W) order. A block listed twice counts
            twice. The lists may be made on the GPU: nothing waits for them, so an index out of range is not an error
            but the nearest block.
        block_counts: ``[B, heads, blocks]`` int32/int64, how many of each list count, clamped to ``[0, listed]``.
        block_size: 64 or 128 tokens in a run; or
        tile, grid: tokens of a box, 64 or 128 in all, and of the whole, each along (time, height, width).
        kv_block_lens: ``[blocks]`` int32/int64, how many tokens of each block of keys are real, the first ones in
            (T, H, W) order within a whole block; None: all. What the others hold does not matter.
        scale: multiplies the scores, positive; None: ``head_dim ** -0.5``.
        return_lse: also return ``lse``, natural logarithm, ``[B, heads, S]`` fp32 (fp64 for fp64 inputs).
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        ``[B, S, heads, head_dim]``, contiguous, dtype of ``q``; or ``(out, lse)``. A query with an empty list gives
        zeros and an ``lse`` of -inf. Text beside the grid: `merge_attention` with dense attention over it.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: inputs that require grad, or what this implementation has not.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic S and grid. head_dim ≤ 256 in Triton.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention", arXiv:2505.13389.
    """
    check_heads(_OP, q, k, v)
    sizes, sides = _blocks(q, block_size, tile, grid)
    tiles = [(n + side - 1) // side for n, side in zip(sizes, sides, strict=True)]
    blocks = tiles[0] * tiles[1] * tiles[2]
    b, _, heads, _ = q.shape
    for name, tensor in (("block_indices", block_indices), ("block_counts", block_counts),
                         ("kv_block_lens", kv_block_lens)):  # fmt: skip
        if tensor is not None or name != "kv_block_lens":
            _check_integers(name, tensor, q)
    if block_indices.dim() != 4 or block_indices.shape[:3] != (b, heads, blocks) or not block_indices.shape[3]:
        bad_shape(_OP, "block_indices", f"[{b}, {heads}, {blocks}, listed] for {blocks} blocks", block_indices)
    if block_counts.shape != (b, heads, blocks):
        bad_shape(_OP, "block_counts", f"[{b}, {heads}, {blocks}] like `block_indices`", block_counts)
    if kv_block_lens is not None and kv_block_lens.shape != (blocks,):
        bad_shape(_OP, "kv_block_lens", f"[{blocks}], one for each block", kv_block_lens)
    scale = check_scale(_OP, scale, q)
    refuse_grad(_OP, q=q, k=k, v=v)
    out, lse = torch.ops.pyvideo.block_sparse_attention(
        q, k, v, block_indices, block_counts, sizes, sides, kv_block_lens, None, None, scale, return_lse, impl
    )
    return (out, lse) if return_lse else out


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """``[B, S, heads, head_dim]`` of one dtype on one device, with a divisor of ``heads`` in ``k`` and ``v``."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, tensor, ndim=4)
        if tensor.dtype != q.dtype:
            raise DTypeError(f"{op}: `{name}` must be {q.dtype} like `q`; got {tensor.dtype}")
    b, s, heads, head_dim = q.shape
    if heads < 1 or head_dim < 1:
        bad_shape(op, "q", "[B, S, heads, head_dim] with at least one head and one channel", q)
    if k.shape[0] != b or k.shape[1] != s or k.shape[3] != head_dim or k.shape[2] < 1 or heads % k.shape[2]:
        bad_shape(op, "k", f"[{b}, {s}, a divisor of {heads}, {head_dim}] for `q` {list(q.shape)}", k)
    if v.shape != k.shape:
        bad_shape(op, "v", f"{list(k.shape)} like `k`", v)
    check_last_dim_contiguous(op, q=q, k=k, v=v)
    check_same_device(op, q=q, k=k, v=v)


def check_scale(op: str, scale: float | None, q: Tensor) -> float:
    """``scale``, or the default of ``q``'s head_dim."""
    if scale is None:
        return float(q.shape[3]) ** -0.5
    if not isinstance(scale, (int, float, torch.SymFloat)) or not 0 < scale < math.inf:
        bad_option(op, "scale", "a positive number", scale)
    return scale


def check_tile(op: str, tile: Sequence[int]) -> list[int]:
    """A box of 64 or 128 tokens."""
    sides = check_triple(op, "tile", tile, 1)
    if sides[0] * sides[1] * sides[2] not in BLOCK_TOKENS:
        bad_option(op, "tile", "a box (time, height, width) of 64 or 128 tokens, as (4, 4, 4)", tuple(sides))
    return sides


def _blocks(
    q: Tensor, block_size: int | None, tile: Sequence[int] | None, grid: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Grid and tile; a flat sequence is a grid of one row."""
    if block_size is not None:
        if tile is not None or grid is not None:
            bad_option(_OP, "block_size", "None where `tile` and `grid` are given", block_size)
        if block_size not in BLOCK_TOKENS:
            bad_option(_OP, "block_size", "64 or 128", block_size)
        if q.shape[1] < 1:
            bad_shape(_OP, "q", "[B, S, heads, head_dim] with at least one token", q)
        return [1, 1, q.shape[1]], [1, 1, block_size]
    if tile is None or grid is None:
        bad_option(_OP, "tile" if tile is None else "grid", "given with the other, where `block_size` is not", None)
    sizes, sides = check_triple(_OP, "grid", grid, 1), check_tile(_OP, tile)
    if q.shape[1] != sizes[0] * sizes[1] * sizes[2]:
        bad_shape(_OP, "q", f"[B, T*H*W, heads, head_dim] for grid {sizes}", q)
    return sizes, sides


def _check_integers(name: str, tensor: object, q: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise DTypeError(f"{_OP}: `{name}` must be an int32 or int64 tensor; got {got}")
    check_same_device(_OP, q=q, **{name: tensor})
