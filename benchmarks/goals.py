"""What is asked of the kernels on a CPU, and which of it a run's results reach.

    ratio = median of the baseline / median of ours,    both in one run, in turns, at least `ROUNDS` rounds

`goals` is the table: what, against whom, how many times as fast, and which result file has the two times. It holds no
time itself, so that no number is kept twice. The goals were set for two cores of a Zen 4 server, which multiplies bf16
(``avx512_bf16``); a machine without that will miss some of them, and that is not an error of the run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyvideo_kernels.sampler.loading import pick_dtype
from pyvideo_kernels.schemas import OPS

from .registry import ENTRIES, Entry
from .report import tables
from .shapes import WAN_1B

ROUNDS = 5
"""Fewer than these give no median to judge by."""
LARGE = 4096 * 1536
"""Elements of the largest tensor of a call, from which on a memory-bound op is judged: [1, 4096, 1536]."""

# Fields of the benchmarks' requests, and at once the settings by which their results are known.
CLIP: Mapping[str, Any] = {"model": "tiny", "height": 64, "width": 64, "frames": 17, "steps": 8, "decode": True}
BLOCKS: Mapping[str, Any] = {
    "model": "wan2.1-1.3b", "layers": 2, "height": 512, "width": 512, "frames": 13, "steps": 1, "guidance": 1.0,
    "decode": False,
}  # fmt: skip
DECODER: Mapping[str, Any] = {"model": "wan2.1-1.3b", "height": 256, "width": 256, "frames": 17}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""How the command line calls them."""
ACCELERATED = "ours:attention=dense,loop=pipeline"
"""A forward under accelerate() alone, its exact attention too: nothing of the sampler's loop may help it."""
ELSEWHERE = "no result has it"
WINDOW = "window-90%"
"""How the names of the windowed shapes end that are judged."""


@dataclass(frozen=True)
class Goal:
    """How many times as fast as a baseline something has to be.

    Args:
        what: in words.
        kind: of the result that says so.
        where: an op's row: ``op`` and ``shape``; else settings of the result.
        against: ``eager``, ``compile``.
        needed: their seconds over ours.
        shown: the baseline in words, where its name does not say what it is.
        ours: our side among a clip's variants.
    """

    what: str
    kind: str
    where: Mapping[str, Any]
    against: str
    needed: float
    shown: str = ""
    ours: str = "ours"


@dataclass(frozen=True)
class Outcome:
    """A goal in one result.

    Args:
        shape: what it was measured at, as the result says; of a goal that none measures, as the goal does.
        ratio, spread: the measured ratio, and what the rounds' spreads make of it; None: see ``why_not``.
    """

    goal: Goal
    shape: str
    dtype: str = tables.NOTHING
    ratio: float | None = None
    spread: float = 0.0
    why_not: str = ""

    @property
    def reached(self) -> str:
        """``yes``, ``within spread`` (below what is needed by less than ±), ``no``, ``not measured``."""
        if self.ratio is None:
            return "not measured"
        if self.ratio >= self.goal.needed:
            return "yes"
        return "within spread" if self.ratio + self.spread >= self.goal.needed else "no"

    @property
    def measurable(self) -> bool:
        """Whether there is a result that should have it."""
        return self.why_not != ELSEWHERE


# The table -------------------------------------------------------------------------------------------------------


@functools.cache
def goals() -> tuple[Goal, ...]:
    """All of them."""
    out = []
    for op in memory_bound():
        for shape in large_shapes(ENTRIES[op]) or ("",):
            where = {"op": op, "shape": shape}
            out += [Goal(op, "ops", where, "eager", 2.0), Goal(op, "ops", where, "compile", 1.0)]
    attention = ENTRIES["spacetime_attention"]
    for shape in [name for name in attention.cpu if name.endswith(WINDOW)] or [""]:
        where = {"op": attention.op, "shape": shape}
        out.append(Goal(attention.op, "ops", where, "eager", 4.0, shown="masked SDPA"))
    out += [
        Goal("clip of the embedded model", "e2e", CLIP, "eager", 1.5),
        Goal("clip of the embedded model", "e2e", CLIP, "compile", 1.0),
        Goal("blocks of Wan 1.3B, attention=dense", "e2e", BLOCKS, "eager", 1.3, ours=ACCELERATED),
        Goal("VAE decoder of Wan", "vae", DECODER, "eager", 1.3),
    ]
    return tuple(out)


def memory_bound() -> list[str]:
    """Ops without products to speak of that have a kernel for the CPU."""
    return [
        name
        for name, entry in ENTRIES.items()
        if "cpu" in OPS[name].impls and not any(entry.flops(**sizes) for sizes in entry.cpu.values())
    ]


def large_shapes(entry: Entry) -> list[str]:
    """Shapes of an op's CPU benchmark at which it is judged."""
    return [name for name, sizes in entry.cpu.items() if _elements(entry, sizes) >= LARGE]


def _elements(entry: Entry, sizes: Mapping[str, Any]) -> int:
    """Elements of the largest tensor that goes in; no memory is taken."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_leaves

    with FakeTensorMode():
        inputs = entry.inputs(**sizes, dtype=torch.float32, device=torch.device("cpu"))
    return max(leaf.numel() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


# A machine's results ---------------------------------------------------------------------------------------------


def outcomes(results: Iterable[Mapping[str, Any]]) -> list[Outcome]:
    """Every goal, in every one of one machine's results that measures it."""
    found = list(results)
    return [outcome for goal in goals() for outcome in _outcomes(goal, found)]


def _outcomes(goal: Goal, results: list[Mapping[str, Any]]) -> Iterator[Outcome]:
    judged = _ops(goal, results) if goal.kind == "ops" else _models(goal, results)
    nothing = Outcome(goal, _asked(goal), why_not=ELSEWHERE)
    if goal.kind == "ops" and not goal.where["shape"] and any(result["kind"] == "ops" for result in results):
        nothing = Outcome(goal, tables.NOTHING, why_not="the benchmark has no shape of this kind for a CPU")
    yield from list(judged) or [nothing]


def _asked(goal: Goal) -> str:
    if goal.kind == "ops":
        return str(goal.where["shape"])
    return "×".join(str(goal.where[side]) for side in ("height", "width", "frames"))


def _ops(goal: Goal, results: list[Mapping[str, Any]]) -> Iterator[Outcome]:
    measured = [result for result in results if result["kind"] == "ops"]
    for result in measured:
        if _dtype(result["settings"]["dtype"]) != sampled_in(measured):
            continue
        for row in result["rows"]:
            if any(row[key] != value for key, value in goal.where.items()):
                continue
            dtype = tables.short_dtype(row["dtype"])
            made = functools.partial(Outcome, goal, row["shape"], dtype)
            other = row.get("baselines", {}).get(goal.against, {"skipped": "not asked for"})
            if "error" in row:
                yield made(why_not=f"wrong: {row['error']}")
            elif "ratio" not in other:
                yield made(why_not=f"{goal.against}: {other.get('error') or other.get('skipped')}")
            elif row["rounds"] < ROUNDS:
                yield made(why_not=_too_few(row["rounds"]))
            else:
                yield made(*_ratio(other, row))


def sampler_dtype(device: torch.device) -> torch.dtype:
    """What the sampler runs a model of Wan 1.3B's width in on this device, and what is measured on it therefore."""
    return pick_dtype("auto", device, WAN_1B["width"])


def sampled_in(results: Iterable[Mapping[str, Any]]) -> str:
    """The dtype that ops are judged in: the one that the sampler runs in on that machine."""
    return next((_dtype(r["settings"]["sampler_dtype"]) for r in results if "sampler_dtype" in r["settings"]), "bf16")


def _dtype(name: object) -> str:
    return tables.short_dtype(str(name).removeprefix("torch."))


def _models(goal: Goal, results: list[Mapping[str, Any]]) -> Iterator[Outcome]:
    """Clips and decoders: a row a variant."""
    for result in results:
        settings = result["settings"]
        if result["kind"] != goal.kind or any(settings.get(key) != value for key, value in goal.where.items()):
            continue
        # The whole model is another one.
        if "layers" not in goal.where and settings.get("layers"):
            continue
        size = "×".join(str(settings[side]) for side in ("height", "width", "frames"))
        steps = f", {settings['steps']} step{'s' * (settings['steps'] != 1)}" if "steps" in settings else ""
        made = functools.partial(Outcome, goal, size + steps, tables.short_dtype(settings["dtype"]))
        ours = next((row for row in result["rows"] if row["variant"] == goal.ours), {"error": "was not asked for"})
        base = _baseline(goal.against, result["rows"])
        failed = next((f"{name}: {row['error']}" for name, row in ((goal.ours, ours), base) if "error" in row), None)
        if failed:
            yield made(why_not=failed)
        elif (rounds := min(ours["rounds"], base[1]["rounds"])) < ROUNDS:
            yield made(why_not=_too_few(rounds))
        else:
            yield made(*_ratio(_total(base[1]), _total(ours)))


def _baseline(against: str, rows: Iterable[Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    """Name and row of the baseline; of several ways to compile the stock model, the fastest."""
    if against == "compile":
        stock = [row for row in rows if row["variant"].partition(":")[0] == "compile"]
    else:
        stock = [row for row in rows if row["variant"] == against]
    best = min(stock, key=lambda row: math.inf if "error" in row else _total(row)["seconds"], default=None)
    return (against, {"error": "was not asked for"}) if best is None else (best["variant"], best)


def _total(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Seconds and spread of a variant."""
    if isinstance(row["seconds"], Mapping):
        total = row["seconds"]["total"]
        return {"seconds": total["median"], "spread": total["spread"]}
    return row


def _ratio(base: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[float, float]:
    ratio = base["seconds"] / ours["seconds"]
    return ratio, ratio * math.hypot(base["spread"] / base["seconds"], ours["spread"] / ours["seconds"])


def _too_few(rounds: int) -> str:
    return f"{rounds} rounds, and {ROUNDS} are needed"


# Shown -----------------------------------------------------------------------------------------------------------


def table(found: Iterable[Outcome]) -> tables.Table:
    """Goals as a table; why some were not measured, under it."""
    columns = (
        tables.Column("goal", False), tables.Column("shape", False), tables.Column("dtype", False),
        tables.Column("against", False), tables.Column("needed ×"), tables.Column("measured ×"), tables.Column("±"),
        tables.Column("reached", False),
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    reasons: dict[str, list[str]] = {}
    for each in found:
        goal = each.goal
        cells = (tables.NOTHING, tables.NOTHING)
        if each.ratio is not None:
            cells = tables.ratio(each.ratio), tables.ratio(each.spread)
        rows.append(
            (goal.what, each.shape, each.dtype, goal.shown or goal.against, tables.ratio(goal.needed), *cells,
             each.reached)
        )  # fmt: skip
        if each.why_not:
            reasons.setdefault(each.why_not, []).append(f"{goal.what} {each.shape}")
    notes = [f"{', '.join(dict.fromkeys(what))}: {' '.join(why.split())}" for why, what in reasons.items()]
    return tables.Table(columns, tuple(rows), tuple(notes))


def summary(found: Iterable[Outcome]) -> str:
    """How many there are of each verdict.

    >>> one = Goal("a", "ops", {}, "eager", 2.0)
    >>> summary([Outcome(one, "s", "bf16", 2.1), Outcome(one, "s", "bf16", 1.9, 0.2), Outcome(one, "s", why_not="x")])
    '1 of 3 goals reached, 1 within spread, 1 not measured'
    """
    verdicts = [outcome.reached for outcome in found]
    counts = [f"{verdicts.count('yes')} of {len(verdicts)} goals reached"]
    for verdict, words in (("within spread", "within spread"), ("no", "not reached"), ("not measured", "not measured")):
        if verdict in verdicts:
            counts.append(f"{verdicts.count(verdict)} {words}")
    return ", ".join(counts)
