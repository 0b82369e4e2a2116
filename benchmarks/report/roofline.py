"""The roofline plot: what each op achieves, under what this machine was measured to achieve at best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .drawing import BLUE, GREY, HALO, MANY, RED, SERIES, Result, check_kind, label_points, panels, styled, title
from .tables import rate, short_dtype

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Mapping[str, Sequence[Mapping[str, Any]]]


def roofline(result: Result) -> Figure | None:
    """Achieved rates under this machine's own ceilings: FLOPs over intensity, and bytes for ops that only move them."""
    check_kind(result, "ops")
    rows = [row for row in result["rows"] if "error" not in row]
    moving = [row for row in rows if row["unit"] == "B/s"]
    counting = [row for row in rows if row["unit"] == "FLOP/s" and row.get("bytes") and row.get("flops")]
    lines = _lines(moving, many=len(rows) > MANY)
    heights = [3.2] * bool(counting) + [0.75 + 0.23 * len(lines)] * bool(lines)
    if not heights:
        return None
    with styled():
        figure, parts = panels(0.7 + sum(heights), rows=len(heights), height_ratios=heights)
        title(figure, "Achieved rate under the machine's measured ceilings", result)
        if lines:
            _memory_panel(parts[-1], lines, result["ceilings"]["copy"])
        if counting:
            _compute_panel(parts[0], _lines(counting, many=len(rows) > MANY), result["ceilings"])
        return figure


def _lines(rows: Sequence[Mapping[str, Any]], many: bool) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by what gets a label of its own, slowest first."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row["op"] if many else f"{row['op']}  {row['shape']}", []).append(row)
    return {label: sorted(members, key=lambda row: row["rate"]) for label, members in lines.items()}


def _range(rows: Sequence[Mapping[str, Any]], key: str, form: Callable[[float], str]) -> str:
    """The lowest and the highest, or the only one; a unit that both have once."""
    low, high = form(min(row[key] for row in rows)), form(max(row[key] for row in rows))
    if low == high:
        return low
    value, _, unit = low.partition(" ")
    return f"{value if unit and high.endswith(f' {unit}') else low} to {high}"


def _memory_panel(axes: Axes, lines: Lines, ceiling: float) -> None:
    """Ops without FLOPs to speak of: the only axis is bandwidth."""
    scale, unit = (1e12, "TB/s") if ceiling >= 1e12 else (1e9, "GB/s")
    for y, members in enumerate(lines.values()):
        achieved = [row["rate"] / scale for row in members]
        axes.plot([0, achieved[-1]], [y, y], color=GREY, linewidth=1.2, zorder=2)
        axes.plot(achieved, [y] * len(achieved), "o", color=BLUE, markersize=5, zorder=4)
        text = _range(members, "rate", lambda value: rate(value, "B/s"))
        axes.annotate(
            f"{text}, {_range(members, 'share_of_ceiling', '{:.0%}'.format)}", (achieved[-1], y), (7, 0),
            textcoords="offset points", va="center", fontsize=7.5, bbox=HALO, zorder=5,
        )  # fmt: skip
    axes.axvline(ceiling / scale, color=RED, linewidth=1.2)
    axes.annotate(
        f"copy {rate(ceiling, 'B/s')}", (ceiling / scale, -0.9), (-4, 0), textcoords="offset points", ha="right",
        va="center", color=RED, fontsize=8,
    )  # fmt: skip
    grouped = any(len(members) > 1 for members in lines.values())
    highest = max(members[-1]["rate"] for members in lines.values())
    axes.set_xlim(0, max(ceiling, highest * (1.25 if grouped else 1.1)) / scale * 1.12)
    axes.set_ylim(len(lines) - 0.4, -1.5)
    axes.set_yticks(range(len(lines)), list(lines), fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{unit}, inputs and outputs counted once")
    axes.grid(False, axis="y")


def _products(lines: Lines, ceilings: Mapping[str, Any]) -> dict[str, float]:
    """The matrix products that rows are held to, by name: the run's own, and others (TF32 for convolutions)."""
    shares = [row["rate"] / row["share_of_ceiling"] for rows in lines.values() for row in rows]
    others = {
        short_dtype(name): value
        for name, value in ceilings.get("gemms", {}).items()
        if value != ceilings["gemm"] and any(math.isclose(value, each, rel_tol=1e-6) for each in shares)
    }
    return {"": ceilings["gemm"], **others}


def _compute_panel(axes: Axes, lines: Lines, ceilings: Mapping[str, Any]) -> None:
    copy, products = ceilings["copy"], _products(lines, ceilings)
    points = [(row["flops"] / row["bytes"], row["rate"]) for members in lines.values() for row in members]
    gemm = max(products.values())
    ridges = [value / copy for value in products.values()]
    low, high = min(*ridges, *(x for x, _ in points)) / 3, max(*ridges, *(x for x, _ in points)) * 4
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(min(low * copy, *(y for _, y in points)) / 1.6, max(gemm, *(y for _, y in points)) * 2.4)
    style: dict[str, Any] = {"textcoords": "offset points", "color": RED, "fontsize": 8, "bbox": HALO, "zorder": 3}
    roof = [axes.annotate(f"copy {rate(copy, 'B/s')}", (low, low * copy), (10, 1), va="center", **style)]
    for name, value in products.items():
        axes.plot(
            [low, value / copy, high], [low * copy, value, value], "--" if name else "-", color=RED, linewidth=1.4,
            zorder=2,
        )  # fmt: skip
        text = f"matrix product{name and f', {name}'} {rate(value, 'FLOP/s')}"
        # At opposite ends: the lines may be close.
        at, off, side = ((value / copy, value), (6, 5), "left") if name else ((high, value), (-2, 5), "right")
        roof.append(axes.annotate(text, at, off, ha=side, **style))
    ops = list(dict.fromkeys(members[0]["op"] for members in lines.values()))
    many = any(len(members) > 1 for members in lines.values())
    labels = []
    for label, members in lines.items():
        colour = SERIES[ops.index(members[0]["op"]) % len(SERIES)]
        own = [(row["flops"] / row["bytes"], row["rate"]) for row in members]
        text = f"{label}: {_range(members, 'rate', lambda value: rate(value, 'FLOP/s'))}"
        axes.plot(*zip(*own), "o", color=colour, markersize=6, zorder=4, label=text if many else None)
        labels.append((*own[-1], text))
    axes.set_xlabel("FLOP per byte of input and output")
    _rate_ticks(axes)
    if many:
        axes.legend(loc="lower right", frameon=True, framealpha=0.85, edgecolor="none", borderaxespad=0.2)
    else:
        label_points(axes, labels, points, clear_of=roof)


def _rate_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def achieved(value: float, _: Any) -> str:
        scale, prefix = (1e12, "T") if value >= 1e12 else (1e9, "G")
        return f"{value / scale:,g} {prefix}FLOP/s"

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 300 * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(achieved))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
