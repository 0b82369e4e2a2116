"""How a run reports itself: bars on a terminal, plain lines elsewhere, nothing from Python. Torch-free."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

PHASES = {
    "load": "load the model",
    "text": "read the prompt",
    "denoise": "denoise",
    "decode": "decode",
    "write": "write the film",
}


class Reporter:
    """Says nothing; the base of the others."""

    def plan(self, line: str) -> None:
        """The plan of a film."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def warn(self, text: str) -> None:
        """Something the user will want to change."""

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """A phase of a run; the value advances it by one of ``total``."""
        yield lambda: None

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """The summary."""


class PlainReporter(Reporter):
    """One line a phase, a few for a long one; for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream

    def _say(self, text: str) -> None:
        print(text, file=self.stream or sys.stderr, flush=True)

    def plan(self, line: str) -> None:
        self._say(f"plan: {line}")

    def note(self, text: str) -> None:
        self._say(f"note: {text}")

    def warn(self, text: str) -> None:
        self._say(f"warning: {text}")

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        started = said = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal done, said
            done += 1
            now = time.monotonic()
            if total and done < total and now - said > 10:
                said = now
                each = (now - started) / done
                self._say(f"{PHASES[name]}: {done}/{total}, {each:.3g} s each, {_clock(each * (total - done))} to go")

        yield advance
        elapsed = time.monotonic() - started
        each = f", {elapsed / done:.3g} s a step" if name == "denoise" and done else ""
        self._say(f"{PHASES[name]}: {elapsed:.2f} s{each}")

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self._say("; ".join(f"{name} {value}" for name, value in rows))


class RichReporter(Reporter):
    """Bars with an ETA on a terminal."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console

        self.console = console or Console(stderr=True)

    def plan(self, line: str) -> None:
        self.console.print(f"[bold]plan[/] {_plain(line)}", highlight=False)

    def note(self, text: str) -> None:
        self.console.print(f"[dim]note: {_plain(text)}[/]", highlight=False)

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]warning: {_plain(text)}[/]", highlight=False)

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns: list[Any] = [SpinnerColumn(finished_text="[green]✓[/]"), TextColumn(f"{PHASES[name]:<15}")]
        if total:
            columns += [BarColumn(24), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[each]}")]
        columns += [TimeElapsedColumn()] + ([TextColumn("eta"), TimeRemainingColumn()] if total else [])
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(name, total=total or 1, each="")
            started = time.monotonic()
            done = 0

            def advance() -> None:
                nonlocal done
                done += 1
                each = f"{(time.monotonic() - started) / done:.3g} s/step" if name == "denoise" else ""
                bar.update(task, completed=done if total else 0, each=each)

            yield advance
            bar.update(task, completed=total or 1)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        from rich.table import Table

        table = Table(title=_plain(title), title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, _plain(value))
        self.console.print(table)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def reporter_for(stream: Any = None) -> Reporter:
    """Rich on a terminal, plain lines elsewhere."""
    stream = stream or sys.stderr
    return RichReporter() if stream.isatty() else PlainReporter()
