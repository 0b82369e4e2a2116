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
        """A phase of a run; the value advances it by one of ``total``, from any thread. A phase may be inside another
        that goes on beside it: frames are written while later ones are decoded.
        """
        yield lambda: None

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """The summary."""


class PlainReporter(Reporter):
    """One line a phase, a few for a long one; for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream
        self._inner: tuple[str, float] | None = None
        """The phase that ended last inside the present one, and when."""

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

        self._inner = None
        yield advance
        ended = time.monotonic()
        elapsed = ended - started
        more = f", {elapsed / done:.3g} s a step" if name == "denoise" and done else ""
        if self._inner is not None:
            inner, before = self._inner
            more = f", {ended - before:.2f} s of it after {PHASES[inner]}"
        self._say(f"{PHASES[name]}: {elapsed:.2f} s{more}")
        self._inner = (name, ended)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self._say("; ".join(f"{name} {value}" for name, value in rows))


class RichReporter(Reporter):
    """Bars with an ETA on a terminal."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console

        self.console = console or Console(stderr=True)
        self._bars: Any = None
        """The bars of the phase under way, which those inside it join."""

    def plan(self, line: str) -> None:
        self.console.print(f"[bold]plan[/] {_plain(line)}", highlight=False)

    def note(self, text: str) -> None:
        self.console.print(f"[dim]note: {_plain(text)}[/]", highlight=False)

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]warning: {_plain(text)}[/]", highlight=False)

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        outer = self._bars
        bars = outer if outer is not None else _bars(self.console, counted=bool(total))
        with bars if outer is None else contextlib.nullcontext():
            self._bars = bars
            task = bars.add_task(PHASES[name], total=total or 1, each="")
            started = time.monotonic()
            done = 0

            def advance() -> None:
                nonlocal done
                done += 1
                each = f"{(time.monotonic() - started) / done:.3g} s/step" if name == "denoise" else ""
                bars.update(task, completed=done if total else 0, each=each)

            try:
                yield advance
            finally:
                self._bars = outer
            bars.update(task, completed=total or 1)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        from rich.table import Table

        table = Table(title=_plain(title), title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, _plain(value))
        self.console.print(table)


def _bars(console: Any, *, counted: bool) -> Any:
    """One line a phase; ``counted`` with a bar, how many of how many, and when it will be done."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns: list[Any] = [SpinnerColumn(finished_text="[green]✓[/]"), TextColumn("{task.description:<15}")]
    if counted:
        columns += [BarColumn(24), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[each]}")]
    columns += [TimeElapsedColumn()] + ([TextColumn("eta"), TimeRemainingColumn()] if counted else [])
    return Progress(*columns, console=console)


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
