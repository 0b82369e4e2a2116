"""``python -m benchmarks``: what ``make bench`` runs. This machine's speed, as tables and plots, in a few minutes.

The ops against the reference model's code and torch.compile, and a short clip of the embedded model, eager against
accelerated. On a CPU it takes under five minutes on two cores; what would not fit is left out, aloud.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import pyvideo_kernels.benchmarks.results as results
from pyvideo_kernels.error_types import PyVideoError
from pyvideo_kernels.sampler.problems import Exit, exit_code
from pyvideo_kernels.sampler.video import check_folder

LIMIT = 210.0
"""Seconds of a CPU run after which no optional part is started: the rest of five minutes is for the parts in hand."""


class Bench:
    """Parts of a run, one result file each; a part that fails leaves the others standing.

    Args:
        folder: where files go.
        device: what is measured.
        quick: a shape an op, eager alone, and no clip.
    """

    def __init__(self, folder: Path, device: torch.device, quick: bool) -> None:
        self.folder, self.device, self.quick = folder, device, quick
        self.start = time.monotonic()
        self.paths: list[Path] = []
        self.wrong: list[str] = []
        self.begun: list[Path] = []

    @property
    def kept(self) -> list[Path]:
        """What this run has written, parts that it is in the middle of too."""
        return [path for path in self.begun if path.exists()]

    def run(self) -> None:
        """Every part, then the page and the plots."""
        gpu = self.device.type == "cuda"
        self.part("ops-bf16", lambda path: self.ops(path, torch.bfloat16, None if gpu else ["eager", "compile"]))
        if not gpu and not self.quick:
            self.part("ops-fp32", lambda path: self.ops(path, torch.float32, ["eager"]), optional=True)
        if not self.quick:
            self.part("e2e-tiny", self.clip, optional=not gpu)
        self.report()

    def part(self, name: str, work: Callable[[Path], dict[str, Any]], optional: bool = False) -> None:
        """One result file."""
        path = self.folder / f"{name}.json"
        path.unlink(missing_ok=True)  # a result of an earlier run must not pass for this one's
        self.begun.append(path)
        spent = time.monotonic() - self.start
        if optional and spent > LIMIT:
            print(f"\n{name}: left out, {spent:.0f} s are spent on this machine already")
            return
        print(f"\n{name}", flush=True)
        try:
            result = work(path)
        except PyVideoError as error:
            print(f"{name}: {error}")
            self.wrong.append(name)
            return
        self.paths.append(results.write(path, result))
        self.wrong += [f"{name}: {row.get('op') or row.get('variant')}" for row in result["rows"] if "error" in row]

    def ops(self, path: Path, dtype: torch.dtype, baselines: list[str] | None) -> dict[str, Any]:
        """The ops; finished rows are on disk if this is interrupted."""
        import pyvideo_kernels.benchmarks.ops as ops
        from pyvideo_kernels.benchmarks.ops.table import printer_for

        printer = printer_for(self.device)
        begun: dict[str, Any] = {}

        def start(result: dict[str, Any]) -> None:
            begun.update(result)
            printer.start(result)

        def row(found: dict[str, Any]) -> None:
            printer.row(found)
            results.write(path, {**begun, "incomplete": True})

        result = begun
        asked: dict[str, Any] = {"quick": True} if self.quick else {"baselines": baselines}
        try:
            result = ops.run([], self.device, dtype, **asked, on_row=row, on_start=start)
        finally:
            if begun:
                printer.finish(result)
        return result

    def clip(self, path: Path) -> dict[str, Any]:
        """A short clip of the embedded model, eager against accelerated."""
        import pyvideo_kernels.benchmarks.e2e as e2e
        from pyvideo_kernels.benchmarks.e2e.console import Console

        request = e2e.Request(model="tiny", variants=("eager", "ours"), steps=8, device=str(self.device))
        console = Console(request.rounds)
        result = e2e.run(request, console.show)
        console.table(result)
        return result

    def report(self) -> None:
        """One page of all parts, and their plots."""
        import pyvideo_kernels.benchmarks.numbers as numbers

        if self.paths:
            self.paths += numbers.report(self.paths, self.folder, "This machine")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and say where the files are; 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape an op, eager alone, no clip: under a minute")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:N]")
    parser.add_argument("--output", "-o", type=Path, default=Path("runs/bench"), metavar="DIR")
    options = parser.parse_args(argv)
    bench: Bench | None = None
    try:
        from pyvideo_kernels.benchmarks.ops import device_named

        bench = Bench(options.output, device_named(options.device), options.quick)
        check_folder(options.output, "output")
        bench.run()
    except PyVideoError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(exit_code(error) or Exit.FAILED)
    except KeyboardInterrupt:
        kept = ", ".join(map(str, bench.kept)) if bench else ""
        print(f"\ninterrupted; {f'what was finished is in {kept}' if kept else 'nothing was written'}", file=sys.stderr)
        return Exit.INTERRUPTED
    if bench.wrong:
        print(f"\nwrong or not measured: {', '.join(bench.wrong)}")
    print(f"\n{time.monotonic() - bench.start:.0f} s; written:", *map(str, bench.paths), sep="\n  ")
    return Exit.FAILED if bench.wrong else Exit.OK


if __name__ == "__main__":
    sys.exit(main())
