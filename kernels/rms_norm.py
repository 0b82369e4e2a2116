"""RMSNorm of strided rows: one read of x, one write of y, fp32 inside."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for, row

from .launch import cdiv, collapse_rows, on_device, refuse_float64


@triton.jit
def row_offsets(rows, n1, n2, n3, s0, s1, s2, s3, DIMS: tl.constexpr):
    """Offsets of ``rows`` in up to four leading dimensions; sizes are those of the inner three, outermost first."""
    # The common case, evenly spaced rows, costs no division.
    if DIMS == 1:
        return rows * s3
    if DIMS == 2:
        return rows // n3 * s2 + rows % n3 * s3
    outer = rows // n3
    if DIMS == 3:
        return outer // n2 * s1 + outer % n2 * s2 + rows % n3 * s3
    return outer // n2 // n1 * s0 + outer // n2 % n1 * s1 + outer % n2 * s2 + rows % n3 * s3


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, y_ptr, weight_ptr,
    n_rows, d, eps,
    n1, n2, n3, s0, s1, s2, s3,
    HAS_WEIGHT: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (cols < d)[None, :]
    offsets = row_offsets(rows, n1, n2, n3, s0, s1, s2, s3, DIMS)
    x = tl.load(x_ptr + offsets[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 1) / d + eps)[:, None]
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + cols[None, :], mask=(cols < d)[None, :], other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * d + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def launch_fwd(x: Tensor, y: Tensor, weight: Tensor | None, eps: float, config: row.RowConfig) -> None:
    """Launch over the rows of ``x [..., D]`` into contiguous ``y``."""
    if y.numel() == 0:
        return
    d = x.shape[-1]
    n_rows = x.numel() // d
    dims = collapse_rows(x)
    sizes, strides = zip(*([(1, 0)] * (4 - len(dims)) + dims), strict=True)
    with on_device(x):
        _rms_norm_fwd_kernel[(cdiv(n_rows, config.rows),)](
            x, y, weight,
            n_rows, d, eps,
            *sizes[1:], *strides,
            weight is not None, len(dims), config.rows, config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``impl="triton"`` of the op."""
    refuse_float64("rms_norm", x, weight)
    config = row.select(arch_for(x), op="rms_norm", width=x.shape[-1])
    y = x.new_empty(x.shape)
    launch_fwd(x, y, weight, eps, config)
    return y
