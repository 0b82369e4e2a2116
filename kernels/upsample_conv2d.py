"""Nearest 2× and a 3×3 convolution as a GEMM over shifted boxes of the small image, one phase of the result at a time.

A program owns a box of small pixels, one phase (which of the pixels made from each of them) and a group of output
channels; a phase has 2×2 taps where the doubled image has 3×3. Programs of one box adjoin, so its pixels come from the
L2 for all phases but one. Taps run from the oldest frame to the newest, frames of the cache before those of x. Two
variants of one algorithm: boxes moved by tensor descriptors (TMA, whose zero fill is the spatial padding) and by
pointers. Repeated edges are clamped indices, which a descriptor has not: programs at an edge use pointers in either.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs.causal_conv3d import ConvConfig
from pyvideo_kernels.configs.upsample_conv2d import select
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.ops.upsample_conv2d import as_phases, pack_upsample_weight
from pyvideo_kernels.reference.upsample_conv2d import output_shape

from .causal_conv3d import _descriptor, _precision, descriptors_can_address
from .launch import cdiv, on_device, refuse_float64


@triton.jit
def _program(frames, h_tiles, w_tiles, n_tiles):
    """Batch and frame (int64: they multiply strides), box, phase in space and channel group of this program."""
    pid = tl.program_id(0)
    group = pid % n_tiles
    pid = pid // n_tiles
    phase = pid % 4
    pid = pid // 4
    w_tile = pid % w_tiles
    pid = pid // w_tiles
    h_tile = pid % h_tiles
    pid = pid // h_tiles
    return (pid // frames).to(tl.int64), (pid % frames).to(tl.int64), h_tile, w_tile, phase, group


@triton.jit
def _frames_read(
    frame, lead, cached, KT: tl.constexpr, DOUBLE: tl.constexpr, HAS_CACHE: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Phase in time and oldest frame that an output frame reads; and how many taps meet nothing, and the cache."""
    s = frame * 0
    small = frame
    if DOUBLE:
        s = (frame + lead) % 2
        small = (frame + lead) // 2
    oldest = small - (KT - 1)
    missing = 0
    if ZEROS:
        missing = tl.minimum(tl.maximum(-cached - oldest, 0), KT).to(tl.int32)
    past = 0
    if HAS_CACHE:
        past = tl.minimum(tl.maximum(-oldest, 0), KT).to(tl.int32)
    return s.to(tl.int32), oldest, missing, past


@triton.jit
def _store(
    acc, y_ptr, bias_ptr, residual_ptr, pixels, residual_pixels, pixel_mask, first_channel, o,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Bias and residual in fp32, one rounding, the pixels and channels that exist."""
    channels = first_channel + tl.arange(0, N)
    channel_mask = channels < o
    mask = pixel_mask[:, None] & channel_mask[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        at = residual_ptr + residual_pixels[:, None] + channels[None, :]
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + pixels[:, None] + channels[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish(
    acc, acc2, y_ptr, bias_ptr, residual_ptr, b, frame, h0, w0, p, q, frames, h, w, o, first_channel,
    r_b, r_t, r_h, r_w,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Write every second pixel of every second row; origins are int64 scalars, offsets within a box fit int32."""
    m = tl.arange(0, BH * BW)
    rows, cols = m // BW, m % BW
    pixel_mask = (h0 + rows < h) & (w0 + cols < w) & (frame >= 0)
    top, left = tl.cast(2 * h0 + p, tl.int64), tl.cast(2 * w0 + q, tl.int64)
    y_ptr += (((b * frames + frame) * (2 * h) + top) * (2 * w) + left) * o
    pixels = (rows * (4 * w) + cols * 2) * o
    residual_pixels = pixels
    if HAS_RESIDUAL:
        residual_ptr += b * r_b + frame * r_t + top * r_h + left * r_w
        residual_pixels = rows * (2 * r_h) + cols * (2 * r_w)
    _store(
        acc, y_ptr, bias_ptr, residual_ptr, pixels, residual_pixels, pixel_mask, first_channel, o,
        HAS_BIAS, HAS_RESIDUAL, N,
    )  # fmt: skip
    if N2 > 0:
        _store(
            acc2, y_ptr, bias_ptr, residual_ptr, pixels, residual_pixels, pixel_mask, first_channel + N, o,
            HAS_BIAS, HAS_RESIDUAL, N2,
        )  # fmt: skip


@triton.jit
def _walk_pointers(
    acc, acc2, x_ptr, cache_ptr, weight_ptr, b, oldest, start, cached, h, w, o, h0, w0, p, q, first_channel,
    x_b, x_t, x_h, x_w, c_b, c_t, c_h, c_w,
    KT: tl.constexpr, C: tl.constexpr, HAS_CACHE: tl.constexpr, EDGES: tl.constexpr, PRECISION: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Accumulate the taps of the frames from ``start`` on, ``weight_ptr`` being those of the phase."""
    PER_FRAME: tl.constexpr = 4 * ((C + BK - 1) // BK)
    m = tl.arange(0, BH * BW)
    rows, cols = m // BW, m % BW
    k = tl.arange(0, BK)
    n = first_channel + tl.arange(0, N)
    weight_n = weight_ptr + n.to(tl.int64)[None, :] * (KT * 4 * C) + k[:, None]
    n2 = n
    weight_n2 = weight_n
    if N2 > 0:
        n2 = first_channel + N + tl.arange(0, N2)
        weight_n2 = weight_ptr + n2.to(tl.int64)[None, :] * (KT * 4 * C) + k[:, None]
    for step in tl.range(start * PER_FRAME, KT * PER_FRAME):
        # Before the oldest frame that is known lies that frame again; zeros are not walked.
        frame = tl.maximum(oldest + step // PER_FRAME, -cached)
        tap, k0 = step % 4, step % PER_FRAME // 4 * BK
        y, x = rows + (tap // 2 - 1 + p), cols + (tap % 2 - 1 + q)
        inside = (h0 + y >= 0) & (h0 + y < h) & (w0 + x >= 0) & (w0 + x < w)
        if EDGES:
            y, x = tl.minimum(tl.maximum(y, -h0), h - 1 - h0), tl.minimum(tl.maximum(x, -w0), w - 1 - w0)
            inside = m >= 0
        base, s_h, s_w = x_ptr + b * x_b + frame * x_t, x_h, x_w
        if HAS_CACHE:
            # A frame of the cache or of x: a scalar choice of base and strides, no branch in the loop.
            old = frame < 0
            base = tl.where(old, cache_ptr + b * c_b + (frame + cached) * c_t, base)
            s_h, s_w = tl.where(old, c_h, x_h), tl.where(old, c_w, x_w)
        base += tl.cast(h0, tl.int64) * s_h + tl.cast(w0, tl.int64) * s_w + k0
        at = base + (y * s_h + x * s_w)[:, None] + k[None, :]
        k_at = (step // PER_FRAME * 4 + tap) * C + k0
        if C % BK == 0:
            a = tl.load(at, mask=inside[:, None], other=0.0)
            wt = tl.load(weight_n + k_at, mask=n[None, :] < o, other=0.0)
        else:
            k_mask = k0 + k < C
            a = tl.load(at, mask=inside[:, None] & k_mask[None, :], other=0.0)
            wt = tl.load(weight_n + k_at, mask=(n[None, :] < o) & k_mask[:, None], other=0.0)
        acc = tl.dot(a, wt, acc, input_precision=PRECISION)
        if N2 > 0:
            if C % BK == 0:
                wt2 = tl.load(weight_n2 + k_at, mask=n2[None, :] < o, other=0.0)
            else:
                wt2 = tl.load(weight_n2 + k_at, mask=(n2[None, :] < o) & (k0 + k < C)[:, None], other=0.0)
            acc2 = tl.dot(a, wt2, acc2, input_precision=PRECISION)
    return acc, acc2


@triton.jit
def _walk_descriptor(
    acc, acc2, frames_desc, weight_desc, weight2_desc, b, frame0, top, left, first_row, start, stop,
    C: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Accumulate the taps of the frames ``[start, stop)``, all of which lie behind one descriptor."""
    PER_FRAME: tl.constexpr = 4 * ((C + BK - 1) // BK)
    for step in tl.range(start * PER_FRAME, stop * PER_FRAME):
        tap, k0 = step % 4, step % PER_FRAME // 4 * BK
        frame = tl.maximum(frame0 + step // PER_FRAME, 0)
        row = step // PER_FRAME * 4 + tap
        a = frames_desc.load([b, frame, top + tap // 2, left + tap % 2, k0]).reshape(M, BK)
        wt = weight_desc.load([first_row, row, k0]).reshape(N, BK)
        acc = tl.dot(a, wt.T, acc, input_precision=PRECISION)
        if N2 > 0:
            wt2 = weight2_desc.load([first_row + N, row, k0]).reshape(N2, BK)
            acc2 = tl.dot(a, wt2.T, acc2, input_precision=PRECISION)
    return acc, acc2


@triton.jit
def _upsample_conv2d_fwd_kernel(
    x_desc, cache_desc, weight_desc, weight2_desc, x_ptr, cache_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    cached, lead, h, w, o, small_frames, frames, h_tiles, w_tiles, n_tiles,
    x_b, x_t, x_h, x_w, c_b, c_t, c_h, c_w, r_b, r_t, r_h, r_w,
    KT: tl.constexpr, C: tl.constexpr, DOUBLE: tl.constexpr, TWICE: tl.constexpr,
    HAS_CACHE: tl.constexpr, ZEROS: tl.constexpr, EDGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    b, t, h_tile, w_tile, phase, group = _program(small_frames if TWICE else frames, h_tiles, w_tiles, n_tiles)
    p, q = phase // 2, phase % 2
    h0, w0, first_channel = h_tile * BH, w_tile * BW, group * (N + N2)
    acc = tl.zeros([BH * BW, N], tl.float32)
    acc2 = acc
    if N2 > 0:
        acc2 = tl.zeros([BH * BW, N2], tl.float32)
    s, oldest, missing, past = _frames_read(t, lead, cached, KT, DOUBLE, HAS_CACHE, ZEROS)
    row0 = (s * 4 + phase) * o
    weight_ptr += row0.to(tl.int64) * (KT * 4 * C)
    if DESCRIPTORS:
        # The edge that a phase looks across is the one on its side.
        across = (p == 0) & (h_tile == 0) | (p == 1) & (h_tile == h_tiles - 1)
        across |= (q == 0) & (w_tile == 0) | (q == 1) & (w_tile == w_tiles - 1)
        if EDGES and across:
            acc, acc2 = _walk_pointers(
                acc, acc2, x_ptr, cache_ptr, weight_ptr, b, oldest, missing, cached, h, w, o, h0, w0, p, q,
                first_channel, x_b, x_t, x_h, x_w, c_b, c_t, c_h, c_w,
                KT, C, HAS_CACHE, EDGES, PRECISION, BH, BW, BK, N, N2,
            )  # fmt: skip
        else:
            batch, frame0, top, left = b.to(tl.int32), oldest.to(tl.int32), h0 - 1 + p, w0 - 1 + q
            if HAS_CACHE:
                acc, acc2 = _walk_descriptor(
                    acc, acc2, cache_desc, weight_desc, weight2_desc, batch, frame0 + cached, top, left,
                    row0 + first_channel, missing, past, C, PRECISION, BH * BW, BK, N, N2,
                )  # fmt: skip
                missing = tl.maximum(missing, past)
            acc, acc2 = _walk_descriptor(
                acc, acc2, x_desc, weight_desc, weight2_desc, batch, frame0, top, left,
                row0 + first_channel, missing, KT, C, PRECISION, BH * BW, BK, N, N2,
            )  # fmt: skip
    else:
        acc, acc2 = _walk_pointers(
            acc, acc2, x_ptr, cache_ptr, weight_ptr, b, oldest, missing, cached, h, w, o, h0, w0, p, q,
            first_channel, x_b, x_t, x_h, x_w, c_b, c_t, c_h, c_w,
            KT, C, HAS_CACHE, EDGES, PRECISION, BH, BW, BK, N, N2,
        )  # fmt: skip
    if TWICE:
        # One convolution for the two frames that are made from this one.
        for twin in tl.static_range(2):
            _finish(
                acc, acc2, y_ptr, bias_ptr, residual_ptr, b, 2 * t + twin - lead, h0, w0, p, q, frames, h, w, o,
                first_channel, r_b, r_t, r_h, r_w, HAS_BIAS, HAS_RESIDUAL, BH, BW, N, N2,
            )  # fmt: skip
    else:
        _finish(
            acc, acc2, y_ptr, bias_ptr, residual_ptr, b, t, h0, w0, p, q, frames, h, w, o,
            first_channel, r_b, r_t, r_h, r_w, HAS_BIAS, HAS_RESIDUAL, BH, BW, N, N2,
        )  # fmt: skip


def box_span(x: Tensor, config: ConvConfig, step: int = 1) -> int:
    """Largest offset, in elements, from a box's origin that is computed in int32; ``step``: 2 in the doubled image."""
    rows, cols = (config.block_h + 1) * step, (config.block_w + 1) * step
    return rows * abs(x.stride(2)) + cols * abs(x.stride(3)) + x.shape[4]


def launch_fwd(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    kt: int,
    time_factor: int,
    cache: Tensor | None,
    first: bool,
    pad_mode: str,
    residual: Tensor | None,
    y: Tensor,
    config: ConvConfig,
) -> None:
    """Launch over channels-last ``x`` and packed weights into contiguous ``y``; ``kt``: taps in time of the weight."""
    b, t, h, w, c = x.shape
    frames, o = y.shape[1], y.shape[4]
    phases, _, taps, _ = packed.shape
    n, n2 = config.block_n, config.block_n2
    twice = time_factor == 2 and kt == 1
    tiles = (cdiv(h, config.block_h), cdiv(w, config.block_w), cdiv(o, n + n2))
    grid = (b * (t if twice else frames) * tiles[0] * tiles[1] * 4 * tiles[2],)
    past = x if cache is None else cache
    descriptors = (None, None, None, None)
    if config.descriptors:
        box = [1, 1, config.block_h, config.block_w, config.block_k]
        rows = packed.view(phases * o, taps, c)
        x_desc, weight_desc = _descriptor(x, box), _descriptor(rows, [n, 1, config.block_k])
        cache_desc = x_desc if cache is None else _descriptor(cache, box)
        weight2_desc = _descriptor(rows, [n2, 1, config.block_k]) if n2 else weight_desc
        descriptors = (x_desc, cache_desc, weight_desc, weight2_desc)
    with on_device(x):
        _upsample_conv2d_fwd_kernel[grid](
            *descriptors, x, past, packed, bias, residual, y,
            0 if cache is None else cache.shape[1], int(first and time_factor == 2), h, w, o, t, frames, *tiles,
            *x.stride()[:4], *past.stride()[:4], *((0,) * 4 if residual is None else residual.stride()[:4]),
            taps // 4, c, phases == 8, twice,
            cache is not None, pad_mode == "zeros", pad_mode in ("replicate", "reflect"),
            bias is not None, residual is not None, _precision(x), config.descriptors,
            config.block_h, config.block_w, config.block_k, n, n2,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def upsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Tensor | None,
    time_factor: int,
    cache: Tensor | None,
    first: bool,
    pad_mode: str,
    residual: Tensor | None,
) -> Tensor:
    """``impl="triton"`` of the op."""
    refuse_float64("upsample_conv2d", x)
    if cache is not None and cache.shape[1] == 0:
        cache = None
    if packed is None:
        packed = pack_upsample_weight(weight, time_factor)
    packed = as_phases(packed)
    kt = weight.shape[2] if weight.dim() == 5 else 1
    o, c = packed.shape[1], packed.shape[3]
    aligned = descriptors_can_address(x, cache, packed)
    config = select(arch_for(x), c=c, o=o, itemsize=x.element_size(), aligned=aligned)
    y = x.new_empty(output_shape(x, weight, time_factor, first))
    if not y.numel():
        return y
    spans = [box_span(view, config) for view in (x, cache) if view is not None]
    spans += [box_span(view, config, 2) for view in (y, residual) if view is not None]
    if max(spans) >= 2**31:
        raise UnsupportedError("upsample_conv2d: impl 'triton' needs boxes within 2^31 elements; copy the view")
    launch_fwd(x, packed, bias, kt, time_factor, cache, first, pad_mode, residual, y, config)
    return y
