"""How `pyvideo bench ops` shows its rows: a table an op on a terminal, a line a row elsewhere.

The cells are those of `tables`, which every page and plot uses.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any, Protocol, TextIO

import torch

from ..report import tables

Row = dict[str, Any]
_SHORT = {"implementation": "impl", "median ms": "ms", "of ceiling": "ceiling"}


class Printer(Protocol):
    """Takes a run as it happens."""

    def start(self, result: dict[str, Any]) -> None: ...

    def row(self, row: Row) -> None: ...

    def finish(self, result: dict[str, Any]) -> None: ...


def ceiling_line(result: dict[str, Any]) -> str:
    """What this device reaches at best."""
    tops = result["ceilings"]
    gemms = ", ".join(f"{name} {tables.rate(value, 'FLOP/s')}" for name, value in tops["gemms"].items())
    return f"measured ceilings: copy {tables.rate(tops['copy'], 'B/s')}; matrix product {gemms}"


def line(row: Row, device: torch.device) -> str:
    """A row in plain text."""
    head = f"{row['op']:27} {row['shape']:20} {row['impl']:9}"
    if "error" in row:
        return f"{head} WRONG: {row['error']}"
    median, spread = tables.with_spread(row["seconds"], row["spread"], 1e3)
    by = "wall" if device.type == "cpu" else "graph" if row["graph"] else "events"
    ratios = [f"{name} {_competitor(found)}" for name, found in row["baselines"].items() if "skipped" not in found]
    return (
        f"{head} {median:>8} ms ±{spread:>7} {by:6} {tables.rate(row['rate'], row['unit']):>13} "
        f"{row['share_of_ceiling']:>5.0%} of ceiling; {', '.join(ratios) or 'no baseline'}"
    )


def _competitor(found: Row) -> str:
    return f"x{tables.ratio(found['ratio'])}" if "ratio" in found else found.get("error", "?")


def notes(rows: list[Row]) -> list[str]:
    """What a reader must know beside the numbers: how a row differs from what the method promises."""
    lines: dict[str, None] = {}
    for row in rows:
        where = f"{row['op']} {row['shape']}"
        for key, text in (
            ("why_no_graph", "timed by events, not as a graph"),
            ("capped", "the cache may have helped"),
            ("unchecked_at_size", "checked on samples alone"),
        ):
            if key in row:
                lines[f"{where}: {text}: {row[key]}"] = None
        for name, found in row.get("baselines", {}).items():
            if "note" in found:
                lines[f"{name}: {found['note']}"] = None
            if "why_no_graph" in found:
                lines[f"{where}: {name} timed by events, not as a graph: {found['why_no_graph']}"] = None
    return list(lines)


class PlainPrinter:
    """Lines on stdout; for logs, pipes, and where rich is not installed."""

    def __init__(self, device: torch.device, stream: TextIO | None = None) -> None:
        self.device, self.stream = device, stream

    def _say(self, text: str) -> None:
        print(text, file=self.stream or sys.stdout, flush=True)

    def start(self, result: dict[str, Any]) -> None:
        self._say(ceiling_line(result))

    def row(self, row: Row) -> None:
        self._say(line(row, self.device))

    def finish(self, result: dict[str, Any]) -> None:
        for text in notes(result["rows"]):
            self._say(f"note: {text}")


class RichPrinter:
    """Tables on a terminal: one an op as it is finished, or one for all where each has a single row.

    Args:
        device: where the rows come from.
        console: rich's.
        single: one table at the end.
    """

    def __init__(self, device: torch.device, console: Any, single: bool = False) -> None:
        from rich.live import Live

        self.device = device
        self.console, self.single = console, single
        self.rows: list[Row] = []
        # Drawn when told to and at no other time: a spinner's thread would be in the measurement.
        self.status = Live(console=console, auto_refresh=False, transient=True)

    def start(self, result: dict[str, Any]) -> None:
        self.console.print(ceiling_line(result), highlight=False)
        self.status.start()

    def row(self, row: Row) -> None:
        from rich.text import Text

        if self.rows and self.rows[-1]["op"] != row["op"] and not self.single:
            self._flush()
        self.rows.append(row)
        text = f"{row['op']} {row['shape']}: {'wrong' if 'error' in row else 'done'}; measuring the next"
        self.status.update(Text(text, style="dim"), refresh=True)

    def finish(self, result: dict[str, Any]) -> None:
        from rich.text import Text

        self.status.stop()
        self._flush()
        for text in (*notes(result["rows"]), *versions(result["rows"])):
            self.console.print(Text(text, style="dim"))

    def _flush(self) -> None:
        from rich.measure import Measurement
        from rich.text import Text

        rows, self.rows = self.rows, []
        if not rows:
            return
        table, errors = drawn(rows)
        endless = self.console.options.update(width=10_000)
        if Measurement.get(self.console, endless, table).maximum <= self.console.width:
            self.console.print(table)
            for text in errors:
                self.console.print(Text(text, style="red"))
            return
        for row in rows:  # no number is worth less than a column
            self.console.print(Text(line(row, self.device), style="red" if "error" in row else ""))


def versions(rows: list[Row]) -> list[str]:
    """One line that says what the baselines' names stand for."""
    found = itertools.chain.from_iterable(row.get("baselines", {}).items() for row in rows)
    named = {name: outcome["version"] for name, outcome in found if "version" in outcome}
    return ["versions: " + "; ".join(f"{name} {version}" for name, version in named.items())] if named else []


def drawn(rows: list[Row]) -> tuple[Any, tuple[str, ...]]:
    """The table of some rows, and what went wrong in them. What is the same in all of them is in its title."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    ran = []
    for row in rows:
        outcomes = row.get("baselines", {}).items()
        kept = {
            name: {k: v for k, v in one.items() if k != "version"} for name, one in outcomes if "skipped" not in one
        }
        ran.append({**row, "baselines": kept})
    made = tables.table({"kind": "ops", "rows": ran})
    common = [at for at, column in enumerate(made.columns) if column.title in ("op", "dtype")]
    common = [at for at in common if len({row[at] for row in made.rows}) == 1]
    out = Table(
        title=", ".join(made.rows[0][at] for at in common),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    shown = [at for at in range(len(made.columns)) if at not in common]
    for at in shown:
        column = made.columns[at]
        # Names break after a hyphen: a ratio needs no more than six letters.
        heading = _SHORT.get(column.title, column.title.replace("-", "-\n"))
        out.add_column(Text(heading), justify="right" if column.numeric else "left", no_wrap=True)
    for cells in made.rows:
        red = "bold red" if "WRONG" in cells else ""
        out.add_row(*(Text(cells[at], style="red" if cells[at] == "error" else "") for at in shown), style=red)
    return out, made.notes


def printer_for(device: torch.device, single: bool = False) -> Printer:
    """Tables where stdout is a terminal and rich is installed."""
    try:
        from rich.console import Console
    except ImportError:
        return PlainPrinter(device)
    console = Console()
    return RichPrinter(device, console, single) if console.is_terminal else PlainPrinter(device)
