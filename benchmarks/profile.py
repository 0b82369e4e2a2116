"""Where the time of one call goes: seconds by class of op, the attention kernels that ran, the gaps between kernels.

`account` is pure: a `Trace` in, the breakdown out. `record` makes the trace of a call with torch.profiler.

On a GPU, time is device time. Every instant in which kernels run is shared equally among the kernels that run then
(several streams), so that the classes and the gaps add up to the wall. The wall is that of a call without the
profiler: the profiler slows the launching CPU, not the kernels, and would show gaps that are its own. On a CPU, time
is that spent in each op without its children, the wall is the profiled call's, and the gaps are Python.
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pyvideo_kernels.errors import UnsupportedError, ValueOptionError

from .op_classes import GAPS, PHASES, chain_kind, class_of, is_cpu_work, is_cross, is_op, kernel_kind, op_kind, owner


@dataclass(eq=False)
class CpuEvent:
    """An op, or a range around Python code, on the CPU. Times in seconds on one clock for the whole trace."""

    name: str
    start: float
    duration: float
    shapes: Sequence[Sequence[int]] = ()
    thread: int = 0
    parent: CpuEvent | None = None
    children: list[CpuEvent] = field(default_factory=list)

    @property
    def end(self) -> float:
        return self.start + self.duration

    def chain(self) -> list[CpuEvent]:
        """The event and its parents, innermost first."""
        return [self] if self.parent is None else [self, *self.parent.chain()]

    def own(self) -> list[tuple[float, float]]:
        """When this event ran and none of its children did."""
        spans, at = [], self.start
        for child in sorted(self.children, key=lambda child: child.start):
            if child.start > at:
                spans.append((at, child.start))
            at = max(at, child.end)
        if self.end > at:
            spans.append((at, self.end))
        return spans


@dataclass(eq=False)
class DeviceEvent:
    """A kernel, copy or fill on the device, and the innermost CPU event that launched it (None: not known)."""

    name: str
    start: float
    duration: float
    launcher: CpuEvent | None = None
    stream: int = 0

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass
class Trace:
    """What was recorded of one call: ``wall`` seconds, CPU events (nested), device events (None: a CPU ran it)."""

    wall: float
    cpu: list[CpuEvent]
    device: list[DeviceEvent] | None = None


def nest(events: Iterable[CpuEvent]) -> list[CpuEvent]:
    """Events sorted by start, with parents and children by containment, thread by thread."""
    ordered = sorted(events, key=lambda event: (event.thread, event.start, -event.duration))
    stack: list[CpuEvent] = []
    for event in ordered:
        # A child's end may pass its parent's by the clock's resolution.
        while stack and (stack[-1].thread != event.thread or stack[-1].end <= event.start):
            stack.pop()
        if stack:
            event.parent = stack[-1]
            stack[-1].children.append(event)
        stack.append(event)
    return ordered


def shares(spans: Iterable[tuple[float, float, int]]) -> dict[int, float]:
    """Seconds of each key, every instant divided equally among the spans that cover it; the sum is their union.

    Args:
        spans: (start, end, key).
    """
    edges = sorted(
        edge for start, end, key in spans if end > start for edge in ((start, 1, key), (end, 0, key))
    )  # at one instant, ends come before starts
    seconds: dict[int, float] = defaultdict(float)
    active: dict[int, int] = defaultdict(int)
    running = 0
    last = 0.0
    for at, opens, key in edges:
        if running and at > last:
            for other, count in active.items():
                seconds[other] += (at - last) * count / running
        last = at
        step = 1 if opens else -1
        active[key] += step
        running += step
        if not active[key]:
            del active[key]
    return dict(seconds)


@dataclass(frozen=True)
class _Work:
    """One piece of busy time: what to count it under, and under which name."""

    label: str
    name: str
    attention: str | None  # "self" or "cross"
    spans: Sequence[tuple[float, float]]
    calls: int = 1


def _placed(chain: list[CpuEvent], kernel: str | None, phase: str) -> tuple[str, str | None, CpuEvent | None]:
    """Class, self or cross if it is attention, and the op that decided."""
    names = [event.name for event in chain]
    at = owner(names)
    if at is not None:
        kind, decider = op_kind(names[at]), chain[at]
    elif kernel is not None:
        # No op that we know: by the kernel's name, else elementwise if any op launched it.
        decider = None
        kind = kernel_kind(kernel) or (chain_kind(names) if any(is_op(name) for name in names) else None)
    else:
        kind, decider = chain_kind(names), None
    cross = kind == "attention" and decider is not None and is_cross(decider.name, decider.shapes)
    side = ("cross" if cross else "self") if kind == "attention" else None
    return class_of(kind, phase, cross), side, decider


def _device_work(trace: Trace, phase: str) -> list[_Work]:
    work = []
    for kernel in trace.device or ():
        chain = kernel.launcher.chain() if kernel.launcher else []
        label, side, _ = _placed(chain, kernel.name, phase)
        work.append(_Work(label, kernel.name, side, [(kernel.start, kernel.end)]))
    return work


_BACKEND = re.compile(r"aten::_scaled_dot_product_|aten::_(flash|efficient|cudnn)_attention_forward")


def _cpu_work(trace: Trace, phase: str) -> list[_Work]:
    work = []
    for event in trace.cpu:
        if not is_cpu_work(event.name):
            continue
        chain = event.chain()
        label, side, decider = _placed(chain, None, phase)
        name, calls = event.name, 1
        if side is not None and decider is not None:
            # All of an attention op's time is listed under its backend: "which attention ran" is asked, not its parts.
            name = _backend(decider) or decider.name
            calls = int(event is decider)
        work.append(_Work(label, name, side, event.own(), calls))
    return work


def _backend(event: CpuEvent) -> str | None:
    """The backend that an attention op is or called."""
    if _BACKEND.match(event.name):
        return event.name
    return next(filter(None, map(_backend, event.children)), None)


def account(trace: Trace, phase: str, top: int = 20) -> dict[str, Any]:
    """The breakdown of a trace.

    Args:
        trace: what was recorded.
        phase: ``"denoise"`` or ``"decode"``.
        top: how many kernels (on a CPU: ops) to list.
    Returns:
        ``wall``; ``classes``: seconds by class, launch gaps included, adding up to ``wall``; ``attention``: names of
        the kernels that ran it, most time first; ``kernels``: name, seconds, calls and class of the longest.
    """
    if phase not in PHASES:
        raise ValueOptionError(f"breakdown: `phase` must be {' or '.join(PHASES)}; got {phase!r}")
    work = _cpu_work(trace, phase) if trace.device is None else _device_work(trace, phase)
    seconds = shares((start, end, i) for i, each in enumerate(work) for start, end in each.spans)
    classes = dict.fromkeys(PHASES[phase], 0.0)
    attention: dict[str, dict[str, float]] = {"self": defaultdict(float), "cross": defaultdict(float)}
    names: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for i, each in enumerate(work):
        spent = seconds.get(i, 0.0)
        classes[each.label] = classes.get(each.label, 0.0) + spent
        row = names[each.name, each.label]
        row[0] += spent
        row[1] += each.calls
        if each.attention:
            attention[each.attention][each.name] += spent
    busy = sum(seconds.values())
    # A profiled kernel may last a little longer than in the call that gave the wall.
    wall = max(trace.wall, busy)
    classes[GAPS] = wall - busy
    longest = sorted(names.items(), key=lambda item: -item[1][0])[:top]
    return {
        "wall": wall,
        "classes": classes,
        "attention": {side: sorted(found, key=lambda n: -found[n]) for side, found in attention.items()},
        "kernels": [
            {"name": name, "seconds": spent, "calls": int(calls), "class": label}
            for (name, label), (spent, calls) in longest
        ],
    }


# torch.profiler -> Trace ------------------------------------------------------------------------------------------

# On the device's timeline but not work on it: annotations repeated there, and waits.
_NOT_WORK = re.compile(r"(Context|Stream|Event) (Sync|Wait)|^##|^ProfilerStep|^Torch-Compiled Region")
# On the CPU's but not the program's: the profiler's own records, and calls of the CUDA runtime, whose numbers are
# another series than the ops' and may repeat them.
_NOT_OURS = re.compile(
    r"profiler::|\[memory\]|\[OutOfMemory\]|(cuda|hip)[A-Z]\w*$|cu[A-Z]\w*$|Activity Buffer|Lazy Function"
)


def trace_of(events: Iterable[Any], wall: float, device: torch.device) -> Trace:
    """A trace of the profiler's raw events (``profile.profiler.kineto_results.events()``)."""
    cpu: dict[int, CpuEvent] = {}
    ranges: list[CpuEvent] = []
    launched: list[tuple[int, DeviceEvent]] = []
    origin: int | None = None
    for event in events:
        name = event.name()
        # Nanoseconds since 1970 do not fit a float; seconds since the first event do.
        origin = event.start_ns() if origin is None else origin
        start, duration = (event.start_ns() - origin) * 1e-9, event.duration_ns() * 1e-9
        if event.device_type() == torch.autograd.DeviceType.CPU:
            # A linked event is the runtime's call (cudaLaunchKernel) for an op.
            if event.linked_correlation_id() > 0 or event.is_async() or _NOT_OURS.match(name):
                continue
            row = CpuEvent(name, start, duration, event.shapes(), event.start_thread_id())
            ranges.append(row)
            cpu[event.correlation_id()] = row
        elif not event.is_user_annotation() and not _NOT_WORK.search(name):
            kernel = DeviceEvent(name, start, duration, stream=event.device_resource_id())
            launched.append((event.linked_correlation_id(), kernel))
    for correlation, kernel in launched:
        kernel.launcher = cpu.get(correlation) if correlation else None
    return Trace(wall, nest(ranges), None if device.type == "cpu" else [kernel for _, kernel in launched])


def record(call: Callable[[], Any], device: torch.device) -> Trace:
    """The trace of a call; on a GPU a call without the profiler, for the wall, goes before."""
    from torch.profiler import ProfilerActivity, profile

    def timed() -> float:
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        return time.perf_counter() - start

    # Read by the profiler's library when it is first used; without it, lines of its own go to stderr among ours.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        # The first use of the profiler loads its driver library for seconds: not in our trace.
        with profile(activities=activities):
            torch.zeros(1, device=device).add_(1)
            _synchronize(device)
    wall = timed() if device.type == "cuda" else None
    with profile(activities=activities, record_shapes=True) as profiler:
        profiled = timed()
    results: Any = profiler.profiler
    trace = trace_of(results.kineto_results.events(), profiled if wall is None else wall, device)
    if trace.device is not None and not trace.device:
        raise UnsupportedError(
            "breakdown: the profiler saw no kernel on the GPU; another profiler may hold it, or the driver may not "
            "let this user trace (NVreg_RestrictProfilingToAdminUsers)"
        )
    return trace


def breakdown(call: Callable[[], Any], *, phase: str, device: torch.device | str, top: int = 20) -> dict[str, Any]:
    """Seconds of one warm call by class of op.

    Args:
        call: does the work; called once on a CPU, twice on a GPU. Compiled, tuned and warm before.
        phase: ``"denoise"`` (transformer, guidance, scheduler) or ``"decode"`` (autoencoder).
        device: where it runs, ``cuda`` or ``cpu``.
        top: how many kernels to list.
    Returns:
        As `account`.
    Raises:
        ValueOptionError: unknown phase. UnsupportedError: a device that is not traced.
    """
    device = torch.device(device)
    if phase not in PHASES:
        raise ValueOptionError(f"breakdown: `phase` must be {' or '.join(PHASES)}; got {phase!r}")
    if device.type not in ("cuda", "cpu"):
        raise UnsupportedError(f"breakdown: `device` must be cuda or cpu; got {device}")
    return account(record(call, device), phase, top)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
