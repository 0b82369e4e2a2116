"""Plots of result files, as SVG: how much faster, where the time goes, how near to the machine's limits, at what quality.

The same result gives the same bytes, and a plot carries the digest of the result that it was drawn from
(`plot_digest`), so that a stale plot is found without drawing it again. Text stays text in the SVG.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvideo_kernels.errors import UnsupportedError, ValueOptionError

from .op_classes import CLASSES, GAPS, PHASES
from .tables import baselines, clip, identical, machine, number, rate, ratio, short_dtype, versioned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Raised by hand when the drawing itself changes, so that plots drawn the old way count as stale.
DRAWING = 1

# Okabe and Ito's palette: told apart with every kind of colour vision, and by lightness in print.
BLUE, ORANGE, GREEN, PINK, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
SKY, YELLOW, GREY, INK = "#56B4E9", "#F0E442", "#BBBBBB", "#222222"
CLASS_COLOURS = dict(zip(CLASSES, (BLUE, SKY, ORANGE, GREEN, RED, YELLOW, PINK, GREY), strict=True))
_DARK = ("self-attention", "norm/modulation/rope", "vae conv")  # white numbers on these
SERIES = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, "#666666", "#882255", "#44AA99")
WIDTH = 8.6  # inches; a README shows it at about its own size

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pyvideo-kernels",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
    "hatch.color": "#888888",
}


def digest(result: Mapping[str, Any]) -> str:
    """``sha256:...`` of a result and of the way it is drawn."""
    data = json.dumps(result, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(f"{DRAWING}\n{data}".encode()).hexdigest()


def plot_digest(path: Path) -> str | None:
    """The digest that a plot carries; None if it carries none."""
    found = re.search(r"<dc:identifier>\s*(sha256:[0-9a-f]{64})\s*</dc:identifier>", path.read_text())
    return found.group(1) if found else None


def write_all(result: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
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
    written = []
    for name, draw in _plots(result).items():
        with _styled():
            figure = draw(result)
            if figure is not None:
                written.append(_save(figure, folder / f"{stem}-{name}.svg", result))
    return written


def _plots(result: Mapping[str, Any]) -> dict[str, Callable[[Mapping[str, Any]], Figure | None]]:
    kinds: dict[str, dict[str, Callable[[Mapping[str, Any]], Figure | None]]] = {
        "ops": {"speedup": speedup_bars, "roofline": roofline},
        "e2e": {"speedup": speedup_bars, "breakdown": stacked_breakdown, "speed-psnr": speed_psnr},
    }
    kind = result.get("kind")
    if kind not in kinds:
        raise ValueOptionError(f"plots: `kind` must be ops or e2e; got {kind!r}")
    return kinds[kind]


@contextmanager
def _styled() -> Iterator[None]:
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError("plots need matplotlib: pip install 'pyvideo-kernels[bench]'") from None
    with matplotlib.rc_context(_STYLE):
        yield


def _figure(height: float, columns: int = 1, widths: Sequence[float] | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """A figure that belongs to no window: pyplot is not involved, nor is any display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("plots need matplotlib: pip install 'pyvideo-kernels[bench]'") from None
    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        1, columns, squeeze=False, gridspec_kw={"width_ratios": widths} if widths else None, **kwargs
    )
    return figure, list(axes[0])


def _save(figure: Figure, path: Path, result: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    metadata = {"Date": None, "Creator": "pyvideo-kernels", "Identifier": digest(result)}
    try:
        figure.savefig(temporary, format="svg", metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _title(figure: Figure, title: str, result: Mapping[str, Any]) -> None:
    where = result["provenance"]
    torch = f"torch {where['torch']}"
    settings = result.get("settings", {})
    what = clip(settings) if result["kind"] == "e2e" else _dtypes(result["rows"])
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.text(
        0.01, 1.0, f"\n\n{machine(result)} · {what} · {torch}", ha="left", va="top", fontsize=8, color="#555555"
    )


def _dtypes(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(short_dtype(row["dtype"]) for row in rows))


# Speedup -------------------------------------------------------------------------------------------------------------


def speedup_bars(result: Mapping[str, Any]) -> Figure | None:
    """Ops: ratio to each baseline, an op a group. End to end: ratio to eager, a variant a group."""
    with _styled():
        _plots(result)  # refuses other kinds
        return _op_speedups(result) if result["kind"] == "ops" else _variant_speedups(result)


def _op_speedups(result: Mapping[str, Any]) -> Figure | None:
    rows = result["rows"]
    names = [name for name in baselines(rows) if any("ratio" in row.get("baselines", {}).get(name, {}) for row in rows)]
    groups = []
    for row in rows:
        label = f"{row['op']}  {row['shape']}" + (f"  {short_dtype(row['dtype'])}" if _mixed(rows) else "")
        if "error" in row:
            groups.append((label, [(None, "wrong")]))
            continue
        bars: list[tuple[float | None, str]] = []
        for name in names:
            found = row.get("baselines", {}).get(name, {})
            bars.append((found.get("ratio"), "error" if "error" in found else ""))
        groups.append((label, bars))
    title = f"Speed against {_and(names)}" if names else "Speed"
    return _bars(result, title, groups, [versioned(name, rows) for name in names])


def _variant_speedups(result: Mapping[str, Any]) -> Figure | None:
    series = ("step", "decode", "total")
    groups: list[tuple[str, list[tuple[float | None, str]]]] = []
    for row in result["rows"]:
        if row["variant"] == "eager":
            continue
        if "error" in row:
            groups.append((row["variant"], [(None, "error")]))
            continue
        ratios = row.get("ratio") or {}
        groups.append((row["variant"], [(ratios.get(name), "") for name in series]))
    legend = ["denoising step", "decode", "whole clip"]
    return _bars(result, "Speed against eager", groups, legend)


def _mixed(rows: Sequence[Mapping[str, Any]]) -> bool:
    return len({row["dtype"] for row in rows}) > 1


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _bars(
    result: Mapping[str, Any], title: str, groups: list[tuple[str, list[tuple[float | None, str]]]], legend: list[str]
) -> Figure | None:
    values = [value for _, bars in groups for value, _ in bars if value]
    if not values:
        return None
    # A ratio and its inverse are equally far from 1 on a log axis; few small ratios read more easily from zero.
    low, high = min(*values, 1.0), max(*values, 1.0)
    log = high / low > 4
    pitch, gap = 1.0, 0.7
    tops, at = [], 0.0
    for _, bars in groups:
        tops.append(at)
        at += len(bars) * pitch + gap
    figure, (axes,) = _figure(1.35 + 0.2 * at)
    _title(figure, title, result)
    base = 1.0 if log else 0.0
    for (_, bars), top in zip(groups, tops):
        for i, (value, note) in enumerate(bars):
            y = top + i * pitch
            if value:
                axes.barh(y, value - base, left=base, height=0.86 * pitch, color=SERIES[i % len(SERIES)], label=None)
            left = bool(log and value and value < 1)
            text = ratio(value) if value else note
            axes.annotate(
                text, (value or base, y), (-3 if left else 3, 0), textcoords="offset points", va="center",
                ha="right" if left else "left", fontsize=7.5, color=INK if value else RED,
            )  # fmt: skip
    axes.axvline(1.0, color=INK, linewidth=1.0, zorder=3)
    if log:
        _log_ratio_axis(axes, low, high)
    else:
        axes.set_xlim(0, high * 1.12)
    axes.set_yticks([top + (len(bars) - 1) / 2 for (_, bars), top in zip(groups, tops)], [name for name, _ in groups])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_ylim(at - gap, -pitch)
    axes.set_xlabel("times as fast as the baseline" + (" (log)" if log else ""))
    _legend(figure, legend, [SERIES[i % len(SERIES)] for i in range(len(legend))])
    return figure


def _log_ratio_axis(axes: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    # Room for the number past the end of a bar.
    room = (high / low) ** 0.09
    axes.set_xlim(low / room if low < 1 else 0.97, high * room)
    ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low / room <= t <= high * room]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])


def _legend(figure: Figure, names: Sequence[str], colours: Sequence[str], hatched: Sequence[str] = ()) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=colour, label=name, hatch="////" if name in hatched else None)
        for name, colour in zip(names, colours)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 6), handlelength=1.2)


# Breakdown ---------------------------------------------------------------------------------------------------------


def stacked_breakdown(result: Mapping[str, Any]) -> Figure | None:
    """Seconds by class of op, a bar a variant: one denoising step, and the decoder."""
    with _styled():
        _kind(result, "e2e")
        rows = [row for row in result["rows"] if row.get("breakdown")]
        phases = [phase for phase in PHASES if any(phase in row["breakdown"] for row in rows)]
        if not phases:
            return None
        figure, panels = _figure(1.75 + 0.42 * len(rows), len(phases), sharey=True)
        _title(figure, "Where the time goes", result)
        used: dict[str, None] = {}
        for axes, phase in zip(panels, phases):
            used |= dict.fromkeys(_stack(axes, phase, rows))
        panels[0].set_yticks(range(len(rows)), [row["variant"] for row in rows])
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
        names = [name for name in CLASSES if name in used]
        _legend(figure, names, [CLASS_COLOURS[name] for name in names], hatched=(GAPS,))
        return figure


def _stack(axes: Axes, phase: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One panel; returns the classes that it shows."""
    found = [row["breakdown"].get(phase) for row in rows]
    longest = max(each["wall"] for each in found if each)
    # Milliseconds where seconds would all be zeros with a point.
    scale, unit = (1.0, "s") if longest >= 1 else (1e3, "ms")
    used = []
    for y, each in enumerate(found):
        if not each:
            continue
        left = 0.0
        for name in CLASSES:
            seconds = each["classes"].get(name, 0.0)
            if seconds <= 0:
                continue
            used.append(name)
            axes.barh(
                y, seconds * scale, left=left * scale, height=0.66, color=CLASS_COLOURS[name], edgecolor="white",
                linewidth=0.5, hatch="////" if name == GAPS else None,
            )  # fmt: skip
            if seconds > 0.085 * longest:
                axes.text(
                    (left + seconds / 2) * scale, y, number(seconds * scale), ha="center", va="center", fontsize=7.5,
                    color="white" if name in _DARK else INK,
                )  # fmt: skip
            left += seconds
        axes.annotate(
            f"{number(each['wall'] * scale)} {unit}", (each["wall"] * scale, y), (4, 0), textcoords="offset points",
            va="center", fontsize=8, fontweight="bold",
        )  # fmt: skip
    axes.set_xlim(0, longest * scale * 1.2)
    axes.set_title("one denoising step" if phase == "denoise" else "decode", loc="left", fontsize=9)
    axes.set_xlabel("seconds" if unit == "s" else "milliseconds")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    return used


def _kind(result: Mapping[str, Any], expected: str) -> None:
    if result.get("kind") != expected:
        raise ValueOptionError(f"plots: `kind` must be {expected}; got {result.get('kind')!r}")


# Roofline ------------------------------------------------------------------------------------------------------------


def roofline(result: Mapping[str, Any]) -> Figure | None:
    """Achieved rates under this machine's own ceilings: bytes for ops that only move them, FLOPs over intensity."""
    with _styled():
        _kind(result, "ops")
        rows = [row for row in result["rows"] if "error" not in row]
        moving = [row for row in rows if row["unit"] == "B/s"]
        counting = [row for row in rows if row["unit"] == "FLOP/s" and row.get("bytes") and row.get("flops")]
        if not moving and not counting:
            return None
        height = max(3.6, 1.5 + 0.24 * len(moving)) if moving else 3.6
        both = bool(moving and counting)
        figure, panels = _figure(height, 1 + both, (1.0, 1.25) if both else None)
        _title(figure, "Achieved rate and the machine's measured ceilings", result)
        if moving:
            _memory_panel(panels[0], moving, result["ceilings"]["copy"])
        if counting:
            _compute_panel(panels[-1], counting, result["ceilings"])
        return figure


def _memory_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], ceiling: float) -> None:
    """Ops without FLOPs to speak of: the only axis is bandwidth."""
    scale, unit = (1e12, "TB/s") if ceiling >= 1e12 else (1e9, "GB/s")
    for y, row in enumerate(rows):
        axes.plot([0, row["rate"] / scale], [y, y], color=GREY, linewidth=1.2, zorder=2)
        axes.plot(row["rate"] / scale, y, "o", color=BLUE, markersize=5, zorder=3)
        axes.annotate(
            f"{row['share_of_ceiling']:.0%}", (row["rate"] / scale, y), (6, 0), textcoords="offset points",
            va="center", fontsize=7.5,
        )  # fmt: skip
    axes.axvline(ceiling / scale, color=RED, linewidth=1.2)
    high = max(ceiling, *(row["rate"] for row in rows)) / scale
    axes.set_xlim(0, high * 1.17)
    axes.set_ylim(len(rows) - 0.4, -1.3)
    axes.annotate(
        f"copy {rate(ceiling, 'B/s')}", (ceiling / scale, -0.85), (-3, 0), textcoords="offset points", ha="right",
        va="center", color=RED, fontsize=8,
    )  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{row['op']}  {row['shape']}" for row in rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{unit}, inputs and outputs counted once")
    axes.grid(False, axis="y")


def _compute_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float]) -> None:
    copy, gemm = ceilings["copy"], ceilings["gemm"]
    points = [(row["flops"] / row["bytes"], row["rate"], row) for row in rows]
    ridge = gemm / copy
    low = min(ridge, *(x for x, _, _ in points)) / 3
    high = max(ridge, *(x for x, _, _ in points)) * 4
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([low, ridge, high], [low * copy, gemm, gemm], color=RED, linewidth=1.4, zorder=2)
    axes.set_xlim(low, high)
    bottom = min(min(y for _, y, _ in points), low * copy) / 1.6
    axes.set_ylim(bottom, max(gemm, *(y for _, y, _ in points)) * 2.2)
    axes.annotate(
        f"matrix product {rate(gemm, 'FLOP/s')}", (high, gemm), (-2, 5), textcoords="offset points", ha="right",
        color=RED, fontsize=8,
    )  # fmt: skip
    axes.annotate(
        f"copy {rate(copy, 'B/s')}", (low, low * copy), (7, 0), textcoords="offset points", ha="left", va="center",
        color=RED, fontsize=8,
    )  # fmt: skip
    ops = list(dict.fromkeys(row["op"] for _, _, row in points))
    labels = []
    for x, y, row in points:
        axes.plot(x, y, "o", color=SERIES[ops.index(row["op"]) % len(SERIES)], markersize=6, zorder=4)
        labels.append((x, y, f"{row['op']} {row['shape']}: {rate(y, 'FLOP/s')}"))
    axes.set_xlabel("FLOP per byte")
    _rate_ticks(axes)
    _label_points(axes, labels)


def _rate_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    def shown(value: float, _: Any) -> str:
        scale, prefix = (1e12, "T") if value >= 1e12 else (1e9, "G")
        return f"{value / scale:g} {prefix}FLOP/s"

    axes.yaxis.set_major_formatter(FuncFormatter(shown))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


# Speed and quality --------------------------------------------------------------------------------------------------


def speed_psnr(result: Mapping[str, Any]) -> Figure | None:
    """Speed of the whole clip against the worst frame's PSNR to eager; what is identical to eager is at the top edge."""
    with _styled():
        _kind(result, "e2e")
        rows = [row for row in result["rows"] if row.get("quality") and (row.get("ratio") or {}).get("total")]
        finite = {row["variant"]: _psnr(row) for row in rows if _psnr(row) is not None}
        rows = [row for row in rows if row["variant"] in finite or identical(row["quality"])]
        if not [row for row in rows if row["variant"] != "eager"]:
            return None
        figure, (axes,) = _figure(4.0)
        _title(figure, "Speed and fidelity to eager", result)
        values = [value for value in finite.values() if value is not None]
        low, high = (min(values), max(values)) if values else (40.0, 60.0)
        span = max(high - low, 6.0)
        top = high + 0.3 * span
        labels = []
        for i, row in enumerate(rows):
            x, y = row["ratio"]["total"], finite.get(row["variant"])
            at = top if y is None else y
            axes.plot(
                x, at, "^" if y is None else "o", color=SERIES[i % len(SERIES)], markersize=8, zorder=4, clip_on=False
            )
            said = "identical" if y is None else f"{y:.1f} dB"
            labels.append((x, at, f"{row['variant']}: {ratio(x)}×, {said}"))
        axes.axvline(1.0, color=INK, linewidth=1.0, zorder=1)
        xs = [x for x, _, _ in labels]
        width = max(max(xs) - min(xs), 0.2)
        axes.set_xlim(min(*xs, 1.0) - 0.15 * width, max(*xs, 1.0) + 0.15 * width)
        axes.set_ylim(low - 0.2 * span, top)
        ticks = [tick for tick in axes.get_yticks() if low - 0.2 * span <= tick <= high + 0.12 * span]
        axes.set_yticks([*ticks, top], [*(f"{tick:g}" for tick in ticks), "identical"])
        axes.set_xlabel("whole clip, times as fast as eager")
        axes.set_ylabel("PSNR to eager, worst frame (dB)")
        _label_points(axes, labels)
        return figure


def _psnr(row: Mapping[str, Any]) -> float | None:
    found = (row["quality"].get("psnr") or {}).get("min")
    return None if found is None or found == float("inf") else float(found)


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each label beside its point where it covers no other label or point and stays within the axes."""
    figure: Any = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    from matplotlib.transforms import Bbox

    taken = [
        Bbox.from_extents(x - 5, y - 5, x + 5, y + 5)
        for x, y in (axes.transData.transform((x, y)) for x, y, _ in points)
    ]
    steps = [(side * 8, lift) for lift in (0, 10, -10, 20, -20, 30, -30, 42, -42, 54, -54) for side in (1, -1)]
    for x, y, text in points:
        label = axes.annotate(text, (x, y), fontsize=8, va="center", textcoords="offset points", xytext=(0, 0))
        best: tuple[float, tuple[int, int]] | None = None
        for step in steps:
            label.set_position(step)
            label.set_horizontalalignment("left" if step[0] > 0 else "right")
            box = label.get_window_extent(renderer)
            outside = max(0.0, frame.x0 - box.x0) + max(0.0, box.x1 - frame.x1)
            outside += max(0.0, frame.y0 - box.y0) + max(0.0, box.y1 - frame.y1 - 6)
            cost = outside + 50 * sum(box.overlaps(other) for other in taken)
            if best is None or cost < best[0]:
                best = (cost, step)
            if not cost:
                break
        assert best is not None  # there are steps
        label.set_position(best[1])
        label.set_horizontalalignment("left" if best[1][0] > 0 else "right")
        taken.append(label.get_window_extent(renderer))
