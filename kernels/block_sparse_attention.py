"""Attention of blocks of queries over listed blocks of keys: boxes of the (T, H, W) grid, or runs of a sequence.

A program holds one block of queries and walks the list of its (batch, head, block), which was made on the device.
Blocks are addressed where they lie in the plain ``[B, S, heads, D]`` layout: nothing is permuted, and a ragged block at
the edge of the grid is masked. A flat sequence is the grid (1, 1, S) with blocks of (1, 1, size).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs.block_sparse_attention import select
from pyvideo_kernels.errors import UnsupportedError

from .boxes import addressable, box_descriptor, stride_unit
from .launch import cdiv, on_device, refuse_float64
from .softmax import finish, soften

_SIZES = ["s", "heads", "group", "t", "h", "w", "tiles_h", "tiles_w", "blocks", "listed"]


@triton.jit
def _corner(block, tiles_h, tiles_w, BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, FLAT: tl.constexpr):
    """First token of a block along each axis; of a flat sequence, without divisions."""
    if FLAT:
        return 0, 0, block * BW
    return block // (tiles_h * tiles_w) * BT, block // tiles_w % tiles_h * BH, block % tiles_w * BW


@triton.jit(do_not_specialize=_SIZES)
def _block_sparse_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, index_ptr, count_ptr, lens_ptr, coarse_ptr, gate_ptr, k_desc, v_desc,
    s, heads, group, t, h, w, tiles_h, tiles_w, blocks, listed, scale, scale_log2,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h,
    D: tl.constexpr, UNIT: tl.constexpr, LENS: tl.constexpr, GATED: tl.constexpr, G_D: tl.constexpr,
    HAS_LSE: tl.constexpr, DESCRIPTORS: tl.constexpr, FLAT: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = BT * BH * BW
    # A block of keys is taken in parts: a whole one has more scores than sm_80 and sm_120 have registers.
    BLOCK_N: tl.constexpr = KT * KH * KW
    PARTS_H: tl.constexpr = BH // KH
    PARTS_W: tl.constexpr = BW // KW
    PARTS: tl.constexpr = BLOCK // BLOCK_N
    pid = tl.program_id(0)
    block = pid % blocks
    head = pid // blocks % heads
    batch = (pid // blocks // heads).to(tl.int64)
    kv_head = head // group
    at = tl.arange(0, BLOCK)
    in_t, in_h, in_w = at // (BH * BW), at // BW % BH, at % BW
    local = (in_t * h + in_h) * w + in_w
    from_t, from_h, from_w = _corner(block, tiles_h, tiles_w, BT, BH, BW, FLAT)
    valid = (from_t + in_t < t) & (from_h + in_h < h) & (from_w + in_w < w)
    first = ((from_t * h + from_h) * w + from_w).to(tl.int64)

    q_b, q_s, q_h = tl.cast(q_b, tl.int64) * UNIT, q_s * UNIT, tl.cast(q_h, tl.int64) * UNIT
    k_b, k_s, k_h = tl.cast(k_b, tl.int64) * UNIT, k_s * UNIT, tl.cast(k_h, tl.int64) * UNIT
    v_b, v_s, v_h = tl.cast(v_b, tl.int64) * UNIT, v_s * UNIT, tl.cast(v_h, tl.int64) * UNIT
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < D
    q_tile = q_ptr + batch * q_b + first * q_s + head.to(tl.int64) * q_h
    q = tl.load(q_tile + local[:, None] * q_s + cols[None, :], mask=valid[:, None] & col_mask[None, :], other=0.0)
    k_head = k_ptr + batch * k_b + kv_head.to(tl.int64) * k_h
    v_head = v_ptr + batch * v_b + kv_head.to(tl.int64) * v_h
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    entry = (batch * heads + head) * blocks + block
    count = tl.minimum(tl.load(count_ptr + entry), listed).to(tl.int32)
    n = tl.arange(0, BLOCK_N)
    of_t, of_h, of_w = n // (KH * KW), n // KW % KH, n % KW
    near = (of_t * h + of_h) * w + of_w
    for i in tl.range(0, count * PARTS):
        # A list made on the device cannot be checked without waiting for it: clamp, so that none reads elsewhere.
        j = tl.load(index_ptr + entry * listed + i // PARTS)
        j = tl.minimum(tl.maximum(j, 0), blocks - 1).to(tl.int32)
        part = i % PARTS
        part_t, part_h, part_w = part // (PARTS_H * PARTS_W) * KT, part // PARTS_W % PARTS_H * KH, part % PARTS_W * KW
        key_t, key_h, key_w = _corner(j, tiles_h, tiles_w, BT, BH, BW, FLAT)
        key_t, key_h, key_w = key_t + part_t, key_h + part_h, key_w + part_w
        # The least distance to an edge says whether a key is real: one comparison a key, as AMD holds what each gives
        # in two scalar registers. Along an axis where blocks are one token wide there is no edge.
        room = w - key_w - of_w
        if BH > 1:
            room = tl.minimum(room, h - key_h - of_h)
        if BT > 1:
            room = tl.minimum(room, t - key_t - of_t)
        if LENS:
            place = ((part_t + of_t) * BH + part_h + of_h) * BW + part_w + of_w
            room = tl.minimum(room, tl.load(lens_ptr + j).to(tl.int32) - place)
        real = room > 0
        if DESCRIPTORS:
            where = kv_head * D
            k = k_desc.load([batch.to(tl.int32), key_t, key_h, key_w, where]).reshape(BLOCK_N, BLOCK_D)
        else:
            origin = ((key_t * h + key_h) * w + key_w).to(tl.int64)
            k = tl.load(
                k_head + origin * k_s + near[:, None] * k_s + cols[None, :],
                mask=real[:, None] & col_mask[None, :], other=0.0,
            )  # fmt: skip
        scores = tl.where(real[None, :], tl.dot(q, k.T, input_precision="ieee"), float("-inf"))
        weights, acc, top, total = soften(scores, acc, top, total, scale_log2, True)
        if DESCRIPTORS:
            v = v_desc.load([batch.to(tl.int32), key_t, key_h, key_w, where]).reshape(BLOCK_N, BLOCK_D)
            if LENS:
                # Padding may hold anything, and 0 times NaN is NaN.
                v = tl.where(real[:, None], v, 0.0)
        else:
            v = tl.load(
                v_head + origin * v_s + near[:, None] * v_s + cols[None, :],
                mask=real[:, None] & col_mask[None, :], other=0.0,
            )  # fmt: skip
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    out, lse = finish(acc, top, total, scale)
    if GATED:
        # One row a block of queries, weighed token by token: the sum is rounded once, and moves nothing but the gate.
        coarse = tl.load(coarse_ptr + entry * D + cols, mask=col_mask, other=0.0)
        g_b, g_h = tl.cast(g_b, tl.int64), tl.cast(g_h, tl.int64)
        g_tile = gate_ptr + batch * g_b + first * g_s + head * g_h
        gate = tl.load(
            g_tile + local[:, None] * g_s + cols[None, :] * G_D,
            mask=valid[:, None] & col_mask[None, :], other=0.0,
        )  # fmt: skip
        out += gate.to(tl.float32) * coarse[None, :]
    o_tile = o_ptr + ((batch * s + first) * heads + head) * D
    tl.store(
        o_tile + local[:, None] * (heads * D) + cols[None, :], out.to(o_ptr.dtype.element_ty),
        mask=valid[:, None] & col_mask[None, :],
    )  # fmt: skip
    if HAS_LSE:
        tl.store(lse_ptr + (batch * heads + head) * s + first + local, lse, mask=valid)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    grid: Sequence[int],
    tile: Sequence[int],
    kv_block_lens: Tensor | None,
    coarse: Tensor | None,
    gate: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """``impl="triton"`` of the op."""
    refuse_float64("block_sparse_attention", q)
    b, s, heads, head_dim = q.shape
    out = q.new_empty((b, s, heads, head_dim))
    lse = q.new_empty((b, heads, s) if return_lse else (0,), dtype=torch.float32)
    # A block of columns wider than the head would read the next head's.
    whole = head_dim == max(16, 1 << (head_dim - 1).bit_length())
    config = select(
        arch_for(q), head_dim=head_dim, itemsize=q.element_size(),
        aligned=whole and all(map(addressable, (k, v))), tile_t=tile[0], tile_h=tile[1], tile_w=tile[2],
    )  # fmt: skip
    gate_steps = (0, 0, 0, 0) if gate is None else gate.expand(q.shape).stride()
    reach = (tile[0] * grid[1] + tile[1]) * grid[2] + tile[2]
    if max(heads * head_dim, gate_steps[1], *(x.stride(1) for x in (q, k, v))) * reach >= 2**31:
        raise UnsupportedError("block_sparse_attention: impl 'triton' needs a block of tokens within 2^31 elements")
    if not out.numel():
        return out, lse
    tiles = [cdiv(n, side) for n, side in zip(grid, tile, strict=True)]
    blocks = math.prod(tiles)
    unit = stride_unit(q, k, v)
    key = config.key_t, config.key_h, config.key_w
    with on_device(q):
        k_desc = v_desc = None
        if config.descriptors:
            k_desc, v_desc = (box_descriptor(x, grid, 0, key, config.block_d) for x in (k, v))
        _block_sparse_attention_fwd_kernel[(blocks * b * heads,)](
            q, k, v, out, lse if return_lse else None, block_indices.contiguous(), block_counts.contiguous(),
            None if kv_block_lens is None else kv_block_lens.contiguous(),
            None if coarse is None else coarse.contiguous(), gate, k_desc, v_desc,
            s, heads, heads // k.shape[2], *grid, tiles[1], tiles[2], blocks, block_indices.shape[-1],
            scale, scale * math.log2(math.e),
            *(step // unit for x in (q, k, v) for step in x.stride()[:3]),
            *gate_steps[:3], head_dim, unit, kv_block_lens is not None, gate is not None, gate_steps[3], return_lse,
            config.descriptors, tiles[0] == tiles[1] == 1, *tile, *key, config.block_d,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse
