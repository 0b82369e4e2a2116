"""Channel RMS norm + SiLU over channels-last pixels: one read of x, one write of y, fp32 inside."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs import rms_norm_silu as configs

from .launch import cdiv, merged_rows, on_device, refuse_float64


@triton.jit
def row_offsets(rows, n1, n2, n3, s0, s1, s2, s3):
    """Offsets of rows numbered over [*, n1, n2, n3] with strides s0..s3; sizes of 1 cost nothing when specialised."""
    i3 = rows % n3
    rows = rows // n3
    i2 = rows % n2
    rows = rows // n2
    return (rows // n1) * s0 + (rows % n1) * s1 + i2 * s2 + i3 * s3


@triton.jit
def _rms_norm_silu_fwd_kernel(
    x_ptr, y_ptr, weight_ptr,
    n_rows, d, n1, n2, n3, s0, s1, s2, s3, eps, scale,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # int64: a decoded 480p clip has more than 2^31 elements.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < d
    mask = (rows < n_rows)[:, None] & col_mask[None, :]
    at = x_ptr + row_offsets(rows, n1, n2, n3, s0, s1, s2, s3)[:, None] + cols[None, :]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    # The clamp acts on the norm, as in the reference model, not on its square.
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), eps)
    y = x * (scale / norm)[:, None] * tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + rows[:, None] * d + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def launch_fwd(x: Tensor, y: Tensor, weight: Tensor, eps: float, silu: bool, config: configs.RowConfig) -> None:
    """Launch over ``x [..., C]`` with any row strides into contiguous ``y``."""
    width = x.shape[-1]
    n_rows = x.numel() // width if width else 0
    if n_rows == 0:
        return
    sizes, strides = merged_rows(x)
    with on_device(x):
        _rms_norm_silu_fwd_kernel[(cdiv(n_rows, config.rows),)](
            x, y, weight,
            n_rows, width, *sizes[1:], *strides, eps, width**0.5,
            silu, config.rows, config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip


def rms_norm_silu(x: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """``impl="triton"`` of the op."""
    refuse_float64("rms_norm_silu", x, weight)
    config = configs.select(arch_for(x), width=x.shape[-1], itemsize=x.element_size())
    y = x.new_empty(x.shape)
    launch_fwd(x, y, weight, eps, silu, config)
    return y
