"""Channel RMS norm, modulation by clip and SiLU over channels-last pixels: one read of x, one write of y."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs import pixel_norm_silu as configs

from .launch import cdiv, merged_rows, on_device, refuse_float64
from .rms_norm_silu import row_offsets


@triton.jit
def _pixel_norm_silu_fwd_kernel(
    x_ptr, y_ptr, weight_ptr, scale_ptr, shift_ptr,
    n, blocks, d, sb, n1, n2, n3, s0, s1, s2, s3, scale_b, shift_b, eps,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # A program's pixels are of one clip, so its modulation is one row. int64: see row_offsets.
    clip = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < d
    mask = (rows < n)[:, None] & col_mask[None, :]
    at = x_ptr + clip * sb + row_offsets(rows, n1, n2, n3, s0, s1, s2, s3)[:, None] + cols[None, :]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 1) / d + eps)[:, None]
    if weight_ptr is not None or scale_ptr is not None:
        factor = tl.full([BLOCK_D], 1.0, dtype=tl.float32)
        if scale_ptr is not None:
            factor += tl.load(scale_ptr + clip * scale_b + cols, mask=col_mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            factor *= tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
        y *= factor[None, :]
    if shift_ptr is not None:
        y += tl.load(shift_ptr + clip * shift_b + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + (clip * n + rows)[:, None] * d + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def launch_fwd(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    silu: bool,
    config: configs.RowConfig,
) -> None:
    """Launch over ``x [B, ..., C]`` with any row strides into contiguous ``y``."""
    if x.numel() == 0:
        return
    width = x.shape[-1]
    if scale is None and shift is None:
        # Nothing differs between clips: their pixels are rows of one tensor.
        x = x.unsqueeze(0)
    sizes, strides = merged_rows(x[0])
    n = x[0].numel() // width
    blocks = cdiv(n, config.rows)

    def by_clip(z: Tensor | None) -> int:
        return 0 if z is None or z.shape[0] == 1 else z.stride(0)

    with on_device(x):
        _pixel_norm_silu_fwd_kernel[(blocks * x.shape[0],)](
            x, y, weight, scale, shift,
            n, blocks, width, x.stride(0), *sizes[1:], *strides, by_clip(scale), by_clip(shift), eps,
            silu, config.rows, config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip


def pixel_norm_silu(
    x: Tensor, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float, silu: bool
) -> Tensor:
    """``impl="triton"`` of the op."""
    refuse_float64("pixel_norm_silu", x, weight, scale, shift)
    config = configs.select(arch_for(x), width=x.shape[-1], itemsize=x.element_size())
    y = x.new_empty(x.shape)
    launch_fwd(x, y, weight, scale, shift, eps, silu, config)
    return y
