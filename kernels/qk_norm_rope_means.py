"""Query/key norm, rotary embedding and means of tiles: a program walks over the tokens of a tile and keeps a sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs import qk_norm_rope as configs
from pyvideo_kernels.errors import UnsupportedError

from .launch import cdiv, on_device, refuse_float64
from .pairs import four_dims, store_pairs, table_strides
from .qk_norm_rope import norm_rotate


@triton.jit
def _one_tile(
    x_ptr, x_b, x_s, x_h, out_ptr, mean_ptr, weight_ptr, bias_ptr,
    cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
    program, heads, head_dim, t, h, w, tiles_h, tiles_w, boxes, eps,
    NORM: tl.constexpr, LAYER: tl.constexpr, HALF_LAYOUT: tl.constexpr, TABLE_HEADS: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``BLOCK_HEADS`` heads of the tokens of one tile, token by token, and their mean."""
    head_blocks = tl.cdiv(heads, BLOCK_HEADS)
    head_block = program % head_blocks
    box = program // head_blocks % boxes
    batch = program // head_blocks // boxes
    half = head_dim // 2
    tokens = t * h * w
    from_t, from_h, from_w = box // (tiles_h * tiles_w) * BT, box // tiles_w % tiles_h * BH, box % tiles_w * BW
    size_h, size_w = tl.minimum(h - from_h, BH), tl.minimum(w - from_w, BW)
    # A tile at the far edge has fewer tokens: only those are walked over.
    size = tl.minimum(t - from_t, BT) * size_h * size_w
    first = batch * tokens + (from_t * h + from_h) * w + from_w
    # What the loads run ahead of is only ever the stores to `out_ptr`, which is other memory.
    total_x = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
    total_y = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
    for i in tl.range(size, num_stages=STAGES):
        token = first + (i // (size_h * size_w) * h + i // size_w % size_h) * w + i % size_w
        x, y, b, s, head, head_mask = norm_rotate(
            x_ptr, x_b, x_s, x_h, weight_ptr, bias_ptr, cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
            token, head_block, tokens, heads, head_dim, 0, tokens, eps,
            NORM, LAYER, HALF_LAYOUT, TABLE_HEADS, BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip
        # The mean is of what is stored, so that it is the one that a pass over the results would find.
        x, y = x.to(out_ptr.dtype.element_ty), y.to(out_ptr.dtype.element_ty)
        rows = ((b * tokens + s) * heads + head) * head_dim
        store_pairs(out_ptr, rows, head_mask, half, x, y, HALF_LAYOUT, BLOCK_HALF)
        total_x += x.to(tl.float32)
        total_y += y.to(tl.float32)
    heads_at = head_block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    mean_rows = ((batch.to(tl.int64) * heads + heads_at) * boxes + box) * head_dim
    count = size.to(tl.float32)
    store_pairs(mean_ptr, mean_rows, heads_at < heads, half, total_x / count, total_y / count, HALF_LAYOUT, BLOCK_HALF)


@triton.jit(do_not_specialize=["q_programs", "k_programs", "t", "h", "w", "tiles_h", "tiles_w", "boxes"])
def _qk_norm_rope_means_fwd_kernel(
    q_ptr, q_b, q_s, q_h, q_out_ptr, q_mean_ptr, q_weight_ptr, q_bias_ptr,
    k_ptr, k_b, k_s, k_h, k_out_ptr, k_mean_ptr, k_weight_ptr, k_bias_ptr,
    cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
    q_programs, k_programs, q_heads, k_heads, head_dim, t, h, w, tiles_h, tiles_w, boxes, eps,
    NORM: tl.constexpr, LAYER: tl.constexpr, HALF_LAYOUT: tl.constexpr, TABLE_HEADS: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs are q and k of one tile, so that the second finds its tables in cache.
    pid = tl.program_id(0)
    i = pid // 2
    if pid % 2 == 0:
        if i < q_programs:
            _one_tile(
                q_ptr, q_b, q_s, q_h, q_out_ptr, q_mean_ptr, q_weight_ptr, q_bias_ptr,
                cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
                i, q_heads, head_dim, t, h, w, tiles_h, tiles_w, boxes, eps,
                NORM, LAYER, HALF_LAYOUT, TABLE_HEADS, BT, BH, BW, Q_BLOCK, BLOCK_HALF, STAGES,
            )  # fmt: skip
    else:
        if i < k_programs:
            _one_tile(
                k_ptr, k_b, k_s, k_h, k_out_ptr, k_mean_ptr, k_weight_ptr, k_bias_ptr,
                cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
                i, k_heads, head_dim, t, h, w, tiles_h, tiles_w, boxes, eps,
                NORM, LAYER, HALF_LAYOUT, TABLE_HEADS, BT, BH, BW, K_BLOCK, BLOCK_HALF, STAGES,
            )  # fmt: skip


def qk_norm_rope_means(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    norm_type: str,
    layout: str,
    grid: Sequence[int],
    tile: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``impl="triton"`` of the op."""
    op = "qk_norm_rope_means"
    refuse_float64(op, q, q_weight, k_weight, q_bias, k_bias)
    head_dim = q.shape[3]
    if head_dim % 2:
        raise UnsupportedError(f"{op}: an odd head_dim ({head_dim}) has no Triton kernel; use impl='reference'")
    cos, sin = four_dims(cos), four_dims(sin)
    shape = {"head_dim": head_dim, "whole_row": norm == "across_heads", "itemsize": q.element_size()}
    arch = arch_for(q)
    q_config, k_config = (configs.select(arch, op=op, heads=x.shape[2], **shape) for x in (q, k))
    tiles = [cdiv(n, side) for n, side in zip(grid, tile, strict=True)]
    boxes = math.prod(tiles)
    q_out, k_out = (x.new_empty(x.shape) for x in (q, k))
    q_mean, k_mean = (
        x.new_empty((x.shape[0], x.shape[2], boxes, head_dim), dtype=torch.float32) for x in (q, k)
    )  # fmt: skip
    programs = [
        x.shape[0] * boxes * cdiv(x.shape[2], config.block_heads) for x, config in ((q, q_config), (k, k_config))
    ]
    if max(programs) and head_dim:
        with on_device(q):
            _qk_norm_rope_means_fwd_kernel[(2 * max(programs),)](
                q, *q.stride()[:3], q_out, q_mean, q_weight, q_bias,
                k, *k.stride()[:3], k_out, k_mean, k_weight, k_bias,
                cos, *table_strides(cos), sin, *table_strides(sin),
                *programs, q.shape[2], k.shape[2], head_dim, *grid, tiles[1], tiles[2], boxes, eps,
                NORM=("none", "per_head", "across_heads").index(norm), LAYER=norm_type == "layer",
                HALF_LAYOUT=layout == "half",
                TABLE_HEADS=cos is not None and sin is not None and max(cos.shape[2], sin.shape[2]) > 1,
                BT=tile[0], BH=tile[1], BW=tile[2],
                Q_BLOCK=q_config.block_heads, K_BLOCK=k_config.block_heads, BLOCK_HALF=q_config.block_half,
                STAGES=configs.tile_stages(arch),
                num_warps=max(q_config.num_warps, k_config.num_warps),
            )  # fmt: skip
    return q_out, k_out, q_mean, k_mean
