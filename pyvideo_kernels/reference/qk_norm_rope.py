"""Oracle of qk_norm_rope and its in-place twin, the gradient, and the sample inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up

# [B, S, heads, head_dim]: the dimensions whose elements share one statistic.
_NORM_DIMS = {"across_heads": (2, 3), "per_head": (3,)}


def as_table(table: Tensor) -> Tensor:
    """``[S_rot, head_dim]`` as ``[1, S_rot, 1, head_dim]``; four dimensions unchanged."""
    return table[None, :, None, :] if table.dim() == 2 else table


def angles(cos: Tensor, sin: Tensor, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One cosine and one sine a pair, read where diffusers' Wan code reads them: cos at even, sin at odd indices."""
    cos, sin = as_table(cos), as_table(sin)
    if layout == "interleaved":
        return up(cos[..., 0::2], dtype), up(sin[..., 1::2], dtype)
    half = cos.shape[-1] // 2
    return up(cos[..., :half], dtype), up(sin[..., :half], dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Rotate the pairs of the last dimension: (a, b) -> (a cos - b sin, a sin + b cos)."""
    if layout == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def _rotate_range(x: Tensor, cos: Tensor, sin: Tensor, layout: str, start: int, stop: int) -> Tensor:
    stop = x.shape[1] if stop < 0 else stop
    return torch.cat((x[:, :start], rotate(x[:, start:stop], cos, sin, layout), x[:, stop:]), 1)


def _by_head(vector: Tensor, x: Tensor, norm: str, dtype: torch.dtype) -> Tensor:
    """A ``[heads * head_dim]`` or ``[head_dim]`` vector in a shape that multiplies ``x``."""
    vector = up(vector, dtype)
    return vector.view(x.shape[2:]) if norm == "across_heads" else vector


def _normalise(x: Tensor, norm: str, norm_type: str, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised values and the reciprocal deviation they were divided by."""
    dims = _NORM_DIMS[norm]
    if norm_type == "layer":
        x = x - x.mean(dims, keepdim=True)
    rstd = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    return x * rstd, rstd


def _one(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    norm_type: str,
    layout: str,
    start: int,
    stop: int,
    eps: float,
) -> Tensor:
    dtype = compute_dtype(x)
    y = up(x, dtype)
    if norm != "none":
        y, _ = _normalise(y, norm, norm_type, eps)
        if weight is not None:
            y = y * _by_head(weight, x, norm, dtype)
        if bias is not None:
            y = y + _by_head(bias, x, norm, dtype)
    if cos is not None and sin is not None:
        y = _rotate_range(y, *angles(cos, sin, layout, dtype), layout, start, stop)
    out = x.new_empty(x.shape)
    return out.copy_(y)


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
    """Normalise q and k, then rotate the tokens of the range; one rounding, after the rotation.

    ``rotary_stop`` of -1 is the end of the sequence.
    """
    rest = (cos, sin, norm, norm_type, layout, rotary_start, rotary_stop, eps)
    return _one(q, q_weight, q_bias, *rest), _one(k, k_weight, k_bias, *rest)


def qk_norm_rope_(q: Tensor, k: Tensor, *rest: Any) -> None:
    """The same, written over q and k."""
    new_q, new_k = qk_norm_rope(q, k, *rest)
    q.copy_(new_q)
    k.copy_(new_k)


def _one_backward(
    grad: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    norm_type: str,
    layout: str,
    start: int,
    stop: int,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of (x, weight, bias). A rotation's transpose is the rotation back."""
    dtype = compute_dtype(x)
    dy = torch.zeros(x.shape, dtype=dtype, device=x.device) if grad is None else up(grad, dtype)
    if cos is not None and sin is not None:
        c, s = angles(cos, sin, layout, dtype)
        dy = _rotate_range(dy, c, -s, layout, start, stop)
    if norm == "none":
        return dy.to(x.dtype).contiguous(), None, None
    dims = _NORM_DIMS[norm]
    xhat, rstd = _normalise(up(x, dtype), norm, norm_type, eps)
    batch_dims = (0, 1) if norm == "across_heads" else (0, 1, 2)
    dweight = None if weight is None else (dy * xhat).sum(batch_dims).reshape(weight.shape).to(weight.dtype)
    dbias = None if bias is None else dy.sum(batch_dims).reshape(bias.shape).to(bias.dtype)
    dxhat = dy if weight is None else dy * _by_head(weight, x, norm, dtype)
    removed = xhat * (dxhat * xhat).mean(dims, keepdim=True)
    if norm_type == "layer":
        removed = removed + dxhat.mean(dims, keepdim=True)
    return ((dxhat - removed) * rstd).to(x.dtype).contiguous(), dweight, dbias


def qk_norm_rope_backward(
    grads: Sequence[Tensor | None],
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
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (q, k, q_weight, k_weight, q_bias, k_bias), those in ``needs``."""
    rest = (cos, sin, norm, norm_type, layout, rotary_start, rotary_stop, eps)
    none = (None, None, None)
    dq, dq_weight, dq_bias = _one_backward(grads[0], q, q_weight, q_bias, *rest) if any(needs[0::2]) else none
    dk, dk_weight, dk_bias = _one_backward(grads[1], k, k_weight, k_bias, *rest) if any(needs[1::2]) else none
    every = (dq, dk, dq_weight, dk_weight, dq_bias, dk_bias)
    return [g for g, need in zip(every, needs, strict=True) if need and g is not None]


def samples(dtype: torch.dtype, head_dim: int | None = None) -> Iterator[dict[str, Any]]:
    """Each model family's use: packed QKV, grouped heads, text beside video, tables a head, cross-attention.

    ``head_dim``: that of all samples (an odd one leaves those without rotation); None: each has its own.
    """
    for kwargs in _samples(dtype, head_dim):
        if kwargs["cos"] is None or kwargs["q"].shape[-1] % 2 == 0:
            yield kwargs


def _samples(dtype: torch.dtype, head_dim: int | None) -> Iterator[dict[str, Any]]:
    g = generator()
    f32 = torch.float64 if dtype == torch.float64 else torch.float32

    def table(*shape: int, layout: str = "interleaved") -> dict[str, Any]:
        angle = torch.rand(*shape[:-1], shape[-1] // 2, generator=g, dtype=torch.float64) * 6.0
        angle = angle.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat((angle, angle), -1)
        return {"cos": angle.cos().to(f32), "sin": angle.sin().to(f32), "layout": layout}

    def vectors(n: int, m: int, *kinds: str, dtype: torch.dtype = dtype) -> dict[str, Tensor]:
        mean = {"weight": 1.0, "bias": 0.0}
        return {f"{name}_{kind}": randn(size, dtype=dtype, g=g, scale=0.3, mean=mean[kind])
                for kind in kinds for name, size in (("q", n), ("k", m))}  # fmt: skip

    def dim(own: int) -> int:
        return own if head_dim is None else head_dim

    names = ("q_weight", "k_weight", "q_bias", "k_bias", "cos", "sin")
    plain: dict[str, Any] = {
        **dict.fromkeys(names),
        "norm": "across_heads",
        "norm_type": "rms",
        "layout": "interleaved",
        "rotary_start": 0,
        "rotary_stop": -1,
        "eps": 1e-6,
    }
    # Wan: q and k are views of one packed projection; one table for all heads and batches.
    d = dim(16)
    qkv = randn(2, 3, 3, 3, d, dtype=dtype, g=g)
    yield {**plain, "q": qkv[:, :, 0], "k": qkv[:, :, 1], **vectors(3 * d, 3 * d, "weight"), **table(1, 3, 1, d)}
    # Grouped heads, one statistic a head, rotate-half tables of two dimensions, a head_dim that is no power of two.
    d = dim(12)
    q, k = randn(1, 2, 12, d, dtype=dtype, g=g), randn(1, 2, 3, d, dtype=dtype, g=g)
    weights = vectors(d, d, "weight", dtype=f32)
    yield {**plain, "q": q, "k": k, "norm": "per_head", **weights, **table(2, d, layout="half")}
    # CogVideoX: affine layer norm a head, text first, heads before tokens in memory.
    d = dim(16)
    q, k = (randn(1, 2, 5, d, dtype=dtype, g=g, mean=2.0).transpose(1, 2) for _ in range(2))
    weights = vectors(d, d, "weight", "bias")
    yield {**plain, "q": q, "k": k, "norm": "per_head", "norm_type": "layer", **weights, **table(2, d),
           "rotary_start": 3}  # fmt: skip
    # LTX: tables that differ by head and batch entry; text after the video, unequal lengths.
    d = dim(8)
    q, k = randn(2, 2, 2, d, dtype=dtype, g=g), randn(2, 3, 2, d, dtype=dtype, g=g)
    weights = vectors(2 * d, 2 * d, "weight")
    yield {**plain, "q": q, "k": k, **weights, **table(2, 1, 2, d), "rotary_stop": 1, "eps": 1e-5}
    # Cross-attention: other lengths, no rotation; one token.
    d = dim(6)
    q, k = randn(7, 1, 3, d, dtype=dtype, g=g), randn(7, 4, 3, d, dtype=dtype, g=g)
    yield {**plain, "q": q, "k": k, **vectors(3 * d, 3 * d, "weight")}
    # Rotation alone, and a layer norm across heads without affine.
    yield {**plain, "q": q, "k": q.clone(), "norm": "none", **table(1, 1, 1, d, layout="half")}
    d = dim(10)
    q, k = (randn(3, 5, 2, d, dtype=dtype, g=g, mean=3.0) for _ in range(2))
    yield {**plain, "q": q, "k": k, "norm_type": "layer", **table(1, 5, 1, d)}
