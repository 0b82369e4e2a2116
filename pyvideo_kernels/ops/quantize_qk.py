"""Queries and keys in int8 or e4m3, for attention on 8-bit products."""

from __future__ import annotations

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

_OP = "quantize_qk"


def quantize_qk(
    q: Tensor, k: Tensor, *, mean_range: tuple[int, int] | None = None, precision: str = "int8", impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of queries and keys as 8-bit codes and one scale each, with a constant taken off the keys.

        q[i] ≈ q_scale[i] q8[i],   k[j] - c ≈ k_scale[j] k8[j],   lse_shift[i] = q[i]·c
        scale = max |row| / 127,   codes = round(row / scale)            (fp8: / 448, to the nearest e4m3)

    ``c`` is one vector a batch entry and KV head, the mean of a subsample of the keys: large values that a channel has
    in every key would eat the range of the codes. Softmax does not see it, whatever it is: it adds ``q[i]·c`` to
    every score of a row, hence to the row's ``lse`` alone.

    Args:
        q: ``[B, S, heads, head_dim]``, bf16/fp16/fp32 (fp64 by the reference); last dim contiguous, any other strides
            (views of a packed QKV too).
        k: ``[B, S, kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        mean_range: (start, stop), the tokens that ``c`` is the mean of (the video; padding text is left out): every
            64th, or as many as give 64. Empty: ``c = 0``. None: all.
        precision: ``int8``, or ``fp8``: ``torch.float8_e4m3fn``, made by every card, multiplied by sm_89+ and gfx950.
        impl: ``auto``, ``reference`` or ``triton``; an explicit choice never falls back.
    Returns:
        ``(q8, k8, q_scale, k_scale, lse_shift)``: codes in the shapes of q and k, then fp32 (fp64 for fp64)
            ``[B, heads, S]``, ``[B, kv_heads, S]`` and ``[B, heads, S]``; all contiguous. Scales are positive, those of
            rows of zeros too; a row that is not finite has the scale NaN, so that attention gives NaN where it counts.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: an argument requires grad, or this implementation has not what is asked for.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic S. head_dim ≤ 256 in Triton.
    Numerics: codes are within half a step of the row, a tie either way. Deterministic: yes.
    Source: Zhang et al., "SageAttention", arXiv:2410.02367, sec. 4.2 (keys less their mean); a scale a row instead of a
        block.
    """
    check_tensor(_OP, "q", q, ndim=4)
    check_tensor(_OP, "k", k, ndim=4)
    if k.dtype != q.dtype:
        raise DTypeError(f"{_OP}: `k` must be {q.dtype} like `q`; got {k.dtype}")
    b, s, heads, head_dim = q.shape
    if heads < 1 or head_dim < 1:
        bad_shape(_OP, "q", "[B, S, heads, head_dim] with at least one head and one channel", q)
    if k.shape[0] != b or k.shape[1] != s or k.shape[3] != head_dim or k.shape[2] < 1 or heads % k.shape[2]:
        bad_shape(_OP, "k", f"[{b}, {s}, a divisor of {heads}, {head_dim}] for `q` {list(q.shape)}", k)
    check_last_dim_contiguous(_OP, q=q, k=k)
    check_same_device(_OP, q=q, k=k)
    start, stop = (0, s) if mean_range is None else mean_range
    if not 0 <= start <= stop <= s:
        bad_option(_OP, "mean_range", f"(start, stop) within 0 and {s}", mean_range)
    check_precision(_OP, precision)
    refuse_grad(_OP, q=q, k=k)
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.pyvideo.quantize_qk(
        q, k, start, stop, precision, impl
    )
    return out


def check_precision(op: str, precision: str) -> None:
    """Refuse what is not a precision of codes."""
    if precision not in ("int8", "fp8"):
        bad_option(op, "precision", "'int8' or 'fp8'", precision)
