"""Queries and keys in int8, one scale a row, a constant taken off the keys: one read of each, where they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs.quantize_qk import QuantizeConfig, select
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.reference.quantize_qk import CODES, sampled

from .boxes import stride_unit
from .launch import cdiv, on_device, refuse_float64

# Sizes are not specialised: a new length never compiles again.
_SIZES = ["heads", "kv_heads", "s", "tiles", "start", "count", "step"]


@triton.jit
def sizes(x):
    """Absolute values; a NaN compares false, and counts as infinite, which a maximum does not lose."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, float("inf"))


@triton.jit
def row_scale(size, LARGEST: tl.constexpr):
    """A scale for each row of `sizes`, the factor that makes codes of the row, and whether it is finite."""
    top = tl.max(size, 1)
    good = top < float("inf")
    # 2^-118: rows of zeros keep a scale, and a reciprocal, that are normal numbers.
    top = tl.maximum(tl.where(good, top, 1.0), 3.009265538105056e-36)
    return tl.where(good, top / LARGEST, float("nan")), tl.where(good, LARGEST / top, 0.0), good


@triton.jit
def to_codes(x, factor, good, LARGEST: tl.constexpr):
    """``x * factor`` rounded to the nearest (even) code: an integer if the ``LARGEST`` is 127, e4m3 (its byte) if 448.

    In integer arithmetic, which every card and the interpreter do alike; not all of them convert to e4m3.
    """
    wide = tl.where(good[:, None], x, 0.0) * factor[:, None]
    if LARGEST == 127:
        # The low byte of the sum with 1.5·2²³.
        return (wide + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    # A product may be rounded past the largest code by half a unit of fp32.
    size = tl.minimum(tl.abs(wide), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # Three bits of mantissa, to even, and an exponent that begins 120 later; below 2⁻⁶ multiples of 2⁻⁹: one of the
    # lowest bit of 2¹⁴.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = (size + 16384.0).to(tl.int32, bitcast=True) & 15
    code = tl.where(size < 0.015625, small, normal)
    return (code | tl.where(wide < 0, 128, 0)).to(tl.int8)


@triton.jit(do_not_specialize=_SIZES)
def _key_mean_kernel(
    k_ptr, mean_ptr, kv_heads, start, count, step, k_b, k_s, k_h,
    D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    batch, head = (pid // kv_heads).to(tl.int64), (pid % kv_heads).to(tl.int64)
    k_b, k_s, k_h = tl.cast(k_b, tl.int64) * UNIT, tl.cast(k_s, tl.int64) * UNIT, tl.cast(k_h, tl.int64) * UNIT
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < D
    rows = tl.arange(0, ROWS)
    k_head = k_ptr + batch * k_b + head * k_h + start * k_s
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in tl.range(0, count, ROWS):
        at = (i + rows).to(tl.int64) * step
        mask = (i + rows < count)[:, None] & col_mask[None, :]
        x = tl.load(k_head + at[:, None] * k_s + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        # Any constant is exact; one bad token must not take the others with it.
        total += tl.where(tl.abs(x) < float("inf"), x, 0.0)
    mean = tl.sum(total, 0) / tl.maximum(count, 1).to(tl.float32)
    tl.store(mean_ptr + pid.to(tl.int64) * D + cols, mean, mask=col_mask)


@triton.jit
def _quantize_rows(
    x_ptr, x_b, x_s, x_h, mean_ptr, x8_ptr, scale_ptr, shift_ptr, batch, head, heads, mean_head, mean_heads, first, s,
    D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """``ROWS`` tokens of a head; of q if there is a ``shift_ptr``, else of k, less the mean."""
    x_b, x_s, x_h = tl.cast(x_b, tl.int64) * UNIT, x_s * UNIT, tl.cast(x_h, tl.int64) * UNIT
    cols = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, ROWS)
    row_mask = first + rows < s
    mask = row_mask[:, None] & (cols < D)[None, :]
    x_tile = x_ptr + batch * x_b + first * x_s + head * x_h
    x = tl.load(x_tile + rows[:, None] * x_s + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + (batch * mean_heads + mean_head) * D + cols, mask=cols < D, other=0.0)[None, :]
    line = (batch * heads + head) * s + first + rows
    if shift_ptr is not None:
        tl.store(shift_ptr + line, tl.sum(x * mean, 1), mask=row_mask)
    else:
        x = x - mean
    scale, factor, good = row_scale(sizes(x), LARGEST)
    tl.store(scale_ptr + line, scale, mask=row_mask)
    to = x8_ptr + ((batch * s + first) * heads + head) * D
    tl.store(to + rows[:, None] * (heads * D) + cols[None, :], to_codes(x, factor, good, LARGEST), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _quantize_qk_fwd_kernel(
    q_ptr, k_ptr, mean_ptr, q8_ptr, k8_ptr, q_scale_ptr, k_scale_ptr, shift_ptr,
    heads, kv_heads, s, tiles, q_b, q_s, q_h, k_b, k_s, k_h,
    D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    # Heads of one token adjoin in memory and in time: those of q, then those of k.
    pid = tl.program_id(0)
    both = heads + kv_heads
    head = pid % both
    first = (pid // both % tiles * ROWS).to(tl.int64)
    batch = (pid // both // tiles).to(tl.int64)
    if head < heads:
        _quantize_rows(
            q_ptr, q_b, q_s, q_h, mean_ptr, q8_ptr, q_scale_ptr, shift_ptr, batch, head, heads,
            head // (heads // kv_heads), kv_heads, first, s, D, UNIT, ROWS, BLOCK_D, LARGEST,
        )  # fmt: skip
    else:
        _quantize_rows(
            k_ptr, k_b, k_s, k_h, mean_ptr, k8_ptr, k_scale_ptr, None, batch, head - heads, kv_heads,
            head - heads, kv_heads, first, s, D, UNIT, ROWS, BLOCK_D, LARGEST,
        )  # fmt: skip


def launch_mean(k: Tensor, start: int, count: int, step: int, config: QuantizeConfig) -> Tensor:
    """``[B, kv_heads, D]`` fp32: the mean of ``count`` tokens of ``k``, each ``step``-th from ``start`` on."""
    b, _, kv_heads, head_dim = k.shape
    mean = k.new_empty((b, kv_heads, head_dim), dtype=torch.float32)
    unit = stride_unit(k)
    with on_device(k):
        _key_mean_kernel[(b * kv_heads,)](
            k, mean, kv_heads, start, count, step, *(n // unit for n in k.stride()[:3]),
            head_dim, unit, config.rows, config.block_d, num_warps=config.num_warps,
        )  # fmt: skip
    return mean


def launch_fwd(
    q: Tensor, k: Tensor, outputs: tuple[Tensor, ...], mean_start: int, mean_stop: int, precision: str,
    config: QuantizeConfig,
) -> None:  # fmt: skip
    """Launch over ``[B, S, heads, D]`` views into contiguous codes (as int8), scales and ``lse_shift``."""
    b, s, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    unit = stride_unit(q, k)
    steps = [[step // unit for step in x.stride()[:3]] for x in (q, k)]
    tiles = cdiv(s, config.rows)
    mean = launch_mean(k, mean_start, *sampled(mean_start, mean_stop), config)
    with on_device(q):
        _quantize_qk_fwd_kernel[(tiles * (heads + kv_heads) * b,)](
            q, k, mean, *outputs, heads, kv_heads, s, tiles, *steps[0], *steps[1],
            head_dim, unit, config.rows, config.block_d, CODES[precision][1], num_warps=config.num_warps,
        )  # fmt: skip


def quantize_qk(
    q: Tensor, k: Tensor, mean_start: int, mean_stop: int, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``impl="triton"`` of the op."""
    refuse_float64("quantize_qk", q, k)
    b, s, heads, head_dim = q.shape
    config = select(arch_for(q), head_dim=head_dim, itemsize=q.element_size())
    if max(q.stride(1), k.stride(1), heads * head_dim) * config.rows >= 2**31:
        raise UnsupportedError("quantize_qk: impl 'triton' needs tokens less than 2^24 elements apart")
    codes = [x.new_empty(x.shape, dtype=torch.int8) for x in (q, k)]
    floats = [q.new_empty((b, n, s), dtype=torch.float32) for n in (heads, k.shape[2], heads)]
    if q.numel():
        launch_fwd(q, k, (*codes, *floats), mean_start, mean_stop, precision, config)
    codes = [x.view(CODES[precision][0]) for x in codes]
    return codes[0], codes[1], floats[0], floats[1], floats[2]
