"""How things are timed: variants in turns, inputs random and rotated past the cache, medians and spread.

- **In turns.** Every round times every variant once, and every other round in the opposite order: a slow spell of the
  machine hits all of them, and none always follows the same neighbour.
- **Cold.** A call finds its inputs in memory, not in the cache: it uses the next of several sets of inputs, together
  larger than twice the last cache. What the calls of one pass over the sets return stays alive until overwritten a
  pass later, so that outputs rotate with the inputs.
- **GPU.** Below a millisecond a pass over all sets is recorded as a graph and replayed: launch overhead is not part of
  a kernel. Longer calls, and calls that cannot be recorded, are timed between two events.
- **CPU.** Wall time; short calls are repeated.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .backends import Backend, backend_for

GRAPH_BELOW = 1e-3
"""Seconds a call: shorter ones are replayed as a graph where the device has graphs."""
_MAX_SETS = 256
_MAX_CALLS = 10_000


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one variant: the median of the rounds and the half-width of their middle half.

    Args:
        graph: the calls were replayed as a CUDA graph.
        why_no_graph: what happened when a short call was to be recorded; None: recorded, or not tried.
    """

    median: float
    spread: float
    rounds: int
    graph: bool = False
    why_no_graph: str | None = None

    @classmethod
    def of(cls, seconds: list[float], graph: bool = False, why_no_graph: str | None = None) -> Timing:
        if len(seconds) < 3:
            middle, spread = statistics.median(seconds), (max(seconds) - min(seconds)) / 2
        else:
            low, middle, high = statistics.quantiles(seconds, n=4)
            spread = (high - low) / 2
        return cls(middle, spread, len(seconds), graph, why_no_graph)


# Input sets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotation:
    """How many sets of inputs are rotated, and whether they outgrow the cache as they should."""

    sets: int
    capped: str | None = None

    @classmethod
    def past_cache(cls, inputs: int, outputs: int, backend: Backend, variants: int = 1) -> Rotation:
        """Enough sets that inputs and outputs of one pass exceed twice the cache, as memory allows.

        Args:
            inputs, outputs: bytes a call reads and returns.
            backend: the device.
            variants: how many keep a pass of outputs at the same time (graphs do).
        """
        cache = backend.cache_bytes()
        wanted = max(1, math.ceil((2 * cache + 1) / max(inputs + outputs, 1)))
        room = max(1, backend.free_bytes() // max(inputs + variants * outputs, 1))
        sets = min(wanted, room, _MAX_SETS)
        if sets == wanted:
            return cls(sets)
        why = "the memory at hand" if room < _MAX_SETS else f"at most {_MAX_SETS} sets"
        return cls(sets, f"{sets} of {wanted} input sets for twice the {cache >> 20} MiB cache ({why})")


@dataclass(frozen=True)
class Variant:
    """A call with sets of its own: what it needs prepared, others do not."""

    call: Callable[..., Any]
    sets: Sequence[Any]


class _Calls:
    """A variant's calls, each with the next set; what they return replaces what the same set gave a pass ago."""

    def __init__(self, call: Callable[..., Any], sets: Sequence[Any] | None) -> None:
        self.call, self.sets = call, sets
        self.passes = len(sets) if sets is not None else 1
        self.position = 0
        self.kept: list[Any] = [None] * self.passes

    def __call__(self, count: int) -> list[Any]:
        call, sets, passes = self.call, self.sets, self.passes
        for _ in range(count):
            at = self.position
            self.kept[at] = call() if sets is None else call(sets[at])
            self.position = (at + 1) % passes
        return self.kept

    def release(self) -> None:
        """Drop the outputs: another variant's turn needs the memory."""
        self.kept = [None] * self.passes


# The harness ------------------------------------------------------------------------------------------------------


@dataclass
class _Prepared:
    """A variant, warm: ``run(times)`` makes ``times * calls`` calls."""

    run: Callable[[int], Any]
    calls: int
    times: int
    release: Callable[[], None]
    graph: bool = False
    why_no_graph: str | None = None

    def seconds(self, backend: Backend) -> float:
        try:
            return backend.seconds(lambda: self.run(self.times)) / (self.times * self.calls)
        finally:
            self.release()


def _times(seconds: float, each: float) -> int:
    return max(1, min(_MAX_CALLS, round(seconds / max(each, 1e-9))))


def _prepare(calls: _Calls, backend: Backend, min_seconds: float) -> _Prepared:
    backend.warm(lambda: calls(1))  # compiles, tunes, faults pages in
    once = backend.seconds(lambda: calls(1))
    each = once
    if once < min_seconds:
        # A lone short call on a GPU is mostly its launch, and an idle clock is slow: judge by a full queue.
        several = _times(min_seconds, once)
        each = backend.seconds(lambda: calls(several)) / several
    plain = _Prepared(calls, 1, _times(min_seconds, each), calls.release)
    if not backend.graphs or each >= GRAPH_BELOW:
        calls.release()
        return plain
    try:
        backend.warm(lambda: calls(calls.passes))
        calls.release()
        calls.position = 0
        replay = backend.capture(lambda: list(calls(calls.passes)))
        calls.release()

        def run(times: int) -> None:
            for _ in range(times):
                replay()

        backend.warm(lambda: run(1))
        each = backend.seconds(lambda: run(1))
    except Exception as error:
        calls.release()
        return _Prepared(
            plain.run, 1, plain.times, plain.release, why_no_graph=f"{type(error).__name__}: {_first_line(error)}"
        )
    return _Prepared(run, calls.passes, _times(min_seconds, each), lambda: None, graph=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def interleaved(
    variants: Mapping[str, Callable[..., Any] | Variant],
    sets: Sequence[Any] | None = None,
    *,
    device: torch.device | None = None,
    backend: Backend | None = None,
    rounds: int = 7,
    min_seconds: float = 0.02,
    failures: dict[str, Exception] | None = None,
) -> dict[str, Timing]:
    """Seconds a call of each variant, taken ``rounds`` times in turns.

    Args:
        variants: name -> call; it is given one of ``sets`` (or of its own), or nothing without them.
        sets: inputs, rotated call by call (`Rotation` says how many are enough).
        device: where the calls run; None with a ``backend``.
        backend: instead of the device's own.
        rounds: timings a median is taken over.
        min_seconds: short calls are repeated until a round takes as long.
        failures: a variant that raises is entered here and left out of the result; None: it raises.
    """
    backend = backend or backend_for(device or torch.device("cpu"))
    prepared: dict[str, _Prepared] = {}
    seconds: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def guarded(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            prepared.pop(name, None)
            if failures is None:
                raise
            failures[name] = error.with_traceback(None)  # its frames hold tensors

    for name, call in variants.items():
        with guarded(name):
            calls = _Calls(call.call, call.sets) if isinstance(call, Variant) else _Calls(call, sets)
            prepared[name] = _prepare(calls, backend, min_seconds)
            seconds[name] = []
    # On a GPU a round before the first does not count: each capture empties the allocator's cache, and whoever comes
    # next waits for the driver's memory.
    for turn in range(-1 if backend.graphs else 0, rounds):
        for name in list(prepared)[:: -1 if turn % 2 else 1]:
            with guarded(name):
                taken = prepared[name].seconds(backend)
                if turn >= 0:
                    seconds[name].append(taken)
    return {name: Timing.of(seconds[name], run.graph, run.why_no_graph) for name, run in prepared.items()}


# Ceilings ---------------------------------------------------------------------------------------------------------


def copy_bandwidth(device: torch.device, size: int | None = None, backend: Backend | None = None) -> float:
    """Bytes a second of a large copy on this device, read plus written: the ceiling of memory-bound ops."""
    size = size or (1 << 31 if device.type == "cuda" else 1 << 27)
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    call = {"copy": lambda: target.copy_(source)}
    timing = interleaved(call, device=device, backend=backend)["copy"]
    return 2 * source.numel() * 4 / timing.median


def gemm_rate(
    device: torch.device, dtype: torch.dtype, size: int | None = None, backend: Backend | None = None
) -> float:
    """FLOP/s of a large square product on this device: the ceiling of compute-bound ops."""
    size = size or (8192 if device.type == "cuda" else 1536)
    backend = backend or backend_for(device)
    matrix = size * size * dtype.itemsize
    rotation = Rotation.past_cache(2 * matrix, matrix, backend)
    sets = [tuple(torch.randn(size, size, device=device).to(dtype) for _ in range(2)) for _ in range(rotation.sets)]
    timing = interleaved({"gemm": lambda pair: pair[0] @ pair[1]}, sets, backend=backend)["gemm"]
    return 2 * size**3 / timing.median


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Matrix products of fp32 inputs with TF32, or without."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


TF32 = "float32 (TF32)"


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What this device reaches at best, measured: ``copy`` in B/s, ``gemm`` in FLOP/s at ``dtype``, ``gemms`` by dtype.

    fp32 is meant without TF32; with it, it is a line of its own. A CPU is asked for ``dtype`` alone.
    """
    name = dtype_name(dtype)
    gemms: dict[str, float] = {}
    with tf32(False):
        wanted = (torch.bfloat16, torch.float16, torch.float32) if device.type == "cuda" else (dtype,)
        for each in dict.fromkeys((dtype, *wanted)):
            gemms[dtype_name(each)] = gemm_rate(device, each)
    if device.type == "cuda":
        with tf32(True):
            gemms[TF32] = gemm_rate(device, torch.float32)
    return {"copy": copy_bandwidth(device), "gemm": gemms[name], "gemms": gemms}


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``, as result files have it."""
    return str(dtype).removeprefix("torch.")
