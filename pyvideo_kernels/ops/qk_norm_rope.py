"""Query/key normalisation and rotary position embedding in one pass over q and k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import (
    DTypeError,
    ValueOptionError,
    bad_option,
    bad_shape,
    check_last_dim_contiguous,
    check_same_device,
    check_tensor,
    refuse_grad,
)
from ._checks import check_vector

_OPTIONS = {
    "norm": ("across_heads", "per_head", "none"),
    "norm_type": ("rms", "layer"),
    "layout": ("interleaved", "half"),
}


def _check_table(op: str, name: str, table: Tensor, q: Tensor, k: Tensor, rotated: int) -> Tensor:
    """The table as ``[1 or B, S_rot, 1 or heads, head_dim]``."""
    check_tensor(op, name, table, ndim=(2, 4))
    heads, head_dim = q.shape[2:]
    table = table[None, :, None, :] if table.dim() == 2 else table
    per_head = heads if heads == k.shape[2] else 1
    if (
        table.shape[0] not in (1, q.shape[0])
        or table.shape[1] != rotated
        or table.shape[2] not in (1, per_head)
        or table.shape[3] != head_dim
    ):
        one_or = "1" if per_head == 1 else f"1 or {per_head}"
        expected = f"[{rotated}, {head_dim}] or [1 or {q.shape[0]}, {rotated}, {one_or}, {head_dim}]"
        bad_shape(op, name, expected, table)
    return table


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    vectors: dict[str, Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    norm_type: str,
    layout: str,
    rotary_range: tuple[int, int] | None,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Validate; returns the tables in four dimensions and the range, -1 for the end of the sequence."""
    check_tensor(op, "q", q, ndim=4)
    check_tensor(op, "k", k, ndim=4)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        bad_shape(op, "k", f"[{q.shape[0]}, S, heads, {q.shape[3]}] for `q` {list(q.shape)}", k)
    if k.dtype != q.dtype:
        raise DTypeError(f"{op}: `k` must be {q.dtype} like `q`; got {k.dtype}")
    chosen = {"norm": norm, "norm_type": norm_type, "layout": layout}
    for name, value in chosen.items():
        if value not in _OPTIONS[name]:
            bad_option(op, name, "one of " + ", ".join(repr(a) for a in _OPTIONS[name]), value)
    for name, vector in vectors.items():
        if vector is None:
            continue
        if norm == "none":
            raise ValueOptionError(f"{op}: `{name}` must be None with norm='none'; got a tensor")
        if norm_type == "rms" and name.endswith("bias"):
            raise ValueOptionError(f"{op}: `{name}` must be None with norm_type='rms'; got a tensor")
        heads = (q if name.startswith("q") else k).shape[2]
        check_vector(op, heads * q.shape[3] if norm == "across_heads" else q.shape[3], **{name: vector})
    if (cos is None) != (sin is None):
        missing = "cos" if cos is None else "sin"
        raise DTypeError(f"{op}: `{missing}` must be a tensor when the other table is given; got NoneType")
    start, stop = 0, -1
    if cos is not None and sin is not None:
        if q.shape[3] % 2:
            bad_shape(op, "q", "of even head_dim to be rotated in pairs", q)
        shortest = min(q.shape[1], k.shape[1])
        if rotary_range is None:
            if k.shape[1] != q.shape[1]:
                bad_shape(op, "k", f"of {q.shape[1]} tokens like `q` when both are rotated whole", k)
            rotated = q.shape[1]
        else:
            start, stop = rotary_range
            if not 0 <= start <= stop <= shortest:
                bad_option(op, "rotary_range", f"(start, stop) with 0 <= start <= stop <= {shortest}", rotary_range)
            rotated = stop - start
        cos = _check_table(op, "cos", cos, q, k, rotated)
        sin = _check_table(op, "sin", sin, q, k, rotated)
    elif rotary_range is not None:
        raise ValueOptionError(f"{op}: `rotary_range` must be None without `cos` and `sin`; got {rotary_range!r}")
    check_last_dim_contiguous(op, q=q, k=k, cos=cos, sin=sin, **vectors)
    check_same_device(op, q=q, k=k, cos=cos, sin=sin, **vectors)
    return cos, sin, start, stop


def qk_norm_rope(
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
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys, then rotate their pairs by position; fp32 from one end to the other.

        n = x * rsqrt(mean(x²) + eps) * weight                            norm_type="rms"
        n = (x - mean(x)) * rsqrt(var(x) + eps) * weight + bias           norm_type="layer"
        (a, b) -> (a cos θ - b sin θ, a sin θ + b cos θ)                  each pair (a, b) of n

    The mean is over heads and head_dim (``norm="across_heads"``), over head_dim (``"per_head"``), or there is no
    norm (``"none"``). Pairs are (2i, 2i+1) for ``layout="interleaved"`` and (i, i + head_dim/2) for ``"half"``.

    Args:
        q, k: ``[B, S, heads, head_dim]``, bf16/fp16/fp32 (fp64 by the reference), last dim contiguous, any other
            strides: views of a packed QKV projection are read in place. ``k`` may have fewer heads, and, where
            nothing is rotated or ``rotary_range`` is given, another length.
        q_weight, k_weight: ``[heads * head_dim]`` across heads, ``[head_dim]`` per head; None: 1.
        cos, sin: ``[S_rot, head_dim]`` or ``[1 or B, S_rot, 1 or heads, head_dim]``, fp32; None: no rotation. Every
            pair's value stands twice: ``interleaved`` reads cos at even and sin at odd indices, ``half`` reads the
            first half of both.
        q_bias, k_bias: as the weights, for ``norm_type="layer"``; None: 0.
        rotary_range: (start, stop), the tokens that are rotated (video; text is left); None: all.
        eps: added to the mean square or the variance, in units of q².
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        (q, k), contiguous, dtype and shape of the arguments; one rounding, after the rotation.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: a table requires grad (it gets none), or this implementation cannot be had here.
    Supports: sm_80+, gfx942+, CPU | fwd, bwd | fullgraph, CUDA graphs, dynamic S.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, eq. 4; Su et al., "RoFormer",
        arXiv:2104.09864, eq. 34; Dehghani et al., arXiv:2302.05442, sec. 2 (query/key normalisation).
    """
    vectors = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    tables = _check("qk_norm_rope", q, k, vectors, cos, sin, norm, norm_type, layout, rotary_range)
    cos, sin, start, stop = tables
    refuse_grad("qk_norm_rope", cos=cos, sin=sin)
    out: tuple[Tensor, Tensor] = torch.ops.pyvideo.qk_norm_rope(
        q, k, *vectors.values(), cos, sin, norm, norm_type, layout, start, stop, eps, impl
    )
    return out


def qk_norm_rope_(
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
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` written over its inputs: q and k are read once, written once, nothing is allocated.

    Args:
        q, k: as for `qk_norm_rope`, overwritten; strided views are written through, and no two of their elements
            may share memory. Every other argument as there.
    Returns:
        (q, k), the arguments themselves.
    Raises:
        as `qk_norm_rope`, and UnsupportedError when an argument requires grad: its value would be gone by backward.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic S.
    Numerics: as `qk_norm_rope`. Deterministic: yes.
    Source: as `qk_norm_rope`.
    """
    op = "qk_norm_rope_"
    vectors = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    cos, sin, start, stop = _check(op, q, k, vectors, cos, sin, norm, norm_type, layout, rotary_range)
    written: dict[str, Any] = {"q": q, "k": k}
    for name, tensor in written.items():
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            bad_shape(op, name, "a tensor without broadcast dimensions, to be written in place", tensor)
    refuse_grad(op, q=q, k=k, cos=cos, sin=sin, **vectors)
    torch.ops.pyvideo.qk_norm_rope_(q, k, *vectors.values(), cos, sin, norm, norm_type, layout, start, stop, eps, impl)
    return q, k
