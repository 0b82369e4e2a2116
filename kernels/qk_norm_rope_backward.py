"""Backward of the query/key norm and rotation: gradients of q, k and of the norm's vectors in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs import qk_norm_rope as configs
from pyvideo_kernels.errors import UnsupportedError

from .launch import cdiv, on_device, refuse_float64, unit_stride
from .pairs import four_dims, load_pairs, load_table, mean_of_pairs, store_pairs, table_strides


@triton.jit
def _chunk_of_tokens(
    dy_ptr, dy_b, dy_s, dy_h, x_ptr, x_b, x_s, x_h, dx_ptr, weight_ptr, dweight_ptr, dbias_ptr,
    cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
    chunk, head_block, all_tokens, tokens, heads, head_dim, start, stop, eps,
    NORM: tl.constexpr, LAYER: tl.constexpr, HALF_LAYOUT: tl.constexpr, TABLE_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dx of some heads of ``CHUNK`` tokens, and this chunk's row of the sums behind dweight and dbias."""
    half = head_dim // 2
    head = head_block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    head_mask = head < heads
    head64 = head.to(tl.int64)
    inside = head_mask[:, None] & (tl.arange(0, BLOCK_HALF) < half)[None, :]
    WHOLE_ROW: tl.constexpr = NORM == 2
    one = tl.zeros([1], tl.int64)
    if WHOLE_ROW:
        at, at_mask = head64 * head_dim, head_mask
    else:
        at, at_mask = one, one == 0
    n = heads * head_dim if WHOLE_ROW else head_dim
    if weight_ptr is not None:
        wa, wb = load_pairs(weight_ptr, at, at_mask, half, HALF_LAYOUT, BLOCK_HALF)
    sum_wa = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
    sum_wb = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
    sum_ba = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
    sum_bb = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
    for token in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, all_tokens)):
        b, s = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
        da, db = load_pairs(dy_ptr + b * dy_b + s * dy_s, head64 * dy_h, head_mask, half, HALF_LAYOUT, BLOCK_HALF)
        if NORM != 0:
            xa, xb = load_pairs(x_ptr + b * x_b + s * x_s, head64 * x_h, head_mask, half, HALF_LAYOUT, BLOCK_HALF)
        if cos_ptr is not None:
            rotated = (s >= start) & (s < stop)
            cos_at = cos_ptr + b * cos_b + (s - start) * cos_s
            sin_at = sin_ptr + b * sin_b + (s - start) * sin_s
            if TABLE_HEADS:
                cos = load_table(cos_at, head64 * cos_h, head_mask & rotated, half, 0, HALF_LAYOUT, BLOCK_HALF)
                sin = load_table(sin_at, head64 * sin_h, head_mask & rotated, half, 1, HALF_LAYOUT, BLOCK_HALF)
            else:
                cos = load_table(cos_at, one, (one == 0) & rotated, half, 0, HALF_LAYOUT, BLOCK_HALF)
                sin = load_table(sin_at, one, (one == 0) & rotated, half, 1, HALF_LAYOUT, BLOCK_HALF)
            # The transpose of a rotation: the rotation back.
            da, db = tl.where(rotated, da * cos + db * sin, da), tl.where(rotated, db * cos - da * sin, db)
        if NORM != 0:
            if LAYER:
                mean = mean_of_pairs(xa, xb, n, WHOLE_ROW)
                xa = tl.where(inside, xa - mean, 0.0)
                xb = tl.where(inside, xb - mean, 0.0)
            rstd = tl.rsqrt(mean_of_pairs(xa * xa, xb * xb, n, WHOLE_ROW) + eps)
            xa = xa * rstd
            xb = xb * rstd
            if dweight_ptr is not None:
                sum_wa += da * xa
                sum_wb += db * xb
            if dbias_ptr is not None:
                sum_ba += da
                sum_bb += db
            if weight_ptr is not None:
                da = da * wa
                db = db * wb
            along = mean_of_pairs(da * xa, db * xb, n, WHOLE_ROW)
            if LAYER:
                shift = mean_of_pairs(da, db, n, WHOLE_ROW)
                da = da - shift
                db = db - shift
            da = (da - xa * along) * rstd
            db = (db - xb * along) * rstd
        out = dx_ptr + (b * tokens + s) * heads * head_dim
        store_pairs(out, head64 * head_dim, head_mask, half, da, db, HALF_LAYOUT, BLOCK_HALF)
    if WHOLE_ROW:
        row = chunk.to(tl.int64) * heads * head_dim
    else:
        # Heads share the vector: they are summed here, head blocks with the chunks afterwards.
        row = (chunk * tl.cdiv(heads, BLOCK_HEADS) + head_block).to(tl.int64) * head_dim
    if dweight_ptr is not None:
        if not WHOLE_ROW:
            sum_wa, sum_wb = tl.sum(sum_wa, 0, keep_dims=True), tl.sum(sum_wb, 0, keep_dims=True)
        store_pairs(dweight_ptr + row, at, at_mask, half, sum_wa, sum_wb, HALF_LAYOUT, BLOCK_HALF)
    if dbias_ptr is not None:
        if not WHOLE_ROW:
            sum_ba, sum_bb = tl.sum(sum_ba, 0, keep_dims=True), tl.sum(sum_bb, 0, keep_dims=True)
        store_pairs(dbias_ptr + row, at, at_mask, half, sum_ba, sum_bb, HALF_LAYOUT, BLOCK_HALF)


@triton.jit
def _qk_norm_rope_bwd_kernel(
    dq_out_ptr, dq_b, dq_s, dq_h, q_ptr, q_b, q_s, q_h, dq_ptr, q_weight_ptr, dq_weight_ptr, dq_bias_ptr,
    dk_out_ptr, dk_b, dk_s, dk_h, k_ptr, k_b, k_s, k_h, dk_ptr, k_weight_ptr, dk_weight_ptr, dk_bias_ptr,
    cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
    q_all, k_all, q_tokens, k_tokens, q_heads, k_heads, head_dim, start, stop, eps,
    NORM: tl.constexpr, LAYER: tl.constexpr, HALF_LAYOUT: tl.constexpr, TABLE_HEADS: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i = pid // 2
    if pid % 2 == 0:
        blocks = tl.cdiv(q_heads, Q_BLOCK)
        if i < tl.cdiv(q_all, CHUNK) * blocks:
            _chunk_of_tokens(
                dq_out_ptr, dq_b, dq_s, dq_h, q_ptr, q_b, q_s, q_h, dq_ptr, q_weight_ptr, dq_weight_ptr, dq_bias_ptr,
                cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
                i // blocks, i % blocks, q_all, q_tokens, q_heads, head_dim, start, stop, eps,
                NORM, LAYER, HALF_LAYOUT, TABLE_HEADS, Q_BLOCK, BLOCK_HALF, CHUNK,
            )  # fmt: skip
    else:
        blocks = tl.cdiv(k_heads, K_BLOCK)
        if i < tl.cdiv(k_all, CHUNK) * blocks:
            _chunk_of_tokens(
                dk_out_ptr, dk_b, dk_s, dk_h, k_ptr, k_b, k_s, k_h, dk_ptr, k_weight_ptr, dk_weight_ptr, dk_bias_ptr,
                cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
                i // blocks, i % blocks, k_all, k_tokens, k_heads, head_dim, start, stop, eps,
                NORM, LAYER, HALF_LAYOUT, TABLE_HEADS, K_BLOCK, BLOCK_HALF, CHUNK,
            )  # fmt: skip


def _sums(x: Tensor, vector: Tensor | None, wanted: bool, config: configs.Config, chunk: int) -> Tensor | None:
    """Room for one row of sums a program; None where no gradient is wanted."""
    if not wanted or vector is None:
        return None
    rows = cdiv(x.shape[0] * x.shape[1], chunk)
    if vector.numel() == x.shape[3] and config.block_heads < x.shape[2]:
        rows *= cdiv(x.shape[2], config.block_heads)
    return x.new_empty((rows, vector.numel()), dtype=torch.float32)


def qk_norm_rope_backward(
    grads: Sequence[Tensor | None],
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    norm_type: str,
    layout: str,
    rotary_start: int,
    rotary_stop: int,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """``impl="triton"`` of the backward op: gradients of (q, k, q_weight, k_weight, q_bias, k_bias) in ``needs``."""
    dy_q, dy_k = grads
    if dy_q is None or dy_k is None:
        raise UnsupportedError("qk_norm_rope_backward: impl 'triton' takes both gradients; use impl='reference'")
    refuse_float64("qk_norm_rope_backward", q, q_weight, k_weight, q_bias, k_bias)
    if q.shape[3] % 2:
        raise UnsupportedError(f"qk_norm_rope_backward: impl 'triton' has no odd head_dim ({q.shape[3]})")
    arch, whole_row, chunk = arch_for(q), norm == "across_heads", configs.tokens_per_chunk(arch_for(q))
    shape = {
        "op": "qk_norm_rope_backward",
        "head_dim": q.shape[3],
        "whole_row": whole_row,
        "itemsize": q.element_size(),
    }
    q_config, k_config = (configs.select(arch, heads=x.shape[2], **shape) for x in (q, k))
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    q_sums = [_sums(q, v, need, q_config, chunk) for v, need in ((q_weight, needs[2]), (q_bias, needs[4]))]
    k_sums = [_sums(k, v, need, k_config, chunk) for v, need in ((k_weight, needs[3]), (k_bias, needs[5]))]
    cos, sin = four_dims(cos), four_dims(sin)
    dy_q, dy_k = unit_stride(dy_q), unit_stride(dy_k)
    programs = [
        cdiv(x.shape[0] * x.shape[1], chunk) * cdiv(x.shape[2], config.block_heads)
        for x, config in ((q, q_config), (k, k_config))
    ]
    constants: dict[str, Any] = {
        "NORM": ("none", "per_head", "across_heads").index(norm),
        "LAYER": norm_type == "layer",
        "HALF_LAYOUT": layout == "half",
        "TABLE_HEADS": cos is not None and sin is not None and max(cos.shape[2], sin.shape[2]) > 1,
    }
    if max(programs) and q.shape[3]:
        with on_device(q):
            _qk_norm_rope_bwd_kernel[(2 * max(programs),)](
                dy_q, *dy_q.stride()[:3], q, *q.stride()[:3], dq, q_weight, *q_sums,
                dy_k, *dy_k.stride()[:3], k, *k.stride()[:3], dk, k_weight, *k_sums,
                cos, *table_strides(cos), sin, *table_strides(sin),
                q.shape[0] * q.shape[1], k.shape[0] * k.shape[1], q.shape[1], k.shape[1], q.shape[2], k.shape[2],
                q.shape[3], rotary_start, q.shape[1] if rotary_stop < 0 else rotary_stop, eps, **constants,
                Q_BLOCK=q_config.block_heads, K_BLOCK=k_config.block_heads, BLOCK_HALF=q_config.block_half, CHUNK=chunk,
                # Twice the forward's: the sums are as many registers again.
                num_warps=min(16, 2 * max(q_config.num_warps, k_config.num_warps)),
            )  # fmt: skip
    every: list[tuple[Tensor | None, Tensor | None]] = [
        (dq, q), (dk, k), (q_sums[0], q_weight), (k_sums[0], k_weight), (q_sums[1], q_bias), (k_sums[1], k_bias),
    ]  # fmt: skip
    out = []
    for (value, like), need in zip(every, needs, strict=True):
        if need and value is not None and like is not None:
            # Added in a fixed order: the same gradient every time.
            out.append(value if value.dim() == 4 else value.sum(0).to(like.dtype))
    return out
