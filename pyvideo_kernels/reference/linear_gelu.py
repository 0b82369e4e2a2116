"""Oracle of linear_gelu, its gradient, and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, reduce_to, up

APPROXIMATIONS = ("tanh", "none")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """y = gelu(x @ weightᵀ + bias), one rounding at the end."""
    dtype = compute_dtype(x)
    u = up(x, dtype) @ up(weight, dtype).T
    if bias is not None:
        u = u + up(bias, dtype)
    return torch.nn.functional.gelu(u, approximate=approximate).to(x.dtype).contiguous()


def linear_gelu_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    approximate: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (x, weight, bias), those in ``needs``; u is recomputed.

    The products are in the dtype of ``x``, and u and du rounded to it, as autograd through the two modules has them:
    products in fp32 would cost a model in bf16 its tensor cores.
    """
    (grad,) = grads
    assert grad is not None
    u = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    du = torch.ops.aten.gelu_backward(grad, u, approximate=approximate)
    out: list[Tensor] = []
    if needs[0]:
        out.append((du @ weight).contiguous())
    if needs[1]:
        n, k = weight.shape
        rows = x.numel() // k
        out.append(du.reshape(rows, n).T @ x.reshape(rows, k))
    if needs[2] and bias is not None:
        out.append(reduce_to(up(du, compute_dtype(x)), bias))
    return out


def summed(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> dict[int, Tensor]:
    """√terms Σ|a b| of the sum of products behind each element; GELU is at most 1.13 times as steep as its argument."""
    u = x.abs() @ weight.abs().T
    if bias is not None:
        u = u + bias.abs()
    return {0: 1.13 * u * weight.shape[1] ** 0.5}


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Both approximations, one to five dimensions, with bias or not, strided operands, sizes that fill no tile."""
    g = generator()

    def projection(n: int, k: int, bias: bool = True, spread: float = 1.0) -> dict[str, Tensor | None]:
        weight = randn(n, k, dtype=dtype, g=g, scale=spread * k**-0.5)
        return {"weight": weight, "bias": randn(n, dtype=dtype, g=g, scale=0.5) if bias else None}

    yield {"x": randn(2, 19, 48, dtype=dtype, g=g), **projection(72, 48), "approximate": "tanh"}
    # As T5's and CLIP's projections; odd sizes in every dimension, values far out on both sides.
    yield {"x": randn(1, 7, 37, dtype=dtype, g=g), **projection(33, 37, False, 6.0), "approximate": "none"}
    yield {"x": randn(40, dtype=dtype, g=g), **projection(5, 40), "approximate": "tanh"}
    # Every other row of a packed weight, and x as a slice of wider rows.
    weight = randn(2 * 24, 56, dtype=dtype, g=g, scale=32**-0.5)[::2, 8:40]
    x = randn(3, 5, 64, dtype=dtype, g=g)[:, :, 16:48]
    yield {"x": x, "weight": weight, "bias": randn(24, dtype=dtype, g=g), "approximate": "tanh"}
    # Rows that no merging of dimensions makes regular.
    x = randn(2, 3, 2, 3, 32, dtype=dtype, g=g).permute(3, 1, 0, 2, 4)
    yield {"x": x, **projection(16, 32), "approximate": "none"}
    yield {"x": randn(1, 1, 130, dtype=dtype, g=g), **projection(131, 130, spread=3.0), "approximate": "tanh"}
