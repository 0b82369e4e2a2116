"""Rows of heads as pairs: loads, stores and means that the rotary kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def split_pairs(tile, BLOCK_HALF: tl.constexpr):
    """The even and the odd elements of the last dimension, from registers: neighbours share a thread."""
    return tl.split(tl.reshape(tile, [tile.shape[0], BLOCK_HALF, 2]))


@triton.jit
def load_pairs(ptr, rows, row_mask, half, HALF_LAYOUT: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """The first and second members of all pairs of some rows (offsets ``rows``) as two fp32 tiles [rows, half]."""
    if HALF_LAYOUT:
        cols = tl.arange(0, BLOCK_HALF)
        mask = row_mask[:, None] & (cols < half)[None, :]
        at = ptr + rows[:, None] + cols[None, :]
        a = tl.load(at, mask=mask, other=0.0)
        b = tl.load(at + half, mask=mask, other=0.0)
    elif rows.shape[0] == 1:
        # A row that all heads share: each thread loads just its own few, already where the arithmetic wants them.
        cols = tl.arange(0, BLOCK_HALF)
        mask = row_mask[:, None] & (cols < half)[None, :]
        a = tl.load(ptr + rows[:, None] + (2 * cols)[None, :], mask=mask, other=0.0)
        b = tl.load(ptr + rows[:, None] + (2 * cols + 1)[None, :], mask=mask, other=0.0)
    else:
        # Both members in one wide load; de-interleaved in registers, strided loads would be two bytes each.
        cols = tl.arange(0, 2 * BLOCK_HALF)
        mask = row_mask[:, None] & (cols < 2 * half)[None, :]
        a, b = split_pairs(tl.load(ptr + rows[:, None] + cols[None, :], mask=mask, other=0.0), BLOCK_HALF)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def load_table(ptr, rows, row_mask, half, ODD: tl.constexpr, HALF_LAYOUT: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """One value a pair: the first half of a half table, the even or the odd entries of an interleaved one."""
    cols = tl.arange(0, BLOCK_HALF)
    mask = row_mask[:, None] & (cols < half)[None, :]
    if HALF_LAYOUT:
        out = tl.load(ptr + rows[:, None] + cols[None, :], mask=mask, other=0.0)
    elif rows.shape[0] == 1:
        out = tl.load(ptr + rows[:, None] + (2 * cols + ODD)[None, :], mask=mask, other=0.0)
    else:
        wide = tl.arange(0, 2 * BLOCK_HALF)
        mask = row_mask[:, None] & (wide < 2 * half)[None, :]
        even, odd = split_pairs(tl.load(ptr + rows[:, None] + wide[None, :], mask=mask, other=0.0), BLOCK_HALF)
        out = odd if ODD else even
    return out.to(tl.float32)


@triton.jit
def store_pairs(ptr, rows, row_mask, half, a, b, HALF_LAYOUT: tl.constexpr, BLOCK_HALF: tl.constexpr):
    dtype: tl.constexpr = ptr.dtype.element_ty
    if HALF_LAYOUT:
        cols = tl.arange(0, BLOCK_HALF)
        mask = row_mask[:, None] & (cols < half)[None, :]
        at = ptr + rows[:, None] + cols[None, :]
        tl.store(at, a.to(dtype), mask=mask)
        tl.store(at + half, b.to(dtype), mask=mask)
    else:
        cols = tl.arange(0, 2 * BLOCK_HALF)
        mask = row_mask[:, None] & (cols < 2 * half)[None, :]
        y = tl.reshape(tl.join(a.to(dtype), b.to(dtype)), [a.shape[0], 2 * BLOCK_HALF])
        tl.store(ptr + rows[:, None] + cols[None, :], y, mask=mask)


@triton.jit
def mean_of_pairs(a, b, n, WHOLE_ROW: tl.constexpr):
    """Mean over the pairs of a row, or of all rows (padding must be zero); broadcasts over [rows, half]."""
    total = tl.sum(a + b, 1)
    if WHOLE_ROW:
        return tl.sum(total, 0) / n
    else:
        return (total / n)[:, None]


def table_strides(table: Tensor | None) -> tuple[int, int, int]:
    """Batch, token and head strides of a ``[1 or B, S_rot, 1 or heads, head_dim]`` table; 0 where it is broadcast."""
    if table is None:
        return 0, 0, 0
    b, s, h, _ = table.stride()
    return (b if table.shape[0] > 1 else 0, s, h if table.shape[2] > 1 else 0)


def four_dims(table: Tensor | None) -> Tensor | None:
    """``[S_rot, head_dim]`` as ``[1, S_rot, 1, head_dim]``; four dimensions and None unchanged."""
    return table[None, :, None, :] if table is not None and table.dim() == 2 else table
