"""Last layer: norm, modulation, projection and unpatchify; x is read from memory once.

With per-batch modulation of 16-bit values the norm moves to the other side of the product,

    ((x - mean) * rstd * (1 + scale) + shift) · w + bias = rstd * (x · w' - mean * sum(w')) + shift · w + bias

with w' = w * (1 + scale), so that one loop feeds x to the matrix units and takes its statistics from the same tiles.
w' is rounded where the model rounds the modulated x; sum(w') is of the rounded values, so that the mean cancels.
Per-token modulation has no such w', and in fp32 taking off the mean after the product loses bits that count: there a
first loop takes the statistics, a second one normalises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs import final_layer as configs
from pyvideo_kernels.errors import UnsupportedError

from .launch import bs_strides, cdiv, on_device

# Elements of one batch entry up to which its pixels are addressed by 32-bit offsets.
NARROW_ELEMENTS = 2**31 - 1


@triton.jit
def _fold_modulation_kernel(
    weight_ptr, weight_n, bias_ptr, scale_ptr, scale_b, shift_ptr, shift_b, folded_ptr, total_ptr, offset_ptr,
    features, d, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row n of w' = w * (1 + scale), its sum, and shift · w + bias, for one batch entry."""
    n, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = folded_ptr.dtype.element_ty
    total = tl.zeros([BLOCK], tl.float32)
    offset = tl.zeros([BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < d
        weight = tl.load(weight_ptr + n * weight_n + cols, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + b * scale_b + cols, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + b * shift_b + cols, mask=mask, other=0.0).to(tl.float32)
        folded = (weight * (1.0 + scale)).to(dtype)
        tl.store(folded_ptr + (b * features + n) * d + cols, folded, mask=mask)
        total += folded.to(tl.float32)
        offset += weight * shift
    out = b * features + n
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n).to(tl.float32)
    tl.store(total_ptr + out, tl.sum(total, 0))
    tl.store(offset_ptr + out, tl.sum(offset, 0) + bias)


@triton.jit
def _first_mean(x_rows, row_mask, d, BLOCK_K: tl.constexpr):
    """Mean of the first channels of each row: what the sums are shifted by.

    The sum of squares about it cancels at most by d / BLOCK_K, whatever the mean of the row.
    """
    cols = tl.arange(0, BLOCK_K)
    mask = row_mask[:, None] & (cols < d)[None, :]
    first = tl.load(x_rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(first, 1) / tl.minimum(BLOCK_K, d)


@triton.jit
def _statistics(sums, squares, origin, d, eps):
    """Mean and reciprocal deviation of each row from sums about ``origin``."""
    away = tl.sum(sums, 1) / d
    variance = tl.maximum(tl.sum(squares, 1) / d - away * away, 0.0)
    return origin + away, tl.rsqrt(variance + eps)


@triton.jit
def _store_pixels(
    out_ptr, y, b, token, token_mask, feature, features, channels, grid_t, grid_h, grid_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Write ``y [tokens, features]`` to its pixels of ``[B, C, T*PT, H*PH, W*PW]``."""
    w, rest = token % grid_w, token // grid_w
    h, t = rest % grid_h, rest // grid_h
    channel, place = feature % channels, feature // channels
    # cast(): an extent of 1 is a constant to the compiler, which has no .to().
    row = tl.cast(grid_w * PW, OFFSET)
    frame = row * (grid_h * PH)
    clip = frame * (grid_t * PT)
    at_token = (t * PT).to(OFFSET) * frame + (h * PH).to(OFFSET) * row + w * PW
    at_feature = channel.to(OFFSET) * clip + (place // (PH * PW)).to(OFFSET) * frame
    at_feature += (place // PW % PH).to(OFFSET) * row + place % PW
    # Transposed: neighbouring threads take neighbouring tokens, whose pixels share a row.
    mask = (feature < features)[:, None] & token_mask[None, :]
    pixels = out_ptr + b * channels * clip.to(tl.int64)
    tl.store(pixels + (at_feature[:, None] + at_token[None, :]), tl.trans(y.to(out_ptr.dtype.element_ty)), mask=mask)


@triton.jit
def _place(tokens, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Batch entry, tokens and features of this program; neighbours share tokens, so that x comes from cache."""
    tiles, blocks = tl.cdiv(features, BLOCK_N), tl.cdiv(tokens, BLOCK_M)
    pid = tl.program_id(0)
    row = pid // tiles
    feature = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return (row // blocks).to(tl.int64), row % blocks * BLOCK_M + tl.arange(0, BLOCK_M), feature


@triton.jit
def _final_layer_fwd_kernel(
    x_ptr, x_b, x_s, folded_ptr, total_ptr, offset_ptr, folded_batches, out_ptr,
    tokens, d, eps, features, channels, grid_t, grid_h, grid_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Per-batch modulation, folded into 16-bit weights: one loop."""
    b, token, feature = _place(tokens, features, BLOCK_M, BLOCK_N)
    token_mask, feature_mask = token < tokens, feature < features
    x_rows = x_ptr + b * x_b + token.to(tl.int64) * x_s
    entry = tl.where(folded_batches > 1, b, 0) * features
    folded_rows = folded_ptr + (entry + feature) * d
    origin = _first_mean(x_rows, token_mask, d, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, d, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        col_mask = (cols < d)[None, :]
        x = tl.load(x_rows[:, None] + cols[None, :], mask=token_mask[:, None] & col_mask, other=0.0)
        folded = tl.load(folded_rows[:, None] + cols[None, :], mask=feature_mask[:, None] & col_mask, other=0.0)
        acc = tl.dot(x, tl.trans(folded), acc, input_precision="ieee")
        away = tl.where(col_mask, x.to(tl.float32) - origin[:, None], 0.0)
        sums += away
        squares += away * away
    mean, rstd = _statistics(sums, squares, origin, d, eps)
    total = tl.load(total_ptr + entry + feature, mask=feature_mask, other=0.0)
    offset = tl.load(offset_ptr + entry + feature, mask=feature_mask, other=0.0)
    y = (acc - mean[:, None] * total[None, :]) * rstd[:, None] + offset[None, :]
    _store_pixels(
        out_ptr, y, b, token, token_mask, feature, features, channels, grid_t, grid_h, grid_w, PT, PH, PW, OFFSET
    )  # fmt: skip


@triton.jit
def _final_layer_two_loops_fwd_kernel(
    x_ptr, x_b, x_s, scale_ptr, scale_b, scale_s, shift_ptr, shift_b, shift_s, weight_ptr, weight_n, bias_ptr, out_ptr,
    tokens, d, eps, features, channels, grid_t, grid_h, grid_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Per-token modulation or fp32: statistics in a first loop, the second finds x in cache."""
    b, token, feature = _place(tokens, features, BLOCK_M, BLOCK_N)
    token_mask, feature_mask = token < tokens, feature < features
    token64 = token.to(tl.int64)
    x_rows = x_ptr + b * x_b + token64 * x_s
    scale_rows = scale_ptr + b * scale_b + token64 * scale_s
    shift_rows = shift_ptr + b * shift_b + token64 * shift_s
    weight_rows = weight_ptr + feature.to(tl.int64) * weight_n
    origin = _first_mean(x_rows, token_mask, d, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in tl.range(0, d, BLOCK_K, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_K)
        mask = token_mask[:, None] & (cols < d)[None, :]
        x = tl.load(x_rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        away = tl.where((cols < d)[None, :], x - origin[:, None], 0.0)
        sums += away
        squares += away * away
    mean, rstd = _statistics(sums, squares, origin, d, eps)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, d, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        mask = token_mask[:, None] & (cols < d)[None, :]
        x = tl.load(x_rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        # Zero weights past d: what stands in the other operand there does not matter as long as it is finite.
        weight_mask = feature_mask[:, None] & (cols < d)[None, :]
        weight = tl.load(weight_rows[:, None] + cols[None, :], mask=weight_mask, other=0.0)
        modulated = (x - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift
        acc = tl.dot(modulated.to(weight.dtype), tl.trans(weight), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + feature, mask=feature_mask, other=0.0).to(tl.float32)[None, :]
    _store_pixels(
        out_ptr, acc, b, token, token_mask, feature, features, channels, grid_t, grid_h, grid_w, PT, PH, PW, OFFSET
    )  # fmt: skip


def _fold_modulation(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """w' ``[B, features, D]``, its row sums and the constant of each feature, and B (1 where nothing varies)."""
    (features, d), batches = weight.shape, max(scale.shape[0], shift.shape[0])
    folded = weight.new_empty((batches, features, d))
    total, offset = (weight.new_empty((batches, features), dtype=torch.float32) for _ in range(2))
    _fold_modulation_kernel[(features, batches)](
        weight, weight.stride(0), bias, scale, bs_strides(scale)[0], shift, bs_strides(shift)[0],
        folded, total, offset, features, d, BLOCK=min(1024, max(16, triton.next_power_of_2(d))), num_warps=4,
    )  # fmt: skip
    return folded, total, offset, batches


def launch_fwd(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    eps: float,
    config: configs.Config,
) -> None:
    """Launch over ``x [B, S, D]`` into contiguous ``out [B, C, T*pt, H*ph, W*pw]``."""
    (b, tokens, d), features = x.shape, weight.shape[0]
    if out.numel() == 0:
        return
    launch_grid = (b * cdiv(tokens, config.block_m) * cdiv(features, config.block_n),)
    # Within a batch entry; 64-bit offsets cost a second register a pixel.
    offset_type = tl.int64 if out[0].numel() > NARROW_ELEMENTS else tl.int32
    tile = (offset_type, config.block_m, config.block_n, config.block_k)
    sizes = (tokens, d, eps, features, out.shape[1], *grid, *patch, *tile)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    x_b, x_s = x.stride(0), x.stride(1)
    with on_device(x):
        if config.folded:
            folded, total, offset, batches = _fold_modulation(weight, bias, scale, shift)
            _final_layer_fwd_kernel[launch_grid](
                x, x_b, x_s, folded, total, offset, batches, out, *sizes, **options,
            )  # fmt: skip
        else:
            _final_layer_two_loops_fwd_kernel[launch_grid](
                x, x_b, x_s, scale, *bs_strides(scale), shift, *bs_strides(shift), weight, weight.stride(0), bias, out,
                *sizes, config.num_stages, **options,
            )  # fmt: skip


def final_layer(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    patch: Sequence[int],
    eps: float,
) -> Tensor:
    """``impl="triton"`` of the op."""
    if x.dtype == torch.float64:
        raise UnsupportedError("final_layer: float64 has no Triton kernel; use impl='reference'")
    channels = weight.shape[0] // (patch[0] * patch[1] * patch[2])
    out = x.new_empty((x.shape[0], channels, grid[0] * patch[0], grid[1] * patch[1], grid[2] * patch[2]))
    config = configs.select(
        arch_for(x),
        features=weight.shape[0],
        itemsize=x.element_size(),
        folded=x.element_size() == 2 and max(scale.shape[1], shift.shape[1]) == 1,
    )
    launch_fwd(x, scale, shift, weight, bias, out, grid, patch, eps, config)
    return out
