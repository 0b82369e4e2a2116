"""Oracle of quantize_qk, the constant that is taken off the keys, and the sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up

CODES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""By precision, the dtype of codes, and the code of the largest number of a row."""
# Below this a row is zeros: its scale stays a normal number, and so does the scale's reciprocal.
SMALLEST = 2.0**-118
# Tokens whose mean stands for that of all: every 64th, and 64 of them at least where there are as many.
SAMPLES, MAX_STEP = 64, 64


def sampled(start: int, stop: int) -> tuple[int, int]:
    """How many tokens of ``[start, stop)`` the mean is taken over, and how far apart they are."""
    n = max(stop - start, 0)
    step = max(1, min(n // SAMPLES, MAX_STEP))
    return (n + step - 1) // step, step


def key_mean(k: Tensor, start: int, stop: int) -> Tensor:
    """``[B, kv_heads, D]``: the mean of a subsample of the tokens, without what is not finite; zeros without tokens."""
    count, step = sampled(start, stop)
    if count == 0:
        return k.new_zeros((k.shape[0], k.shape[2], k.shape[3]), dtype=compute_dtype(k))
    some = up(k[:, start:stop:step], compute_dtype(k))
    return torch.where(some.isfinite(), some, 0.0).sum(1) / count


def to_codes(x: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Codes and one scale a row: ``x ≈ codes * scale``; zeros and a NaN scale for a row that is not finite."""
    dtype, largest = CODES[precision]
    top = x.abs().amax(-1, keepdim=True)
    good = top.isfinite()
    scale = torch.where(good, top.clamp(min=SMALLEST), 1.0) / largest
    codes = torch.where(good, x / scale, 0.0)
    codes = codes.round() if precision == "int8" else codes.clamp(-largest, largest)
    return codes.to(dtype), torch.where(good, scale, torch.nan).squeeze(-1)


def quantize_qk(
    q: Tensor, k: Tensor, mean_start: int, mean_stop: int, precision: str = "int8"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of q, and of k less a constant, in 8 bits; what the constant adds to each query's scores."""
    dtype = compute_dtype(q)
    mean = key_mean(k, mean_start, mean_stop)
    wide = up(q, dtype)
    shift = torch.einsum("bshd,bhd->bhs", wide, mean.repeat_interleave(q.shape[2] // k.shape[2], 1))
    q8, q_scale = to_codes(wide, precision)
    k8, k_scale = to_codes(up(k, dtype) - mean[:, None], precision)
    return q8, k8, q_scale.transpose(1, 2).contiguous(), k_scale.transpose(1, 2).contiguous(), shift.contiguous()


def summed(q: Tensor, k: Tensor, mean_start: int, mean_stop: int, precision: str = "int8") -> dict[int, Tensor]:
    """√terms Σ|a b| of the sums behind each float: the mean of the keys, and its products with the queries."""
    count, _ = sampled(mean_start, mean_stop)
    mean = key_mean(k.abs(), mean_start, mean_stop)
    rows = mean.amax(-1)[:, :, None].expand(-1, -1, k.shape[1]) / CODES[precision][1]
    shift = torch.einsum("bshd,bhd->bhs", q.abs(), mean.repeat_interleave(q.shape[2] // k.shape[2], 1))
    return {3: count**0.5 * rows, 4: (count**0.5 + q.shape[3] ** 0.5) * shift}


def samples(dtype: torch.dtype, head_dim: int | None = None) -> Iterator[dict[str, Any]]:
    """Packed and permuted views, grouped heads, odd head dims, constant and outlying channels, zeros, text.

    ``head_dim``: that of all samples; None: each has its own.
    """
    g = generator()

    def dim(own: int) -> int:
        return own if head_dim is None else head_dim

    def draw(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return randn(*shape, dtype=dtype, g=g, scale=scale, mean=mean)

    precision = {"precision": "int8"}
    packed = draw(2, 37, 3, 3, dim(40))
    yield {"q": packed[:, :, 0], "k": packed[:, :, 2], "mean_start": 0, "mean_stop": 37, **precision}
    # Grouped heads; a channel that is large and the same in every key, another that is constant; text first.
    q, k = draw(1, 150, 4, dim(64)), draw(1, 150, 2, dim(64))
    k[..., 3] += 40.0
    k[..., -1] = 7.0
    yield {"q": q, "k": k, "mean_start": 9, "mean_stop": 150, **precision}
    yield {"q": q, "k": k, "mean_start": 9, "mean_stop": 150, "precision": "fp8"}
    # Heads outermost in memory, logits to ±60; rows of zeros, the whole of k in one batch entry.
    q, k = (draw(2, 2, 19, dim(128), scale=8.0).transpose(1, 2) for _ in range(2))
    q[:, 4] = 0.0
    k[1] = 0.0
    yield {"q": q, "k": k, "mean_start": 0, "mean_stop": 11, **precision}
    precision = {"precision": "fp8"}
    # One token, and no video token to take a mean of.
    yield {"q": draw(1, 1, 1, dim(24)), "k": draw(1, 1, 1, dim(24)), "mean_start": 0, "mean_stop": 1, **precision}
    yield {"q": draw(1, 5, 1, dim(16)), "k": draw(1, 5, 1, dim(16)), "mean_start": 0, "mean_stop": 0, **precision}
