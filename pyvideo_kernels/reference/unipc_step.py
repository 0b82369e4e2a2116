"""Oracle of unipc_step and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up
from .guidance_step import guided


def unipc_step(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    last_sample: Tensor | None,
    history: Sequence[Tensor],
    guidance_scale: float,
    sigma: float,
    corrector: Sequence[float],
    predictor: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """(prev_sample, x0, corrected): linear combinations in the compute dtype, each output rounded once."""
    dtype = compute_dtype(sample)
    x = up(sample, dtype)
    x0 = x - sigma * guided(cond, uncond, guidance_scale, dtype)
    past = [up(h, dtype) for h in history]
    corrected = x
    if last_sample is not None:
        corrected = _combine(corrector, [up(last_sample, dtype), x0, *past])
    prev = _combine(predictor, [corrected, x0, *past])
    # A custom op may not return its input: without a corrector ``corrected`` is a copy of ``sample``.
    corrected = corrected.to(sample.dtype, copy=True, memory_format=torch.contiguous_format)
    return prev.to(sample.dtype).contiguous(), x0.to(sample.dtype).contiguous(), corrected


def _combine(coefficients: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    total = coefficients[0] * terms[0]
    for c, term in zip(coefficients[1:], terms[1:], strict=True):
        total = total + c * term
    return total


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The first step, the second, a steady second-order one, a third-order one; ragged and permuted."""
    g = generator()
    low = torch.bfloat16 if dtype == torch.float32 else dtype
    steps = (
        ((1, 4, 3, 5, 7), low, (), (0.98, 0.02)),
        ((1, 4, 3, 5, 7), low, (0.97, 0.04, -0.01), (0.96, 0.09, -0.05)),
        ((2, 67), dtype, (0.9, 0.13, -0.05, 0.02), (0.93, 0.11, -0.04, 0.0)),
        ((1, 2, 3), low, (0.9, 0.1, 0.02, -0.03, 0.01), (0.9, 0.3, -0.25, 0.05, 0.0)),
    )
    for shape, prediction, corrector, predictor in steps:
        yield {
            "sample": randn(*shape, dtype=dtype, g=g),
            "cond": randn(*shape, dtype=prediction, g=g),
            "uncond": randn(*shape, dtype=prediction, g=g) if corrector else None,
            "last_sample": randn(*shape, dtype=dtype, g=g) if corrector else None,
            "history": [randn(*shape, dtype=dtype, g=g) for _ in range(len(predictor) - 2)],
            "guidance_scale": 5.0,
            "sigma": 0.93,
            "corrector": list(corrector),
            "predictor": list(predictor),
        }
    permuted = [randn(1, 3, 5, 4, dtype=dtype, g=g).permute(0, 3, 1, 2) for _ in range(5)]
    yield {
        "sample": permuted[0], "cond": permuted[1], "uncond": permuted[2], "last_sample": permuted[3],
        "history": [permuted[4]], "guidance_scale": 3.0, "sigma": 0.5,
        "corrector": [0.9, 0.2, -0.1], "predictor": [0.8, 0.2, 0.0],
    }  # fmt: skip
