"""Query/key norm and rotary embedding: one launch, one read and one write of q and k, fp32 in between."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs import qk_norm_rope as configs
from pyvideo_kernels.errors import UnsupportedError

from .launch import cdiv, on_device, refuse_float64
from .pairs import four_dims, load_pairs, load_table, mean_of_pairs, store_pairs, table_strides
from .qk_norm_rope_backward import qk_norm_rope_backward as qk_norm_rope_backward  # the backward op's home is here


@triton.jit
def norm_rotate(
    x_ptr, x_b, x_s, x_h, weight_ptr, bias_ptr,
    cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
    token, head_block, tokens, heads, head_dim, start, stop, eps,
    NORM: tl.constexpr, LAYER: tl.constexpr, HALF_LAYOUT: tl.constexpr, TABLE_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of ``BLOCK_HEADS`` heads of one token; NORM 0: none, 1: per head, 2: across heads.

    Returns both members of the pairs in fp32; batch, token and heads (int64); which of the heads there are.
    """
    half = head_dim // 2
    # Divided as the 32-bit numbers they are, multiplied by strides as 64-bit ones.
    b, s = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    head = head_block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    head_mask = head < heads
    head64 = head.to(tl.int64)
    WHOLE_ROW: tl.constexpr = NORM == 2
    # Every load is issued before the first reduction, whose barriers the compiler moves no load across.
    x, y = load_pairs(x_ptr + b * x_b + s * x_s, head64 * x_h, head_mask, half, HALF_LAYOUT, BLOCK_HALF)
    one = tl.zeros([1], tl.int64)
    if WHOLE_ROW:
        at, at_mask = head64 * head_dim, head_mask
    else:
        at, at_mask = one, one == 0
    if weight_ptr is not None:
        wx, wy = load_pairs(weight_ptr, at, at_mask, half, HALF_LAYOUT, BLOCK_HALF)
    if bias_ptr is not None:
        bx, by = load_pairs(bias_ptr, at, at_mask, half, HALF_LAYOUT, BLOCK_HALF)
    if cos_ptr is not None:
        rotated = (s >= start) & (s < stop)
        cos_at = cos_ptr + b * cos_b + (s - start) * cos_s
        sin_at = sin_ptr + b * sin_b + (s - start) * sin_s
        if TABLE_HEADS:
            cos = load_table(cos_at, head64 * cos_h, head_mask & rotated, half, 0, HALF_LAYOUT, BLOCK_HALF)
            sin = load_table(sin_at, head64 * sin_h, head_mask & rotated, half, 1, HALF_LAYOUT, BLOCK_HALF)
        else:
            cos = load_table(cos_at, one, (one == 0) & rotated, half, 0, HALF_LAYOUT, BLOCK_HALF)
            sin = load_table(sin_at, one, (one == 0) & rotated, half, 1, HALF_LAYOUT, BLOCK_HALF)
    if NORM != 0:
        n = heads * head_dim if WHOLE_ROW else head_dim
        if LAYER:
            mean = mean_of_pairs(x, y, n, WHOLE_ROW)
            inside = head_mask[:, None] & (tl.arange(0, BLOCK_HALF) < half)[None, :]
            x = tl.where(inside, x - mean, 0.0)
            y = tl.where(inside, y - mean, 0.0)
        rstd = tl.rsqrt(mean_of_pairs(x * x, y * y, n, WHOLE_ROW) + eps)
        x = x * rstd
        y = y * rstd
        if weight_ptr is not None:
            x = x * wx
            y = y * wy
        if bias_ptr is not None:
            x = x + bx
            y = y + by
    if cos_ptr is not None:
        # Selected, not multiplied by one and zero: an infinite neighbour must not reach a token that is not rotated.
        x, y = tl.where(rotated, x * cos - y * sin, x), tl.where(rotated, x * sin + y * cos, y)
    return x, y, b, s, head64, head_mask


@triton.jit
def _one_token(
    x_ptr, x_b, x_s, x_h, out_ptr, out_b, out_s, out_h, weight_ptr, bias_ptr,
    cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
    token, head_block, tokens, heads, head_dim, start, stop, eps,
    NORM: tl.constexpr, LAYER: tl.constexpr, HALF_LAYOUT: tl.constexpr, TABLE_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    x, y, b, s, head64, head_mask = norm_rotate(
        x_ptr, x_b, x_s, x_h, weight_ptr, bias_ptr, cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
        token, head_block, tokens, heads, head_dim, start, stop, eps,
        NORM, LAYER, HALF_LAYOUT, TABLE_HEADS, BLOCK_HEADS, BLOCK_HALF,
    )  # fmt: skip
    if FENCE:
        # In place, on a tile with fewer elements than threads could hold: several threads read one element.
        tl.debug_barrier()
    half = head_dim // 2
    store_pairs(out_ptr + b * out_b + s * out_s, head64 * out_h, head_mask, half, x, y, HALF_LAYOUT, BLOCK_HALF)


@triton.jit
def _qk_norm_rope_fwd_kernel(
    q_ptr, q_b, q_s, q_h, q_out_ptr, qo_b, qo_s, qo_h, q_weight_ptr, q_bias_ptr,
    k_ptr, k_b, k_s, k_h, k_out_ptr, ko_b, ko_s, ko_h, k_weight_ptr, k_bias_ptr,
    cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
    q_programs, k_programs, q_tokens, k_tokens, q_heads, k_heads, head_dim, start, stop, eps,
    NORM: tl.constexpr, LAYER: tl.constexpr, HALF_LAYOUT: tl.constexpr, TABLE_HEADS: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs are q and k of one token, so that the second finds its tables in cache.
    pid = tl.program_id(0)
    i = pid // 2
    if pid % 2 == 0:
        if i < q_programs:
            blocks = tl.cdiv(q_heads, Q_BLOCK)
            _one_token(
                q_ptr, q_b, q_s, q_h, q_out_ptr, qo_b, qo_s, qo_h, q_weight_ptr, q_bias_ptr,
                cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
                i // blocks, i % blocks, q_tokens, q_heads, head_dim, start, stop, eps,
                NORM, LAYER, HALF_LAYOUT, TABLE_HEADS, Q_BLOCK, BLOCK_HALF, FENCE,
            )  # fmt: skip
    else:
        if i < k_programs:
            blocks = tl.cdiv(k_heads, K_BLOCK)
            _one_token(
                k_ptr, k_b, k_s, k_h, k_out_ptr, ko_b, ko_s, ko_h, k_weight_ptr, k_bias_ptr,
                cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
                i // blocks, i % blocks, k_tokens, k_heads, head_dim, start, stop, eps,
                NORM, LAYER, HALF_LAYOUT, TABLE_HEADS, K_BLOCK, BLOCK_HALF, FENCE,
            )  # fmt: skip


def launch_fwd(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    norm_type: str,
    layout: str,
    start: int,
    stop: int,
    eps: float,
    q_config: configs.Config,
    k_config: configs.Config,
) -> None:
    """Launch over ``[B, S, heads, head_dim]`` of any strides; ``q_out`` and ``k_out`` may be ``q`` and ``k``."""
    programs = [
        x.shape[0] * x.shape[1] * cdiv(x.shape[2], config.block_heads) for x, config in ((q, q_config), (k, k_config))
    ]
    if max(programs) == 0 or q.shape[3] == 0:
        return
    num_warps = max(q_config.num_warps, k_config.num_warps)
    with on_device(q):
        _qk_norm_rope_fwd_kernel[(2 * max(programs),)](
            q, *q.stride()[:3], q_out, *q_out.stride()[:3], q_weight, q_bias,
            k, *k.stride()[:3], k_out, *k_out.stride()[:3], k_weight, k_bias,
            cos, *table_strides(cos), sin, *table_strides(sin),
            *programs, q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], start, stop, eps,
            NORM=("none", "per_head", "across_heads").index(norm), LAYER=norm_type == "layer",
            HALF_LAYOUT=layout == "half",
            TABLE_HEADS=cos is not None and sin is not None and max(cos.shape[2], sin.shape[2]) > 1,
            Q_BLOCK=q_config.block_heads, K_BLOCK=k_config.block_heads, BLOCK_HALF=q_config.block_half,
            FENCE=q_out is q and min(q_config.tile, k_config.tile) < 512 * num_warps,
            num_warps=num_warps,
        )  # fmt: skip


def _launch(
    q: Tensor,
    k: Tensor,
    outputs: tuple[Tensor, Tensor] | None,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    norm_type: str,
    layout: str,
    start: int,
    stop: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    refuse_float64("qk_norm_rope", q, *vectors)
    if q.shape[3] % 2:
        raise UnsupportedError(
            f"qk_norm_rope: an odd head_dim ({q.shape[3]}) has no Triton kernel; use impl='reference'"
        )
    arch, whole_row = arch_for(q), norm == "across_heads"
    shape = {"op": "qk_norm_rope", "head_dim": q.shape[3], "whole_row": whole_row, "itemsize": q.element_size()}
    q_config, k_config = (configs.select(arch, heads=x.shape[2], **shape) for x in (q, k))
    q_out, k_out = outputs or (q.new_empty(q.shape), k.new_empty(k.shape))
    stop = q.shape[1] if stop < 0 else stop
    launch_fwd(
        q, k, q_out, k_out, *vectors, cos, sin, norm, norm_type, layout, start, stop, eps, q_config, k_config
    )  # fmt: skip
    return q_out, k_out


def qk_norm_rope(
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
    rotary_start: int,
    rotary_stop: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``impl="triton"`` of the op."""
    cos, sin = four_dims(cos), four_dims(sin)
    vectors = (q_weight, k_weight, q_bias, k_bias)
    return _launch(q, k, None, vectors, cos, sin, norm, norm_type, layout, rotary_start, rotary_stop, eps)


def qk_norm_rope_(
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
    rotary_start: int,
    rotary_stop: int,
    eps: float,
) -> None:
    """``impl="triton"`` of the in-place op: a program reads all that its statistics need before it writes."""
    cos, sin = four_dims(cos), four_dims(sin)
    vectors = (q_weight, k_weight, q_bias, k_bias)
    _launch(q, k, (q, k), vectors, cos, sin, norm, norm_type, layout, rotary_start, rotary_stop, eps)
