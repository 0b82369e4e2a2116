"""Oracle of pixel_norm_silu and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up


def pixel_norm_silu(
    x: Tensor, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float, silu: bool
) -> Tensor:
    """y = x * rsqrt(mean(x²) + eps) * weight * (1 + scale) + shift over the channels, then SiLU; one rounding."""
    dtype = compute_dtype(x)
    xf = up(x, dtype)
    y = xf * (xf.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * up(weight, dtype)
    at = (-1, *(1,) * (x.dim() - 2), x.shape[-1])
    if scale is not None:
        y = y * (1 + up(scale, dtype).reshape(at))
    if shift is not None:
        y = y + up(shift, dtype).reshape(at)
    if silu:
        y = torch.nn.functional.silu(y)
    return y.to(x.dtype).contiguous()


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Clips and rows, any width, modulation by clip and for all, slices, an all-zero pixel, values near the eps."""
    g = generator()

    def case(
        x: Tensor,
        modulated: int = 0,
        weighted: bool = False,
        silu: bool = True,
        eps: float = 1e-8,
        wide: bool = False,
    ) -> dict[str, Any]:
        kind = torch.float32 if wide and dtype != torch.float64 else dtype
        c = x.shape[-1]
        return {
            "x": x,
            "weight": randn(c, dtype=kind, g=g, mean=1.0, scale=0.3) if weighted else None,
            "scale": randn(modulated, c, dtype=kind, g=g, scale=0.3) if modulated else None,
            "shift": randn(modulated, c, dtype=kind, g=g, scale=0.3) if modulated else None,
            "eps": eps,
            "silu": silu,
        }

    yield case(randn(2, 2, 3, 5, 128, dtype=dtype, g=g), modulated=2)
    yield case(randn(2, 3, 2, 3, 20, dtype=dtype, g=g)[:, 1:], modulated=1, weighted=True, silu=False, wide=True)
    yield case(randn(1, 1, 5, 7, 3, dtype=dtype, g=g))
    # Columns of a wider tensor, and a channels-first clip seen channels-last only after a copy of its rows.
    yield case(randn(7, 120, dtype=dtype, g=g)[:, :96], weighted=True)
    yield case(randn(2, 5, 3, 16, dtype=dtype, g=g).permute(2, 0, 1, 3), modulated=3)
    zero = randn(3, 12, dtype=dtype, g=g)
    zero[1] = 0
    yield case(zero)
    # The mean square of these rows is below eps, which is added inside the root.
    yield case(randn(2, 8, dtype=dtype, g=g, scale=1e-2), eps=1e-3)
