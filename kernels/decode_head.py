"""The last convolution of a decoder, whose results are pixels: clamped, unfolded and rounded as they are stored.

Few channels come out (3, 12 or 48), so the taps in time are columns of the product too: an input frame is read once
for the output frames it reaches, and a program walks along a run of frames with one accumulator slot for each output
frame that is under way. Slot s belongs to the frames t with t mod KT = s; when frame t is complete it is stored, and
its slot begins anew with t + KT.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs.decode_head import HeadConfig, select
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.ops.causal_conv3d import pack_weight
from pyvideo_kernels.reference.causal_conv3d import repeats_frames, spatial_mode

from .causal_conv3d import _precision
from .launch import cdiv, on_device, refuse_float64

_OP = "decode_head_"
_EDGES = {"zeros": 0, "replicate": 1, "reflect": 2}


@triton.jit
def _along(at, size, EDGE: tl.constexpr):
    """The row or column that is seen at ``at``, which may be outside; for zeros, the mask decides."""
    if EDGE == 2:
        at = tl.where(at < 0, -at, at)
        at = tl.where(at >= size, 2 * (size - 1) - at, at)
    # Positions of a tile past the image are not stored, and may look anywhere inside it.
    return tl.minimum(tl.maximum(at, 0), size - 1)


@triton.jit
def _columns(first, channel0, t, O: tl.constexpr, G: tl.constexpr, KT: tl.constexpr, PER_TAP: tl.constexpr,
             N: tl.constexpr):  # fmt: skip
    """Offsets of the weights of columns ``first + [0, N)`` for input frame ``t``, and which columns there are."""
    n = first + tl.arange(0, N)
    # Input frame t is tap KT-1-ahead of output frame t + ahead, whose slot this is.
    ahead = (n // G + KT - (t + KT) % KT) % KT
    o = channel0 + n % G
    return (o * KT + KT - 1 - ahead)[None, :] * PER_TAP, (n < KT * G) & (o < O)


@triton.jit
def _emit(
    acc, first, channel0, slot, bias_ptr, out_ptr, rows, cols, inside, o_c, o_t, o_h, o_w,
    O: tl.constexpr, G: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    HAS_BIAS: tl.constexpr, CLAMP: tl.constexpr, BYTES: tl.constexpr, ROUNDED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Store the columns of one slot as pixels, and begin the slot anew."""
    n = first + tl.arange(0, N)
    o = channel0 + n % G
    mine = ((n // G == slot) & (o < O))[None, :]
    y = acc
    if HAS_BIAS:
        y += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    # Frames in bytes are those of the float frames, whose dtype has rounded once.
    y = y.to(ROUNDED)
    if BYTES:
        pixel = y.to(tl.float32) * 0.5 + 0.5
        pixel = tl.where(pixel == pixel, pixel, 0.0)
        pixel = tl.minimum(tl.maximum(pixel, 0.0), 1.0) * 255.0
        # Halves to even: past 2^23 there is no place for them. (The launcher forbids fusing this with the product.)
        value = ((pixel + 12582912.0) - 12582912.0).to(tl.int32).to(tl.uint8)
    elif CLAMP:
        value = tl.clamp(y.to(tl.float32), -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL).to(ROUNDED)
    else:
        value = y
    # Channels of a patch are [c, frame, column, row].
    channel, i = o // (PT * PW * PH), o // (PW * PH) % PT
    k, j = o // PH % PW, o % PH
    column_at = channel.to(tl.int64) * o_c + i.to(tl.int64) * o_t + j.to(tl.int64) * o_h + k.to(tl.int64) * o_w
    row_at = rows.to(tl.int64) * PH * o_h + cols.to(tl.int64) * PW * o_w
    tl.store(out_ptr + row_at[:, None] + column_at[None, :], value, mask=inside[:, None] & mine)
    return tl.where((n // G == slot)[None, :], 0.0, acc)


@triton.jit(do_not_specialize=["cached", "t", "frames", "run", "runs", "h_tiles", "w_tiles"])
def _decode_head_fwd_kernel(
    x_ptr, cache_ptr, weight_ptr, bias_ptr, out_ptr,
    cached, t, h, w, frames, run, runs, h_tiles, w_tiles,
    x_b, x_t, x_h, x_w, c_b, c_t, c_h, c_w, o_b, o_c, o_t, o_h, o_w,
    C: tl.constexpr, O: tl.constexpr, G: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    EDGE: tl.constexpr, REPEAT: tl.constexpr, HAS_BIAS: tl.constexpr, CLAMP: tl.constexpr, BYTES: tl.constexpr,
    PRECISION: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KH * KW
    K_TILES: tl.constexpr = (C + BK - 1) // BK
    pid = tl.program_id(0)
    # Groups of channels of one box adjoin, for the L2.
    channel0, pid = pid % ((O + G - 1) // G) * G, pid // ((O + G - 1) // G)
    w0, pid = pid % w_tiles * BW, pid // w_tiles
    h0, pid = pid % h_tiles * BH, pid // h_tiles
    first, b = pid % runs * run, (pid // runs).to(tl.int64)
    stop = tl.minimum(first + run, frames)
    m = tl.arange(0, BH * BW)
    rows, cols = m // BW, m % BW
    inside = (h0 + rows < h) & (w0 + cols < w)
    out_ptr += b * o_b + tl.cast(h0, tl.int64) * PH * o_h + tl.cast(w0, tl.int64) * PW * o_w
    k = tl.arange(0, BK)
    acc = tl.zeros([BH * BW, N], tl.float32)
    acc2 = acc
    if N2 > 0:
        acc2 = tl.zeros([BH * BW, N2], tl.float32)
    oldest = first - (KT - 1)
    if not REPEAT:
        oldest = tl.maximum(oldest, -cached)  # frames before those are zeros
    for at_t in tl.range(oldest, stop, disable_licm=True):
        weights, real = _columns(0, channel0, at_t, O, G, KT, TAPS * C, N)
        weights2, real2 = weights, real
        if N2 > 0:
            weights2, real2 = _columns(N, channel0, at_t, O, G, KT, TAPS * C, N2)
        # A frame of the cache or of x: before them the oldest repeated, after them the last.
        seen = tl.cast(tl.minimum(tl.maximum(at_t, -cached), t - 1), tl.int64)
        old = seen < 0
        frame = tl.where(old, cache_ptr + b * c_b + (seen + cached) * c_t, x_ptr + b * x_b + seen * x_t)
        s_h, s_w = tl.where(old, c_h, x_h), tl.where(old, c_w, x_w)
        for step in tl.range(0, TAPS * K_TILES):
            tap, k0 = step // K_TILES, step % K_TILES * BK
            y0, x0 = h0 + tap // KW - KH // 2, w0 + tap % KW - KW // 2
            if EDGE == 0:
                there = (y0 + rows >= 0) & (y0 + rows < h) & (x0 + cols >= 0) & (x0 + cols < w)
                origin = frame + tl.cast(y0, tl.int64) * s_h + tl.cast(x0, tl.int64) * s_w + k0
                at = origin + (rows * s_h + cols * s_w)[:, None] + k[None, :]
            else:
                there = inside
                origin = frame + k0
                line = _along(y0 + rows, h, EDGE).to(tl.int64) * s_h + _along(x0 + cols, w, EDGE).to(tl.int64) * s_w
                at = origin + line[:, None] + k[None, :]
            k_at = tap * C + k0 + k
            if C % BK == 0:
                a = tl.load(at, mask=there[:, None], other=0.0)
                wt = tl.load(weight_ptr + (weights + k_at[:, None]), mask=real[None, :], other=0.0)
            else:
                left = k0 + k < C
                a = tl.load(at, mask=there[:, None] & left[None, :], other=0.0)
                wt = tl.load(weight_ptr + (weights + k_at[:, None]), mask=real[None, :] & left[:, None], other=0.0)
            acc = tl.dot(a, wt, acc, input_precision=PRECISION)
            if N2 > 0:
                if C % BK == 0:
                    wt2 = tl.load(weight_ptr + (weights2 + k_at[:, None]), mask=real2[None, :], other=0.0)
                else:
                    wt2 = tl.load(
                        weight_ptr + (weights2 + k_at[:, None]), mask=real2[None, :] & (k0 + k < C)[:, None], other=0.0
                    )
                acc2 = tl.dot(a, wt2, acc2, input_precision=PRECISION)
        slot = (at_t + KT) % KT
        ready = inside & (at_t >= first)
        frame_out = out_ptr + tl.cast(at_t, tl.int64) * PT * o_t
        acc = _emit(
            acc, 0, channel0, slot, bias_ptr, frame_out, rows, cols, ready, o_c, o_t, o_h, o_w,
            O, G, PT, PH, PW, HAS_BIAS, CLAMP, BYTES, x_ptr.dtype.element_ty, N,
        )  # fmt: skip
        if N2 > 0:
            acc2 = _emit(
                acc2, N, channel0, slot, bias_ptr, frame_out, rows, cols, ready, o_c, o_t, o_h, o_w,
                O, G, PT, PH, PW, HAS_BIAS, CLAMP, BYTES, x_ptr.dtype.element_ty, N2,
            )  # fmt: skip


def tile_span(x: Tensor, config: HeadConfig) -> int:
    """Largest offset, in elements, from a tile's origin that is computed in int32."""
    return config.block_h * abs(x.stride(2)) + config.block_w * abs(x.stride(3)) + x.shape[4]


def launch_fwd(
    out: Tensor,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    pad_mode: str,
    pad_end: int,
    patch: Sequence[int],
    clamp: bool,
    config: HeadConfig,
) -> None:
    """Launch over channels-last ``x`` and a packed weight into ``out [B, C, T, H, W]`` of any strides."""
    b, t, h, w, c = x.shape
    o, _, kt, kh, kw = packed.shape
    frames, past = t + pad_end, x if cache is None else cache
    run = min(config.run, frames)
    tiles = (cdiv(h, config.block_h), cdiv(w, config.block_w))
    with on_device(x):
        _decode_head_fwd_kernel[(b * cdiv(frames, run) * tiles[0] * tiles[1] * cdiv(o, config.channels),)](
            x, past, packed, bias, out,
            0 if cache is None else cache.shape[1], t, h, w, frames, run, cdiv(frames, run), *tiles,
            *x.stride()[:4], *past.stride()[:4], *out.stride(),
            c, o, config.channels, kt, kh, kw, *patch,
            _EDGES[spatial_mode(pad_mode)], repeats_frames(pad_mode), bias is not None, clamp,
            out.dtype == torch.uint8, _precision(x),
            config.block_h, config.block_w, config.block_k, config.block_n, config.block_n2,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip


def decode_head_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    pad_mode: str,
    pad_end: int,
    patch: Sequence[int],
    clamp: bool,
) -> None:
    """``impl="triton"`` of the op."""
    refuse_float64(_OP, x)
    if cache is not None and cache.shape[1] == 0:
        cache = None
    o, c, kt, _, _ = weight.shape
    config = select(arch_for(x), c=c, o=o, kt=kt, itemsize=x.element_size())
    if max(tile_span(view, config) for view in (x, cache) if view is not None) >= 2**31:
        raise UnsupportedError(f"{_OP}: impl 'triton' needs tiles within 2^31 elements; copy the view")
    if out.numel():
        launch_fwd(out, x, pack_weight(weight), bias, cache, pad_mode, pad_end, patch, clamp, config)
