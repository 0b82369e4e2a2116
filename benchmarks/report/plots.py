"""Plots of result files, as SVG: how much faster, where the time goes, how near the machine's limits, at what quality.

The same result gives the same bytes, and a plot carries the digest of the result that it was drawn from
(`plot_digest`), so that a stale plot is found without drawing it again. Text stays text in the SVG.

A function of a plot returns None where the result has nothing for it to show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..op_classes import CLASSES, GAPS, PHASES
from .drawing import (
    CLASS_COLOURS,
    DARK,
    INK,
    MANY,
    RED,
    SERIES,
    Result,
    check_kind,
    digest,
    label_points,
    legend,
    panels,
    plot_digest,
    save,
    styled,
    title,
)
from .roofline import roofline
from .tables import BASELINES, baselines, identical, number, ratio, short_dtype, versioned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["digest", "plot_digest", "roofline", "speed_psnr", "speedup_bars", "stacked_breakdown", "write_all"]


def write_all(result: Result, folder: Path, stem: str) -> list[Path]:
    """Draw every plot that a result has data for, as ``<folder>/<stem>-<plot>.svg``, each whole or not at all.

    Args:
        result: of kind ``ops`` or ``e2e``.
        folder: made if it is not there.
        stem: start of the files' names.
    Returns:
        The files written.
    Raises:
        ValueOptionError: a kind that has no plots. UnsupportedError: matplotlib is not installed.
    """
    kinds: dict[str, dict[str, Callable[[Result], Figure | None]]] = {
        "ops": {"speedup": speedup_bars, "roofline": roofline},
        "e2e": {"speedup": speedup_bars, "breakdown": stacked_breakdown, "speed-psnr": speed_psnr},
    }
    check_kind(result, *kinds)
    written = []
    with styled():
        for name, draw in kinds[result["kind"]].items():
            figure = draw(result)
            if figure is not None:
                written.append(save(figure, folder / f"{stem}-{name}.svg", result))
    return written


# Speedup -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bar:
    """One bar: a ratio (of several ``parts`` their geometric mean), or why there is none.

    ``series`` is its place in the legend; ``note`` what else there is to say.
    """

    series: int
    value: float | None
    note: str = ""
    parts: tuple[float, ...] = ()


_Groups = list[tuple[str, list[_Bar]]]


def speedup_bars(result: Result) -> Figure | None:
    """Ops: ratio to each baseline, an op a group. End to end: ratio to eager, a variant a group."""
    check_kind(result, "ops", "e2e")
    with styled():
        return _op_speedups(result) if result["kind"] == "ops" else _variant_speedups(result)


def _op_speedups(result: Result) -> Figure | None:
    rows = result["rows"]
    named = [name for name in baselines(rows) if any("ratio" in row.get("baselines", {}).get(name, {}) for row in rows)]
    several = len({row["dtype"] for row in rows}) > 1
    groups: _Groups = []
    for (op, *rest), members in _grouped(rows).items():
        detail = rest or ([f"({len(members)} shapes)"] if len(members) > 1 else [members[0]["shape"]])
        dtype = f"  {short_dtype(members[0]['dtype'])}" if several and rest else ""
        bars = [bar for i, name in enumerate(named) if (bar := _against(i, name, members))]
        wrong = sum("error" in row for row in members)
        if wrong:
            bars.append(_Bar(0, None, "wrong" if wrong == len(members) else f"{wrong} of {len(members)} wrong"))
        if bars:
            groups.append((f"{op}  {detail[0]}{dtype}", bars))
    if not named:
        return None
    shown = named
    if len(named) > 4:  # the legend has the rest
        first = [name for name in named if name in BASELINES]
        shown = [*first, f"{len(named) - len(first)} other kernels"]
    heading = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
    series = [versioned(name, rows) for name in named]
    against = "the baseline" + (": geometric mean over shapes, a dot a shape" if len(rows) > MANY else "")
    return _bars(result, f"Speed against {heading}", against, groups, series)


def _grouped(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    """Rows by what gets a line of its own: each row, or with many of them each op."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = (row["op"],) if len(rows) > MANY else (row["op"], row["shape"], row["dtype"])
        groups.setdefault(key, []).append(row)
    return groups


def _against(series: int, name: str, rows: Sequence[Mapping[str, Any]]) -> _Bar | None:
    """The bar of one baseline over ``rows``; None where it did not run."""
    found = [row.get("baselines", {}).get(name, {}) for row in rows]
    parts = tuple(each["ratio"] for each in found if each.get("ratio"))
    failed = sum("error" in each for each in found)
    if not parts:
        return _Bar(series, None, "error") if failed else None
    mean = math.exp(math.fsum(map(math.log, parts)) / len(parts))
    note = f"{failed} of {len(rows)} failed" if failed else ""
    return _Bar(series, mean, note, parts if len(parts) > 1 else ())


def _variant_speedups(result: Result) -> Figure | None:
    series = ("step", "decode", "total")
    settings = result["settings"]
    # A clip that is one step is that step.
    alone = settings.get("steps") == 1 and settings.get("decode") is False
    groups: _Groups = []
    for row in result["rows"]:
        if row["variant"] == "eager":
            continue
        if "error" in row:
            groups.append((row["variant"], [_Bar(0, None, "error")]))
            continue
        ratios = row.get("ratio") or {}
        bars = [_Bar(i, ratios[name]) for i, name in enumerate(series) if ratios.get(name) and not (alone and i)]
        if bars:
            groups.append((row["variant"], bars))
    return _bars(result, "Speed against eager", "eager", groups, ["denoising step", "decode", "whole clip"])


def _bars(result: Result, heading: str, against: str, groups: _Groups, series: Sequence[str]) -> Figure | None:
    values = [value for _, bars in groups for bar in bars for value in (bar.value, *bar.parts) if value]
    if not values:
        return None
    # A ratio and its inverse are equally far from 1 on a log axis; few small ratios read more easily from zero.
    low, high = min(*values, 1.0), max(*values, 1.0)
    log = high / low > 4
    base = 1.0 if log else 0.0
    gap = 0.7
    tops, at = [], 0.0
    for _, bars in groups:
        tops.append(at)
        at += len(bars) + gap
    figure, (axes,) = panels(1.35 + 0.2 * at)
    title(figure, heading, result)
    for (_, bars), top in zip(groups, tops):
        for i, bar in enumerate(bars):
            if bar.value:
                colour = SERIES[bar.series % len(SERIES)]
                axes.barh(top + i, bar.value - base, left=base, height=0.86, color=colour)
            if bar.parts:
                axes.plot(bar.parts, [top + i] * len(bar.parts), "o", color=INK, markersize=2.2, zorder=4)
            left = log and bar.value is not None and bar.value < 1
            ends = [bar.value or base, *bar.parts]
            axes.annotate(
                ", ".join(filter(None, (ratio(bar.value) if bar.value else "", bar.note))),
                (min(ends) if left else max(ends), top + i), (-4 if left else 4, 0), textcoords="offset points",
                va="center", ha="right" if left else "left", fontsize=7.5, color=RED if bar.note else INK,
            )  # fmt: skip
    axes.axvline(1.0, color=INK, linewidth=1.0, zorder=3)
    if log:
        _log_ratio_axis(axes, low, high)
    else:
        axes.set_xlim(0, high * 1.12)
    axes.set_yticks([top + (len(bars) - 1) / 2 for (_, bars), top in zip(groups, tops)], [name for name, _ in groups])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_ylim(at - gap, -1)
    axes.set_xlabel(f"times as fast as {against}" + (" (log)" if log else ""))
    drawn = [i for i in range(len(series)) if any(bar.series == i and bar.value for _, bars in groups for bar in bars)]
    legend(figure, [series[i] for i in drawn], [SERIES[i % len(SERIES)] for i in drawn])
    return figure


def _log_ratio_axis(axes: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    # Room for the number past the end of a bar, on either side.
    room = (high / low) ** 0.09
    axes.set_xlim(low / room if low < 1 else 0.97, high * room)
    axes.xaxis.set_minor_locator(NullLocator())
    shown = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low / room <= t <= high * room]
    axes.set_xticks(shown, [f"{t:g}" for t in shown])


# Breakdown ---------------------------------------------------------------------------------------------------------


def stacked_breakdown(result: Result) -> Figure | None:
    """Seconds by class of op, a bar a variant: one denoising step, and the decoder."""
    check_kind(result, "e2e")
    rows = [row for row in result["rows"] if row.get("breakdown")]
    phases = [phase for phase in PHASES if any(row["breakdown"].get(phase) for row in rows)]
    if not phases:
        return None
    with styled():
        figure, parts = panels(1.75 + 0.42 * len(rows), columns=len(phases), sharey=True)
        title(figure, "Where the time goes", result)
        used = {name for axes, phase in zip(parts, phases) for name in _stack(axes, phase, rows, 6.6 / len(phases))}
        parts[0].set_yticks(range(len(rows)), [row["variant"] for row in rows])
        parts[0].set_ylim(len(rows) - 0.4, -0.6)
        names = [name for name in CLASSES if name in used]
        legend(figure, names, [CLASS_COLOURS[name] for name in names], hatched=(GAPS,))
        return figure


def _stack(axes: Axes, phase: str, rows: Sequence[Mapping[str, Any]], width: float) -> set[str]:
    """One panel of about ``width`` inches; returns the classes that it shows."""
    found = [row["breakdown"].get(phase) for row in rows]
    longest = max(each["wall"] for each in found if each)
    # Milliseconds where seconds would all be zeros with a point.
    scale, unit = (1.0, "s") if longest >= 1 else (1e3, "ms")
    used = set()
    for y, each in enumerate(found):
        if not each:
            continue
        left = 0.0
        for name in dict.fromkeys((*PHASES[phase], *CLASSES)):
            value = each["classes"].get(name, 0.0) * scale
            if value <= 0:
                continue
            used.add(name)
            colour = CLASS_COLOURS[name]
            axes.barh(
                y, value, left=left, height=0.66, color=colour, edgecolor="white", linewidth=0.5,
                hatch="////" if name == GAPS else None,
            )  # fmt: skip
            text = number(value)
            # A digit of this size is about 0.065 inches wide.
            if width * value / (1.2 * longest * scale) > 0.065 * len(text) + 0.05 and name != GAPS:
                ink = "white" if colour in DARK else INK
                axes.text(left + value / 2, y, text, ha="center", va="center", fontsize=7.5, color=ink)
            left += value
        wall = each["wall"] * scale
        axes.annotate(
            f"{number(wall)} {unit}", (wall, y), (4, 0), textcoords="offset points", va="center", fontsize=8,
            fontweight="bold",
        )  # fmt: skip
    axes.set_xlim(0, longest * scale * 1.2)
    axes.set_title("one denoising step" if phase == "denoise" else "decode", loc="left", fontsize=9)
    axes.set_xlabel("seconds" if unit == "s" else "milliseconds")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    return used


# Speed and quality --------------------------------------------------------------------------------------------------


def speed_psnr(result: Result) -> Figure | None:
    """Speed of the whole clip against the worst frame's PSNR to eager; what equals eager is at the top edge."""
    check_kind(result, "e2e")
    rows = [row for row in result["rows"] if row.get("quality") and (row.get("ratio") or {}).get("total")]
    finite = {row["variant"]: value for row in rows if (value := _psnr(row)) is not None}
    rows = [row for row in rows if row["variant"] in finite or identical(row["quality"])]
    if all(row["variant"] == "eager" for row in rows):
        return None
    low, high = (min(finite.values()), max(finite.values())) if finite else (40.0, 60.0)
    span = max(high - low, 6.0)
    bottom, top = low - 0.2 * span, high + 0.3 * span
    with styled():
        figure, (axes,) = panels(4.0)
        title(figure, "Speed and fidelity to eager", result)
        labels = []
        for i, row in enumerate(rows):
            x, found = row["ratio"]["total"], finite.get(row["variant"])
            y, marker, said = (top, "^", "identical") if found is None else (found, "o", f"{found:.1f} dB")
            axes.plot(x, y, marker, color=SERIES[i % len(SERIES)], markersize=8, zorder=4, clip_on=False)
            labels.append((x, y, f"{row['variant']}: {ratio(x)}×, {said}"))
        axes.axvline(1.0, color=INK, linewidth=1.0, zorder=1)
        left, right = min(1.0, *(x for x, _, _ in labels)), max(1.0, *(x for x, _, _ in labels))
        room = 0.15 * max(right - left, 0.2)
        axes.set_xlim(left - room, right + room)
        axes.set_ylim(bottom, top)
        ticks = [tick for tick in axes.get_yticks() if bottom <= tick <= high + 0.12 * span] if finite else []
        axes.set_yticks([*ticks, top], [*(f"{tick:g}" for tick in ticks), "identical"])
        axes.set_xlabel("whole clip, times as fast as eager")
        axes.set_ylabel("PSNR to eager, worst frame (dB)")
        label_points(axes, labels, [(x, y) for x, y, _ in labels])
        return figure


def _psnr(row: Mapping[str, Any]) -> float | None:
    found = (row["quality"].get("psnr") or {}).get("min")
    return None if found is None or found == float("inf") else float(found)
