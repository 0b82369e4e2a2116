"""The variants of one run: each warmed and checked, then timed in turns, then looked into; rows at any moment.

A variant that cannot run, runs out of memory or gives a broken video becomes a row with its error; the others go on.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyvideo_kernels import dispatch
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.integrations.diffusers.steps import past_dense_steps

from . import quality
from .attention_choice import Choice, choose
from .clips import Clip, Clock, peak_memory, ratios, run_clip, seconds, turns
from .loops import Sampled, decoding
from .variants import BEST, Built, Variant, build

OnEvent = Callable[[str, "Entry"], None]
LEFT_OUT = "left out: "
"""How the error of a variant begins that would have run, had there been time."""
_COMPILATION = 60.0
"""Seconds that compiling a model of true size takes, about."""


@dataclass(frozen=True)
class Source:
    """A model on its device, and the inputs that every variant gets.

    Args:
        inputs: ``inputs()`` -> keyword arguments of ``pipe.__call__`` for latents as a tuple, anew for each clip:
            generators have a state.
        decode: ``decode(pipe, latents)`` -> ``[1, 3, frames, height, width]`` in [-1, 1]; None: latents are the end.
    """

    pipe: Any
    inputs: Callable[[], dict[str, Any]]
    decode: Callable[[Any, Tensor], Tensor] | None
    device: torch.device
    dtype: torch.dtype
    seed: int = 0


@dataclass
class Entry:
    """A variant on its way to a row."""

    variant: Variant
    built: Built | None = None
    error: str | None = None
    broken: bool = False
    first: float | None = None
    clips: list[Clip] = field(default_factory=list)
    own_memory: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        return self.built is not None and self.error is None


class Session:
    """Runs ``variants`` of ``source``; ``rows()`` is what is known so far.

    Args:
        source: the model and its inputs; its pipeline stays as it is.
        variants: the first one is the base of ratios and quality.
        float32: measure errors against the model in float32.
        clock: what the clips are timed with.
        until: a `time.monotonic` by which all should be over: a variant that leaves too little for everybody's rounds
            is left out, and so is a breakdown; eager never is. None: no end.
        on_event: called as things happen: ``warm``, ``failed``, ``round``, ``breakdown``.
    """

    def __init__(
        self,
        source: Source,
        variants: Sequence[Variant],
        *,
        float32: bool = True,
        clock: Clock | None = None,
        until: float | None = None,
        on_event: OnEvent = lambda event, entry: None,
    ) -> None:
        self.source = source
        self.entries = [Entry(variant) for variant in variants]
        self.float32 = float32
        self.clock = clock or Clock(source.device)
        self.until = until
        self.on_event = on_event
        self.resident = self.clock.allocated() or 0
        self._frames: np.ndarray | None = None
        self._latents: Tensor | None = None
        self._call: Any = None
        self._float32_velocity: Tensor | None = None
        self._base_error = 0.0
        self._choice: Choice | None = None

    @property
    def base(self) -> Entry:
        return self.entries[0]

    def run(self, rounds: int) -> None:
        """Everything, in order."""
        compiled = sum(entry.variant.compile is not None for entry in self.entries)
        with _room_for_graphs(compiled) if compiled else contextlib.nullcontext():
            self._run(rounds)

    def _run(self, rounds: int) -> None:
        for entry in self.entries:
            if self._too_late(entry, rounds):
                entry.error = f"{LEFT_OUT}its rounds and those before it would have ended too late"
                self.on_event("failed", entry)
            else:
                self._guarded(entry, self.warm)
        for number in range(rounds):
            for entry in turns([entry for entry in self.entries if entry.runs], number):
                self._guarded(entry, self.time)
                if entry.runs:
                    self.on_event("round", entry)
        for entry in self.entries:
            if entry.runs and self._ends_in_time(2 * entry.clips[-1].total):
                self.look_into(entry)
                self.on_event("breakdown", entry)
            elif entry.runs:
                entry.facts["notes"].append("no breakdown: it would have ended too late")

    def _ends_in_time(self, seconds: float) -> bool:
        return self.until is None or time.monotonic() + seconds <= self.until

    def _too_late(self, entry: Entry, rounds: int) -> bool:
        """Whether there is no time to warm this variant and then to time it beside those that are warm."""
        if entry is self.base or self.base.first is None:
            return False
        clips = 1 + rounds * (1 + sum(other.runs for other in self.entries))
        compilation = _COMPILATION * (entry.variant.compile is not None)
        return not self._ends_in_time(clips * self.base.first + compilation)

    def _guarded(self, entry: Entry, work: Callable[[Entry], None]) -> None:
        try:
            work(entry)
        except Exception as error:
            entry.error = describe(error)
            entry.broken = isinstance(error, quality.BrokenVideo)
        if entry.error is not None:
            # Outside the except clause: the traceback held on to the frames and their tensors.
            entry.built = None
            entry.clips.clear()
            gc.collect()
            if self.source.device.type == "cuda":
                torch.cuda.empty_cache()
            self.on_event("failed", entry)

    # One variant ------------------------------------------------------------------------------------------------

    def _clip(self, built: Built) -> Clip:
        torch.manual_seed(self.source.seed)
        return run_clip(built.pipe, self.source.inputs(), decoding(built.pipe, self.source.decode), self.clock)

    def warm(self, entry: Entry) -> None:
        """Build a variant, run its first clip, check its video and compare it with the base's."""
        before = self.clock.allocated() or 0
        graphs = _graphs() if entry.variant.compile is not None else None
        built = build(self.source.pipe, self._resolved(entry))
        entry.facts["notes"] = [*entry.facts.get("notes", ()), *built.notes]
        calls = dispatch.calls()  # after accelerate(), which may have checked kernels
        if entry is self.base and (self.float32 or self._wants_best):
            caught: list[Clip] = []
            self._call = quality.first_call(built.pipe.transformer, lambda: caught.append(self._clip(built)))
            clip = caught[0]
        else:
            clip = self._clip(built)
        entry.first = clip.total
        if isinstance(built.pipe, Sampled):
            entry.facts["evaluation"] = built.pipe.evaluation.as_dict()
        entry.facts["calls"] = _new_calls(calls)
        entry.facts["fallbacks"] = built.report.fallbacks() if built.report else {}
        if graphs is not None:
            entry.facts["compiled"] = _new_graphs(graphs)
        self._check(clip)
        entry.facts["quality"] = self._quality(entry, built, clip)
        clip.latents = clip.video = None
        if self.source.device.type == "cuda":
            gc.collect()
        entry.own_memory = max((self.clock.allocated() or 0) - before, 0)
        entry.built = built
        self.on_event("warm", entry)

    @property
    def _wants_best(self) -> bool:
        return any(entry.variant.backend == BEST for entry in self.entries)

    def _resolved(self, entry: Entry) -> Variant:
        """The variant with a name for ``backend=best``."""
        if entry.variant.backend != BEST:
            return entry.variant
        if self._call is None:
            raise UnsupportedError(f"backend={BEST} is found with the inputs of eager, which did not run")
        if self._choice is None:
            self._choice = choose(self.source.pipe, self._call, self.clock, describe)
        entry.facts |= {"backend": self._choice.name, "notes": [self._choice.note()]}
        return replace(entry.variant, backend=self._choice.name)

    def _check(self, clip: Clip) -> None:
        assert clip.latents is not None
        quality.check_finite("latents", clip.latents)
        if clip.video is not None:
            quality.check_finite("decoded video", clip.video)

    def _quality(self, entry: Entry, built: Built, clip: Clip) -> dict[str, Any]:
        out: dict[str, Any] = {}
        assert clip.latents is not None
        frames = None if clip.video is None else quality.frames(clip.video)
        if entry is self.base:
            self._latents, self._frames = clip.latents.cpu(), frames
        if self._latents is not None:
            out["latents_error"] = _finite(quality.relative_error(clip.latents.cpu(), self._latents))
        if frames is not None and self._frames is not None:
            quality.check_not_black(frames, self._frames)
            out |= quality.compare_videos(frames, self._frames)
            if "psnr" not in out:
                entry.facts["notes"].append("no PSNR and SSIM: scikit-image is missing, pip install scikit-image")
        if self.float32 and self._call is not None:
            try:
                out |= self._float32_error(entry, built)
            except (RuntimeError, MemoryError) as error:  # the video and the timings stand without it
                entry.facts["notes"].append(f"no error against float32: {describe(error)}")
                if entry is self.base:
                    self.float32 = False
        return out

    def _float32_error(self, entry: Entry, built: Built) -> dict[str, float | None]:
        velocity = quality.velocity(built.pipe.transformer, self._call)
        if entry is self.base:
            reference = velocity
            if self.source.dtype != torch.float32:
                reference = quality.float32_velocity(built.pipe.transformer, self._call)
            self._float32_velocity = reference.cpu()
            self._base_error = quality.relative_error(velocity, self._float32_velocity)
        assert self._float32_velocity is not None
        error = quality.relative_error(velocity, self._float32_velocity)
        if entry.variant.exact and entry is not self.base:
            quality.check_error("velocity", error, self._base_error, self.source.dtype, self.source.device)
        return {"float32_error": _finite(error), "eager_float32_error": _finite(self._base_error)}

    def time(self, entry: Entry) -> None:
        """One timed clip."""
        assert entry.built is not None
        graphs = _graphs() if entry.variant.compile is not None else None
        clip = self._clip(entry.built)
        self._check(clip)
        clip.latents = clip.video = None
        entry.clips.append(clip)
        if graphs is not None:
            entry.facts["compiled"]["recompiles"] += _graphs()["graphs"] - graphs["graphs"]

    def look_into(self, entry: Entry) -> None:
        """Where the time goes: one denoising step and one decode under the profiler, outside the timings."""
        from .. import profile

        assert entry.built is not None
        pipe = entry.built.pipe
        decode = decoding(pipe, self.source.decode)

        def stop(running: Any, *_: Any) -> dict[str, Any]:
            running._interrupt = True  # diffusers' own way: the remaining steps do nothing
            return {}

        def step() -> Tensor:
            # The first of as many steps as are timed: a schedule of one step is another, in LTX one of NaN. Where the
            # first steps are dense and the others not, it runs as the others do.
            with past_dense_steps(pipe.transformer, getattr(pipe, "transformer_2", None)):
                latents: Tensor = pipe(**self.source.inputs(), callback_on_step_end=stop)[0]
            return latents

        try:
            latents = step()
            parts: dict[str, Callable[[], Tensor]] = {"denoise": step}
            if decode is not None:
                parts["decode"] = lambda: decode(pipe, latents)
            breakdown = {}
            for phase, call in parts.items():
                seen = profile.breakdown(call, phase=phase, device=self.source.device)
                breakdown[phase] = {key: seen[key] for key in ("wall", "classes", "kernels") if key in seen}
                if phase == "denoise":
                    entry.facts["attention"] = seen["attention"]
            entry.facts["breakdown"] = breakdown
        except Exception as error:  # the timings stand without it
            entry.facts["notes"].append(f"no breakdown: {describe(error)}")

    # Rows -------------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """A row a variant that has an error, or at least one timed clip."""
        base = seconds(self.base.clips) if self.base.clips else {}
        return [self._row(entry, base) for entry in self.entries if entry.error is not None or entry.clips]

    def _row(self, entry: Entry, base: dict[str, Any]) -> dict[str, Any]:
        variant = entry.variant
        row: dict[str, Any] = {
            "variant": variant.name,
            "accelerate": None if variant.accelerate is None else dict(variant.accelerate),
            "compile": variant.compile is not None,
            "backend": variant.backend,
        }
        if entry.error is not None:
            return {**row, "error": entry.error}
        times = seconds(entry.clips)
        return {
            **row,
            "rounds": len(entry.clips),
            "seconds": {**times, "first": entry.first},
            "peak_memory_bytes": peak_memory(entry.clips, self.resident, entry.own_memory),
            "ratio": ratios(base, times),
            **entry.facts,
        }


def describe(error: BaseException) -> str:
    """``Type: first words``, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def _finite(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def _new_calls(before: dict[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """op -> implementation -> how often it ran since ``before``."""
    out: dict[str, dict[str, int]] = {}
    for (op, impl), count in sorted(dispatch.calls().items()):
        if count > before.get((op, impl), 0):
            out.setdefault(op, {})[impl] = count - before.get((op, impl), 0)
    return out


def _graphs() -> dict[str, int]:
    """How many graphs torch.compile has made in this process, and how often it had to break one."""
    from torch._dynamo.utils import counters

    return {
        "graphs": int(counters["stats"].get("unique_graphs", 0)),
        "graph_breaks": sum(counters["graph_break"].values()),
    }


@contextlib.contextmanager
def _room_for_graphs(variants: int) -> Iterator[None]:
    """Variants compile the same code: past torch's limit of graphs a function, the later ones would run eagerly."""
    from torch._dynamo import config

    with config.patch(recompile_limit=config.recompile_limit * variants):
        yield


def _new_graphs(before: dict[str, int]) -> dict[str, int]:
    return {key: value - before[key] for key, value in _graphs().items()} | {"recompiles": 0}


__all__ = ["Entry", "Session", "Source", "describe"]
