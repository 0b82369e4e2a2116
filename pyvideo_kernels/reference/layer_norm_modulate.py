"""Oracle of layer_norm_modulate, its gradient, and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, reduce_to, up


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """y = (norm(x) * weight + bias) * (1 + scale) + shift, over the last dimension, one rounding at the end."""
    dtype = compute_dtype(x)
    y = torch.nn.functional.layer_norm(
        up(x, dtype),
        x.shape[-1:],
        None if weight is None else up(weight, dtype),
        None if bias is None else up(bias, dtype),
        eps,
    )
    if scale is not None:
        y = y * (1 + up(scale, dtype))
    if shift is not None:
        y = y + up(shift, dtype)
    return y.to(x.dtype).contiguous()


def layer_norm_modulate_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (x, scale, shift, weight, bias), those in ``needs``; statistics are recomputed from ``x``."""
    (grad,) = grads
    assert grad is not None
    dtype = compute_dtype(x)
    dy, xf = up(grad, dtype), up(x, dtype)
    mean = xf.mean(-1, keepdim=True)
    centred = xf - mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat = centred * rstd
    affine = xhat
    if weight is not None:
        affine = affine * up(weight, dtype)
    if bias is not None:
        affine = affine + up(bias, dtype)
    daffine = dy if scale is None else dy * (1 + up(scale, dtype))
    out: list[Tensor] = []
    if needs[0]:
        dxhat = daffine if weight is None else daffine * up(weight, dtype)
        centring = dxhat.mean(-1, keepdim=True) + xhat * (dxhat * xhat).mean(-1, keepdim=True)
        out.append(((dxhat - centring) * rstd).to(x.dtype).contiguous())
    if needs[1] and scale is not None:
        out.append(reduce_to(dy * affine, scale))
    if needs[2] and shift is not None:
        out.append(reduce_to(dy, shift))
    if needs[3] and weight is not None:
        out.append(reduce_to(daffine * xhat, weight))
    if needs[4] and bias is not None:
        out.append(reduce_to(daffine, bias))
    return out


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Per-batch and per-token modulation, affine and not, odd widths, one token, strided rows, large means."""
    g = generator()
    none: dict[str, Any] = {"scale": None, "shift": None, "weight": None, "bias": None}
    f32 = torch.float32 if dtype != torch.float64 else dtype

    def modulation(*shape: int, dtype: torch.dtype = f32) -> dict[str, Tensor]:
        return {name: randn(*shape, dtype=dtype, g=g, scale=0.5) for name in ("scale", "shift")}

    x = randn(2, 5, 96, dtype=dtype, g=g)
    yield {**none, "x": x, **modulation(2, 1, 96), "eps": 1e-6}
    yield {**none, "x": randn(2, 3, 40, dtype=dtype, g=g), **modulation(2, 3, 40, dtype=dtype), "eps": 1e-6}
    affine = {"weight": randn(130, dtype=f32, g=g, mean=1.0, scale=0.2), "bias": randn(130, dtype=f32, g=g)}
    yield {**none, "x": randn(1, 1, 130, dtype=dtype, g=g), **affine, "eps": 1e-5}
    # A column slice of a wider tensor (rows far apart) and modulation cut from a packed [B, 6, D] table.
    wide = randn(2, 7, 200, dtype=dtype, g=g)[..., :64]
    table = randn(2, 6, 64, dtype=f32, g=g, scale=0.5)
    yield {**none, "x": wide, "scale": table[:, 1:2], "shift": table[:, 0:1], "eps": 1e-6}
    yield {**none, "x": randn(1, 4, 33, dtype=dtype, g=g, mean=8.0), **modulation(1, 1, 33), "eps": 1e-6}
