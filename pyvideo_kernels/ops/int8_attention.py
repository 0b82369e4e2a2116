"""Attention on int8 queries and keys."""

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

_OP = "int8_attention"


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
    check_tensor(_OP, "v", v, ndim=4)
    for name, codes in (("q8", q8), ("k8", k8)):
        if not isinstance(codes, Tensor) or codes.dtype != torch.int8:
            got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise DTypeError(f"{_OP}: `{name}` must be an int8 tensor; got {got}")
        if codes.dim() != 4:
            bad_shape(_OP, name, "[B, S, heads, head_dim]", codes)
    b, s, heads, head_dim = q8.shape
    if heads < 1 or head_dim < 1:
        bad_shape(_OP, "q8", "[B, S, heads, head_dim] with at least one head and one channel", q8)
    if k8.shape[0] != b or k8.shape[1] != s or k8.shape[3] != head_dim or k8.shape[2] < 1 or heads % k8.shape[2]:
        bad_shape(_OP, "k8", f"[{b}, {s}, a divisor of {heads}, {head_dim}] for `q8` {list(q8.shape)}", k8)
    if v.shape != k8.shape:
        bad_shape(_OP, "v", f"{list(k8.shape)} like `k8`", v)
    check_last_dim_contiguous(_OP, q8=q8, k8=k8, v=v)
    vectors = (("q_scale", q_scale, heads), ("k_scale", k_scale, k8.shape[2]), ("lse_shift", lse_shift, heads))
    wanted = torch.float64 if v.dtype == torch.float64 else torch.float32
    for name, vector, n in vectors:
        if vector is None and name == "lse_shift":
            continue
        check_tensor(_OP, name, vector, ndim=3)
        assert vector is not None
        if vector.dtype != wanted:
            raise DTypeError(f"{_OP}: `{name}` must be {wanted} with `v` in {v.dtype}; got {vector.dtype}")
        if vector.shape != (b, n, s) or not vector.is_contiguous():
            bad_shape(_OP, name, f"[{b}, {n}, {s}], contiguous", vector)
    check_same_device(_OP, q8=q8, k8=k8, v=v, q_scale=q_scale, k_scale=k_scale, lse_shift=lse_shift)
    sizes, flat_window, strides = check_options(_OP, "q8", q8, grid, window, stride, text_len, text_side, kv_lens)
    if scale is None:
        scale = head_dim**-0.5
    if not 0 < scale < math.inf:
        bad_option(_OP, "scale", "a positive number", scale)
    refuse_grad(_OP, v=v, q_scale=q_scale, k_scale=k_scale, lse_shift=lse_shift)
    out, lse = torch.ops.pyvideo.int8_attention(
        q8, k8, v, q_scale, k_scale, lse_shift, sizes, flat_window, strides, causal_time, text_len, text_side, kv_lens,
        scale, return_lse, impl,
    )  # fmt: skip
    return (out, lse) if return_lse else out
