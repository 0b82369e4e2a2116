"""RMSNorm of strided rows: one read of x, one write of y, fp32 inside; and its backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


def places(x: Tensor) -> tuple[tuple[int, ...], int]:
    """Sizes and strides that `row_offsets` takes for the rows of ``x``, and how many dimensions it needs."""
    dims = collapse_rows(x)
    sizes, strides = zip(*([(1, 0)] * (4 - len(dims)) + dims), strict=True)
    return (*sizes[1:], *strides), len(dims)


def launch_fwd(x: Tensor, y: Tensor, weight: Tensor | None, eps: float, config: row.RowConfig) -> None:
    """Launch over the rows of ``x [..., D]`` into contiguous ``y``."""
    if y.numel() == 0:
        return
    d = x.shape[-1]
    n_rows = x.numel() // d
    where, dims = places(x)
    with on_device(x):
        _rms_norm_fwd_kernel[(cdiv(n_rows, config.rows),)](
            x, y, weight,
            n_rows, d, eps,
            *where,
            weight is not None, dims, config.rows, config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``impl="triton"`` of the op."""
    refuse_float64("rms_norm", x, weight)
    config = row.select(arch_for(x), op="rms_norm", width=x.shape[-1], itemsize=x.element_size())
    y = x.new_empty(x.shape)
    launch_fwd(x, y, weight, eps, config)
    return y


# Backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _rms_norm_dx_kernel(
    dy_ptr, x_ptr, dx_ptr, rstd_ptr, weight_ptr,
    n_rows, d, eps,
    n1, n2, n3, s0, s1, s2, s3,
    HAS_WEIGHT: tl.constexpr, WRITE_DX: tl.constexpr, WRITE_STATS: tl.constexpr,
    DIMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The statistic of each row, and dx = (g - xhat * mean(g * xhat)) * rstd."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (cols < d)[None, :]
    offsets = row_offsets(rows, n1, n2, n3, s0, s1, s2, s3, DIMS)
    x = tl.load(x_ptr + offsets[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / d + eps)
    if WRITE_STATS:
        tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    if WRITE_DX:
        xhat = x * rstd[:, None]
        flat = rows[:, None] * d + cols[None, :]
        g = tl.load(dy_ptr + flat, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g = g * tl.load(weight_ptr + cols[None, :], mask=(cols < d)[None, :], other=0.0).to(tl.float32)
        dx = (g - xhat * (tl.sum(g * xhat, 1) / d)[:, None]) * rstd[:, None]
        tl.store(dx_ptr + flat, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_dweight_kernel(
    dy_ptr, x_ptr, rstd_ptr, dweight_ptr,
    n_rows, d,
    n1, n2, n3, s0, s1, s2, s3,
    DIMS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of dy * xhat over each chunk of rows, in a fixed order."""
    # Chunks on the first axis: the second ends at 65535, and rows per head are many.
    chunk = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, CHUNK, ROWS):
        rows = chunk * CHUNK + start + tl.arange(0, ROWS)
        mask = (rows < n_rows)[:, None] & (cols < d)[None, :]
        offsets = row_offsets(rows, n1, n2, n3, s0, s1, s2, s3, DIMS)
        x = tl.load(x_ptr + offsets[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * d + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        total += dy * x * rstd[:, None]
    tl.store(dweight_ptr + chunk * d + cols, tl.sum(total, 0), mask=cols < d)


def launch_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dx: Tensor | None,
    dweight: Tensor | None,
    config: row.RowConfig,
    sum_config: row.SumConfig,
) -> None:
    """Write contiguous ``dx`` and the fp32 sums ``dweight [chunks, D]``, those given; ``dy`` is contiguous."""
    d = x.shape[-1]
    n_rows = x.numel() // d
    where, dims = places(x)
    rstd = None if dweight is None else x.new_empty((n_rows,), dtype=torch.float32)
    with on_device(x):
        _rms_norm_dx_kernel[(cdiv(n_rows, config.rows),)](
            dy, x, dx, rstd, weight,
            n_rows, d, eps, *where,
            weight is not None, dx is not None, rstd is not None,
            dims, config.rows, config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip
        if dweight is not None:
            _rms_norm_dweight_kernel[(dweight.shape[0], cdiv(d, sum_config.block_d))](
                dy, x, rstd, dweight,
                n_rows, d, *where,
                dims, sum_config.chunk, sum_config.rows, sum_config.block_d,
                num_warps=sum_config.num_warps,
            )  # fmt: skip


def rms_norm_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """``impl="triton"`` of the backward op: gradients of (x, weight), those in ``needs``."""
    (dy,) = grads
    assert dy is not None
    refuse_float64("rms_norm_backward", dy, x, weight)
    arch = arch_for(x)
    shape = {"op": "rms_norm_backward", "width": x.shape[-1], "itemsize": x.element_size()}
    config, sum_config = row.select(arch, **shape), row.select_sum(arch, **shape)
    dx = x.new_empty(x.shape) if needs[0] else None
    sums = None
    if needs[1] and weight is not None:
        chunks = cdiv(x.shape[:-1].numel(), sum_config.chunk)
        sums = x.new_empty((chunks, x.shape[-1]), dtype=torch.float32)
    if x.numel() and (dx is not None or sums is not None):
        # Autograd may hand over an expanded gradient (that of a sum, say); a plain one is not copied.
        launch_bwd(dy.contiguous(), x, weight, eps, dx, sums, config, sum_config)
    out = [] if dx is None else [dx]
    if sums is not None and weight is not None:
        out.append(sums.sum(0).to(weight.dtype))
    return out
