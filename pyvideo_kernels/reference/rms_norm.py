"""Oracle of rms_norm, its gradient, and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, reduce_to, up


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """y = x * rsqrt(mean(x², -1) + eps) * weight, one rounding at the end."""
    dtype = compute_dtype(x)
    xf = up(x, dtype)
    y = xf * (xf.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * up(weight, dtype)
    return y.to(x.dtype).contiguous()


def rms_norm_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (x, weight), those in ``needs``; the statistic is recomputed from ``x``."""
    (grad,) = grads
    assert grad is not None
    dtype = compute_dtype(x)
    dy, xf = up(grad, dtype), up(x, dtype)
    rstd = (xf.square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat = xf * rstd
    out: list[Tensor] = []
    if needs[0]:
        dxhat = dy if weight is None else dy * up(weight, dtype)
        out.append(((dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True)) * rstd).to(x.dtype).contiguous())
    if needs[1] and weight is not None:
        out.append(reduce_to(dy * xhat, weight))
    return out


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """One to five dimensions, weight or not in either dtype, permuted and sliced rows, odd widths, tiny values."""
    g = generator()
    f32 = torch.float32 if dtype != torch.float64 else dtype

    def weight(d: int, dtype: torch.dtype = dtype) -> Tensor:
        return randn(d, dtype=dtype, g=g, mean=1.0, scale=0.2)

    yield {"x": randn(2, 5, 96, dtype=dtype, g=g), "weight": weight(96), "eps": 1e-6}
    yield {"x": randn(37, dtype=dtype, g=g), "weight": None, "eps": 1e-5}
    yield {"x": randn(5, 33, dtype=dtype, g=g, scale=1e-3), "weight": weight(33, f32), "eps": 1e-6}
    # q of a packed [B, S, 3, heads, head_dim] projection, per head.
    yield {"x": randn(2, 3, 3, 2, 16, dtype=dtype, g=g)[:, :, 0], "weight": weight(16), "eps": 1e-6}
    # Rows that no merging of dimensions makes regular, and one token of a long clip.
    yield {"x": randn(2, 3, 2, 3, 24, dtype=dtype, g=g).permute(3, 1, 0, 2, 4), "weight": weight(24), "eps": 1e-6}
    yield {"x": randn(1, 1, 131, dtype=dtype, g=g, mean=4.0), "weight": weight(131), "eps": 1e-6}
