"""Query/key norm, rotary embedding and 8-bit codes in one pass: what attention reads is all that is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs import qk_norm_rope as configs
from pyvideo_kernels.configs import quantize_qk as mean_configs
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.reference.quantize_qk import CODES, sampled

from .launch import cdiv, on_device, refuse_float64
from .pairs import four_dims, load_pairs, store_pairs, table_strides
from .qk_norm_rope import launch_fwd as launch_unquantized
from .qk_norm_rope import norm_rotate
from .quantize_qk import launch_mean, row_scale, sizes, to_codes


@triton.jit
def _one_token(
    x_ptr, x_b, x_s, x_h, codes_ptr, scale_ptr, shift_ptr, mean_ptr, group, weight_ptr, bias_ptr,
    cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
    token, head_block, tokens, heads, head_dim, start, stop, eps,
    NORM: tl.constexpr, LAYER: tl.constexpr, HALF_LAYOUT: tl.constexpr, TABLE_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Heads of one token of q if there is a ``shift_ptr``, else of k, less the mean; ``group``: heads to a mean."""
    x, y, b, s, head, head_mask = norm_rotate(
        x_ptr, x_b, x_s, x_h, weight_ptr, bias_ptr, cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
        token, head_block, tokens, heads, head_dim, start, stop, eps,
        NORM, LAYER, HALF_LAYOUT, TABLE_HEADS, BLOCK_HEADS, BLOCK_HALF,
    )  # fmt: skip
    half = head_dim // 2
    # Padding of the head is not zero after a norm with bias, but no number of it may set the scale.
    inside = head_mask[:, None] & (tl.arange(0, BLOCK_HALF) < half)[None, :]
    mean_at = (b * (heads // group) + head.to(tl.int32) // group) * head_dim
    mean_x, mean_y = load_pairs(mean_ptr, mean_at, head_mask, half, HALF_LAYOUT, BLOCK_HALF)
    line = (b * heads + head) * tokens + s
    if shift_ptr is not None:
        shift = tl.sum(tl.where(inside, x * mean_x + y * mean_y, 0.0), 1)
        tl.store(shift_ptr + line, shift, mask=head_mask)
    else:
        x = x - mean_x
        y = y - mean_y
    scale, factor, good = row_scale(tl.where(inside, tl.maximum(sizes(x), sizes(y)), 0.0), LARGEST)
    tl.store(scale_ptr + line, scale, mask=head_mask)
    rows = ((b * tokens + s) * heads + head) * head_dim
    store_pairs(
        codes_ptr, rows, head_mask, half, to_codes(x, factor, good, LARGEST), to_codes(y, factor, good, LARGEST),
        HALF_LAYOUT, BLOCK_HALF,
    )  # fmt: skip


@triton.jit
def _qk_norm_rope_int8_fwd_kernel(
    q_ptr, q_b, q_s, q_h, q8_ptr, q_scale_ptr, shift_ptr, q_weight_ptr, q_bias_ptr,
    k_ptr, k_b, k_s, k_h, k8_ptr, k_scale_ptr, k_weight_ptr, k_bias_ptr, mean_ptr,
    cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
    q_programs, k_programs, tokens, q_heads, k_heads, head_dim, start, stop, eps,
    NORM: tl.constexpr, LAYER: tl.constexpr, HALF_LAYOUT: tl.constexpr, TABLE_HEADS: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs are q and k of one token, so that the second finds its tables in cache.
    pid = tl.program_id(0)
    i = pid // 2
    if pid % 2 == 0:
        if i < q_programs:
            blocks = tl.cdiv(q_heads, Q_BLOCK)
            _one_token(
                q_ptr, q_b, q_s, q_h, q8_ptr, q_scale_ptr, shift_ptr, mean_ptr, q_heads // k_heads,
                q_weight_ptr, q_bias_ptr, cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
                i // blocks, i % blocks, tokens, q_heads, head_dim, start, stop, eps,
                NORM, LAYER, HALF_LAYOUT, TABLE_HEADS, Q_BLOCK, BLOCK_HALF, LARGEST,
            )  # fmt: skip
    else:
        if i < k_programs:
            blocks = tl.cdiv(k_heads, K_BLOCK)
            _one_token(
                k_ptr, k_b, k_s, k_h, k8_ptr, k_scale_ptr, None, mean_ptr, 1,
                k_weight_ptr, k_bias_ptr, cos_ptr, cos_b, cos_s, cos_h, sin_ptr, sin_b, sin_s, sin_h,
                i // blocks, i % blocks, tokens, k_heads, head_dim, start, stop, eps,
                NORM, LAYER, HALF_LAYOUT, TABLE_HEADS, K_BLOCK, BLOCK_HALF, LARGEST,
            )  # fmt: skip


def _mean(
    k: Tensor, weight: Tensor | None, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, norm: str,
    norm_type: str, layout: str, start: int, stop: int, eps: float, config: configs.Config,
) -> Tensor:  # fmt: skip
    """The mean of a subsample of the keys as they will be: those few are normed and rotated twice."""
    mean_config = mean_configs.select(arch_for(k), head_dim=k.shape[3], itemsize=4)
    count, step = sampled(start, stop)
    some = k[:, start:stop:step]
    if cos is not None and sin is not None:
        cos, sin = cos[:, ::step], sin[:, ::step]
    keys = k.new_empty(some.shape, dtype=torch.float32)
    nothing = some[:, :0]
    launch_unquantized(
        nothing, some, keys[:, :0], keys, None, weight, None, bias, cos, sin, norm, norm_type, layout, 0, count, eps,
        config, config,
    )  # fmt: skip
    return launch_mean(keys, 0, count, 1, mean_config)


def qk_norm_rope_int8(
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
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``impl="triton"`` of the op."""
    refuse_float64("qk_norm_rope_int8", q, q_weight, k_weight, q_bias, k_bias)
    b, s, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if head_dim % 2:
        raise UnsupportedError(
            f"qk_norm_rope_int8: an odd head_dim ({head_dim}) has no Triton kernel; use impl='reference'"
        )
    cos, sin = four_dims(cos), four_dims(sin)
    stop = s if rotary_stop < 0 else rotary_stop
    shape = {"head_dim": head_dim, "whole_row": norm == "across_heads", "itemsize": q.element_size()}
    q_config, k_config = (
        configs.select(arch_for(q), op="qk_norm_rope_int8", heads=n, **shape) for n in (heads, kv_heads)
    )
    q8, k8 = (x.new_empty(x.shape, dtype=torch.int8) for x in (q, k))
    q_scale, k_scale, shift = (q.new_empty((b, n, s), dtype=torch.float32) for n in (heads, kv_heads, heads))
    programs = [b * s * cdiv(n, config.block_heads) for n, config in ((heads, q_config), (kv_heads, k_config))]
    if not q.numel():
        return q8.view(CODES[precision][0]), k8.view(CODES[precision][0]), q_scale, k_scale, shift
    mean = _mean(k, k_weight, k_bias, cos, sin, norm, norm_type, layout, rotary_start, stop, eps, k_config)
    with on_device(q):
        _qk_norm_rope_int8_fwd_kernel[(2 * max(programs),)](
            q, *q.stride()[:3], q8, q_scale, shift, q_weight, q_bias,
            k, *k.stride()[:3], k8, k_scale, k_weight, k_bias, mean,
            cos, *table_strides(cos), sin, *table_strides(sin),
            *programs, s, heads, kv_heads, head_dim, rotary_start, stop, eps,
            NORM=("none", "per_head", "across_heads").index(norm), LAYER=norm_type == "layer",
            HALF_LAYOUT=layout == "half",
            TABLE_HEADS=cos is not None and sin is not None and max(cos.shape[2], sin.shape[2]) > 1,
            Q_BLOCK=q_config.block_heads, K_BLOCK=k_config.block_heads, BLOCK_HALF=q_config.block_half,
            LARGEST=CODES[precision][1],
            num_warps=max(q_config.num_warps, k_config.num_warps),
        )  # fmt: skip
    return q8.view(CODES[precision][0]), k8.view(CODES[precision][0]), q_scale, k_scale, shift
