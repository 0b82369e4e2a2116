"""Device code of causal_conv3d: two variants of one algorithm, and the epilogues they share.

A program owns a box of output pixels of one frame and a group of output channels that go to one place of the result.
Taps run from the oldest frame to the newest, so frames of zeros are the head of the loop and are not walked, and frames
of the cache come before those of x: the past is read where it lies. A frame that is repeated is a frame index that is
clamped, a scalar a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

ZEROS, REPLICATE, REFLECT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _program(pid, frames, h_tiles, w_tiles, n_tiles):
    """Batch and frame (int64: they multiply strides), box and channel group; groups of one box adjoin for the L2."""
    group = pid % n_tiles
    pid = pid // n_tiles
    w_tile = pid % w_tiles
    pid = pid // w_tiles
    h_tile = pid % h_tiles
    pid = pid // h_tiles
    return (pid // frames).to(tl.int64), (pid % frames).to(tl.int64), h_tile, w_tile, group


@triton.jit
def _border_box(box, h_tiles, w_tiles, h_first, h_last, w_first, w_last):
    """Row and column of the box-th box outside of ``[h_first, h_last) x [w_first, w_last)``: above, below, beside."""
    above = h_first * w_tiles
    around = above + (h_tiles - h_last) * w_tiles
    sides = w_tiles - (w_last - w_first)
    beside = tl.maximum(box - around, 0)
    side = beside % tl.maximum(sides, 1)
    h_tile = tl.where(box < above, box // w_tiles, (box - above) // w_tiles + h_last)
    h_tile = tl.where(box < around, h_tile, h_first + beside // tl.maximum(sides, 1))
    w_tile = tl.where(box < around, box % w_tiles, tl.where(side < w_first, side, side - w_first + w_last))
    return h_tile, w_tile


@triton.jit
def _steps(first, cached, KT: tl.constexpr, PER_FRAME: tl.constexpr, REPEAT: tl.constexpr):
    """Loop bounds ``start, split, stop``: steps before ``split`` read the cache, frames before ``start`` are zero.

    ``first`` is the frame, relative to x, that the oldest tap reads.
    """
    past = tl.minimum(tl.maximum(-first, 0), KT)
    missing = past * 0
    if not REPEAT:
        missing = tl.minimum(tl.maximum(-cached - first, 0), KT)
    return missing.to(tl.int32) * PER_FRAME, past.to(tl.int32) * PER_FRAME, KT * PER_FRAME


@triton.jit
def _on_edge(at, size, EDGE: tl.constexpr):
    """The pixel that stands for position ``at``: itself inside, the edge's or the mirrored one outside.

    Where a box overhangs the frame it may take any pixel: what comes of it is not stored.
    """
    if EDGE == REFLECT:
        at = (size - 1) - tl.abs((size - 1) - tl.abs(at))
    return tl.minimum(tl.maximum(at, 0), size - 1)


@triton.jit
def _place(b, t, h0, w0, frames, h_out, w_out, o, place, FT: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr):
    """Offset in the result of a box's first pixel at one of the places that a position is unfolded to, and its frame,
    row and column. b and t are int64, and so is what they are part of."""
    t1, h1, w1 = t * FT + place // (FH * FW), h0 * FH + place // FW % FH, w0 * FW + place % FW
    return (((b * frames * FT + t1) * (h_out * FH) + h1) * (w_out * FW) + w1) * o, t1, h1, w1


@triton.jit
def _sum(
    acc, bias_ptr, residual_ptr, at, mask, channels, channel_mask, row0, row_c,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Bias and residual in fp32; channels that do not exist stay zero."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row0 + channels * row_c, mask=channel_mask, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + at[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _norm_silu(acc, factor, norm_ptr, channels, channel_mask):
    z = acc * factor[:, None] * tl.load(norm_ptr + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    return z * tl.sigmoid(z)


@triton.jit
def _finish(
    acc, acc2, y_ptr, z_ptr, bias_ptr, residual_ptr, norm_ptr,
    b, t, h0, w0, frames, h_out, w_out, o, place, channel0, row_place, row_c, r_b, r_t, r_h, r_w, eps, scale,
    FT: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Write the box; tile origins are int64 scalars, offsets within a tile fit int32 (the launcher checks)."""
    m = tl.arange(0, BH * BW)
    rows, cols = m // BW, m % BW
    pixel_mask = (h0 + rows < h_out) & (w0 + cols < w_out)
    origin, t1, h1, w1 = _place(b, t, h0, w0, frames, h_out, w_out, o, place, FT, FH, FW)
    pixels = (rows * FH * w_out + cols) * FW * o
    residual_pixels = pixels
    if HAS_RESIDUAL:
        residual_ptr += b * r_b + t1 * r_t + tl.cast(h1, tl.int64) * r_h + tl.cast(w1, tl.int64) * r_w
        residual_pixels = rows * FH * r_h + cols * FW * r_w
    row0 = place * row_place
    channels = channel0 + tl.arange(0, N)
    channel_mask = channels < o
    mask = pixel_mask[:, None] & channel_mask[None, :]
    at = pixels[:, None] + channels[None, :]
    acc = _sum(
        acc, bias_ptr, residual_ptr, residual_pixels, mask, channels, channel_mask, row0, row_c, HAS_BIAS, HAS_RESIDUAL
    )
    if KEEP:
        tl.store(y_ptr + origin + at, acc.to(y_ptr.dtype.element_ty), mask=mask)
    if N2 > 0:
        channels2 = channel0 + N + tl.arange(0, N2)
        channel_mask2 = channels2 < o
        mask2 = pixel_mask[:, None] & channel_mask2[None, :]
        at2 = pixels[:, None] + channels2[None, :]
        acc2 = _sum(
            acc2, bias_ptr, residual_ptr, residual_pixels, mask2, channels2, channel_mask2, row0, row_c,
            HAS_BIAS, HAS_RESIDUAL,
        )  # fmt: skip
        if KEEP:
            tl.store(y_ptr + origin + at2, acc2.to(y_ptr.dtype.element_ty), mask=mask2)
    if NORM:
        # All channels of a pixel are here: the launcher sees to it.
        squares = tl.sum(acc * acc, 1)
        if N2 > 0:
            squares += tl.sum(acc2 * acc2, 1)
        factor = scale / tl.maximum(tl.sqrt(squares), eps)
        z = _norm_silu(acc, factor, norm_ptr, channels, channel_mask)
        tl.store(z_ptr + origin + at, z.to(z_ptr.dtype.element_ty), mask=mask)
        if N2 > 0:
            z2 = _norm_silu(acc2, factor, norm_ptr, channels2, channel_mask2)
            tl.store(z_ptr + origin + at2, z2.to(z_ptr.dtype.element_ty), mask=mask2)


@triton.jit
def _causal_conv3d_fwd_kernel(
    x_ptr, cache_ptr, weight_ptr, bias_ptr, residual_ptr, norm_ptr, y_ptr, z_ptr,
    cached, t_in, h, w, o, frames, h_out, w_out, h_tiles, w_tiles, n_tiles, per_place,
    boxes, h_first, h_last, w_first, w_last,
    x_b, x_t, x_h, x_w, c_b, c_t, c_h, c_w, r_b, r_t, r_h, r_w, row_place, row_c, eps, scale,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    C: tl.constexpr, FT: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr,
    EDGE: tl.constexpr, REPEAT: tl.constexpr, END: tl.constexpr, BORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KH * KW
    K_TILES: tl.constexpr = (C + BK - 1) // BK
    PER_FRAME: tl.constexpr = TAPS * K_TILES
    if BORDER:
        # Only boxes that touch an edge: the others are another launch's.
        b, t, box, _, group = _program(tl.program_id(0), frames, boxes, 1, n_tiles)
        h_tile, w_tile = _border_box(box, h_tiles, w_tiles, h_first, h_last, w_first, w_last)
    else:
        b, t, h_tile, w_tile, group = _program(tl.program_id(0), frames, h_tiles, w_tiles, n_tiles)
    place, channel0 = group // per_place, group % per_place * (N + N2)
    h0, w0 = h_tile * BH, w_tile * BW
    m = tl.arange(0, BH * BW)
    rows, cols = m // BW * SH, m % BW * SW
    # The pixel that tap (0, 0) of the box's first pixel reads; negative at the borders.
    top, left = h0 * SH - KH // 2, w0 * SW - KW // 2
    k = tl.arange(0, BK)
    weight_ptr += tl.cast(place, tl.int64) * row_place * (KT * TAPS * C)
    n = channel0 + tl.arange(0, N)
    weight_n = weight_ptr + (n.to(tl.int64) * row_c)[None, :] * (KT * TAPS * C) + k[:, None]
    acc = tl.zeros([BH * BW, N], tl.float32)
    n2 = n
    weight_n2 = weight_n
    acc2 = acc
    if N2 > 0:
        n2 = channel0 + N + tl.arange(0, N2)
        weight_n2 = weight_ptr + (n2.to(tl.int64) * row_c)[None, :] * (KT * TAPS * C) + k[:, None]
        acc2 = tl.zeros([BH * BW, N2], tl.float32)
    first = t * ST - (KT - 1)
    start, _, stop = _steps(first, cached, KT, PER_FRAME, REPEAT)
    for step in tl.range(start, stop):
        frame = first + step // PER_FRAME
        if REPEAT:
            frame = tl.maximum(frame, -cached)
        if END:
            frame = tl.minimum(frame, t_in - 1)
        tap, k0 = step % TAPS, step % PER_FRAME // TAPS * BK
        y0, x0 = top + tap // KW, left + tap % KW
        # A frame of the cache or of x: a scalar choice of base and strides, no branch in the loop.
        old = frame < 0
        base = tl.where(old, cache_ptr + b * c_b + (frame + cached) * c_t, x_ptr + b * x_b + frame * x_t)
        s_h, s_w = tl.where(old, c_h, x_h), tl.where(old, c_w, x_w)
        if EDGE == ZEROS:
            base += tl.cast(y0, tl.int64) * s_h + tl.cast(x0, tl.int64) * s_w + k0
            offsets = rows * s_h + cols * s_w
            inside = (y0 + rows >= 0) & (y0 + rows < h) & (x0 + cols >= 0) & (x0 + cols < w)
        else:
            # Relative to a pixel of the box, so that what is left fits 32 bits.
            y1, x1 = tl.minimum(tl.maximum(y0, 0), h - 1), tl.minimum(tl.maximum(x0, 0), w - 1)
            base += tl.cast(y1, tl.int64) * s_h + tl.cast(x1, tl.int64) * s_w + k0
            offsets = (_on_edge(y0 + rows, h, EDGE) - y1) * s_h + (_on_edge(x0 + cols, w, EDGE) - x1) * s_w
        at = base + offsets[:, None] + k[None, :]
        k_at = (step // PER_FRAME * TAPS + tap) * C + k0
        k_mask = k0 + k < C
        if C % BK == 0:
            a = tl.load(at, mask=inside[:, None], other=0.0) if EDGE == ZEROS else tl.load(at)
            wt = tl.load(weight_n + k_at, mask=n[None, :] < o, other=0.0)
        else:
            a_mask = inside[:, None] & k_mask[None, :] if EDGE == ZEROS else k_mask[None, :]
            a = tl.load(at, mask=a_mask, other=0.0)
            wt = tl.load(weight_n + k_at, mask=(n[None, :] < o) & k_mask[:, None], other=0.0)
        acc = tl.dot(a, wt, acc, input_precision=PRECISION)
        if N2 > 0:
            if C % BK == 0:
                wt2 = tl.load(weight_n2 + k_at, mask=n2[None, :] < o, other=0.0)
            else:
                wt2 = tl.load(weight_n2 + k_at, mask=(n2[None, :] < o) & k_mask[:, None], other=0.0)
            acc2 = tl.dot(a, wt2, acc2, input_precision=PRECISION)
    _finish(
        acc, acc2, y_ptr, z_ptr, bias_ptr, residual_ptr, norm_ptr,
        b, t, h0, w0, frames, h_out, w_out, o, place, channel0, row_place, row_c, r_b, r_t, r_h, r_w, eps, scale,
        FT, FH, FW, HAS_BIAS, HAS_RESIDUAL, NORM, KEEP, BH, BW, N, N2,
    )  # fmt: skip


@triton.jit
def _walk(
    acc, acc2, frames_desc, weight_desc, weight2_desc, b, frame0, last, top, left, place, channel0, start, stop,
    CLAMP_FIRST: tl.constexpr, CLAMP_LAST: tl.constexpr,
    TAPS: tl.constexpr, KW: tl.constexpr, PER_FRAME: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Accumulate the steps ``[start, stop)``, all of whose frames lie behind one descriptor."""
    for step in tl.range(start, stop):
        tap, k0 = step % TAPS, step % PER_FRAME // TAPS * BK
        row = step // PER_FRAME * TAPS + tap
        frame = frame0 + step // PER_FRAME
        if CLAMP_FIRST:
            frame = tl.maximum(frame, 0)
        if CLAMP_LAST:
            frame = tl.minimum(frame, last)
        a = frames_desc.load([b, frame, top + tap // KW, left + tap % KW, k0]).reshape(M, BK)
        wt = weight_desc.load([place, channel0, row, k0]).reshape(N, BK)
        acc = tl.dot(a, wt.T, acc, input_precision=PRECISION)
        if N2 > 0:
            wt2 = weight2_desc.load([place, channel0 + N, row, k0]).reshape(N2, BK)
            acc2 = tl.dot(a, wt2.T, acc2, input_precision=PRECISION)
    return acc, acc2


@triton.jit
def _causal_conv3d_descriptor_fwd_kernel(
    x_desc, cache_desc, weight_desc, weight2_desc, bias_ptr, residual_ptr, norm_ptr, y_ptr, z_ptr,
    cached, t_in, o, frames, h_out, w_out, h_tiles, w_tiles, n_tiles, per_place, h_first, w_first,
    r_b, r_t, r_h, r_w, row_place, row_c, eps, scale,
    ST: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, C: tl.constexpr,
    FT: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr,
    HAS_CACHE: tl.constexpr, REPEAT: tl.constexpr, END: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Boxes ``[h_first, h_first + h_tiles) x [w_first, w_first + w_tiles)``; what they read outside is zero."""
    TAPS: tl.constexpr = KH * KW
    PER_FRAME: tl.constexpr = TAPS * ((C + BK - 1) // BK)
    b, t, h_tile, w_tile, group = _program(tl.program_id(0), frames, h_tiles, w_tiles, n_tiles)
    place, channel0 = group // per_place, group % per_place * (N + N2)
    h0, w0 = (h_first + h_tile) * BH, (w_first + w_tile) * BW
    top, left = h0 - KH // 2, w0 - KW // 2
    acc = tl.zeros([BH * BW, N], tl.float32)
    acc2 = acc
    if N2 > 0:
        acc2 = tl.zeros([BH * BW, N2], tl.float32)
    first = t * ST - (KT - 1)
    start, split, stop = _steps(first, cached, KT, PER_FRAME, REPEAT)
    box, frame0 = b.to(tl.int32), first.to(tl.int32)
    if HAS_CACHE:
        acc, acc2 = _walk(
            acc, acc2, cache_desc, weight_desc, weight2_desc, box, frame0 + cached, cached - 1, top, left, place,
            channel0, start, split, REPEAT, False, TAPS, KW, PER_FRAME, PRECISION, BH * BW, BK, N, N2,
        )  # fmt: skip
        start = split
    acc, acc2 = _walk(
        acc, acc2, x_desc, weight_desc, weight2_desc, box, frame0, t_in - 1, top, left, place, channel0,
        start, stop, REPEAT and not HAS_CACHE, END, TAPS, KW, PER_FRAME, PRECISION, BH * BW, BK, N, N2,
    )  # fmt: skip
    _finish(
        acc, acc2, y_ptr, z_ptr, bias_ptr, residual_ptr, norm_ptr,
        b, t, h0, w0, frames, h_out, w_out, o, place, channel0, row_place, row_c, r_b, r_t, r_h, r_w, eps, scale,
        FT, FH, FW, HAS_BIAS, HAS_RESIDUAL, NORM, KEEP, BH, BW, N, N2,
    )  # fmt: skip
