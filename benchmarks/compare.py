"""``pyvideo bench compare OLD NEW``: is the new run slower than the old one, beyond what both runs' own noise explains?

What is compared is the ratio to each baseline that ran in the same run, in turns: a slow machine slows both sides.
Absolute medians are compared too where both files name the same card or CPU, torch and thread count.

A quantity made of medians ``m_i`` with spreads ``h_i`` (half the interquartile range of the rounds) may move by

    tolerance = max(FLOOR, WIDTH * sqrt(sum_i (h_i / m_i)²)),    in ln(new / old)

with four terms for a ratio (ours and the baseline, old and new) and two for seconds. For normal noise half an
interquartile range is 0.67 standard deviations of one round, and the median of seven rounds is off by about half of a
standard deviation, so ``WIDTH = 2`` is about three standard errors of a ratio; ``FLOOR`` is what two runs of the same
code differ by for reasons that no round sees (alignment, clocks, a page that moved).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyvideo_kernels.error_types import ValueOptionError
from pyvideo_kernels.sampler.problems import Exit

from . import results

FLOOR = 0.03
WIDTH = 2.0
NOISY = 0.25
"""A tolerance above this says more of the machine than of the code; such rows are named."""

PHASES = ("step", "denoise", "decode", "total")
# Two clips through different settings are two measurements, not an old one and a new one. Of the rest (rounds, prompt
# text) a median does not depend.
_SAME_CLIP = (
    "model", "weights", "layers", "pipeline", "height", "width", "frames", "steps", "guidance", "dtype", "tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A median and its spread, in seconds."""

    median: float
    spread: float

    @property
    def noise(self) -> float:
        return self.spread / self.median


Key = tuple[str, ...]
Phases = dict[str, tuple[Sample, dict[str, Sample]]]


@dataclass(frozen=True)
class Change:
    """How far one measure of one row moved.

    Args:
        row: what was measured, in words.
        measure: ``"vs eager"``, ``"seconds"``, ``"step vs eager"``.
        old, new: ratios (more is better) or seconds (less is better).
        gain: new speed / old speed; below 1 is slower.
        tolerance: how far ``ln(gain)`` may be from 0 by noise alone.
    """

    row: str
    measure: str
    old: float
    new: float
    gain: float
    tolerance: float

    @property
    def verdict(self) -> str:
        if abs(math.log(self.gain)) <= self.tolerance:
            return "same"
        return "slower" if self.gain < 1 else "faster"


@dataclass
class Comparison:
    """What differs between two result files.

    Args:
        changes: every measure that both runs have.
        lost: rows of the old run that the new one lacks. ``new_rows``: the other way round.
        wrong: rows that are wrong in the new run, with the reason.
        baselines: baselines of the old run that the new one could not run, with the reason.
        rebound: rows whose implementation is another one now.
    """

    changes: list[Change] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    new_rows: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    baselines: list[str] = field(default_factory=list)
    rebound: list[str] = field(default_factory=list)
    absolute: bool = False

    def of(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]

    @property
    def failed(self) -> bool:
        return bool(self.of("slower") or self.lost or self.wrong)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Comparison:
    """Hold one result against another of the same kind and device type.

    Args:
        old, new: result files of kind ``ops`` or ``e2e``, as ``results.read`` returns them.
    Raises:
        ValueOptionError: they cannot be compared, and why; a time in one of them is not a positive number.
    """
    _check_comparable(old, new)
    kind = old["kind"]
    out = Comparison(absolute=same_machine(old["provenance"], new["provenance"]))
    before, after = _rows(old, kind), _rows(new, kind)
    pairs = {key: key for key in before if key in after}
    for key, other in _rebound(before.keys() - pairs.keys(), after.keys() - pairs.keys()):
        pairs[key] = other
        out.rebound.append(f"{' '.join(key[:-1])}: {key[-1]} -> {other[-1]}")
    out.lost = [_name(key) for key in before if key not in pairs]
    out.new_rows = [_name(key) for key in after if key not in pairs.values()]
    out.wrong = [f"{_name(key)}: {row['error']}" for key, row in after.items() if "error" in row]
    for key, other in pairs.items():
        a, b = before[key], after[other]
        if "error" in a or "error" in b:
            continue
        out.changes += _changes(_name(other), _samples(a, old), _samples(b, new), out.absolute)
        out.baselines += _lost_baselines(_name(other), a, b)
    if pairs and not out.changes and not out.wrong:
        raise ValueOptionError("no baseline is in both files and they are not from one machine: nothing to compare")
    return out


def same_machine(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether absolute seconds of two provenances may be held against each other."""
    keys = ("device", "gpu", "torch") if a["device"] == "cuda" else ("device", "cpu", "torch", "threads")
    return all(a.get(key) == b.get(key) for key in keys)


def _check_comparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if old["kind"] != new["kind"]:
        raise ValueOptionError(f"the files are of different kinds: {old['kind']} and {new['kind']}")
    if old["kind"] not in ("ops", "e2e"):
        raise ValueOptionError(f"only results of kind ops or e2e hold speeds; got {old['kind']}")
    devices = old["provenance"]["device"], new["provenance"]["device"]
    if devices[0] != devices[1]:
        raise ValueOptionError(f"the files are from different kinds of device: {devices[0]} and {devices[1]}")
    if old["kind"] == "e2e":
        differ = [
            f"{key} {old['settings'].get(key)!r} and {new['settings'].get(key)!r}"
            for key in _SAME_CLIP
            if old["settings"].get(key) != new["settings"].get(key)
        ]
        if differ:
            raise ValueOptionError(f"the clips differ: {', '.join(differ)}")


def _rows(result: Mapping[str, Any], kind: str) -> dict[Key, dict[str, Any]]:
    fields = ("op", "shape", "dtype", "impl") if kind == "ops" else ("variant",)
    return {tuple(str(row[name]) for name in fields): row for row in result["rows"]}


def _name(key: Key) -> str:
    return " ".join(key)


def _rebound(lost: set[Key], new: set[Key]) -> Iterator[tuple[Key, Key]]:
    """Rows that differ in the implementation alone, where that leaves no choice: dispatch binds another one now."""
    for key in sorted(lost):
        if len(key) == 1:
            continue
        here = [k for k in lost if k[:-1] == key[:-1]]
        there = [k for k in new if k[:-1] == key[:-1]]
        if len(here) == len(there) == 1:
            yield key, there[0]


def _sample(where: str, row: Mapping[str, Any], key: str = "seconds") -> Sample:
    median, spread = row.get(key), row.get("spread", 0.0)
    if not isinstance(median, (int, float)) or not math.isfinite(median) or median <= 0:
        raise ValueOptionError(f"{where}: `{key}` must be a positive number of seconds; got {median!r}")
    if not isinstance(spread, (int, float)) or not math.isfinite(spread) or spread < 0:
        raise ValueOptionError(f"{where}: `spread` must be a number of seconds; got {spread!r}")
    return Sample(float(median), float(spread))


def _samples(row: Mapping[str, Any], result: Mapping[str, Any]) -> Phases:
    """Phase ("" for an op) -> our sample, and the sample of each baseline that ran."""
    if result["kind"] == "ops":
        where = f"{row['op']} {row['shape']}"
        baselines = {
            name: _sample(f"{where}, baseline {name}", value)
            for name, value in row.get("baselines", {}).items()
            if "seconds" in value
        }
        return {"": (_sample(where, row), baselines)}
    eager = next((r for r in result["rows"] if r["variant"] == "eager" and r is not row and "error" not in r), None)
    out: Phases = {}
    for phase in PHASES:
        if row["seconds"].get(phase):
            base = eager and eager["seconds"].get(phase)
            bases = {"eager": _sample(f"eager, {phase}", base, "median")} if base else {}
            out[phase] = (_sample(f"{row['variant']}, {phase}", row["seconds"][phase], "median"), bases)
    return out


def _changes(name: str, old: Phases, new: Phases, absolute: bool) -> Iterator[Change]:
    for phase in (key for key in old if key in new):
        (a, a_bases), (b, b_bases) = old[phase], new[phase]
        prefix = f"{phase} " if phase else ""
        for base in (key for key in a_bases if key in b_bases):
            before, after = a_bases[base].median / a.median, b_bases[base].median / b.median
            noise = _tolerance(a, b, a_bases[base], b_bases[base])
            yield Change(name, f"{prefix}vs {base}", before, after, after / before, noise)
        if absolute:
            yield Change(name, f"{prefix}seconds", a.median, b.median, a.median / b.median, _tolerance(a, b))


def _tolerance(*samples: Sample) -> float:
    return max(FLOOR, WIDTH * math.hypot(*(sample.noise for sample in samples)))


def _lost_baselines(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for base, value in old.get("baselines", {}).items():
        now = new.get("baselines", {}).get(base, {"skipped": "not asked for"})
        if "seconds" in value and "seconds" not in now:
            yield f"{name}: {base}: {now.get('error') or 'skipped, ' + now.get('skipped', 'no reason given')}"


# Said aloud ------------------------------------------------------------------------------------------------------


def tables(comparison: Comparison) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Title and rows (row, what was compared, old, new, change, tolerance) of the slower and the faster ones."""

    def value(change: Change, number: float) -> str:
        return f"{number * 1e3:.3f} ms" if change.measure.endswith("seconds") else f"{number:.2f}x"

    out: list[tuple[str, list[tuple[str, ...]]]] = []
    for verdict, title in (("slower", "Regressions"), ("faster", "Improvements")):
        found = sorted(comparison.of(verdict), key=lambda c: abs(math.log(c.gain)), reverse=True)
        rows: list[tuple[str, ...]] = [
            (c.row, c.measure, value(c, c.old), value(c, c.new), f"{c.gain - 1:+.1%}", f"±{c.tolerance:.1%}")
            for c in found
        ]
        if rows:
            out.append((title, rows))
    return out


_COLUMNS = ("row", "compared", "old", "new", "speed", "noise")


def show(comparison: Comparison) -> None:
    """Print a comparison: with rich where it is installed, else in plain columns."""
    for title, rows in tables(comparison):
        _print_table(title, rows)
    for title, lines in (
        ("Wrong now", comparison.wrong),
        ("Lost", comparison.lost),
        ("Bound to another implementation", comparison.rebound),
        ("Baselines that no longer run", comparison.baselines),
        ("New", comparison.new_rows),
    ):
        if lines:
            print(f"{title}:", *(f"  {line}" for line in lines), sep="\n")
    noisy = sorted({change.row for change in comparison.changes if change.tolerance > NOISY})
    if noisy:
        print(f"Too noisy to judge within {NOISY:.0%}:", *(f"  {row}" for row in noisy), sep="\n")
    if not comparison.absolute:
        print("Different machines, torch or threads: ratios were compared, seconds were not.")
    counts = {verdict: len({c.row for c in comparison.of(verdict)}) for verdict in ("slower", "faster")}
    print(
        f"{len({c.row for c in comparison.changes})} rows compared: {counts['slower']} slower, {counts['faster']} "
        f"faster; {len(comparison.lost)} lost, {len(comparison.wrong)} wrong, {len(comparison.new_rows)} new"
    )


def _print_table(title: str, rows: list[tuple[str, ...]]) -> None:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [_COLUMNS, *rows]) for i in range(len(_COLUMNS))]
        print(f"{title}:")
        for row in [_COLUMNS, *rows]:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def command(old: Path, new: Path) -> None:
    """``pyvideo bench compare``: print what differs; exit 1 where the new run is worse."""
    import typer

    comparison = compare(results.read(old), results.read(new))
    show(comparison)
    if comparison.failed:
        raise typer.Exit(Exit.FAILED)
