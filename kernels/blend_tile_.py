"""A decoded tile blended over its seams into the canvas: one read of the tile, one write of the frames."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs import blend_tile_ as configs

from .launch import cdiv, on_device, refuse_float64


@triton.jit
def _blend_tile_kernel(
    out_ptr, below_ptr, right_ptr, tile_ptr, above_ptr, left_ptr,
    channels, frames, height, width,
    out_h, out_w, below_h, right_w, above_h, left_w, above_steps, left_steps,
    ob, oc, ot, oh, ow, bb, bc, bt, bh, bw, rb, rc, rt, rh, rw,
    tb, tc, tt, th, tw, ab, ac, at, ah, aw, lb, lc, lt, lh, lw,
    INNER: tl.constexpr, GRAIN: tl.constexpr, CLAMP: tl.constexpr, BYTES: tl.constexpr,
    ABOVE: tl.constexpr, LEFT: tl.constexpr, BELOW: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A program has one row of one image, of one channel (INNER 1) or of all of them as they lie (INNER C). int64: a
    # clip may have more than 2^31 elements.
    blocks = tl.cdiv(width * INNER, BLOCK)
    row = tl.program_id(0).to(tl.int64) // blocks
    inner = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = inner < width * INNER
    y = row % height
    row = row // height
    t = row % frames
    row = row // frames
    if INNER == 1:
        x = inner
        c = tl.zeros_like(inner) + row % channels
        b = row // channels
    else:
        x = inner // INNER
        c = (inner % INNER).to(tl.int64)
        b = row
    x = x.to(tl.int64)
    v = tl.load(tile_ptr + b * tb + t * tt + y * th + c * tc + x * tw, mask=mask, other=0.0).to(tl.float32)
    if ABOVE:
        on = mask & (y < above_h)
        a = tl.load(above_ptr + b * ab + t * at + y * ah + c * ac + x * aw, mask=on, other=0.0).to(tl.float32)
        weight = tl.minimum((y // GRAIN).to(tl.float32) / above_steps, 1.0)
        v = tl.where(on, a * (1.0 - weight) + v * weight, v)
    if LEFT:
        on = mask & (x < left_w)
        a = tl.load(left_ptr + b * lb + t * lt + y * lh + c * lc + x * lw, mask=on, other=0.0).to(tl.float32)
        weight = tl.minimum((x // GRAIN).to(tl.float32) / left_steps, 1.0)
        v = tl.where(on, a * (1.0 - weight) + v * weight, v)
    if BELOW:
        first = height - below_h
        at_below = below_ptr + b * bb + t * bt + (y - first) * bh + c * bc + x * bw
        tl.store(at_below, v.to(below_ptr.dtype.element_ty), mask=mask & (y >= first))
    if RIGHT:
        first = width - right_w
        at_right = right_ptr + b * rb + t * rt + y * rh + c * rc + (x - first) * rw
        tl.store(at_right, v.to(right_ptr.dtype.element_ty), mask=mask & (x >= first))
    if BYTES:
        v = tl.floor(tl.minimum(tl.maximum(v * 0.5 + 0.5, 0.0), 1.0) * 255.0 + 0.5)
    elif CLAMP:
        v = tl.minimum(tl.maximum(v, -1.0), 1.0)
    at_out = out_ptr + b * ob + t * ot + y * oh + c * oc + x * ow
    tl.store(at_out, v.to(out_ptr.dtype.element_ty), mask=mask & (y < out_h) & (x < out_w))


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0,) * 5 if x is None else x.stride()


def launch(
    out: Tensor,
    below: Tensor | None,
    right: Tensor | None,
    tile: Tensor,
    above: Tensor | None,
    left: Tensor | None,
    grain: int,
    clamp: bool,
    inner: int,
    config: configs.FlatConfig,
) -> None:
    """Launch over ``tile [B, C, T, H, W]`` of any strides; ``inner`` channels (1 or all) of a row go together."""
    b, c, t, h, w = tile.shape
    rows = b * t * h * (c // inner)
    above_h, left_w = 0 if above is None else above.shape[3], 0 if left is None else left.shape[4]
    below_h, right_w = 0 if below is None else below.shape[3], 0 if right is None else right.shape[4]
    with on_device(tile):
        _blend_tile_kernel[(rows * cdiv(w * inner, config.block),)](
            out, below, right, tile, above, left,
            c, t, h, w,
            out.shape[3], out.shape[4], below_h, right_w, above_h, left_w,
            max(1, above_h // grain), max(1, left_w // grain),
            *(stride for x in (out, below, right, tile, above, left) for stride in _strides(x)),
            inner, grain, clamp, not out.dtype.is_floating_point,
            above_h > 0, left_w > 0, below_h > 0, right_w > 0, config.block,
            num_warps=config.num_warps,
        )  # fmt: skip


def blend_tile_(
    out: Tensor,
    below: Tensor | None,
    right: Tensor | None,
    tile: Tensor,
    above: Tensor | None,
    left: Tensor | None,
    grain: int,
    clamp: bool,
) -> None:
    """``impl="triton"`` of the op."""
    refuse_float64("blend_tile_", out, below, right, tile, above, left)
    if tile.numel() == 0:
        return
    # Channels that lie together are read together.
    inner = tile.shape[1] if tile.stride(1) == 1 else 1
    config = configs.select(arch_for(tile), width=tile.shape[4] * inner, itemsize=tile.element_size())
    launch(out, below, right, tile, above, left, grain, clamp, inner, config)
