"""Means over boxes of the (T, H, W) grid: one read of the tokens, where they lie."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs.block_mean import select
from pyvideo_kernels.errors import UnsupportedError

from .boxes import stride_unit
from .launch import cdiv, on_device, refuse_float64


@triton.jit(do_not_specialize=["heads", "t", "h", "w", "tiles_h", "tiles_w", "blocks"])
def _block_mean_fwd_kernel(
    x_ptr, o_ptr, heads, t, h, w, tiles_h, tiles_w, blocks, x_b, x_s, x_h,
    D: tl.constexpr, UNIT: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Heads of one box adjoin in memory and in time.
    pid = tl.program_id(0)
    head = pid % heads
    block = pid // heads % blocks
    batch = (pid // heads // blocks).to(tl.int64)
    from_t, from_h, from_w = block // (tiles_h * tiles_w) * BT, block // tiles_w % tiles_h * BH, block % tiles_w * BW
    first = ((from_t * h + from_h) * w + from_w).to(tl.int64)
    x_b, x_s, x_h = tl.cast(x_b, tl.int64) * UNIT, x_s * UNIT, tl.cast(x_h, tl.int64) * UNIT
    x_tile = x_ptr + batch * x_b + first * x_s + head.to(tl.int64) * x_h
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < D
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.static_range(0, BT * BH * BW, ROWS):
        at = start + tl.arange(0, ROWS)
        in_t, in_h, in_w = at // (BH * BW), at // BW % BH, at % BW
        real = (in_t < BT) & (from_t + in_t < t) & (from_h + in_h < h) & (from_w + in_w < w)
        offset = ((in_t * h + in_h) * w + in_w) * x_s
        x = tl.load(x_tile + offset[:, None] + cols[None, :], mask=real[:, None] & col_mask[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    size = tl.minimum(t - from_t, BT) * tl.minimum(h - from_h, BH) * tl.minimum(w - from_w, BW)
    out = (batch * heads + head) * blocks + block
    tl.store(o_ptr + out * D + cols, total / size.to(tl.float32), mask=col_mask)


def block_mean(x: Tensor, grid: Sequence[int], tile: Sequence[int]) -> Tensor:
    """``impl="triton"`` of the op."""
    refuse_float64("block_mean", x)
    b, _, heads, head_dim = x.shape
    tiles = [cdiv(n, side) for n, side in zip(grid, tile, strict=True)]
    blocks, tokens = math.prod(tiles), math.prod(tile)
    config = select(arch_for(x), head_dim=head_dim, itemsize=x.element_size(), tokens=tokens)
    if x.stride(1) * ((tile[0] * grid[1] + tile[1]) * grid[2] + tile[2]) >= 2**31 or tokens > 64 * config.rows:
        raise UnsupportedError(
            f"block_mean: impl 'triton' has boxes within 2^31 elements, of up to {64 * config.rows} tokens"
        )
    out = x.new_empty((b, heads, blocks, head_dim), dtype=torch.float32)
    if out.numel():
        unit = stride_unit(x)
        with on_device(x):
            _block_mean_fwd_kernel[(b * blocks * heads,)](
                x, out, heads, *grid, tiles[1], tiles[2], blocks, *(step // unit for step in x.stride()[:3]),
                head_dim, unit, *tile, config.rows, config.block_d, num_warps=config.num_warps,
            )  # fmt: skip
    return out
