"""The search for the fastest configuration of a key: compile, compare, time, halve, judge. `tune` keeps the table."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pyvideo_kernels.configs import forced_arch, forced_config, target_of, tuned
from pyvideo_kernels.testing.conditions import poisoned

from ..backends import backend_for
from ..registry import weight_of
from ..timing import Rotation, Timing, interleaved
from .launches import Compiled, Compiler, Job, Launch, samples_of

GAIN = 0.02
# How many are left after each pass over the smallest shape, and its rounds; the last ones meet every shape. A pass
# that would not halve the field is left out.
_PASSES = ((8, 3), (3, 5))
# Seconds that looking through the candidates of a key may take, about: of slow kernels only the nearest are tried.
_SCREEN_S = 20.0
# So many are tried however slow they are.
_AFFORDABLE = 4
# At most so many in turns: each keeps its outputs alive.
_TURNS = 8
# Elements compared at a time.
_PIECE = 1 << 24
# The share of codes that may be one step off: several times what bf16 inputs of a quantisation explain.
_CODES_OFF = 0.01
# What CUDA says when its context is lost.
_FATAL = ("CUDA error", "illegal memory access", "unspecified launch failure", "misaligned address")
Timer = Callable[..., Mapping[str, Timing]]
Say = Callable[[str], None]


class OutOfTime(Exception):
    """The budget is spent; the key in hand is left for the next time."""


@dataclass(frozen=True)
class Question:
    """A key to tune, and the launches that ask it, the smallest first."""

    family: str
    key: tuned.Key
    launches: tuple[Launch, ...]

    @property
    def op(self) -> str:
        return self.launches[0].op

    @property
    def dtype(self) -> str:
        return self.launches[0].dtype

    def __str__(self) -> str:
        return f"{self.family} " + ", ".join(f"{name}={value}" for name, value in self.key)


@dataclass
class Search:
    """One card's search for the fastest configurations.

    Args:
        device: where candidates run.
        arch: what they are compiled for: the device's, or sm_90 where the device is a CPU.
        compiler: None: nothing is compiled beforehand (Triton's interpreter needs nothing compiled).
        rounds: timings a median of the last comparison is taken over.
        limit: at most so many candidates a key, the rule's included.
        until: a `time.monotonic`; None: no end.
        timer: `timing.interleaved`, or a test's.
        excluded: family, key and configuration of what took a process down before.
        on_crash: told what takes this one down, before the error goes on its way.
    """

    device: torch.device
    arch: str
    compiler: Compiler | None
    rounds: int = 7
    limit: int | None = None
    until: float | None = None
    timer: Timer = interleaved
    say: Say = print
    excluded: Sequence[tuple[str, tuned.Key, Any]] = ()
    on_crash: Callable[[Question, Any, str], None] = lambda question, config, error: None

    def __post_init__(self) -> None:
        self.wrong: list[str] = []
        # Kernels that were compiled here, though the compiler's processes had compiled them: none, or its work is lost.
        self.recompiled = 0

    @property
    def host(self) -> str:
        """What rules are asked with: the device's architecture, the interpreter's on a CPU."""
        return str(target_of(self.device))

    def check_time(self) -> None:
        if self.until is not None and time.monotonic() > self.until:
            raise OutOfTime

    def compile(self, question: Question, configs: Sequence[Any], launches: Sequence[Launch]) -> dict[Any, str]:
        """Why each configuration that does not fit one of the launches does not."""
        self.check_time()
        if self.compiler is None or not configs:
            return {}
        jobs = self.jobs(question, configs, launches)
        done = self.compiler.compile(jobs, self.until)
        if len(done) < len(jobs):
            raise OutOfTime
        return misfits(done)

    def prepare(self, question: Question) -> None:
        """Compile what the oracle's samples launch, and begin with the question: one by one it takes a minute."""
        if self.compiler is not None and self.device.type == "cuda":
            jobs = [Job(launch, self.arch) for launch in samples_of(question.op, getattr(torch, question.dtype))]
            self.compiler.ahead(jobs)
            self.ahead(question)
            self.compiler.compile(jobs, self.until)

    def ahead(self, question: Question) -> None:
        """Have the first jobs of a question compiled while another is being timed."""
        if self.compiler is not None:
            self.compiler.ahead(self.jobs(question, self.candidates(question), question.launches[:1]))

    def candidates(self, question: Question) -> list[Any]:
        """What is tried, the rule's answer first."""
        family = tuned.families()[question.family]
        rule, *others = family.candidates(self.host, **dict(question.key))[: self.limit]
        return [rule, *(each for each in others if (question.family, question.key, each) not in self.excluded)]

    def jobs(self, question: Question, configs: Sequence[Any], launches: Sequence[Launch]) -> list[Job]:
        """What is compiled: every configuration at every launch."""
        return [
            Job(launch, self.arch, question.family, question.key, config) for launch in launches for config in configs
        ]

    def call(self, question: Question, launch: Launch, config: Any) -> Callable[[Sequence[Any]], Any]:
        """A launch with ``config`` in place, and rules for everything else."""

        def run(args: Sequence[Any]) -> Any:
            with forced_arch(self.host), forced_config(question.family, config, **dict(question.key)):
                return launch.run(args)

        return run

    def affordable(self, question: Question, launch: Launch, rule: Any) -> int:
        """How many candidates there is time for: each is run once to compare and about four times to time."""
        if self.limit is not None and self.limit <= _AFFORDABLE:
            return self.limit
        call, args = self.call(question, launch, rule), launch.args(self.device)
        backend = backend_for(self.device)
        backend.warm(lambda: call(args))
        return max(_AFFORDABLE, int(_SCREEN_S / (5 * max(backend.seconds(lambda: call(args)), 1e-6))))

    def agreeing(self, question: Question, launch: Launch, configs: Sequence[Any]) -> dict[Any, str]:
        """Why each configuration whose output is not that of the first one, the rule's, is dropped."""
        self.check_time()
        args = launch.args(self.device)
        out: dict[Any, str] = {}
        with _compilations() as compiled:
            expected = _poisoned(self.call(question, launch, configs[0]), args)
            for config in configs[1:]:
                self.check_time()
                try:
                    problem = self._problem(self.call(question, launch, config), args, expected)
                except RuntimeError as error:
                    if _fatal(error):
                        self.on_crash(question, config, f"{launch}: {_first_line(error)}")
                    raise
                if problem:
                    out[config] = problem
        if self.compiler is not None and self.device.type == "cuda":
            self.recompiled += len(compiled)
        self.report(launch, out)
        return out

    def report(self, launch: Launch, reasons: Mapping[Any, str]) -> None:
        """Name what is dropped and why."""
        for config, reason in reasons.items():
            self.wrong.append(f"{launch}: {config}: {reason}")
            self.say(f"  DROPPED {config}\n    {reason} ({launch})")

    def _problem(
        self, call: Callable[[Sequence[Any]], Any], args: Sequence[Any], expected: Sequence[Tensor]
    ) -> str | None:
        try:
            found = _poisoned(call, args)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            if _fatal(error):
                raise
            return f"failed: {type(error).__name__}: {_first_line(error)[:200]}"
        problem = difference(expected, found)
        return f"wrong: {problem}" if problem else None

    def time(self, question: Question, launch: Launch, configs: Sequence[Any], rounds: int) -> dict[Any, Timing]:
        """Seconds of each configuration at a launch, all in turns with the first, the rule's; none of what fails."""
        args = launch.args(self.device)
        rule, *others = configs
        inputs, outputs = weight_of(args), weight_of(self.call(question, launch, rule)(args))
        rotation = Rotation.past_cache(inputs, outputs, backend_for(self.device), _TURNS)
        # A CPU has nothing to find out here, and the interpreter no cache to outgrow.
        count = rotation.sets if self.device.type == "cuda" else 1
        sets = [args, *(launch.args(self.device) for _ in range(count - 1))]
        out: dict[Any, Timing] = {}
        for start in range(0, max(len(others), 1), _TURNS - 1):
            self.check_time()
            turns = [rule, *others[start : start + _TURNS - 1]]
            calls = {str(index): self.call(question, launch, config) for index, config in enumerate(turns)}
            failures: dict[str, Exception] = {}
            timings = self.timer(calls, sets, device=self.device, rounds=rounds, failures=failures)
            if "0" in failures:
                raise failures["0"]
            failed = {turns[int(name)]: f"failed: {type(e).__name__}: {_first_line(e)}" for name, e in failures.items()}
            self.report(launch, failed)
            # Ratios to the rule of the same turns: the card may be slower in one group's than in another's.
            scale = out[rule].median / timings["0"].median if rule in out else 1.0
            for index, config in enumerate(turns):
                if config not in out and config not in failed:
                    t = timings[str(index)]
                    out[config] = Timing(t.median * scale, t.spread * scale, t.rounds, t.graph)
        return out

    def answer(self, question: Question, following: Question | None = None) -> dict[str, Any]:
        """The table's row for a question; ``following`` compiles while this one is timed."""
        configs = self.candidates(question)
        tried, dropped = len(configs), dict[str, int]()
        rule, smallest, rest = configs[0], question.launches[0], question.launches[1:]

        def drop(reasons: Mapping[Any, str]) -> None:
            for reason in (reason.partition(":")[0] for config, reason in reasons.items() if config in configs[1:]):
                dropped[reason] = dropped.get(reason, 0) + 1
            configs[1:] = [config for config in configs[1:] if config not in reasons]

        drop(self.compile(question, configs, [smallest]))
        if following is not None:
            self.ahead(following)
        many = self.affordable(question, smallest, rule)
        drop(dict.fromkeys(configs[1 + many :], "time"))
        drop(self.agreeing(question, smallest, configs))
        for keep, rounds in _PASSES:
            if len(configs) - 1 >= 2 * keep:
                seconds = self.time(question, smallest, configs, rounds)
                drop(_untimed(configs, seconds))
                configs[1:] = sorted(configs[1:], key=lambda config: seconds[config].median)[:keep]
        drop(self.compile(question, configs, rest))
        for launch in rest:
            drop(self.agreeing(question, launch, configs))
        table = {}
        for launch in question.launches:
            table[launch] = self.time(question, launch, configs, self.rounds)
            drop(_untimed(configs, table[launch]))
        best = choose(rule, configs[1:], list(table.values()))
        measured = [
            {
                "shape": launch.shape,
                "seconds": timings[best].median,
                "default_seconds": timings[rule].median,
                "spread": max(timings[best].spread, timings[rule].spread),
            }
            for launch, timings in table.items()
        ]
        return {
            "op": question.op,
            **tuned.as_row(question.family, question.key, best),
            "tuned": best != rule,
            **{name: sum(row[name] for row in measured) for name in ("seconds", "default_seconds", "spread")},
            "default_config": asdict(rule),
            "dtype": smallest.dtype,
            "measured": measured,
            "candidates": tried,
            "dropped": dropped,
            "digest": tuned.digest(question.op),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }


def _untimed(configs: Sequence[Any], seconds: Mapping[Any, Timing]) -> dict[Any, str]:
    return {config: "failed" for config in configs if config not in seconds}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _fatal(error: BaseException) -> bool:
    """Whether the CUDA context is lost: nothing that this process does from here on can be trusted."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FATAL)


def misfits(done: Mapping[Job, Compiled]) -> dict[Any, str]:
    """Why configurations do not fit, of those that do not."""
    return {job.config: reason for job, compiled in done.items() if (reason := compiled.misfit(job.arch))}


@contextmanager
def _compilations() -> Iterator[list[str]]:
    """Names of the kernels that Triton compiles within, and did not find on disk."""
    from triton import knobs

    names: list[str] = []
    before = knobs.compilation.listener

    def listen(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            names.append(str(getattr(src, "name", src)))
        if before is not None:
            before(src=src, cache_hit=cache_hit, **rest)

    knobs.compilation.listener = listen
    try:
        yield names
    finally:
        knobs.compilation.listener = before


def _poisoned(call: Callable[[Sequence[Any]], Any], args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Outputs over memory filled with NaN: a fresh buffer may hold the very output that it is compared with."""
    with poisoned():
        return tuple(out for out in call(args) if isinstance(out, Tensor))


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> str | None:
    """Where two configurations of one kernel differ by more than another order of summation explains; None: nowhere.

    Elementwise, two units in the last place and four of the root mean square; sums kept in fp32 get 64 times that.
    Codes (integers) may be one step off where a sum falls on the other side of a rounding, which is rare.
    """
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        if not a.is_floating_point():
            off_by, count = 0, 0
            for x, y in zip(a.reshape(-1).split(_PIECE), b.reshape(-1).split(_PIECE), strict=True):
                steps = (x.int() - y.int()).abs()
                count += int(steps.count_nonzero())
                off_by = max(off_by, int(steps.max()) if steps.numel() else 0)
            if off_by > 1 or count > _CODES_OFF * a.numel():
                return f"output {index}: {count} of {a.numel()} codes differ, by up to {off_by}"
            continue
        unit = torch.finfo(a.dtype).eps * (64 if a.dtype == torch.float32 else 1)
        # A piece at a time: in fp32 the outputs of a large clip would fill a good part of a card.
        pieces = list(zip(a.reshape(-1).split(_PIECE), b.reshape(-1).split(_PIECE), strict=True))
        square = sum(float(torch.where(torch.isfinite(x), x, 0).float().square().sum()) for x, _ in pieces)
        floor = 4 * unit * math.sqrt(square / max(a.numel(), 1))
        count, most = 0, 0.0
        for x, y in pieces:
            finite = torch.isfinite(x)
            if not torch.equal(finite, torch.isfinite(y)):
                return f"output {index}: NaN or infinity where the rule has none"
            x, y = (torch.where(finite, t, 0).float() for t in (x, y))
            off = (x - y).abs()
            if over := int((off > 2 * unit * x.abs() + floor).sum()):
                count, most = count + over, max(most, float(off.max()))
        if count:
            return f"output {index}: {count} of {a.numel()} elements differ, by up to {most:.3e}"
    return None


def beats(candidate: Timing, rule: Timing) -> bool:
    """Faster by more than 2 %, and by more than twice the larger spread."""
    gain = rule.median - candidate.median
    return gain > GAIN * rule.median and gain > 2 * max(candidate.spread, rule.spread)


def choose(rule: Any, others: Sequence[Any], table: Sequence[Mapping[Any, Timing]]) -> Any:
    """The configuration with the least time over all launches that beats the rule's there and loses at none."""

    def total(config: Any) -> Timing:
        timings = [row[config] for row in table]
        return Timing(sum(t.median for t in timings), sum(t.spread for t in timings), timings[0].rounds)

    def loses(config: Any) -> bool:
        return any(
            row[config].median - row[rule].median > 2 * max(row[config].spread, row[rule].spread) for row in table
        )

    good = [config for config in others if beats(total(config), total(rule)) and not loses(config)]
    return min(good, key=lambda config: total(config).median, default=rule)
