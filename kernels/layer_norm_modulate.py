"""LayerNorm + affine + modulation: one read of x, one write of y, fp32 inside."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for, row

from .launch import bs_strides, cdiv, on_device, refuse_float64


@triton.jit
def norm_modulate_rows(
    x, row_b, row_s, cols, mask, col_mask, d, eps,
    scale_ptr, scale_b, scale_s, shift_ptr, shift_b, shift_s, weight_ptr, bias_ptr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Normalise and modulate fp32 rows ``x [rows, block_d]``; columns past d must be zero in ``x``."""
    mean = tl.sum(x, 1) / d
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / d + eps)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + cols[None, :], mask=col_mask[None, :], other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + cols[None, :], mask=col_mask[None, :], other=0.0).to(tl.float32)
    if HAS_SCALE:
        at = scale_ptr + (row_b * scale_b + row_s * scale_s)[:, None] + cols[None, :]
        y = y * (1.0 + tl.load(at, mask=mask, other=0.0).to(tl.float32))
    if HAS_SHIFT:
        at = shift_ptr + (row_b * shift_b + row_s * shift_s)[:, None] + cols[None, :]
        y = y + tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _layer_norm_modulate_fwd_kernel(
    x_ptr, y_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr,
    n_rows, s, d, eps,
    x_b, x_s, scale_b, scale_s, shift_b, shift_s,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # int64: a row index times a stride passes 2^31 elements on long clips.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_b, row_s = rows // s, rows % s
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < d
    mask = (rows < n_rows)[:, None] & col_mask[None, :]
    x = tl.load(x_ptr + (row_b * x_b + row_s * x_s)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    y = norm_modulate_rows(
        x, row_b, row_s, cols, mask, col_mask, d, eps,
        scale_ptr, scale_b, scale_s, shift_ptr, shift_b, shift_s, weight_ptr, bias_ptr,
        HAS_SCALE, HAS_SHIFT, HAS_WEIGHT, HAS_BIAS,
    )  # fmt: skip
    tl.store(y_ptr + rows[:, None] * d + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def launch_fwd(
    x: Tensor,
    y: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    config: row.RowConfig,
) -> None:
    """Launch over ``x [B, S, D]`` into contiguous ``y``."""
    b, s, d = x.shape
    n_rows = b * s
    if n_rows == 0:
        return
    with on_device(x):
        _layer_norm_modulate_fwd_kernel[(cdiv(n_rows, config.rows),)](
            x, y, scale, shift, weight, bias,
            n_rows, s, d, eps,
            x.stride(0), x.stride(1), *bs_strides(scale), *bs_strides(shift),
            scale is not None, shift is not None, weight is not None, bias is not None,
            config.rows, config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``impl="triton"`` of the op."""
    refuse_float64("layer_norm_modulate", x, scale, shift, weight, bias)
    config = row.select(arch_for(x), op="layer_norm_modulate", width=x.shape[-1])
    y = x.new_empty(x.shape)
    launch_fwd(x, y, scale, shift, weight, bias, eps, config)
    return y
