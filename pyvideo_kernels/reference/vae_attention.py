"""Oracle of vae_attention and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up


def vae_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """Softmax attention of each frame over its own tokens or, causal, over those of all frames up to its own."""
    dtype = compute_dtype(q)
    out = q.new_empty(q.shape)
    for t in range(q.shape[1]):
        first = 0 if causal else t
        keys, values = (up(x[:, first : t + 1].flatten(1, 2), dtype) for x in (k, v))
        scores = up(q[:, t], dtype) @ keys.transpose(1, 2) * scale
        out[:, t] = torch.softmax(scores, -1) @ values
    return out


def summed(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> dict[int, Tensor]:
    """√terms Σ|a b| of the product with the values, and of the scores through the softmax's derivative."""
    dtype = compute_dtype(q)
    out = q.new_empty(q.shape)
    for t in range(q.shape[1]):
        first = 0 if causal else t
        keys, values = (up(x[:, first : t + 1].flatten(1, 2), dtype) for x in (k, v))
        query = up(q[:, t], dtype)
        weights = torch.softmax(query @ keys.transpose(1, 2) * scale, -1)
        # d out = Σ w (v - out) d score; a score's own sum has D terms.
        scores = query.abs() @ keys.abs().transpose(1, 2) * (scale * q.shape[-1] ** 0.5)
        spread = (weights * scores) @ values.abs() + (weights * scores).sum(-1, keepdim=True) * (weights @ values).abs()
        out[:, t] = weights @ values.abs() * keys.shape[1] ** 0.5 + spread
    return {0: out}


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Fused and separate projections, ragged token counts, every split of D, one token, peaked and flat softmax."""
    g = generator()

    def case(qkv: tuple[Tensor, Tensor, Tensor], causal: bool, sharpness: float = 1.0) -> dict[str, Any]:
        q, k, v = qkv
        return {"q": q, "k": k, "v": v, "causal": causal, "scale": sharpness * q.shape[-1] ** -0.5}

    def fused(b: int, t: int, s: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = randn(b, t, s, 3 * d, dtype=dtype, g=g).chunk(3, -1)
        return q, k, v

    def separate(b: int, t: int, s: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (randn(b, t, s, d, dtype=dtype, g=g) for _ in range(3))
        return q, k, v

    yield case(fused(1, 2, 70, 48), causal=False)
    yield case(separate(2, 3, 37, 96), causal=True, sharpness=4.0)
    yield case(fused(1, 1, 1, 32), causal=False)
    yield case(fused(1, 2, 9, 384), causal=True)
    yield case(separate(1, 1, 19, 512), causal=False)
    yield case(fused(1, 1, 5, 1024), causal=False)
    # Frames of a wider clip, so that frames do not follow each other in memory.
    yield case(tuple(x[:, ::2] for x in separate(1, 5, 16, 64)), causal=True)  # type: ignore[arg-type]
