"""``backend=best``: the fastest attention of diffusers for a model on this card, found by running the model with each.

"Eager with the best available attention" is the baseline that a speedup should be held against, and which backend
that is depends on card, head dimension and length.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pyvideo_kernels.errors import UnsupportedError

from . import quality
from .clips import Clock, turns
from .variants import BEST, set_attention_backend, sharing_copy

EXACT = ("native", "_native_flash", "_native_cudnn", "_native_efficient", "flash", "_flash_3", "xformers")
"""Backends that compute attention as the model defines it: none that quantises, downloads, or is made for checking."""

_ROUNDS = 4
# How far the prediction of a model may move when its attention rounds differently; a dropped mask moves it further.
_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-3}


@dataclass
class Choice:
    """The fastest backend, the seconds of one call of the transformer with each, and why others were left."""

    seconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the fastest."""
        if not self.seconds:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
            raise UnsupportedError(f"backend={BEST}: no attention backend of diffusers serves this model ({why})")
        return min(self.seconds, key=self.seconds.__getitem__)

    def note(self) -> str:
        """What was found, in a line."""
        ranked = sorted(self.seconds.items(), key=lambda item: item[1])
        found = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in ranked)
        return f"backend={BEST} is {self.name}; a call of the transformer takes, by backend: {found}"


def choose(
    pipe: Any,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    clock: Clock,
    describe: Callable[[BaseException], str] = str,
) -> Choice:
    """Run the transformer of ``pipe`` on the arguments ``call`` with every exact backend.

    A backend is left out if it is not here, raises, drops a mask, or predicts something else than the model's own.

    Raises:
        UnsupportedError: the model's attention does not ask diffusers for a backend.
    """
    choice = Choice()
    set_attention_backend(_copy(pipe), "native")
    reference = quality.velocity(pipe.transformer, call)
    tolerance = _TOLERANCE[pipe.transformer.dtype]
    ready: dict[str, Any] = {}
    for name in EXACT:
        own = _copy(pipe)
        try:
            dropped = set_attention_backend(own, name)
            if dropped and _has_mask(call):
                raise UnsupportedError(dropped[0])
            error = quality.relative_error(quality.velocity(own.transformer, call), reference)
            if not error <= tolerance:
                raise UnsupportedError(f"predicts something else: relative error {error:.2g}")
            ready[name] = own
        except Exception as error:
            choice.refused[name] = describe(error)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for number in range(_ROUNDS):
        for name in turns(list(ready), number):
            seconds[name].append(_timed(ready[name], call, clock))
    choice.seconds = {name: statistics.median(values) for name, values in seconds.items()}
    return choice


def _copy(pipe: Any) -> Any:
    own = copy.copy(pipe)
    own.transformer, own.transformer_2 = sharing_copy(pipe.transformer), None
    return own


def _timed(pipe: Any, call: tuple[tuple[Any, ...], dict[str, Any]], clock: Clock) -> float:
    clock.synchronize()
    start = clock.mark()
    quality.velocity(pipe.transformer, call)
    end = clock.mark()
    clock.synchronize()
    return clock.seconds(start, end)


def _has_mask(call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    return any("mask" in key and value is not None for key, value in call[1].items())
