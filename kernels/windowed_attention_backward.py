"""Backward of spacetime_attention, dense (a window as large as the grid) and windowed: no atomics, fixed order.

    P = exp(scale·q·k - lse),   dv = Pᵀ·do,   ds = P ∘ (do·vᵀ - delta),   dq = scale·ds·k,   dk = scale·dsᵀ·q

with ``delta = Σ do·o - dlse`` a row. One kernel holds a box of queries and walks the keys it sees (dq); the other holds
a box of keys and walks the queries that see it, over all the heads of its group (dk, dv).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs.windowed_attention import select_backward

from .boxes import axis_bits, axis_span, axis_window, box_tokens, place_bits, stride_unit, whole_grid
from .launch import cdiv, on_device, unit_stride
from .windowed_attention import check_reach, head_window, window_table

_SIZES = [
    "s", "heads", "group", "t", "h", "w", "tiles_t", "tiles_h", "tiles_w", "text_tiles", "video_start", "text_start",
    "text_len", "window_t", "window_h", "window_w", "stride_t", "stride_h", "stride_w",
]  # fmt: skip


@triton.jit
def _delta_kernel(o_ptr, do_ptr, dlse_ptr, delta_ptr, s, heads, do_b, do_s, do_h, D: tl.constexpr,
                  HAS_DLSE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """``delta [B, heads, S]`` of ``ROWS`` tokens of one head."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < s)[:, None] & (cols < D)[None, :]
    o = tl.load(o_ptr + ((batch * s + rows) * heads + head)[:, None] * D + cols[None, :], mask=mask, other=0.0)
    do = tl.load(
        do_ptr + batch * do_b + rows[:, None] * do_s + tl.cast(head, tl.int64) * do_h + cols[None, :],
        mask=mask,
        other=0.0,
    )
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = (batch * heads + head) * s + rows
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + at, mask=rows < s, other=0.0)
    tl.store(delta_ptr + at, delta, mask=rows < s)


@triton.jit
def _weights(scores, seen, base, scale):
    """exp(scale·score - base) where seen, 0 elsewhere.

    Subtracted before the change to base 2: at logits of 60 two products with log2(e) would differ by 40 roundings.
    """
    return tl.where(seen, tl.exp(scores * scale - base), 0.0)


@triton.jit
def _base(lse):
    """What a row's scores are measured from; one that saw nothing has an lse of -inf."""
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit(do_not_specialize=_SIZES)
def _windowed_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, lens_ptr, window_ptr,
    s, heads, group, t, h, w, tiles_t, tiles_h, tiles_w, text_tiles, video_start, text_start, text_len,
    window_t, window_h, window_w, stride_t, stride_h, stride_w, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h,
    D: tl.constexpr, UNIT: tl.constexpr, TEXT: tl.constexpr, LENS: tl.constexpr, CAUSAL: tl.constexpr,
    PER_HEAD: tl.constexpr,
    QT: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = KT * KH * KW
    tiles = tiles_t * tiles_h * tiles_w + text_tiles
    pid = tl.program_id(0)
    window_t, window_h, window_w, head = head_window(
        window_ptr, pid // tiles % heads, window_t, window_h, window_w, PER_HEAD
    )
    batch = (pid // tiles // heads).to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    is_text, at_t, at_h, at_w, inside, valid, row = box_tokens(
        pid % tiles, text_tiles, tiles_h, tiles_w, t, h, w, video_start, text_start, text_len, QT, QH, QW
    )
    q_b, q_s, q_h = tl.cast(q_b, tl.int64) * UNIT, q_s * UNIT, tl.cast(q_h, tl.int64) * UNIT
    k_b, k_s, k_h = tl.cast(k_b, tl.int64) * UNIT, k_s * UNIT, tl.cast(k_h, tl.int64) * UNIT
    v_b, v_s, v_h = tl.cast(v_b, tl.int64) * UNIT, v_s * UNIT, tl.cast(v_h, tl.int64) * UNIT
    do_b, do_s, do_h = tl.cast(do_b, tl.int64) * UNIT, do_s * UNIT, tl.cast(do_h, tl.int64) * UNIT
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < D
    mask = valid[:, None] & col_mask[None, :]
    q = tl.load(
        q_ptr + batch * q_b + head.to(tl.int64) * q_h + row[:, None] * q_s + cols[None, :], mask=mask, other=0.0
    )
    do = tl.load(
        do_ptr + batch * do_b + head.to(tl.int64) * do_h + row[:, None] * do_s + cols[None, :], mask=mask, other=0.0
    )
    k_head, v_head = k_ptr + batch * k_b + kv_head * k_h, v_ptr + batch * v_b + kv_head * v_h
    stat = (batch * heads + head) * s + row
    base = _base(tl.load(lse_ptr + stat, mask=valid, other=0.0))
    delta = tl.load(delta_ptr + stat, mask=valid, other=0.0)

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
    acc = tl.zeros([QT * QH * QW, BLOCK_D], tl.float32)
    steps_t, steps_h, steps_w = tl.cdiv(high_t - low_t, KT), tl.cdiv(high_h - low_h, KH), tl.cdiv(high_w - low_w, KW)
    for i in tl.range(0, steps_t * steps_h * steps_w):
        from_t = low_t + i // (steps_h * steps_w) * KT
        from_h = low_h + i // steps_w % steps_h * KH
        from_w = low_w + i % steps_w * KW
        origin = (video_start + (from_t * h + from_h) * w + from_w).to(tl.int64)
        real = (from_t + key_t < high_t) & (from_h + key_h < high_h) & (from_w + key_w < high_w)
        load = real[:, None] & col_mask[None, :]
        k = tl.load(k_head + origin * k_s + local[:, None] * k_s + cols[None, :], mask=load, other=0.0)
        v = tl.load(v_head + origin * v_s + local[:, None] * v_s + cols[None, :], mask=load, other=0.0)
        bits = (
            axis_bits(first_t, last_t, from_t, is_text, KT, 0)
            | axis_bits(first_h, last_h, from_h, is_text, KH, KT)
            | axis_bits(first_w, last_w, from_w, is_text, KW, KT + KH)
        )
        seen = ((bits[:, None] & wanted[None, :]) == wanted[None, :]) & real[None, :]
        weights = _weights(tl.dot(q, k.T, input_precision="ieee"), seen, base[:, None], scale)
        ds = weights * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    if TEXT:
        keys = text_len
        if LENS:
            keys = tl.minimum(tl.maximum(tl.load(lens_ptr + batch), 0), text_len).to(tl.int32)
        for j in tl.range(0, keys, BLOCK_N):
            real_text = j + n < keys
            line_text = (text_start + j + n).to(tl.int64)
            load_text = real_text[:, None] & col_mask[None, :]
            k = tl.load(k_head + line_text[:, None] * k_s + cols[None, :], mask=load_text, other=0.0)
            v = tl.load(v_head + line_text[:, None] * v_s + cols[None, :], mask=load_text, other=0.0)
            weights = _weights(tl.dot(q, k.T, input_precision="ieee"), real_text[None, :], base[:, None], scale)
            ds = weights * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    dq_tile = dq_ptr + ((batch * s + row) * heads + head)[:, None] * D + cols[None, :]
    tl.store(dq_tile, (acc * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _seen_by(low, high, length, window, stride, CAUSAL: tl.constexpr, AXIS: tl.constexpr):
    """Queries along an axis that see some key of ``[low, high]``: first and one past the last. Windows only move on."""
    i = tl.arange(0, AXIS)
    first, last = axis_window(i, length, window, stride, CAUSAL)
    start = tl.sum(((i < length) & (last < low)).to(tl.int32), 0)
    stop = tl.sum(((i < length) & (first <= high)).to(tl.int32), 0)
    return start, stop


@triton.jit(do_not_specialize=_SIZES)
def _windowed_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, lens_ptr, window_ptr,
    s, heads, group, t, h, w, tiles_t, tiles_h, tiles_w, text_tiles, video_start, text_start, text_len,
    window_t, window_h, window_w, stride_t, stride_h, stride_w, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h,
    D: tl.constexpr, UNIT: tl.constexpr, TEXT: tl.constexpr, LENS: tl.constexpr, CAUSAL: tl.constexpr,
    PER_HEAD: tl.constexpr, AXIS_T: tl.constexpr, AXIS_H: tl.constexpr, AXIS_W: tl.constexpr,
    QT: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = QT * QH * QW
    tiles = tiles_t * tiles_h * tiles_w + text_tiles
    kv_heads = heads // group
    pid = tl.program_id(0)
    tile = pid % tiles
    kv_head = pid // tiles % kv_heads
    batch = (pid // tiles // kv_heads).to(tl.int64)
    is_text, at_t, at_h, at_w, _inside, valid, row = box_tokens(
        tile, text_tiles, tiles_h, tiles_w, t, h, w, video_start, text_start, text_len, KT, KH, KW
    )
    visible = valid
    if LENS:
        lens = tl.minimum(tl.maximum(tl.load(lens_ptr + batch), 0), text_len).to(tl.int32)
        visible &= tl.where(is_text, row - text_start < lens, True)
    q_b, q_s, q_h = tl.cast(q_b, tl.int64) * UNIT, q_s * UNIT, tl.cast(q_h, tl.int64) * UNIT
    k_b, k_s, k_h = tl.cast(k_b, tl.int64) * UNIT, k_s * UNIT, tl.cast(k_h, tl.int64) * UNIT
    v_b, v_s, v_h = tl.cast(v_b, tl.int64) * UNIT, v_s * UNIT, tl.cast(v_h, tl.int64) * UNIT
    do_b, do_s, do_h = tl.cast(do_b, tl.int64) * UNIT, do_s * UNIT, tl.cast(do_h, tl.int64) * UNIT
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < D
    # Padding text may hold anything: it is not read.
    load_keys = visible[:, None] & col_mask[None, :]
    head_of_k = kv_head.to(tl.int64)
    k = tl.load(k_ptr + batch * k_b + head_of_k * k_h + row[:, None] * k_s + cols[None, :], mask=load_keys, other=0.0)
    v = tl.load(v_ptr + batch * v_b + head_of_k * v_h + row[:, None] * v_s + cols[None, :], mask=load_keys, other=0.0)
    # The box of keys: where it begins, and the last place of it that is real.
    from_t, from_h, from_w = tl.min(at_t, 0), tl.min(at_h, 0), tl.min(at_w, 0)
    till_t = tl.minimum(from_t + KT, t) - 1
    till_h = tl.minimum(from_h + KH, h) - 1
    till_w = tl.minimum(from_w + KW, w) - 1
    n = tl.arange(0, KT * KH * KW)
    wanted = place_bits(n, KT, KH, KW)
    m = tl.arange(0, BLOCK_M)
    in_t, in_h, in_w = m // (QH * QW), m // QW % QH, m % QW
    dk = tl.zeros([KT * KH * KW, BLOCK_D], tl.float32)
    dv = tl.zeros([KT * KH * KW, BLOCK_D], tl.float32)
    text_runs = tl.cdiv(text_len, BLOCK_M)
    # A box of padding text has nothing to add.
    some = tl.max(visible.to(tl.int32), 0)
    for member in tl.range(0, group):
        head = kv_head * group + member
        if PER_HEAD:
            # The table is sorted by window; its second half says where a head is in it.
            rank = tl.load(window_ptr + heads * 4 + head)
        else:
            rank = head
        size_t, size_h, size_w, _ = head_window(window_ptr, rank, window_t, window_h, window_w, PER_HEAD)
        start_t, stop_t = _seen_by(from_t, till_t, t, size_t, stride_t, CAUSAL, AXIS_T)
        start_h, stop_h = _seen_by(from_h, till_h, h, size_h, stride_h, False, AXIS_H)
        start_w, stop_w = _seen_by(from_w, till_w, w, size_w, stride_w, False, AXIS_W)
        # Text keys are seen by every query.
        start_t, stop_t = tl.where(is_text, 0, start_t), tl.where(is_text, t, stop_t)
        start_h, stop_h = tl.where(is_text, 0, start_h), tl.where(is_text, h, stop_h)
        start_w, stop_w = tl.where(is_text, 0, start_w), tl.where(is_text, w, stop_w)
        steps_t, steps_h = tl.cdiv(stop_t - start_t, QT), tl.cdiv(stop_h - start_h, QH)
        steps_w = tl.cdiv(stop_w - start_w, QW)
        q_head = q_ptr + batch * q_b + head.to(tl.int64) * q_h
        do_head = do_ptr + batch * do_b + head.to(tl.int64) * do_h
        stats = (batch * heads + head) * s
        # Boxes of video queries first, then runs of text queries, which see everything.
        boxes = steps_t * steps_h * steps_w
        for i in tl.range(0, (boxes + text_runs) * some, disable_licm=True):
            by_text = i >= boxes
            query_t = start_t + i // (steps_h * steps_w) * QT + in_t
            query_h = start_h + i // steps_w % steps_h * QH + in_h
            query_w = start_w + i % steps_w * QW + in_w
            line = (i - boxes) * BLOCK_M + m
            real = tl.where(by_text, line < text_len, (query_t < stop_t) & (query_h < stop_h) & (query_w < stop_w))
            at = tl.where(by_text, text_start + line, video_start + (query_t * h + query_h) * w + query_w).to(tl.int64)
            load = real[:, None] & col_mask[None, :]
            q = tl.load(q_head + at[:, None] * q_s + cols[None, :], mask=load, other=0.0)
            do = tl.load(do_head + at[:, None] * do_s + cols[None, :], mask=load, other=0.0)
            base = _base(tl.load(lse_ptr + stats + at, mask=real, other=0.0))
            delta = tl.load(delta_ptr + stats + at, mask=real, other=0.0)
            first_t, last_t = axis_window(query_t, t, size_t, stride_t, CAUSAL)
            first_h, last_h = axis_window(query_h, h, size_h, stride_h, False)
            first_w, last_w = axis_window(query_w, w, size_w, stride_w, False)
            everything = by_text | is_text
            bits = (
                axis_bits(first_t, last_t, from_t, everything, KT, 0)
                | axis_bits(first_h, last_h, from_h, everything, KH, KT)
                | axis_bits(first_w, last_w, from_w, everything, KW, KT + KH)
            )
            bits = tl.where(real, bits, 0)
            seen = ((wanted[:, None] & bits[None, :]) == wanted[:, None]) & visible[:, None]
            weights = _weights(tl.dot(k, q.T, input_precision="ieee"), seen, base[None, :], scale)
            dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
            ds = weights * (tl.dot(v, do.T, input_precision="ieee") - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    at = ((batch * s + row) * kv_heads + kv_head)[:, None] * D + cols[None, :]
    mask = valid[:, None] & col_mask[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def windowed_attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window: Sequence[int] | None,
    stride: Sequence[int],
    causal_time: bool,
    text_len: int,
    text_side: str,
    kv_lens: Tensor | None,
    scale: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Those of ``(dq, dk, dv)`` that are in ``needs``, contiguous, in the dtype of the inputs."""
    b, s, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    do = unit_stride(do)
    size = whole_grid(grid)
    key = {"op": "spacetime_attention_backward", "head_dim": head_dim, "itemsize": q.element_size(),
           "t": size[0], "h": size[1], "w": size[2]}  # fmt: skip
    # Both, needed or not: what cannot run is refused the same, whichever gradient is wanted.
    configs = {of: select_backward(arch_for(q), of=of, **key) for of in ("dq", "dkv")}
    for config in configs.values():
        check_reach(config, size, q, k, v, do)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    wanted = [x for x, need in zip((dq, dk, dv), needs, strict=True) if need]
    if not q.numel():
        return wanted
    table, shared_window = window_table(window, heads, size, q.device)
    video_start, text_start = (text_len, 0) if text_side == "prefix" else (0, math.prod(size))
    tensors = (q, k, v, do)
    unit = stride_unit(*tensors)
    strides = [step // unit for x in tensors for step in x.stride()[:3]]
    delta = q.new_empty((b, heads, s), dtype=torch.float32)
    with on_device(q):
        rows = 16 if arch_for(q) == "cpu" else 64
        _delta_kernel[(cdiv(s, rows), heads, b)](
            out, do, dlse, delta, s, heads, *do.stride()[:3], head_dim, dlse is not None, rows, configs["dq"].block_d
        )
        for kernel, of, results, count in (
            (_windowed_attention_bwd_dq_kernel, "dq", (dq,), heads),
            (_windowed_attention_bwd_dkv_kernel, "dkv", (dk, dv), kv_heads),
        ):
            if not (needs[0] if of == "dq" else needs[1] or needs[2]):
                continue
            config = configs[of]
            box = config.query if of == "dq" else config.key
            tiles = [cdiv(n, side) for n, side in zip(size, box, strict=True)]
            text_tiles = cdiv(text_len, math.prod(box))
            axes = [] if of == "dq" else [max(2, 1 << (n - 1).bit_length()) for n in size]
            kernel[((math.prod(tiles) + text_tiles) * b * count,)](
                q, k, v, do, lse, delta, *results, kv_lens, table,
                s, heads, heads // kv_heads, *size, *tiles, text_tiles, video_start, text_start, text_len,
                *shared_window, *stride, scale, *strides,
                head_dim, unit, text_len > 0, kv_lens is not None, causal_time, table is not None, *axes,
                *config.query, *config.key, config.block_d,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
    return wanted
