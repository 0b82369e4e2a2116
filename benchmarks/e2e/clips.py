"""One clip through a pipeline, timed; and in which order the variants take their turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..timing import Timing

_T = TypeVar("_T")
PHASES = ("step", "denoise", "decode", "total")


class Clock:
    """Marks on the time line of a device. On a GPU they are events: marking a step does not make the host wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; on a GPU both must have been reached."""
        return float(end - start) if self.device.type != "cuda" else start.elapsed_time(end) / 1e3

    # What the device's memory held at most, beside what it held before.

    def allocated(self) -> int | None:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


@dataclass
class Clip:
    """What one clip took, and what came out."""

    steps: list[float]
    denoise: float
    decode: float | None
    peak: int | None
    latents: Tensor | None = field(default=None, repr=False)
    video: Tensor | None = field(default=None, repr=False)

    @property
    def total(self) -> float:
        return self.denoise + (self.decode or 0.0)


def run_clip(pipe: Any, inputs: Mapping[str, Any], decode: Any, clock: Clock) -> Clip:
    """Denoise and decode once.

    Args:
        pipe: called with ``inputs``, which ask for latents and a tuple.
        decode: ``decode(pipe, latents)`` -> video; None stops at the latents.
        clock: where the marks are set.
    Returns:
        Clip: its first denoising step, which also carries the pipeline's preparations, is in ``denoise`` and, unless
        it is the only one, not in ``steps``.
    """
    before = clock.allocated()
    clock.synchronize()
    clock.reset_peak()
    marks = [clock.mark()]

    def step_end(*_: Any) -> dict[str, Any]:
        marks.append(clock.mark())
        return {}

    latents = pipe(**inputs, callback_on_step_end=step_end)[0]
    denoised = clock.mark()
    video = None if decode is None else decode(pipe, latents)
    end = clock.mark()
    clock.synchronize()
    steps = [clock.seconds(a, b) for a, b in itertools.pairwise(marks)]
    peak = clock.peak()
    return Clip(
        steps=steps[1:] or steps,
        denoise=clock.seconds(marks[0], denoised),
        decode=None if decode is None else clock.seconds(denoised, end),
        peak=None if peak is None or before is None else peak - before,
        latents=latents,
        video=video,
    )


def turns(variants: Sequence[_T], number: int) -> list[_T]:
    """The order of round ``number``: every variant gets every place, and a drift of the machine cancels out.

    Pairs of rounds start one variant further on, the second of a pair runs backwards: A B, B A, B A, A B, ...
    """
    shift = number // 2 % max(len(variants), 1)
    order = [*variants[shift:], *variants[:shift]]
    return order[::-1] if number % 2 else order


def seconds(clips: Sequence[Clip]) -> dict[str, dict[str, float]]:
    """Median and half-width of the middle half of each phase; steps pooled over all clips."""
    values: dict[str, list[float]] = {
        "step": [step for clip in clips for step in clip.steps],
        "denoise": [clip.denoise for clip in clips],
        "total": [clip.total for clip in clips],
    }
    if all(clip.decode is not None for clip in clips):
        values["decode"] = [clip.decode for clip in clips if clip.decode is not None]
    out = {}
    for phase in PHASES:
        if values.get(phase):
            timing = Timing.of(values[phase])
            out[phase] = {"median": timing.median, "spread": timing.spread}
    return out


def ratios(base: Mapping[str, Any], this: Mapping[str, Any]) -> dict[str, float]:
    """``base / this`` of each phase's median: above 1, ``this`` is the faster."""
    return {phase: base[phase]["median"] / this[phase]["median"] for phase in PHASES if phase in base and phase in this}


def peak_memory(clips: Sequence[Clip], resident: int, own: int) -> int | None:
    """Peak of a variant alone: ``resident`` shared weights and inputs, what it keeps (``own``), its clips' own peak."""
    peaks = [clip.peak for clip in clips if clip.peak is not None]
    return resident + own + int(statistics.median(peaks)) if peaks else None
