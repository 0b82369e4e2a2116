"""Gated residual addition, LayerNorm and modulation: x and y read once, both results written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for, row

from .launch import bs_strides, cdiv, on_device, refuse_float64
from .layer_norm_modulate import norm_modulate_rows


@triton.jit
def _gate_residual_norm_modulate_fwd_kernel(
    x_ptr, y_ptr, gate_ptr, x_new_ptr, normed_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr,
    n_rows, s, d, eps,
    x_b, x_s, y_b, y_s, gate_b, gate_s, scale_b, scale_s, shift_b, shift_s,
    HAS_GATE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_b, row_s = rows // s, rows % s
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < d
    mask = (rows < n_rows)[:, None] & col_mask[None, :]
    x = tl.load(x_ptr + (row_b * x_b + row_s * x_s)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + (row_b * y_b + row_s * y_s)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        at = gate_ptr + (row_b * gate_b + row_s * gate_s)[:, None] + cols[None, :]
        y = y * tl.load(at, mask=mask, other=0.0).to(tl.float32)
    x_new = (x + y).to(x_new_ptr.dtype.element_ty)
    out = rows[:, None] * d + cols[None, :]
    tl.store(x_new_ptr + out, x_new, mask=mask)
    # The norm sees the residual stream as it is stored, rounded: that is what the next block will read.
    normed = norm_modulate_rows(
        x_new.to(tl.float32), row_b, row_s, cols, mask, col_mask, d, eps,
        scale_ptr, scale_b, scale_s, shift_ptr, shift_b, shift_s, weight_ptr, bias_ptr,
        HAS_SCALE, HAS_SHIFT, HAS_WEIGHT, HAS_BIAS,
    )  # fmt: skip
    tl.store(normed_ptr + out, normed.to(normed_ptr.dtype.element_ty), mask=mask)


def launch_fwd(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_new: Tensor,
    normed: Tensor,
    config: row.RowConfig,
) -> None:
    """Launch over ``x, y [B, S, D]`` into contiguous ``x_new`` and ``normed``."""
    b, s, d = x.shape
    n_rows = b * s
    if n_rows == 0:
        return
    with on_device(x):
        _gate_residual_norm_modulate_fwd_kernel[(cdiv(n_rows, config.rows),)](
            x, y, gate, x_new, normed, scale, shift, weight, bias,
            n_rows, s, d, eps,
            x.stride(0), x.stride(1), y.stride(0), y.stride(1),
            *bs_strides(gate), *bs_strides(scale), *bs_strides(shift),
            gate is not None, scale is not None, shift is not None, weight is not None, bias is not None,
            config.rows, config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``impl="triton"`` of the op."""
    refuse_float64("gate_residual_norm_modulate", x, y, gate, scale, shift, weight, bias)
    config = row.select(arch_for(x), op="gate_residual_norm_modulate", width=x.shape[-1], itemsize=x.element_size())
    x_new, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    launch_fwd(x, y, gate, scale, shift, weight, bias, eps, x_new, normed, config)
    return x_new, normed
