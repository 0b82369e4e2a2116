"""Gated residual addition: one read of x and y, one write, fp32 inside."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for, elementwise

from .launch import bs_strides, cdiv, on_device, refuse_float64


@triton.jit
def _gate_residual_fwd_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr,
    s, d, row_blocks,
    x_b, x_s, y_b, y_s, gate_b, gate_s,
    HAS_GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # A program stays within one clip: no division per row.
    pid = tl.program_id(0)
    b = (pid // row_blocks).to(tl.int64)
    tokens = (pid % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (tokens < s)[:, None] & (cols < d)[None, :]
    x = tl.load(x_ptr + b * x_b + tokens[:, None] * x_s + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + b * y_b + tokens[:, None] * y_s + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        # Through the first-level cache for a per-batch gate (row stride 0), not through shared memory.
        at = gate_ptr + b * gate_b + tokens[:, None] * gate_s + cols[None, :]
        y = y * tl.load(at, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + (b * s + tokens)[:, None] * d + cols[None, :]
    tl.store(out, (x + y).to(out_ptr.dtype.element_ty), mask=mask)


def launch_fwd(x: Tensor, y: Tensor, gate: Tensor | None, out: Tensor, config: elementwise.TileConfig) -> None:
    """Launch over ``x, y [B, S, D]`` into contiguous ``out``."""
    b, s, d = x.shape
    if out.numel() == 0:
        return
    row_blocks = cdiv(s, config.rows)
    with on_device(x):
        _gate_residual_fwd_kernel[(b * row_blocks, cdiv(d, config.block_d))](
            x, y, gate, out,
            s, d, row_blocks,
            x.stride(0), x.stride(1), y.stride(0), y.stride(1), *bs_strides(gate),
            gate is not None, config.rows, config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """``impl="triton"`` of the op."""
    refuse_float64("gate_residual", x, y, gate)
    config = elementwise.select_tile(arch_for(x), op="gate_residual", width=x.shape[-1], itemsize=x.element_size())
    out = x.new_empty(x.shape)
    launch_fwd(x, y, gate, out, config)
    return out
