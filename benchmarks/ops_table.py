"""How `pyvideo bench ops` shows its rows: a table that grows on a terminal, a line a row elsewhere.

The cells are those of `tables`, which every page and plot uses.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol, TextIO

import torch

from . import tables

Row = dict[str, Any]


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
    """A table that grows row by row on a terminal."""

    def __init__(self, console: Any) -> None:
        from rich.live import Live

        self.console = console
        self.result: dict[str, Any] = {}
        self.live = Live(console=console, auto_refresh=False, vertical_overflow="visible")

    def start(self, result: dict[str, Any]) -> None:
        self.result = {**result, "rows": []}
        self.console.print(ceiling_line(result), highlight=False)
        self.live.start()

    def row(self, row: Row) -> None:
        self.result["rows"].append(row)
        self.live.update(tables.rich_table(self.result), refresh=True)

    def finish(self, result: dict[str, Any]) -> None:
        from rich.text import Text

        self.live.stop()
        for text in notes(result["rows"]):
            self.console.print(Text(f"note: {text}"))


def printer_for(device: torch.device) -> Printer:
    """A table where stdout is a terminal and rich is installed."""
    try:
        from rich.console import Console
    except ImportError:
        return PlainPrinter(device)
    console = Console()
    return RichPrinter(console) if console.is_terminal else PlainPrinter(device)
