"""What every plot shares: the style, a figure without a window, titles, legends, labels that do not collide, saving."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvideo_kernels.errors import UnsupportedError, ValueOptionError

from ..op_classes import CLASSES
from .tables import clip, machine, short_dtype

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

# Raised by hand when the drawing itself changes, so that plots drawn the old way count as stale.
DRAWING = 1

# Okabe and Ito's palette: told apart with every kind of colour vision, and by lightness in print.
BLUE, ORANGE, GREEN, PINK, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
SKY, YELLOW, GREY, INK = "#56B4E9", "#F0E442", "#BBBBBB", "#222222"
SERIES = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, "#666666", "#882255", "#44AA99")
CLASS_COLOURS = dict(zip(CLASSES, (BLUE, SKY, ORANGE, GREEN, RED, YELLOW, PINK, GREY), strict=True))
DARK = (BLUE, GREEN, RED)  # white numbers on these
HALO = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}  # keeps text off the lines behind it
MANY = 20  # rows beyond which a line is an op, with its shapes as dots
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


Result = Mapping[str, Any]


def check_kind(result: Result, *kinds: str) -> None:
    """Refuse a result that a plot is not for."""
    if result.get("kind") not in kinds:
        raise ValueOptionError(f"plots: `kind` must be {' or '.join(kinds)}; got {result.get('kind')!r}")


@contextmanager
def styled() -> Iterator[None]:
    """The plots' settings, for drawing and for saving; the process's own are put back."""
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError("plots need matplotlib: pip install 'pyvideo-kernels[bench]'") from None
    # From the defaults: a user's matplotlibrc must not change what is drawn.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def panels(height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """A figure that belongs to no window: pyplot is not involved, nor is any display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0.01, 0, 0.975, 1))  # a viewer's font may be wider than the one that was measured with
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **kwargs).flat)


def title(figure: Figure, text: str, result: Result) -> None:
    """What is shown, and under it the machine and what was run on it."""
    if result["kind"] == "e2e":
        what = clip(result["settings"])
    else:
        what = ", ".join(dict.fromkeys(short_dtype(row["dtype"]) for row in result["rows"]))
    # The second line of the title is the place of the smaller text, which the layout does not know of.
    figure.suptitle(f"{text}\n", x=0.01, ha="left", fontsize=11, fontweight="bold")
    under = f"{machine(result)} · {what} · torch {result['provenance']['torch']}"
    figure.text(0.01, 1.0, f"\n\n{under}", ha="left", va="top", fontsize=8, color="#555555")


def legend(figure: Figure, names: Sequence[str], colours: Sequence[str], hatched: Sequence[str] = ()) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=colour, label=name, hatch="////" if name in hatched else None)
        for name, colour in zip(names, colours)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 6), handlelength=1.2)


def label_points(
    axes: Axes,
    labels: Sequence[tuple[float, float, str]],
    points: Sequence[tuple[float, float]],
    clear_of: Sequence[Annotation] = (),
) -> None:
    """Write each label beside its point where it covers no point and no other text, and stays within the axes."""
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    figure.draw_without_rendering()  # places the axes, which the layout has not done yet
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    taken = [text.get_window_extent(renderer) for text in clear_of]
    for x, y in points:
        cx, cy = axes.transData.transform((x, y))
        taken.append(Bbox.from_extents(cx - 5, cy - 5, cx + 5, cy + 5))
    lifts = (0, 10, -10, 20, -20, 30, -30, 42, -42, 54, -54)
    # Beside the point; where neither side has the room, above or below it.
    steps = [(side * 8, lift) for lift in lifts for side in (1, -1)] + [(0, lift) for lift in lifts[1:]]
    for x, y, text in labels:
        label = axes.annotate(
            text, (x, y), (0, 0), textcoords="offset points", fontsize=8, va="center", bbox=HALO, zorder=5
        )
        costs = []
        for step in steps:
            box = _put(label, step, frame, renderer)
            outside = max(0.0, frame.x0 - box.x0) + max(0.0, box.x1 - frame.x1)
            outside += max(0.0, frame.y0 - box.y0) + max(0.0, box.y1 - frame.y1 - 8)
            costs.append(outside + 50 * sum(box.overlaps(other) for other in taken))
        taken.append(_put(label, steps[costs.index(min(costs))], frame, renderer))


def _put(label: Annotation, step: tuple[int, int], frame: Any, renderer: Any) -> Any:
    """Move a label by ``step`` points off its point; centred ones into the frame. Returns where it is, in pixels."""
    figure: Any = label.figure
    side, lift = step
    label.set_position((side, lift))
    label.set_horizontalalignment("left" if side > 0 else "right" if side < 0 else "center")
    box = label.get_window_extent(renderer)
    if not side:
        push = max(0.0, frame.x0 - box.x0) - max(0.0, box.x1 - frame.x1)
        label.set_position((push * 72 / figure.dpi, lift))
        box = label.get_window_extent(renderer)
    return box


# Files ---------------------------------------------------------------------------------------------------------------


def digest(result: Result) -> str:
    """``sha256:...`` of a result and of the way it is drawn."""
    data = json.dumps(result, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(f"{DRAWING}\n{data}".encode()).hexdigest()


def plot_digest(path: Path) -> str | None:
    """The digest that a plot carries; None if it carries none."""
    found = re.search(r"<dc:identifier>\s*(sha256:[0-9a-f]{64})\s*</dc:identifier>", path.read_text(encoding="utf-8"))
    return found.group(1) if found else None


def save(figure: Figure, path: Path, result: Result) -> Path:
    """Write the plot whole or not at all, with the digest of ``result``; no date, so that equal plots are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    metadata = {"Date": None, "Creator": "pyvideo-kernels", "Identifier": digest(result)}
    try:
        figure.savefig(temporary, format="svg", metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
