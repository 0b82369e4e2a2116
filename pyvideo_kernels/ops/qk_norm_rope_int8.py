"""Query/key norm, rotary embedding and 8-bit codes in one pass over q and k."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import bad_shape, refuse_grad
from .qk_norm_rope import _check
from .quantize_qk import check_precision

_OP = "qk_norm_rope_int8"


def qk_norm_rope_int8(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm: str = "across_heads",
    norm_type: str = "rms",
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    layout: str = "interleaved",
    rotary_range: tuple[int, int] | None = None,
    eps: float = 1e-6,
    precision: str = "int8",
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`qk_norm_rope`, then `quantize_qk`, in one pass: q and k are read once, and written as codes.

        q', k' = qk_norm_rope(q, k)                                          in fp32, not rounded
        q'[i] ≈ q_scale[i] q8[i],   k'[j] - c ≈ k_scale[j] k8[j],   lse_shift[i] = q'[i]·c

    Args:
        q: ``[B, S, heads, head_dim]``, as for `qk_norm_rope`.
        k: ``[B, S, kv_heads, head_dim]``, of the same length; ``heads`` is a multiple of ``kv_heads``.
        q_weight, k_weight, cos, sin, norm, norm_type, q_bias, k_bias, layout, rotary_range, eps: as for `qk_norm_rope`.
            ``c`` is the mean of some of the tokens that are rotated (the video), of all if no range is given.
        precision: of the codes, as `quantize_qk`: ``int8`` or ``fp8``.
        impl: ``auto``, ``reference`` or ``triton``; an explicit choice never falls back.
    Returns:
        ``(q8, k8, q_scale, k_scale, lse_shift)``, for `int8_attention` or `fp8_attention`: as `quantize_qk`.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: an argument requires grad, or this implementation has not what is asked for.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic S.
    Numerics: as `quantize_qk`; nothing is rounded before the codes. Deterministic: yes.
    Source: as `qk_norm_rope` and `quantize_qk`.
    """
    vectors = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    cos, sin, start, stop = _check(_OP, q, k, vectors, cos, sin, norm, norm_type, layout, rotary_range)
    b, s, heads, head_dim = q.shape
    if k.shape[1] != s or k.shape[2] < 1 or heads % k.shape[2]:
        bad_shape(_OP, "k", f"[{b}, {s}, a divisor of {heads}, {head_dim}] for `q` {list(q.shape)}", k)
    check_precision(_OP, precision)
    refuse_grad(_OP, q=q, k=k, cos=cos, sin=sin, **vectors)
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.pyvideo.qk_norm_rope_int8(
        q, k, *vectors.values(), cos, sin, norm, norm_type, layout, start, stop, eps, precision, impl
    )
    return out
