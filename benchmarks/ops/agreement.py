"""Whether two implementations computed the same, at the size that is timed.

The op's samples (``testing/compare.py``) judge an implementation against float64, and they are small. A kernel that is
right on them may still be wrong at size: an offset that overflows, a last tile that nobody wrote. So what is about to
be timed is also held against the eager code on the very inputs:

    unit             =   eps(dtype) + sqrt(terms) * eps(float32)
    rms(y - e)      <=   2 * unit * rms(e)
    max |y - e|     <=   32 * unit * rms(e)  +  8 * unit * |e|        element by element

Both sides round at the inputs' dtype, eager up to half a dozen times, each by 0.2 eps of the value in root mean
square: the first rule leaves that a factor of three. The second rule is there for the single tile or row, which the
first would not see among many: a value that belongs elsewhere is off by about rms(e), 4 times what bf16 is allowed.
``terms`` is how many products a result sums, which fp32 accumulation may do in any order. Where e is finite, y must be.

External kernels are held to a relative rms error of `PEER_LIMIT` alone: those that quantise to 8 bits are meant to be
off by a few per cent. Above it, they compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PEER_LIMIT = 0.1
TF32_EPS = 2.0**-10
_CHUNK = 1 << 24


class Disagreement(AssertionError):
    """Two outputs that should be the same are not."""


def tensors(value: Any) -> list[Tensor]:
    """Every tensor an op returned."""
    if isinstance(value, Tensor):
        return [value]
    return [item for part in value for item in tensors(part)] if isinstance(value, (list, tuple)) else []


def unit(dtype: torch.dtype, terms: float, tf32: bool = False) -> float:
    """What one rounding of ``dtype`` and a sum of ``terms`` products in fp32 may be off by."""
    eps = TF32_EPS if tf32 and dtype == torch.float32 else torch.finfo(dtype).eps
    return eps + math.sqrt(max(terms, 1.0)) * torch.finfo(torch.float32).eps


def _chunks(y: Tensor, e: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in float64, a piece at a time: the outputs of a large clip fill a good part of a card as they are."""
    y, e = y.reshape(-1), e.reshape(-1)
    for start in range(0, e.numel(), _CHUNK):
        yield y[start : start + _CHUNK].double(), e[start : start + _CHUNK].double()


def _pairs(got: Any, expected: Any) -> list[tuple[Tensor, Tensor]]:
    ys, es = tensors(got), tensors(expected)
    if len(ys) != len(es):
        raise Disagreement(f"{len(ys)} outputs, expected {len(es)}")
    for y, e in zip(ys, es):
        if y.shape != e.shape:
            raise Disagreement(f"shape {list(y.shape)}, expected {list(e.shape)}")
    return [(_without_ties(y, e) if e.dtype == torch.int8 else y, e) for y, e in zip(ys, es)]


def _without_ties(y: Tensor, e: Tensor) -> Tensor:
    """Codes one apart are a number between the two, rounded either way."""
    return torch.where((y.int() - e.int()).abs() <= 1, e, y)


def relative_error(got: Any, expected: Any) -> float:
    """rms(y - e) / rms(e), the worst of the outputs; infinite where y is not finite and e is."""
    worst = 0.0
    for y, e in _pairs(got, expected):
        square = error = 0.0
        for y64, e64 in _chunks(y, e):
            finite = torch.isfinite(e64)
            difference = torch.where(finite, y64 - e64, 0.0)
            square += float(torch.where(finite, e64, 0.0).square().sum())
            error += float(difference.square().sum())
        if not math.isfinite(error):
            return math.inf
        worst = max(worst, math.sqrt(error / square) if square else (math.inf if error else 0.0))
    return worst


def check_at_size(got: Any, expected: Any, allowed: float) -> float:
    """Apply both rules with ``allowed`` as the unit; returns the relative error.

    Raises:
        Disagreement: which rule is broken, by how much.
    """
    error = relative_error(got, expected)
    if not math.isfinite(error):
        raise Disagreement("at this size: not finite where eager is")
    worst, where = 0.0, ""
    for position, (y, e) in enumerate(_pairs(got, expected)):
        if e.numel() == 0:
            continue
        rms = math.sqrt(sum(float(e64.square().nansum()) for _, e64 in _chunks(y, e)) / e.numel())
        for index, (y64, e64) in enumerate(_chunks(y, e)):
            excess = (y64 - e64).abs() - 8 * allowed * e64.abs() - 32 * allowed * rms
            excess = torch.where(torch.isfinite(e64), excess, -1.0)
            at = int(excess.argmax())
            if float(excess[at]) > worst:
                worst = float(excess[at])
                where = (
                    f"output {position} at flat index {index * _CHUNK + at} is {float(y64[at]):.4g}, eager has "
                    f"{float(e64[at]):.4g} (rms {rms:.3g})"
                )
    if error > 2 * allowed:
        what = f"relative error {error:.3e} against eager, allowed {2 * allowed:.3e}"
        raise Disagreement(f"at this size: {what}" + (f"; {where}" if where else ""))
    if where:
        raise Disagreement(f"at this size: {where}")
    return error


def check_peer(got: Any, expected: Any) -> float:
    """The relative error of an external kernel; raises `Disagreement` above `PEER_LIMIT`."""
    error = relative_error(got, expected)
    if not error <= PEER_LIMIT:
        raise Disagreement(f"relative error {error:.3g} against eager, allowed {PEER_LIMIT}")
    return error
