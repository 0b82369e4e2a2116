"""What can go wrong in a run, each with its exit code. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from pathlib import Path

from ..error_types import DeviceError, ModelError, PyVideoError, UnsupportedError, UsageError, ValueOptionError
from ..error_types import did_you_mean as did_you_mean


class Exit(IntEnum):
    """Exit codes of the ``pyvideo`` command."""

    OK = 0
    FAILED = 1
    """A check did not hold: `verify`, `bench compare`, a wrong kernel in `bench ops`."""
    USAGE = 2
    MODEL = 3
    MEMORY = 4
    OUTPUT = 5
    INTERRUPTED = 130


class OutputError(PyVideoError, OSError):
    """The film cannot be written: folder, codec or disk; names the remedy."""


class OutOfMemoryError(PyVideoError, MemoryError):
    """The model or the film does not fit; names the remedy."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run.

    Args:
        phase: what was going on.
        kept: files that are complete and worth having; everything else was removed.
    """

    def __init__(self, phase: str, kept: Iterable[Path] = ()) -> None:
        self.phase, self.kept = phase, tuple(kept)
        what = f"kept {', '.join(map(str, self.kept))}" if self.kept else "nothing was written"
        super().__init__(f"interrupted during {phase}; {what}")


def exit_code(error: BaseException) -> Exit | None:
    """The exit code an error stands for; None for one that is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED
    for kind, code in (
        (OutputError, Exit.OUTPUT),
        (OutOfMemoryError, Exit.MEMORY),
        (ModelError, Exit.MODEL),
        ((UsageError, ValueOptionError, DeviceError, UnsupportedError), Exit.USAGE),
    ):
        if isinstance(error, kind):  # type: ignore[arg-type]
            return code
    return None


def finish(work: Callable[[], object]) -> None:
    """Run a command; every expected error is one sentence on stderr and its exit code."""
    import typer

    try:
        work()
    except KeyboardInterrupt as error:
        text = str(error) or "interrupted; nothing was written"
        typer.echo(text, err=True)
        raise typer.Exit(Exit.INTERRUPTED) from None
    except PyVideoError as error:
        code = exit_code(error)
        if code is None:
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(code) from None
