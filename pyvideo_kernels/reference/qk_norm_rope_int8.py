"""Oracle of qk_norm_rope_int8: the two ops that it is, without a rounding between; and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, up
from . import qk_norm_rope as prologue
from .quantize_qk import quantize_qk
from .quantize_qk import summed as summed_codes


def _unrounded(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, int, int]:
    """q and k as they are before they are rounded, and the tokens that the mean is of."""
    start, stop = rest[-3:-1]
    dtype = compute_dtype(q)
    return *prologue.qk_norm_rope(up(q, dtype), up(k, dtype), *rest), start, q.shape[1] if stop < 0 else stop


def qk_norm_rope_int8(
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
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`qk_norm_rope` in the compute dtype, then `quantize_qk` with the mean of the tokens that are rotated."""
    vectors = (q_weight, k_weight, q_bias, k_bias, cos, sin)
    rows = _unrounded(q, k, *vectors, norm, norm_type, layout, rotary_start, rotary_stop, eps)
    return quantize_qk(*rows, precision)


def summed(*args: Any) -> dict[int, Tensor]:
    """√terms Σ|a b| of the sums behind each float: as for quantize_qk."""
    return summed_codes(*_unrounded(*args[:-1]), args[-1])


def samples(dtype: torch.dtype, head_dim: int | None = None) -> Iterator[dict[str, Any]]:
    """Those of qk_norm_rope in which q and k are of one sequence, some in each precision.

    ``head_dim``: that of all samples; None: each has its own.
    """
    for index, kwargs in enumerate(prologue.samples(dtype, head_dim)):
        if kwargs["q"].shape[1] == kwargs["k"].shape[1]:
            yield {**kwargs, "precision": ("int8", "fp8")[index % 2]}
