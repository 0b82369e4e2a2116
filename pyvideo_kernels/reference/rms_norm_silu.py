"""Oracle of rms_norm_silu and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up


def rms_norm_silu(x: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """y = x / max(|x|, eps) * sqrt(C) * weight over the last dimension, then SiLU; one rounding at the end."""
    dtype = compute_dtype(x)
    xf = up(x, dtype)
    norm = torch.linalg.vector_norm(xf, dim=-1, keepdim=True).clamp_min(eps)
    y = xf * (x.shape[-1] ** 0.5 / norm) * up(weight, dtype)
    if silu:
        y = torch.nn.functional.silu(y)
    # A dense layout other than row-major (a permuted x) would be kept by the arithmetic above.
    return y.to(x.dtype).contiguous()


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Video, image and single rows, odd widths, frame slices, rows far apart, an all-zero row, tiny values."""
    g = generator()

    def case(x: Tensor, silu: bool = True, eps: float = 1e-12, wide: bool = False) -> dict[str, Any]:
        weight = randn(x.shape[-1], dtype=torch.float32 if wide else dtype, g=g, mean=1.0, scale=0.3)
        return {"x": x, "weight": weight, "eps": eps, "silu": silu}

    yield case(randn(1, 2, 3, 5, 96, dtype=dtype, g=g))
    yield case(randn(1, 3, 2, 3, 20, dtype=dtype, g=g)[:, 1:], silu=False, wide=dtype != torch.float64)
    # Columns of a wider tensor, and a channels-first clip seen channels-last only after a copy of its rows.
    yield case(randn(7, 40, dtype=dtype, g=g)[:, :24])
    yield case(randn(2, 5, 3, 16, dtype=dtype, g=g).permute(2, 0, 1, 3))
    yield case(randn(33, dtype=dtype, g=g))
    zero = randn(3, 12, dtype=dtype, g=g)
    zero[1] = 0
    yield case(zero)
    # The norm of these rows is below eps, which must act on the norm and not on its square.
    yield case(randn(2, 8, dtype=dtype, g=g, scale=1e-3), eps=1e-2)
