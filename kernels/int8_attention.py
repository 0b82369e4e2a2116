"""Attention over int8 or e4m3 queries and keys, dense or over windows of the grid; values in their own dtype.

Products of int8 codes are exact in int32; those of e4m3 codes are summed as the card sums them. A key's scale is one
multiplication a score; a query's is a factor of its whole row, which rides in the softmax's FMA. Two variants of each
kernel: keys and values moved by tensor descriptors (TMA) or by pointers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs.int8_attention import has_e4m3, select, select_windowed
from pyvideo_kernels.configs.spacetime_attention import AttentionConfig
from pyvideo_kernels.configs.windowed_attention import WindowConfig
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.ops.spacetime_attention import sees_all

from .boxes import (
    addressable,
    axis_bits,
    axis_span,
    axis_window,
    box_descriptor,
    box_tokens,
    place_bits,
    stride_unit,
    whole_grid,
)
from .launch import cdiv, on_device, refuse_float64
from .spacetime_attention import _key_tiles, _program, _tail, _tile_start
from .windowed_attention import head_window, window_table

# Which text keys count (constexpr TEXT): all; the first kv_lens[b], text after the video; the same, text before it.
_ALL, _SUFFIX, _PREFIX = 0, 1, 2

# Sizes are not specialised: a new grid, window or text length never compiles again.
_SIZES = ["s", "tiles", "head_stop", "body_start", "body_stop", "text_len"]
_WINDOW_SIZES = [
    "s", "heads", "group", "t", "h", "w", "tiles_t", "tiles_h", "tiles_w", "text_tiles", "video_start", "text_start",
    "text_len", "window_t", "window_h", "window_w", "stride_t", "stride_h", "stride_w",
]  # fmt: skip


@triton.jit
def _products(q, k, values: tl.constexpr):
    """Products of codes, as fp32."""
    if q.dtype == tl.int8:
        return tl.dot(q, k.T, out_dtype=tl.int32).to(tl.float32)
    elif values == tl.float32:
        # fp16 holds e4m3 exactly. sm_90 keeps some 14 bits of a sum of fp8 products: not enough for fp32 values.
        return tl.dot(q.to(tl.float16), k.to(tl.float16).T)
    else:
        return tl.dot(q, k.T)


@triton.jit
def _soften_rows(scores, acc, top, total, factor, MASKED: tl.constexpr):
    """`softmax.soften` with a factor of each row's own, base 2 included; ``MASKED``: a row may have seen no key yet."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = new_top
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * factor[:, None] - (base * factor)[:, None])
    decay = tl.exp2((top - base) * factor)
    return weights, acc * decay[:, None], new_top, total * decay + tl.sum(weights, 1)


@triton.jit
def _finish_rows(acc, top, total, factor):
    """Normalised rows and their natural-log LSE; zeros and -inf where no key was seen, NaN where one was."""
    divisor = tl.where(total == 0, 1.0, total)
    lse = top * (factor * 0.6931471805599453) + tl.log(divisor)
    return acc / divisor[:, None], tl.where(total == 0, float("-inf"), lse)


@triton.jit(do_not_specialize=_SIZES)
def _int8_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, shift_ptr, o_ptr, lse_ptr, lens_ptr, k_desc, v_desc,
    s, heads, group, tiles, head_stop, body_start, body_stop, text_len, scale, scale_log2,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    D: tl.constexpr, UNIT: tl.constexpr, V_UNIT: tl.constexpr, TEXT: tl.constexpr, HAS_LSE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, batch, head, kv_head = _program(tiles, heads, group)
    # Strides come in units: multiplying here says how wide a vector is aligned (boxes.stride_unit).
    q_b, q_s, q_h = tl.cast(q_b, tl.int64) * UNIT, q_s * UNIT, tl.cast(q_h, tl.int64) * UNIT
    k_b, k_s, k_h = tl.cast(k_b, tl.int64) * UNIT, k_s * UNIT, tl.cast(k_h, tl.int64) * UNIT
    v_b, v_s, v_h = tl.cast(v_b, tl.int64) * V_UNIT, v_s * V_UNIT, tl.cast(v_h, tl.int64) * V_UNIT
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < D
    keys = tl.arange(0, BLOCK_N)
    queries = tl.arange(0, BLOCK_M)
    first = (tile * BLOCK_M).to(tl.int64)
    row_mask = first + queries < s
    q_tile = q_ptr + batch * q_b + first * q_s + head * q_h
    q = tl.load(q_tile + queries[:, None] * q_s + cols[None, :], mask=row_mask[:, None] & col_mask[None, :], other=0.0)
    row_scale = tl.load(q_scale_ptr + (batch * heads + head) * s + first + queries, mask=row_mask, other=1.0)
    factor = row_scale * scale_log2
    k_head = k_ptr + batch * k_b + kv_head * k_h
    v_head = v_ptr + batch * v_b + kv_head * v_h
    k_scale_head = k_scale_ptr + (batch * (heads // group) + kv_head) * s
    box = batch.to(tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    head_stop, body_stop, head_tiles, body_tiles, first_tail, last_tail = _key_tiles(
        batch, lens_ptr, head_stop, body_start, body_stop, text_len, TEXT, BLOCK_N
    )
    for i in tl.range(0, head_tiles + body_tiles, disable_licm=True):
        n = _tile_start(i, head_tiles, body_start, BLOCK_N)
        far = tl.cast(n, tl.int64)
        if DESCRIPTORS:
            k = k_desc.load([box, n, kv_head, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            k = tl.load(
                k_head + far * k_s + keys[:, None] * k_s + cols[None, :],
                mask=None if D == BLOCK_D else col_mask[None, :], other=None if D == BLOCK_D else 0.0,
            )  # fmt: skip
        key_scale = tl.load(k_scale_head + n + keys)
        scores = _products(q, k, v_ptr.dtype.element_ty) * key_scale[None, :]
        weights, acc, top, total = _soften_rows(scores, acc, top, total, factor, False)
        if DESCRIPTORS:
            v = v_desc.load([box, n, kv_head, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            v = tl.load(
                v_head + far * v_s + keys[:, None] * v_s + cols[None, :],
                mask=None if D == BLOCK_D else col_mask[None, :], other=None if D == BLOCK_D else 0.0,
            )  # fmt: skip
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    for i in tl.range(first_tail, last_tail, num_stages=1, disable_licm=True):
        n, count = _tail(i, head_stop, head_tiles, body_start, body_stop, body_tiles, BLOCK_N)
        seen = keys < count
        far = tl.cast(n, tl.int64)
        if DESCRIPTORS:
            k = k_desc.load([box, n, kv_head, 0]).reshape(BLOCK_N, BLOCK_D)
            v = v_desc.load([box, n, kv_head, 0]).reshape(BLOCK_N, BLOCK_D)
            if TEXT != 0:
                # Padding text may hold anything, and 0 times NaN is NaN; rows past S come as zeros.
                v = tl.where(seen[:, None], v, 0.0)
        else:
            inside = seen[:, None] & col_mask[None, :]
            k = tl.load(k_head + far * k_s + keys[:, None] * k_s + cols[None, :], mask=inside, other=0.0)
            v = tl.load(v_head + far * v_s + keys[:, None] * v_s + cols[None, :], mask=inside, other=0.0)
        key_scale = tl.load(k_scale_head + n + keys, mask=seen, other=0.0)
        scores = _products(q, k, v_ptr.dtype.element_ty) * key_scale[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        weights, acc, top, total = _soften_rows(scores, acc, top, total, factor, False)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    out, lse = _finish_rows(acc, top, total, factor)
    o_tile = o_ptr + ((batch * s + first) * heads + head) * D
    o_tile += queries[:, None] * (heads * D) + cols[None, :]
    tl.store(o_tile, out.to(o_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])
    if HAS_LSE:
        line = (batch * heads + head) * s + first + queries
        if shift_ptr is not None:
            lse += tl.load(shift_ptr + line, mask=row_mask, other=0.0) * scale
        tl.store(lse_ptr + line, lse, mask=row_mask)


@triton.jit(do_not_specialize=_WINDOW_SIZES)
def _int8_windowed_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, shift_ptr, o_ptr, lse_ptr, lens_ptr, window_ptr, k_desc, v_desc,
    s, heads, group, t, h, w, tiles_t, tiles_h, tiles_w, text_tiles, video_start, text_start, text_len,
    window_t, window_h, window_w, stride_t, stride_h, stride_w, scale, scale_log2,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    D: tl.constexpr, UNIT: tl.constexpr, V_UNIT: tl.constexpr, TEXT: tl.constexpr, LENS: tl.constexpr,
    CAUSAL: tl.constexpr, PER_HEAD: tl.constexpr, HAS_LSE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    QT: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The box walk of windowed_attention.py: see there."""
    BLOCK_M: tl.constexpr = QT * QH * QW
    BLOCK_N: tl.constexpr = KT * KH * KW
    tiles = tiles_t * tiles_h * tiles_w + text_tiles
    pid = tl.program_id(0)
    window_t, window_h, window_w, head = head_window(
        window_ptr, pid // tiles % heads, window_t, window_h, window_w, PER_HEAD
    )
    batch = (pid // tiles // heads).to(tl.int64)
    kv_head = head // group
    is_text, at_t, at_h, at_w, inside, valid, row = box_tokens(
        pid % tiles, text_tiles, tiles_h, tiles_w, t, h, w, video_start, text_start, text_len, QT, QH, QW
    )
    q_b, q_s, q_h = tl.cast(q_b, tl.int64) * UNIT, tl.cast(q_s, tl.int64) * UNIT, tl.cast(q_h, tl.int64) * UNIT
    k_b, k_s, k_h = tl.cast(k_b, tl.int64) * UNIT, k_s * UNIT, tl.cast(k_h, tl.int64) * UNIT
    v_b, v_s, v_h = tl.cast(v_b, tl.int64) * V_UNIT, v_s * V_UNIT, tl.cast(v_h, tl.int64) * V_UNIT
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < D
    q_tile = q_ptr + batch * q_b + head.to(tl.int64) * q_h
    q = tl.load(q_tile + row[:, None] * q_s + cols[None, :], mask=valid[:, None] & col_mask[None, :], other=0.0)
    line = (batch * heads + head) * s + row
    factor = tl.load(q_scale_ptr + line, mask=valid, other=1.0) * scale_log2
    shift = tl.zeros([BLOCK_M], tl.float32)
    if HAS_LSE and shift_ptr is not None:
        # Now: a pointer kept for later is two scalar registers, of which gfx9 has too few.
        shift = tl.load(shift_ptr + line, mask=valid, other=0.0) * scale
    k_head = k_ptr + batch * k_b + kv_head.to(tl.int64) * k_h
    v_head = v_ptr + batch * v_b + kv_head.to(tl.int64) * v_h
    k_scale_head = k_scale_ptr + (batch * (heads // group) + kv_head) * s

    first_t, last_t = axis_window(at_t, t, window_t, stride_t, CAUSAL)
    first_h, last_h = axis_window(at_h, h, window_h, stride_h, False)
    first_w, last_w = axis_window(at_w, w, window_w, stride_w, False)
    low_t, high_t = axis_span(first_t, last_t, inside, is_text, t)
    low_h, high_h = axis_span(first_h, last_h, inside, is_text, h)
    low_w, high_w = axis_span(first_w, last_w, inside, is_text, w)

    n = tl.arange(0, BLOCK_N)
    key_t, key_h, key_w = n // (KH * KW), n // KW % KH, n % KW
    wanted = place_bits(n, KT, KH, KW)
    local = (key_t * h + key_h) * w + key_w

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    steps_t, steps_h, steps_w = tl.cdiv(high_t - low_t, KT), tl.cdiv(high_h - low_h, KH), tl.cdiv(high_w - low_w, KW)
    # disable_licm: what it hoists here ends in scalar registers that gfx9 does not have.
    for i in tl.range(0, steps_t * steps_h * steps_w, disable_licm=True):
        from_t = low_t + i // (steps_h * steps_w) * KT
        from_h = low_h + i // steps_w % steps_h * KH
        from_w = low_w + i % steps_w * KW
        origin = (video_start + (from_t * h + from_h) * w + from_w).to(tl.int64)
        # Past the edge lies another key, which is not asked for, or nothing.
        place = tl.minimum(local, (s - 1 - origin).to(tl.int32))
        if DESCRIPTORS:
            where = kv_head * D
            k = k_desc.load([batch.to(tl.int32), from_t, from_h, from_w, where]).reshape(BLOCK_N, BLOCK_D)
        else:
            k = tl.load(
                k_head + origin * k_s + place[:, None] * k_s + cols[None, :],
                mask=None if D == BLOCK_D else col_mask[None, :], other=None if D == BLOCK_D else 0.0,
            )  # fmt: skip
        key_scale = tl.load(k_scale_head + origin + place)
        seen = (
            axis_bits(first_t, last_t, from_t, is_text, KT, 0)
            | axis_bits(first_h, last_h, from_h, is_text, KH, KT)
            | axis_bits(first_w, last_w, from_w, is_text, KW, KT + KH)
        )
        # No query sees a key past the edge, be it text: such a key asks for the sign bit too, which no word has. In
        # arithmetic, the sign of what is left to the edge: masks would fill the scalar registers of gfx9.
        left = (high_t - 1 - from_t - key_t) | (high_h - 1 - from_h - key_h) | (high_w - 1 - from_w - key_w)
        asked = wanted | (left & -2147483648)
        scores = _products(q, k, v_ptr.dtype.element_ty) * key_scale[None, :]
        scores = tl.where((seen[:, None] & asked[None, :]) == asked[None, :], scores, float("-inf"))
        weights, acc, top, total = _soften_rows(scores, acc, top, total, factor, True)
        if DESCRIPTORS:
            v = v_desc.load([batch.to(tl.int32), from_t, from_h, from_w, where]).reshape(BLOCK_N, BLOCK_D)
        else:
            real = (from_t + key_t < high_t) & (from_h + key_h < high_h) & (from_w + key_w < high_w)
            v = tl.load(
                v_head + origin * v_s + local[:, None] * v_s + cols[None, :],
                mask=real[:, None] & col_mask[None, :], other=0.0,
            )  # fmt: skip
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")

    if TEXT:
        keys = text_len
        if LENS:
            keys = tl.minimum(tl.maximum(tl.load(lens_ptr + batch), 0), text_len).to(tl.int32)
        for j in tl.range(0, keys, BLOCK_N, disable_licm=True):
            real_text = j + n < keys
            line_text = (text_start + j + n).to(tl.int64)
            load_text = real_text[:, None] & col_mask[None, :]
            k = tl.load(k_head + line_text[:, None] * k_s + cols[None, :], mask=load_text, other=0.0)
            text_scale = tl.load(k_scale_head + line_text, mask=real_text, other=0.0)
            scores = _products(q, k, v_ptr.dtype.element_ty) * text_scale[None, :]
            scores = tl.where(real_text[None, :], scores, float("-inf"))
            weights, acc, top, total = _soften_rows(scores, acc, top, total, factor, True)
            v = tl.load(v_head + line_text[:, None] * v_s + cols[None, :], mask=load_text, other=0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")

    out, lse = _finish_rows(acc, top, total, factor)
    o_tile = o_ptr + ((batch * s + row) * heads + head)[:, None] * D + cols[None, :]
    tl.store(o_tile, out.to(o_ptr.dtype.element_ty), mask=valid[:, None] & col_mask[None, :])
    if HAS_LSE:
        tl.store(lse_ptr + line, lse + shift, mask=valid)


def _tile_descriptor(x: Tensor, config: AttentionConfig) -> TensorDescriptor:
    """``[B, S, heads, D]`` in boxes of ``block_n`` tokens of one head."""
    # The stride of a dimension of size 1 is arbitrary, and may be one that a descriptor refuses.
    strides = [stride if size > 1 else 16 for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, config.block_n, 1, config.block_d])


def _launch_dense(
    tensors: tuple[Tensor | None, ...], kv_lens: Tensor | None, text_len: int, text_side: str, scale: float,
    config: AttentionConfig,
) -> None:  # fmt: skip
    q8, k8, v = (x for x in tensors[:3] if x is not None)
    b, s, heads, head_dim = q8.shape
    tiles = cdiv(s, config.block_m)
    text = _ALL if kv_lens is None else _PREFIX if text_side == "prefix" else _SUFFIX
    unit, v_unit = stride_unit(q8, k8), stride_unit(v)
    with on_device(v):
        k_desc = v_desc = None
        if config.descriptors:
            k_desc, v_desc = (_tile_descriptor(x, config) for x in (k8, v))
        _int8_attention_fwd_kernel[(tiles * b * heads,)](
            *tensors, kv_lens, k_desc, v_desc,
            s, heads, heads // k8.shape[2], tiles, 0, text_len if text == _PREFIX else 0, s, text_len,
            scale, scale * math.log2(math.e),
            *(step // unit for x in (q8, k8) for step in x.stride()[:3]), *(step // v_unit for step in v.stride()[:3]),
            head_dim, unit, v_unit, text, tensors[-1] is not None, config.descriptors,
            config.block_m, config.block_n, config.block_d,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def _launch_windowed(
    tensors: tuple[Tensor | None, ...], kv_lens: Tensor | None, grid: Sequence[int], window: Sequence[int] | None,
    stride: Sequence[int], causal_time: bool, text_len: int, text_side: str, scale: float, config: WindowConfig,
) -> None:  # fmt: skip
    q8, k8, v = (x for x in tensors[:3] if x is not None)
    b, s, heads, head_dim = q8.shape
    table, shared_window = window_table(window, heads, grid, q8.device)
    tiles = [cdiv(n, side) for n, side in zip(grid, config.query, strict=True)]
    text_tiles = cdiv(text_len, math.prod(config.query))
    video_start, text_start = (text_len, 0) if text_side == "prefix" else (0, math.prod(grid))
    unit, v_unit = stride_unit(q8, k8), stride_unit(v)
    with on_device(v):
        k_desc = v_desc = None
        if config.descriptors:
            k_desc, v_desc = (box_descriptor(x, grid, video_start, config.key, config.block_d) for x in (k8, v))
        _int8_windowed_attention_fwd_kernel[((math.prod(tiles) + text_tiles) * b * heads,)](
            *tensors, kv_lens, table, k_desc, v_desc,
            s, heads, heads // k8.shape[2], *grid, *tiles, text_tiles, video_start, text_start, text_len,
            *shared_window, *stride, scale, scale * math.log2(math.e),
            *(step // unit for x in (q8, k8) for step in x.stride()[:3]), *(step // v_unit for step in v.stride()[:3]),
            head_dim, unit, v_unit, text_len > 0, kv_lens is not None, causal_time, table is not None,
            tensors[-1] is not None, config.descriptors, *config.query, *config.key, config.block_d,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def int8_attention(
    q8: Tensor,
    k8: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    lse_shift: Tensor | None,
    grid: Sequence[int],
    window: Sequence[int] | None,
    stride: Sequence[int],
    causal_time: bool,
    text_len: int,
    text_side: str,
    kv_lens: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """``impl="triton"`` of the op, and of fp8_attention, by the dtype of the codes."""
    op = "int8_attention" if q8.dtype == torch.int8 else "fp8_attention"
    refuse_float64(op, v)
    if q8.dtype != torch.int8 and not has_e4m3(arch_for(v)):
        raise UnsupportedError(
            f"{op}: impl 'triton' needs matrix products of e4m3 (sm_89+, gfx950), {arch_for(v)} has none; use int8"
        )
    b, s, heads, head_dim = q8.shape
    out = v.new_empty((b, s, heads, head_dim))
    lse = v.new_empty((b, heads, s) if return_lse else (0,), dtype=torch.float32)
    size = whole_grid(grid)
    dense = sees_all(grid, window, causal_time)
    # A block wider than the head would read the next head's columns.
    whole = head_dim >= 32 and head_dim & (head_dim - 1) == 0
    aligned = whole and addressable(k8) and addressable(v) and size[0] > 0
    shape = {"head_dim": head_dim, "itemsize": v.element_size(), "aligned": aligned}
    config: AttentionConfig | WindowConfig
    if dense:
        config = select(arch_for(v), **shape)
        reach = max(config.block_m, config.block_n)
    else:
        config = select_windowed(arch_for(v), **shape, t=size[0], h=size[1], w=size[2])
        sides = [max(a, b) for a, b in zip(config.query, config.key, strict=True)]
        reach = (sides[0] * size[1] + sides[1]) * size[2] + sides[2]
    if max(x.stride(1) for x in (q8, k8, v)) * reach >= 2**31:
        raise UnsupportedError(f"{op}: impl 'triton' needs a tile of tokens within 2^31 elements")
    tensors = (q8, k8, v, q_scale, k_scale, lse_shift, out, lse if return_lse else None)
    if out.numel() and isinstance(config, AttentionConfig):
        _launch_dense(tensors, kv_lens, text_len, text_side, scale, config)
    elif out.numel():
        _launch_windowed(tensors, kv_lens, size, window, stride, causal_time, text_len, text_side, scale, config)
    return out, lse
