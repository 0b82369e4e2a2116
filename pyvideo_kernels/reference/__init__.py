"""Eager oracles, one file an op: the formula in torch, float64-capable, plus the op's sample inputs.

Every oracle computes in float32 (float64 for float64 inputs) and rounds once to the output's dtype, which are the
rounding points of the reference models. None imports a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for every other."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in the compute dtype, no copy when it is there already."""
    return x.to(dtype)


def generator(seed: int = 0) -> torch.Generator:
    """CPU generator of the sample inputs: fixed, so that a failing sample can be named."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype, g: torch.Generator, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    """Normal samples drawn in float32 and rounded to ``dtype``: the same values for every dtype."""
    return (torch.randn(*shape, generator=g) * scale + mean).to(dtype)


def reduce_to(grad: Tensor, like: Tensor) -> Tensor:
    """Sum a gradient over the dimensions along which ``like`` was broadcast, in the compute dtype."""
    extra = grad.dim() - like.dim()
    dims = [
        *range(extra),
        *(i + extra for i, n in enumerate(like.shape) if n == 1 and grad.shape[i + extra] != 1),
    ]
    return (grad.sum(dims) if dims else grad).reshape(like.shape).to(like.dtype).contiguous()
