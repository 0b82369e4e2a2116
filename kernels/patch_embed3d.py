"""Patch embedding: a matrix product whose left operand is gathered from the video by its loads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs import patch_embed3d as configs
from pyvideo_kernels.errors import UnsupportedError

from .launch import cdiv, on_device


@triton.jit
def _gather(
    video_ptr, rows, row_mask, k0, columns, stride_c, stride_t, stride_h, stride_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pixels ``[BLOCK_K, tokens]``: neighbouring threads take neighbouring tokens, whose pixels are neighbours too."""
    k = k0 + tl.arange(0, BLOCK_K)
    channel, inside = k // (PT * PH * PW), k % (PT * PH * PW)
    at = channel.to(tl.int64) * stride_c + (inside // (PH * PW)).to(tl.int64) * stride_t
    at += (inside // PW % PH).to(tl.int64) * stride_h + (inside % PW).to(tl.int64) * stride_w
    return tl.load(video_ptr + at[:, None] + rows[None, :], mask=(k < columns)[:, None] & row_mask[None, :], other=0.0)


@triton.jit
def _weights(weight_ptr, n, n_mask, k0, columns, BLOCK_K: tl.constexpr):
    """``[outputs, BLOCK_K]`` of a contiguous ``[width, columns]`` matrix."""
    k = k0 + tl.arange(0, BLOCK_K)
    mask = n_mask[:, None] & (k < columns)[None, :]
    return tl.load(weight_ptr + n.to(tl.int64)[:, None] * columns + k[None, :], mask=mask, other=0.0)


@triton.jit
def _patch_embed3d_fwd_kernel(
    video_ptr, weight_ptr, bias_ptr, out_ptr,
    tokens, grid_t, grid_h, grid_w, width,
    stride_b, stride_c, stride_t, stride_h, stride_w,
    COLUMNS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_CHUNKS: tl.constexpr, N_TILES: tl.constexpr,
):  # fmt: skip
    # Token numbers are divided as 32-bit numbers; what they address is 64-bit.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m < tokens
    w, rest = m % grid_w, m // grid_w
    h, rest = rest % grid_h, rest // grid_h
    t, b = rest % grid_t, rest // grid_t
    rows = b.to(tl.int64) * stride_b + (t * PT).to(tl.int64) * stride_t
    rows += (h * PH).to(tl.int64) * stride_h + (w * PW).to(tl.int64) * stride_w
    if K_CHUNKS > 0:
        patches = ()
        for chunk in tl.static_range(K_CHUNKS):
            pixels = _gather(video_ptr, rows, m_mask, chunk * BLOCK_K, COLUMNS, stride_c, stride_t, stride_h, stride_w,
                             PT, PH, PW, BLOCK_K)  # fmt: skip
            patches = patches + (pixels,)
    first = tl.program_id(1) * N_TILES
    for tile in range(first, min(first + N_TILES, tl.cdiv(width, BLOCK_N))):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        n_mask = n < width
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if K_CHUNKS > 0:
            for chunk in tl.static_range(K_CHUNKS):
                weights = _weights(weight_ptr, n, n_mask, chunk * BLOCK_K, COLUMNS, BLOCK_K)
                acc = tl.dot(tl.trans(patches[chunk]), tl.trans(weights), acc, input_precision="ieee")
        else:
            for k0 in range(0, COLUMNS, BLOCK_K):
                pixels = _gather(video_ptr, rows, m_mask, k0, COLUMNS, stride_c, stride_t, stride_h, stride_w,
                                 PT, PH, PW, BLOCK_K)  # fmt: skip
                weights = _weights(weight_ptr, n, n_mask, k0, COLUMNS, BLOCK_K)
                acc = tl.dot(tl.trans(pixels), tl.trans(weights), acc, input_precision="ieee")
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        at = out_ptr + m.to(tl.int64)[:, None] * width + n[None, :]
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


def launch_fwd(
    video: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, patch: Sequence[int], config: configs.Config
) -> None:
    """Launch over ``video [B, C, T, H, W]`` of any strides, contiguous ``weight [D, C*pt*ph*pw]``, into ``out``."""
    b, _, t, h, w = video.shape
    pt, ph, pw = patch
    grid_t, grid_h, grid_w = t // pt, h // ph, w // pw
    tokens, (width, columns) = b * grid_t * grid_h * grid_w, weight.shape
    if tokens * width == 0:
        return
    with on_device(video):
        _patch_embed3d_fwd_kernel[(cdiv(tokens, config.block_m), cdiv(width, config.block_n * config.n_tiles))](
            video, weight, bias, out,
            tokens, grid_t, grid_h, grid_w, width, *video.stride(),
            columns, pt, ph, pw,
            config.block_m, config.block_n, config.block_k, config.k_chunks, config.n_tiles,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def patch_embed3d(video: Tensor, weight: Tensor, bias: Tensor | None, patch: Sequence[int]) -> Tensor:
    """``impl="triton"`` of the op."""
    if video.dtype == torch.float64:
        raise UnsupportedError("patch_embed3d: float64 has no Triton kernel; use impl='reference'")
    b, _, t, h, w = video.shape
    # A weight that is no plain matrix is copied: it is small beside the video and its tokens.
    weight = weight.reshape(weight.shape[0], -1).contiguous()
    config = configs.select(
        arch_for(video), width=weight.shape[0], columns=weight.shape[1], itemsize=video.element_size()
    )
    out = video.new_empty((b, (t // patch[0]) * (h // patch[1]) * (w // patch[2]), weight.shape[0]))
    launch_fwd(video, weight, bias, out, patch, config)
    return out
