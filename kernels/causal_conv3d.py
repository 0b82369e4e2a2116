"""Causal 3-D convolution as a GEMM over shifted boxes of pixels, one box per tap and group of input channels.

A program owns a box of output pixels of one frame and a group of output channels. Taps run from the oldest frame to
the newest, so frames that do not exist are the head of the loop and are not walked, and frames of the cache come
before those of x: the past is read where it lies. Two variants of one algorithm: boxes moved by tensor descriptors
(TMA, whose zero fill is the spatial padding) and by pointers (everything else, and views a descriptor cannot address).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs.causal_conv3d import ConvConfig, select
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.ops.causal_conv3d import pack_weight
from pyvideo_kernels.reference.causal_conv3d import output_shape

from .launch import cdiv, on_device


@triton.jit
def _program(frames, h_tiles, w_tiles, n_tiles):
    """Batch and frame (int64: they multiply strides), box and channel group; groups of one box adjoin for the L2."""
    pid = tl.program_id(0)
    group = pid % n_tiles
    pid = pid // n_tiles
    w_tile = pid % w_tiles
    pid = pid // w_tiles
    h_tile = pid % h_tiles
    pid = pid // h_tiles
    return (pid // frames).to(tl.int64), (pid % frames).to(tl.int64), h_tile, w_tile, group


@triton.jit
def _steps(first, cached, KT: tl.constexpr, PER_FRAME: tl.constexpr):
    """Loop bounds ``start, split, stop``: steps before ``split`` read the cache, frames before ``start`` are zero.

    ``first`` is the frame, relative to x, that the oldest tap reads.
    """
    missing = tl.minimum(tl.maximum(-cached - first, 0), KT)
    past = tl.minimum(tl.maximum(-first, 0), KT)
    return missing.to(tl.int32) * PER_FRAME, past.to(tl.int32) * PER_FRAME, KT * PER_FRAME


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
    acc, acc2, y_ptr, bias_ptr, residual_ptr, b, t, h0, w0, frames, h_out, w_out, o, first_channel, r_b, r_t, r_h, r_w,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Write the box; tile origins are int64 scalars, offsets within a tile fit int32 (the launcher checks)."""
    m = tl.arange(0, BH * BW)
    rows, cols = m // BW, m % BW
    pixel_mask = (h0 + rows < h_out) & (w0 + cols < w_out)
    y_ptr += (((b * frames + t) * h_out + h0) * w_out + w0) * o
    pixels = (rows * w_out + cols) * o
    residual_pixels = pixels
    if HAS_RESIDUAL:
        residual_ptr += b * r_b + t * r_t + tl.cast(h0, tl.int64) * r_h + tl.cast(w0, tl.int64) * r_w
        residual_pixels = rows * r_h + cols * r_w
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
def _causal_conv3d_fwd_kernel(
    x_ptr, cache_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    cached, h, w, o, frames, h_out, w_out, h_tiles, w_tiles, n_tiles,
    x_b, x_t, x_h, x_w, c_b, c_t, c_h, c_w, r_b, r_t, r_h, r_w,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KH * KW
    K_TILES: tl.constexpr = (C + BK - 1) // BK
    PER_FRAME: tl.constexpr = TAPS * K_TILES
    b, t, h_tile, w_tile, group = _program(frames, h_tiles, w_tiles, n_tiles)
    h0, w0, first_channel = h_tile * BH, w_tile * BW, group * (N + N2)
    m = tl.arange(0, BH * BW)
    rows, cols = m // BW * SH, m % BW * SW
    # The pixel that tap (0, 0) of the box's first pixel reads; negative at the borders.
    top, left = h0 * SH - KH // 2, w0 * SW - KW // 2
    k = tl.arange(0, BK)
    n = first_channel + tl.arange(0, N)
    weight_n = weight_ptr + n.to(tl.int64)[None, :] * (KT * TAPS * C) + k[:, None]
    acc = tl.zeros([BH * BW, N], tl.float32)
    n2 = n
    weight_n2 = weight_n
    acc2 = acc
    if N2 > 0:
        n2 = first_channel + N + tl.arange(0, N2)
        weight_n2 = weight_ptr + n2.to(tl.int64)[None, :] * (KT * TAPS * C) + k[:, None]
        acc2 = tl.zeros([BH * BW, N2], tl.float32)
    first = t * ST - (KT - 1)
    start, _, stop = _steps(first, cached, KT, PER_FRAME)
    for step in tl.range(start, stop):
        frame = first + step // PER_FRAME
        tap, k0 = step % TAPS, step % PER_FRAME // TAPS * BK
        y0, x0 = top + tap // KW, left + tap % KW
        # A frame of the cache or of x: a scalar choice of base and strides, no branch in the loop.
        old = frame < 0
        base = tl.where(old, cache_ptr + b * c_b + (frame + cached) * c_t, x_ptr + b * x_b + frame * x_t)
        s_h, s_w = tl.where(old, c_h, x_h), tl.where(old, c_w, x_w)
        base += tl.cast(y0, tl.int64) * s_h + tl.cast(x0, tl.int64) * s_w + k0
        inside = (y0 + rows >= 0) & (y0 + rows < h) & (x0 + cols >= 0) & (x0 + cols < w)
        at = base + (rows * s_h + cols * s_w)[:, None] + k[None, :]
        k_at = (step // PER_FRAME * TAPS + tap) * C + k0
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
    _finish(
        acc, acc2, y_ptr, bias_ptr, residual_ptr, b, t, h0, w0, frames, h_out, w_out, o, first_channel,
        r_b, r_t, r_h, r_w, HAS_BIAS, HAS_RESIDUAL, BH, BW, N, N2,
    )  # fmt: skip


@triton.jit
def _walk(
    acc, acc2, frames_desc, weight_desc, weight2_desc, b, frame0, top, left, first_channel, start, stop,
    TAPS: tl.constexpr, KW: tl.constexpr, PER_FRAME: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Accumulate the steps ``[start, stop)``, all of whose frames lie behind one descriptor."""
    for step in tl.range(start, stop):
        tap, k0 = step % TAPS, step % PER_FRAME // TAPS * BK
        row = step // PER_FRAME * TAPS + tap
        a = frames_desc.load([b, frame0 + step // PER_FRAME, top + tap // KW, left + tap % KW, k0]).reshape(M, BK)
        wt = weight_desc.load([first_channel, row, k0]).reshape(N, BK)
        acc = tl.dot(a, wt.T, acc, input_precision=PRECISION)
        if N2 > 0:
            wt2 = weight2_desc.load([first_channel + N, row, k0]).reshape(N2, BK)
            acc2 = tl.dot(a, wt2.T, acc2, input_precision=PRECISION)
    return acc, acc2


@triton.jit
def _causal_conv3d_descriptor_fwd_kernel(
    x_desc, cache_desc, weight_desc, weight2_desc, bias_ptr, residual_ptr, y_ptr,
    cached, o, frames, h_out, w_out, h_tiles, w_tiles, n_tiles,
    r_b, r_t, r_h, r_w,
    ST: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, C: tl.constexpr,
    HAS_CACHE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KH * KW
    PER_FRAME: tl.constexpr = TAPS * ((C + BK - 1) // BK)
    b, t, h_tile, w_tile, group = _program(frames, h_tiles, w_tiles, n_tiles)
    h0, w0, first_channel = h_tile * BH, w_tile * BW, group * (N + N2)
    top, left = h0 - KH // 2, w0 - KW // 2
    acc = tl.zeros([BH * BW, N], tl.float32)
    acc2 = acc
    if N2 > 0:
        acc2 = tl.zeros([BH * BW, N2], tl.float32)
    first = t * ST - (KT - 1)
    start, split, stop = _steps(first, cached, KT, PER_FRAME)
    box, frame0 = b.to(tl.int32), first.to(tl.int32)
    if HAS_CACHE:
        acc, acc2 = _walk(
            acc, acc2, cache_desc, weight_desc, weight2_desc, box, frame0 + cached, top, left, first_channel,
            start, split, TAPS, KW, PER_FRAME, PRECISION, BH * BW, BK, N, N2,
        )  # fmt: skip
    acc, acc2 = _walk(
        acc, acc2, x_desc, weight_desc, weight2_desc, box, frame0, top, left, first_channel,
        split, stop, TAPS, KW, PER_FRAME, PRECISION, BH * BW, BK, N, N2,
    )  # fmt: skip
    _finish(
        acc, acc2, y_ptr, bias_ptr, residual_ptr, b, t, h0, w0, frames, h_out, w_out, o, first_channel,
        r_b, r_t, r_h, r_w, HAS_BIAS, HAS_RESIDUAL, BH, BW, N, N2,
    )  # fmt: skip


def descriptors_can_address(*tensors: Tensor | None) -> bool:
    """Whether TMA can read these channels-last views: bases and strides in units of 16 bytes."""
    for x in tensors:
        if x is None:
            continue
        strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
        row = x.shape[-1] * x.element_size()
        if x.data_ptr() % 16 or row % 16 or any(s <= 0 or s * x.element_size() % 16 for s in strides):
            return False
    return True


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    # The stride of a dimension of size 1 is arbitrary, and may be one that a descriptor refuses.
    strides = [stride if size > 1 else 16 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block)


def _precision(x: Tensor) -> str:
    """What cuDNN would be allowed: TF32, or near-fp32 products from three TF32 ones (AMD multiplies fp32 itself)."""
    if arch_for(x).startswith("gfx"):
        return "ieee"
    # Ignored for 16-bit operands.
    return "tf32" if x.dtype != torch.float32 or _tf32_allowed() else "tf32x3"


def _tf32_allowed() -> bool:
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        # Set operator by operator through the newer fp32_precision, which the older flag cannot express.
        return torch.backends.cudnn.conv.fp32_precision == "tf32"


def tile_span(x: Tensor, config: ConvConfig, kernel: tuple[int, int], stride: tuple[int, int]) -> int:
    """Largest offset, in elements, from a tile's origin that the pointer variant computes in int32."""
    rows = (config.block_h - 1) * stride[0] + kernel[0]
    cols = (config.block_w - 1) * stride[1] + kernel[1]
    return rows * abs(x.stride(2)) + cols * abs(x.stride(3)) + x.shape[4]


def launch_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    stride: Sequence[int],
    residual: Tensor | None,
    y: Tensor,
    config: ConvConfig,
) -> None:
    """Launch over channels-last ``x`` and a packed ``weight`` into contiguous ``y``."""
    b, frames, h_out, w_out, o = y.shape
    _, _, h, w, c = x.shape
    kt, kh, kw = weight.shape[2:]
    n, n2 = config.block_n, config.block_n2
    tiles = (cdiv(h_out, config.block_h), cdiv(w_out, config.block_w), cdiv(o, n + n2))
    grid = (b * frames * tiles[0] * tiles[1] * tiles[2],)
    cached = 0 if cache is None else cache.shape[1]
    residual_strides = (0, 0, 0, 0) if residual is None else residual.stride()[:4]
    flags = (bias is not None, residual is not None, _precision(x))
    blocks = (config.block_h, config.block_w, config.block_k, n, n2)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    with on_device(x):
        if config.descriptors:
            box = [1, 1, config.block_h, config.block_w, config.block_k]
            taps = weight.permute(0, 2, 3, 4, 1).reshape(o, kt * kh * kw, c)
            x_desc, weight_desc = _descriptor(x, box), _descriptor(taps, [n, 1, config.block_k])
            _causal_conv3d_descriptor_fwd_kernel[grid](
                x_desc, x_desc if cache is None else _descriptor(cache, box),
                weight_desc, _descriptor(taps, [n2, 1, config.block_k]) if n2 else weight_desc,
                bias, residual, y,
                cached, o, frames, h_out, w_out, *tiles, *residual_strides,
                stride[0], kt, kh, kw, c, cache is not None, *flags, *blocks, **options,
            )  # fmt: skip
        else:
            past = x if cache is None else cache
            _causal_conv3d_fwd_kernel[grid](
                x, past, weight, bias, residual, y,
                cached, h, w, o, frames, h_out, w_out, *tiles,
                *x.stride()[:4], *past.stride()[:4], *residual_strides,
                *stride, kt, kh, kw, c, *flags, *blocks, **options,
            )  # fmt: skip


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    stride: Sequence[int],
    pad_mode: str,
    pad_end: int,
    residual: Tensor | None,
    epilogue: str | None,
    factor: Sequence[int],
    norm_weight: Tensor | None,
    norm_eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """``impl="triton"`` of the op."""
    if x.dtype == torch.float64:
        raise UnsupportedError("causal_conv3d: impl 'triton' has no float64; use impl='reference'")
    if pad_mode != "zeros" or pad_end or epilogue is not None:
        raise UnsupportedError("causal_conv3d: impl 'triton' has neither this pad_mode nor epilogues yet")
    o, c, _, kh, kw = weight.shape
    _, sh, sw = stride
    if cache is not None and cache.shape[1] == 0:
        cache = None
    packed = pack_weight(weight)
    aligned = sh == sw == 1 and descriptors_can_address(x, cache, packed.permute(0, 2, 3, 4, 1))
    config = select(arch_for(x), c=c, o=o, itemsize=x.element_size(), aligned=aligned)
    views = [view for view in (x, cache, residual) if view is not None]
    if max(tile_span(view, config, (kh, kw), (sh, sw)) for view in views) >= 2**31:
        raise UnsupportedError("causal_conv3d: impl 'triton' needs tiles within 2^31 elements; copy the view")
    y = x.new_empty(output_shape(x, weight, stride))
    if y.numel():
        launch_fwd(x, packed, bias, cache, stride, residual, y, config)
    return y, x.new_empty((0,))
