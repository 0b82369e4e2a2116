"""Attention on int8 or e4m3 queries and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import (
    DTypeError,
    bad_option,
    bad_shape,
    check_last_dim_contiguous,
    check_same_device,
    check_tensor,
    refuse_grad,
)
from .spacetime_attention import check_options


def int8_attention(
    q8: Tensor,
    k8: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    lse_shift: Tensor | None = None,
    *,
    grid: Sequence[int],
    window: Sequence[int] | Sequence[Sequence[int]] | None = None,
    stride: Sequence[int] = (1, 1, 1),
    causal_time: bool = False,
    text_len: int = 0,
    text_side: str = "suffix",
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`spacetime_attention` on the codes that `quantize_qk` makes: int8 products, exact in int32, fp32 softmax.

        score[i, j] = scale · q_scale[i] k_scale[j] (q8[i]·k8[j]),   out[i] = Σ_j softmax_j(score[i, j]) v[j]
        lse[i] = log Σ_j exp(score[i, j]) + scale · lse_shift[i]

    Args:
        q8: ``[B, S, heads, head_dim]`` int8; last dim contiguous, any other strides.
        k8: ``[B, S, kv_heads, head_dim]`` int8, likewise.
        v: ``[B, S, kv_heads, head_dim]``, bf16/fp16/fp32 (fp64 by the reference), likewise.
        q_scale, k_scale: ``[B, heads, S]`` and ``[B, kv_heads, S]`` fp32 (fp64 with fp64 values), contiguous.
        lse_shift: ``[B, heads, S]``, dtype of the scales, contiguous; None: nothing was taken off the keys.
        grid, window, stride, causal_time, text_len, text_side, kv_lens, scale, return_lse: as `spacetime_attention`.
        impl: ``auto``, ``reference`` or ``triton``; an explicit choice never falls back.
    Returns:
        ``[B, S, heads, head_dim]``, contiguous, dtype of ``v``; or ``(out, lse)``. A query with no key to see gives
        zeros and an ``lse`` of -inf.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: an argument requires grad, or this implementation has not what is asked for.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic S and grid. head_dim ≤ 256 in Triton.
    Numerics: error ≤ 2 × eager's own against float64, on the same codes; what the codes lose is measured in
        docs/ops/spacetime_attention.md. Deterministic: yes.
    Source: Zhang et al., "SageAttention", arXiv:2410.02367.
    """
    return _attend(
        "int8_attention", torch.int8, q8, k8, v, q_scale, k_scale, lse_shift, grid=grid, window=window, stride=stride,
        causal_time=causal_time, text_len=text_len, text_side=text_side, kv_lens=kv_lens, scale=scale,
        return_lse=return_lse, impl=impl,
    )  # fmt: skip


def fp8_attention(
    q8: Tensor,
    k8: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    lse_shift: Tensor | None = None,
    *,
    grid: Sequence[int],
    window: Sequence[int] | Sequence[Sequence[int]] | None = None,
    stride: Sequence[int] = (1, 1, 1),
    causal_time: bool = False,
    text_len: int = 0,
    text_side: str = "suffix",
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`int8_attention` on codes in e4m3, from `quantize_qk` in precision ``fp8``: fp8 products, fp32 softmax.

        score[i, j] = scale · q_scale[i] k_scale[j] (q8[i]·k8[j]),   out[i] = Σ_j softmax_j(score[i, j]) v[j]
        lse[i] = log Σ_j exp(score[i, j]) + scale · lse_shift[i]

    Args:
        q8: ``[B, S, heads, head_dim]`` ``torch.float8_e4m3fn``; last dim contiguous, any other strides.
        k8: ``[B, S, kv_heads, head_dim]`` ``torch.float8_e4m3fn``, likewise.
        v, q_scale, k_scale, lse_shift: as `int8_attention`: values stay in their own dtype.
        grid, window, stride, causal_time, text_len, text_side, kv_lens, scale, return_lse: as `spacetime_attention`.
        impl: ``auto``, ``reference`` or ``triton``; an explicit choice never falls back, nor does ``auto`` on a GPU.
    Returns:
        ``[B, S, heads, head_dim]``, contiguous, dtype of ``v``; or ``(out, lse)``. A query with no key to see gives
        zeros and an ``lse`` of -inf.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: a card without such products, an argument that requires grad, or this implementation has not
            what is asked for.
    Supports: sm_89+, gfx950, CPU | fwd | fullgraph, CUDA graphs, dynamic S and grid. head_dim ≤ 256 in Triton.
    Numerics: error ≤ 2 × eager's own against float64, on the same codes, as far as the card sums fp8 products in fp32
        (sm_90 keeps some 14 bits); what the codes lose is measured in docs/ops/spacetime_attention.md.
        Deterministic: yes.
    Source: Shah et al., "FlashAttention-3", arXiv:2407.08608; the scales and K's constant as `quantize_qk`.
    """
    return _attend(
        "fp8_attention", torch.float8_e4m3fn, q8, k8, v, q_scale, k_scale, lse_shift, grid=grid, window=window,
        stride=stride, causal_time=causal_time, text_len=text_len, text_side=text_side, kv_lens=kv_lens, scale=scale,
        return_lse=return_lse, impl=impl,
    )  # fmt: skip


# What an error calls a tensor of codes.
_ARTICLES = {torch.int8: "an int8", torch.float8_e4m3fn: "a float8_e4m3fn"}


def _attend(
    op: str,
    dtype: torch.dtype,
    q8: Tensor,
    k8: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    lse_shift: Tensor | None,
    *,
    grid: Sequence[int],
    window: Sequence[int] | Sequence[Sequence[int]] | None,
    stride: Sequence[int],
    causal_time: bool,
    text_len: int,
    text_side: str,
    kv_lens: Tensor | None,
    scale: float | None,
    return_lse: bool,
    impl: str,
) -> Tensor | tuple[Tensor, Tensor]:
    check_tensor(op, "v", v, ndim=4)
    for name, codes in (("q8", q8), ("k8", k8)):
        if not isinstance(codes, Tensor) or codes.dtype != dtype:
            got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise DTypeError(f"{op}: `{name}` must be {_ARTICLES[dtype]} tensor; got {got}")
        if codes.dim() != 4:
            bad_shape(op, name, "[B, S, heads, head_dim]", codes)
    b, s, heads, head_dim = q8.shape
    if heads < 1 or head_dim < 1:
        bad_shape(op, "q8", "[B, S, heads, head_dim] with at least one head and one channel", q8)
    if k8.shape[0] != b or k8.shape[1] != s or k8.shape[3] != head_dim or k8.shape[2] < 1 or heads % k8.shape[2]:
        bad_shape(op, "k8", f"[{b}, {s}, a divisor of {heads}, {head_dim}] for `q8` {list(q8.shape)}", k8)
    if v.shape != k8.shape:
        bad_shape(op, "v", f"{list(k8.shape)} like `k8`", v)
    check_last_dim_contiguous(op, q8=q8, k8=k8, v=v)
    vectors = (("q_scale", q_scale, heads), ("k_scale", k_scale, k8.shape[2]), ("lse_shift", lse_shift, heads))
    wanted = torch.float64 if v.dtype == torch.float64 else torch.float32
    for name, vector, n in vectors:
        if vector is None and name == "lse_shift":
            continue
        check_tensor(op, name, vector, ndim=3)
        assert vector is not None
        if vector.dtype != wanted:
            raise DTypeError(f"{op}: `{name}` must be {wanted} with `v` in {v.dtype}; got {vector.dtype}")
        if vector.shape != (b, n, s) or not vector.is_contiguous():
            bad_shape(op, name, f"[{b}, {n}, {s}], contiguous", vector)
    check_same_device(op, q8=q8, k8=k8, v=v, q_scale=q_scale, k_scale=k_scale, lse_shift=lse_shift)
    sizes, flat_window, strides = check_options(op, "q8", q8, grid, window, stride, text_len, text_side, kv_lens)
    if scale is None:
        scale = head_dim**-0.5
    if not 0 < scale < math.inf:
        bad_option(op, "scale", "a positive number", scale)
    refuse_grad(op, v=v, q_scale=q_scale, k_scale=k_scale, lse_shift=lse_shift)
    out, lse = getattr(torch.ops.pyvideo, op)(
        q8, k8, v, q_scale, k_scale, lse_shift, sizes, flat_window, strides, causal_time, text_len, text_side, kv_lens,
        scale, return_lse, impl,
    )  # fmt: skip
    return (out, lse) if return_lse else out
