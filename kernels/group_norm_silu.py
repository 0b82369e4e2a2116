"""Group norm + SiLU over channels-last pixels: partial statistics, their merge, and one pass that applies them.

The statistics of a group span a whole clip, so x is read twice and written once. Every program takes a run of pixels
with all their channels, which keeps loads wide whatever the groups are: the partial sums are of single channels, and
groups exist only in the merge. All three kernels add in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs import group_norm_silu as configs
from pyvideo_kernels.errors import UnsupportedError

from .launch import cdiv, merged_rows, on_device, refuse_float64
from .rms_norm_silu import row_offsets

# The grid's second axis holds no more.
_MOST_SAMPLES = 65535


@triton.jit
def sample_offset(sample, frames, sb, st):
    """Where a sample begins: a clip (``frames`` is 1) or one frame of one. int64, like ``sample``."""
    return (sample // frames) * sb + (sample % frames) * st


@triton.jit
def nearest(index, ratio, size):
    """The place among ``size`` that ``F.interpolate(mode="nearest")`` reads: it multiplies in float32."""
    return tl.minimum(tl.floor(index.to(tl.float32) * ratio).to(tl.int32), size - 1)


@triton.jit
def latent_offsets(pixels, h, w, tz, hz, wz, rt, rh, rw, z_t, z_h, z_w, APART: tl.constexpr):
    """Offsets in a low-resolution tensor of int32 ``pixels`` of a clip. APART: frame 0 reads 0, the rest the rest."""
    x = pixels % w
    rows = pixels // w
    frame = rows // h
    if APART:
        t = tl.where(frame == 0, 0, 1 + nearest(frame - 1, rt, tz - 1))
    else:
        t = nearest(frame, rt, tz)
    return t.to(tl.int64) * z_t + nearest(rows % h, rh, hz).to(tl.int64) * z_h + nearest(x, rw, wz).to(tl.int64) * z_w


@triton.jit
def _group_norm_silu_stats_kernel(
    x_ptr, pivot_ptr, away_ptr, m2_ptr,
    n, c, chunk, frames, sb, st, n1, n2, n3, s0, s1, s2, s3,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean, as a sum of two, and squared deviations of each channel over ``chunk`` pixels: ``[samples, parts, C]``."""
    part = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < c
    x_ptr += sample_offset(sample, frames, sb, st) + cols[None, :]
    start = part * chunk
    count = tl.minimum(n - start, chunk).to(tl.int32)
    local = tl.arange(0, ROWS)
    mask = (local < count)[:, None] & col_mask[None, :]
    at = row_offsets(start + local, n1, n2, n3, s0, s1, s2, s3)[:, None]
    early = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    # Deviations are from the mean of the first pixels: squares about zero would drown a small variance in a large mean.
    pivot = tl.sum(early, 0) / tl.minimum(count, ROWS).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    squares = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    for first in range(0, count, ROWS):
        mask = (local < count - first)[:, None] & col_mask[None, :]
        at = row_offsets(start + first + local, n1, n2, n3, s0, s1, s2, s3)[:, None]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        away = tl.where(mask, x - pivot[None, :], 0.0)
        total += away
        squares += away * away
    elements = count.to(tl.float32)
    away = tl.sum(total, 0) / elements
    m2 = tl.sum(squares, 0) - away * away * elements
    at = (sample * tl.num_programs(0) + part) * c + cols
    # Added, the two would round away what tells neighbouring parts apart.
    tl.store(pivot_ptr + at, pivot, mask=col_mask)
    tl.store(away_ptr + at, away, mask=col_mask)
    tl.store(m2_ptr + at, m2, mask=col_mask)


@triton.jit
def _group_norm_silu_merge_kernel(
    pivot_ptr, away_ptr, m2_ptr, mean_ptr, rest_ptr, rstd_ptr,
    n, c, chunk, parts, width, elements, eps,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Mean, as a sum of two, and 1/sqrt(var + eps) of one group of ``width`` channels: ``[samples, groups]``."""
    group = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_G)
    base = sample * parts * c + group * width
    pivot = tl.load(pivot_ptr + base)
    total = tl.zeros([BLOCK_P, BLOCK_G], dtype=tl.float32)
    for first in range(0, parts, BLOCK_P):
        index = first + tl.arange(0, BLOCK_P).to(tl.int64)
        mask = (index < parts)[:, None] & (cols < width)[None, :]
        at = base + index[:, None] * c + cols[None, :]
        away = (tl.load(pivot_ptr + at, mask=mask, other=0.0) - pivot) + tl.load(away_ptr + at, mask=mask, other=0.0)
        count = tl.minimum(n - index * chunk, chunk).to(tl.float32)
        total += tl.where(mask, away * count[:, None], 0.0)
    centre = tl.sum(tl.sum(total, 1), 0) / elements
    total = tl.zeros([BLOCK_P, BLOCK_G], dtype=tl.float32)
    for first in range(0, parts, BLOCK_P):
        index = first + tl.arange(0, BLOCK_P).to(tl.int64)
        mask = (index < parts)[:, None] & (cols < width)[None, :]
        at = base + index[:, None] * c + cols[None, :]
        away = (tl.load(pivot_ptr + at, mask=mask, other=0.0) - pivot) + tl.load(away_ptr + at, mask=mask, other=0.0)
        away -= centre
        count = tl.minimum(n - index * chunk, chunk).to(tl.float32)
        total += tl.where(mask, tl.load(m2_ptr + at, mask=mask, other=0.0) + away * away * count[:, None], 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / elements
    at = sample * tl.num_programs(0) + group
    tl.store(mean_ptr + at, pivot)
    tl.store(rest_ptr + at, centre)
    tl.store(rstd_ptr + at, tl.rsqrt(variance + eps))


@triton.jit
def _group_norm_silu_fwd_kernel(
    x_ptr, y_ptr, mean_ptr, rest_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    n, c, groups, width, frames, sb, st, n1, n2, n3, s0, s1, s2, s3,
    h, w, tz, hz, wz, rt, rh, rw, scale_b, scale_t, scale_h, scale_w, shift_b, shift_t, shift_h, shift_w,
    APART: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    # From the end to the beginning: what the statistics read last is still in the L2 cache.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    sample = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    cols = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < c
    at = sample * groups + cols // width
    mean = tl.load(mean_ptr + at, mask=col_mask, other=0.0)
    rest = tl.load(rest_ptr + at, mask=col_mask, other=0.0)
    factor = tl.load(rstd_ptr + at, mask=col_mask, other=0.0)
    if weight_ptr is not None:
        factor *= tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    clip = sample // frames
    x_ptr += sample_offset(sample, frames, sb, st) + cols[None, :]
    y_ptr += sample * n * c + cols[None, :]
    if scale_ptr is not None:
        scale_ptr += clip * scale_b + cols[None, :]
    if shift_ptr is not None:
        shift_ptr += clip * shift_b + cols[None, :]
    # int64: the last block of a large decoded clip is more than 2^31 elements away.
    for step in tl.static_range(STEPS):
        rows = (block.to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        mask = (rows < n)[:, None] & col_mask[None, :]
        x = tl.load(x_ptr + row_offsets(rows, n1, n2, n3, s0, s1, s2, s3)[:, None], mask=mask, other=0.0)
        # The mean is taken off first and in two parts: folded into the bias, it would cancel where it is large.
        y = (x.to(tl.float32) - mean[None, :] - rest[None, :]) * factor[None, :]
        if bias_ptr is not None:
            y += bias[None, :]
        if scale_ptr is not None or shift_ptr is not None:
            pixels = ((sample % frames) * n + rows).to(tl.int32)
        if scale_ptr is not None:
            z = latent_offsets(pixels, h, w, tz, hz, wz, rt, rh, rw, scale_t, scale_h, scale_w, APART)
            y *= tl.load(scale_ptr + z[:, None], mask=mask, other=0.0).to(tl.float32)
        if shift_ptr is not None:
            z = latent_offsets(pixels, h, w, tz, hz, wz, rt, rh, rw, shift_t, shift_h, shift_w, APART)
            y += tl.load(shift_ptr + z[:, None], mask=mask, other=0.0).to(tl.float32)
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(y_ptr + rows[:, None] * c, y.to(y_ptr.dtype.element_ty), mask=mask)


def _latent(x: Tensor, z: Tensor | None) -> tuple[tuple[int, ...], tuple[float, ...], bool]:
    """Sizes (h, w, tz, hz, wz), ratios of (t, h, w), and whether the first frame stands apart."""
    if z is None:
        return (1, 1, 1, 1, 1), (1.0, 1.0, 1.0), False
    _, t, h, w, _ = x.shape
    _, tz, hz, wz, _ = z.shape
    if t * h * w >= 2**31:
        raise UnsupportedError(
            "group_norm_silu: `scale` and `shift` of clips from 2^31 pixels on; use impl='reference'"
        )
    apart = t > 1 and t % 2 == 1
    return (h, w, tz, hz, wz), ((tz - apart) / (t - apart), hz / h, wz / w), apart


def launch_fwd(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    per_frame: bool,
    config: configs.GroupNormConfig,
) -> None:
    """Launch over ``x [B, ..., C]`` with any row strides into contiguous ``y``."""
    if x.numel() == 0:
        return
    c, width = x.shape[-1], x.shape[-1] // groups
    frames = x.shape[1] if per_frame else 1
    samples = x.shape[0] * frames
    strides = (x.stride(0), x.stride(1) if per_frame else 0)
    sample = x[0, 0] if per_frame else x[0]
    n = sample.numel() // c
    row_sizes, row_strides = merged_rows(sample)
    rows = (*row_sizes[1:], *row_strides)
    latent, ratios, apart = _latent(x, scale if scale is not None else shift)
    if samples > _MOST_SAMPLES:
        raise UnsupportedError(f"group_norm_silu: more than {_MOST_SAMPLES} clips or frames; use impl='reference'")
    chunk = config.chunk(n, samples)
    parts, blocks_c = cdiv(n, chunk), cdiv(c, config.block_c)
    partial = x.new_empty((3, samples, parts, c), dtype=torch.float32)
    merged = x.new_empty((3, samples, groups), dtype=torch.float32)
    block_g = 1 << (width - 1).bit_length()
    with on_device(x):
        _group_norm_silu_stats_kernel[(parts, samples, blocks_c)](
            x, *partial.unbind(), n, c, chunk, frames, *strides, *rows, config.rows, config.block_c,
            num_warps=config.num_warps,
        )  # fmt: skip
        _group_norm_silu_merge_kernel[(groups, samples)](
            *partial.unbind(), *merged.unbind(), n, c, chunk, parts, width, float(n * width), eps,
            max(1, configs.MERGE_ELEMENTS // block_g), block_g, num_warps=config.merge_warps,
        )  # fmt: skip
        _group_norm_silu_fwd_kernel[(cdiv(n, config.rows * config.steps), samples, blocks_c)](
            x, y, *merged.unbind(), weight, bias, scale, shift,
            n, c, groups, width, frames, *strides, *rows, *latent, *ratios,
            *((0, 0, 0, 0) if scale is None else scale.stride()[:4]),
            *((0, 0, 0, 0) if shift is None else shift.stride()[:4]),
            apart, silu, config.rows, config.block_c, config.steps,
            num_warps=config.num_warps,
        )  # fmt: skip


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    per_frame: bool,
) -> Tensor:
    """``impl="triton"`` of the op."""
    refuse_float64("group_norm_silu", x, weight, bias, scale, shift)
    config = configs.select(arch_for(x), width=x.shape[-1], itemsize=x.element_size())
    y = x.new_empty(x.shape)
    launch_fwd(x, y, weight, bias, scale, shift, groups, eps, silu, per_frame, config)
    return y
