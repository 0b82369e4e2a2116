"""Attention of video tokens over windows of their (T, H, W) grid, text tokens in the same launch.

A program holds a box of neighbouring queries and walks the boxes of keys that any of them sees, in fp32 softmax as the
dense kernel does. Nothing is permuted or padded: boxes are addressed where they lie, by tensor descriptors (TMA, rank 5
over ``[B, T, H, W, heads·D]``, whose zero fill is the ragged edge) or by pointers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs.windowed_attention import WindowConfig, select
from pyvideo_kernels.errors import UnsupportedError

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
from .launch import cdiv, on_device
from .softmax import finish, soften

# Sizes are not specialised: a new grid, window or text length never compiles again.
_SIZES = [
    "s", "heads", "group", "t", "h", "w", "tiles_t", "tiles_h", "tiles_w", "text_tiles", "video_start", "text_start",
    "text_len", "window_t", "window_h", "window_w", "stride_t", "stride_h", "stride_w",
]  # fmt: skip


@triton.jit
def head_window(window_ptr, rank, window_t, window_h, window_w, PER_HEAD: tl.constexpr):
    """Window and head of the ``rank``-th head of a launch: its own of the table, or the one that all have."""
    head = rank
    if PER_HEAD:
        window_t, window_h = tl.load(window_ptr + rank * 4), tl.load(window_ptr + rank * 4 + 1)
        window_w, head = tl.load(window_ptr + rank * 4 + 2), tl.load(window_ptr + rank * 4 + 3)
    return window_t, window_h, window_w, head


@triton.jit(do_not_specialize=_SIZES)
def _windowed_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lens_ptr, window_ptr, k_desc, v_desc,
    s, heads, group, t, h, w, tiles_t, tiles_h, tiles_w, text_tiles, video_start, text_start, text_len,
    window_t, window_h, window_w, stride_t, stride_h, stride_w, scale, scale_log2,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    D: tl.constexpr, UNIT: tl.constexpr, TEXT: tl.constexpr, LENS: tl.constexpr, CAUSAL: tl.constexpr,
    PER_HEAD: tl.constexpr, HAS_LSE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    QT: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = QT * QH * QW
    BLOCK_N: tl.constexpr = KT * KH * KW
    tiles = tiles_t * tiles_h * tiles_w + text_tiles
    pid = tl.program_id(0)
    # Heads come in the order of their windows, largest first, so that the longest programs do not end the launch.
    window_t, window_h, window_w, head = head_window(
        window_ptr, pid // tiles % heads, window_t, window_h, window_w, PER_HEAD
    )
    batch = (pid // tiles // heads).to(tl.int64)
    kv_head = head // group
    # Text queries see everything: theirs are the longest programs, and come first.
    is_text, at_t, at_h, at_w, inside, valid, row = box_tokens(
        pid % tiles, text_tiles, tiles_h, tiles_w, t, h, w, video_start, text_start, text_len, QT, QH, QW
    )
    q_b, q_s, q_h = tl.cast(q_b, tl.int64) * UNIT, tl.cast(q_s, tl.int64) * UNIT, tl.cast(q_h, tl.int64) * UNIT
    k_b, k_s, k_h = tl.cast(k_b, tl.int64) * UNIT, k_s * UNIT, tl.cast(k_h, tl.int64) * UNIT
    v_b, v_s, v_h = tl.cast(v_b, tl.int64) * UNIT, v_s * UNIT, tl.cast(v_h, tl.int64) * UNIT
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < D
    q_tile = q_ptr + batch * q_b + head.to(tl.int64) * q_h
    q = tl.load(q_tile + row[:, None] * q_s + cols[None, :], mask=valid[:, None] & col_mask[None, :], other=0.0)
    k_head = k_ptr + batch * k_b + kv_head.to(tl.int64) * k_h
    v_head = v_ptr + batch * v_b + kv_head.to(tl.int64) * v_h

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
    for i in tl.range(0, steps_t * steps_h * steps_w):
        from_t = low_t + i // (steps_h * steps_w) * KT
        from_h = low_h + i // steps_w % steps_h * KH
        from_w = low_w + i % steps_w * KW
        if DESCRIPTORS:
            where = kv_head * D
            k = k_desc.load([batch.to(tl.int32), from_t, from_h, from_w, where]).reshape(BLOCK_N, BLOCK_D)
        else:
            origin = (video_start + (from_t * h + from_h) * w + from_w).to(tl.int64)
            real = (from_t + key_t < high_t) & (from_h + key_h < high_h) & (from_w + key_w < high_w)
            k = tl.load(
                k_head + origin * k_s + local[:, None] * k_s + cols[None, :],
                mask=real[:, None] & col_mask[None, :], other=0.0,
            )  # fmt: skip
        # One word a query says what it sees of this box, one a key what it asks for: two operations a score.
        seen = (
            axis_bits(first_t, last_t, from_t, is_text, KT, 0)
            | axis_bits(first_h, last_h, from_h, is_text, KH, KT)
            | axis_bits(first_w, last_w, from_w, is_text, KW, KT + KH)
        )
        # What lies past the edge of the grid was filled with zeros, and text queries would see it.
        edge = (
            axis_bits(0, t - 1, from_t, False, KT, 0)
            | axis_bits(0, h - 1, from_h, False, KH, KT)
            | axis_bits(0, w - 1, from_w, False, KW, KT + KH)
        )
        seen = seen & edge
        scores = tl.dot(q, k.T, input_precision="ieee")
        scores = tl.where((seen[:, None] & wanted[None, :]) == wanted[None, :], scores, float("-inf"))
        weights, acc, top, total = soften(scores, acc, top, total, scale_log2, True)
        if DESCRIPTORS:
            v = v_desc.load([batch.to(tl.int32), from_t, from_h, from_w, where]).reshape(BLOCK_N, BLOCK_D)
        else:
            v = tl.load(
                v_head + origin * v_s + local[:, None] * v_s + cols[None, :],
                mask=real[:, None] & col_mask[None, :], other=0.0,
            )  # fmt: skip
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")

    if TEXT:
        keys = text_len
        if LENS:
            keys = tl.minimum(tl.maximum(tl.load(lens_ptr + batch), 0), text_len).to(tl.int32)
        for j in tl.range(0, keys, BLOCK_N):
            real_text = j + n < keys
            line_text = (text_start + j + n).to(tl.int64)
            load_text = real_text[:, None] & col_mask[None, :]
            k = tl.load(k_head + line_text[:, None] * k_s + cols[None, :], mask=load_text, other=0.0)
            scores = tl.where(real_text[None, :], tl.dot(q, k.T, input_precision="ieee"), float("-inf"))
            weights, acc, top, total = soften(scores, acc, top, total, scale_log2, True)
            v = tl.load(v_head + line_text[:, None] * v_s + cols[None, :], mask=load_text, other=0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")

    out, lse = finish(acc, top, total, scale)
    o_tile = o_ptr + ((batch * s + row) * heads + head)[:, None] * D + cols[None, :]
    tl.store(o_tile, out.to(o_ptr.dtype.element_ty), mask=valid[:, None] & col_mask[None, :])
    if HAS_LSE:
        tl.store(lse_ptr + (batch * heads + head) * s + row, lse, mask=valid)


# Of all heads (then no table), and the table; see `window_table`.
WindowTable = tuple[Tensor | None, tuple[int, ...]]


@functools.lru_cache(64)
def _windows(rows: tuple[tuple[int, ...], ...], heads: int, device: torch.device) -> Tensor:
    """``[heads * 5]`` int32 on the device: window and head in fours, largest window first, and then each head's place.

    Kept, so that a call copies nothing.
    """
    table = [(*rows[head % len(rows)], head) for head in range(heads)]
    table.sort(key=lambda row: -row[0] * row[1] * row[2])
    place = [0] * heads
    for rank, row in enumerate(table):
        place[row[3]] = rank
    return torch.tensor([n for row in table for n in row] + place, dtype=torch.int32).to(device)


def window_table(window: Sequence[int] | None, heads: int, grid: Sequence[int], device: torch.device) -> WindowTable:
    """The window that all heads have, or the table of theirs; a window is no longer than the grid."""
    rows = [tuple(grid)] if window is None else [tuple(window[i : i + 3]) for i in range(0, len(window), 3)]
    clamped = tuple(tuple(max(min(n, side), 1) for n, side in zip(row, grid, strict=True)) for row in rows)
    if len(set(clamped)) == 1:
        return None, clamped[0]
    return _windows(clamped, heads, device), (1, 1, 1)


def check_reach(config: WindowConfig, grid: Sequence[int], *tensors: Tensor) -> None:
    """Offsets within a box are int32."""
    sides = [max(a, b) for a, b in zip(config.query, config.key, strict=True)]
    reach = (sides[0] * grid[1] + sides[1]) * grid[2] + sides[2]
    if max(x.stride(1) for x in tensors) * reach >= 2**31:
        raise UnsupportedError("spacetime_attention: impl 'triton' needs a box of keys within 2^31 elements")


def windowed_attention(
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
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Windows and causal time of ``spacetime_attention``."""
    b, s, heads, head_dim = q.shape
    out = q.new_empty((b, s, heads, head_dim))
    lse = q.new_empty((b, heads, s) if return_lse else (0,), dtype=torch.float32)
    size = whole_grid(grid)
    # A block wider than the head would read the next head's columns.
    whole = head_dim == max(16, 1 << (head_dim - 1).bit_length())
    aligned = whole and addressable(k) and addressable(v) and size[0] > 0
    config = select(
        arch_for(q), op="spacetime_attention", head_dim=head_dim, itemsize=q.element_size(), aligned=aligned,
        t=size[0], h=size[1], w=size[2],
    )  # fmt: skip
    check_reach(config, size, k, v)
    if out.numel():
        launch_fwd(q, k, v, out, lse if return_lse else None, kv_lens, size, window, stride, causal_time, text_len,
                   text_side, scale, config)  # fmt: skip
    return out, lse


def launch_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    kv_lens: Tensor | None,
    grid: Sequence[int],
    window: Sequence[int] | None,
    stride: Sequence[int],
    causal_time: bool,
    text_len: int,
    text_side: str,
    scale: float,
    config: WindowConfig,
) -> None:
    """Launch over ``q [B, S, heads, D]`` into contiguous ``out`` and, unless None, ``lse [B, heads, S]``."""
    b, s, heads, head_dim = q.shape
    table, shared_window = window_table(window, heads, grid, q.device)
    tiles = [cdiv(n, side) for n, side in zip(grid, config.query, strict=True)]
    text_tiles = cdiv(text_len, math.prod(config.query))
    video_start, text_start = (text_len, 0) if text_side == "prefix" else (0, math.prod(grid))
    programs = (math.prod(tiles) + text_tiles) * b * heads
    unit = stride_unit(q, k, v)
    with on_device(q):
        k_desc = v_desc = None
        if config.descriptors:
            k_desc, v_desc = (box_descriptor(x, grid, video_start, config.key, config.block_d) for x in (k, v))
        _windowed_attention_fwd_kernel[(programs,)](
            q, k, v, out, lse, kv_lens, table, k_desc, v_desc,
            s, heads, heads // k.shape[2], *grid, *tiles, text_tiles, video_start, text_start, text_len,
            *shared_window, *stride, scale, scale * math.log2(math.e),
            *(step // unit for x in (q, k, v) for step in x.stride()[:3]),
            head_dim, unit, text_len > 0, kv_lens is not None, causal_time, table is not None, lse is not None,
            config.descriptors, *config.query, *config.key, config.block_d,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
