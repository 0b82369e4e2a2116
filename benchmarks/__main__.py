"""``python -m benchmarks``: what ``make bench`` runs. This machine's speed, as tables and plots, part by part.

On a CPU: the ops against the reference model's code and torch.compile, a clip of the embedded model, two blocks of Wan
1.3B and its VAE decoder, each eager against ours, in turns; at the end which goals (`goals`) the ratios reach. About a
quarter of an hour on two cores; ``--quick`` takes less than a minute. On a GPU: the ops against every baseline that is
here, and the clip.

The exit status is 1 where something was wrong or could not be measured. A goal that another machine misses is no error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pyvideo_kernels.benchmarks.goals as goals
import pyvideo_kernels.benchmarks.results as results
from pyvideo_kernels.configs import slug
from pyvideo_kernels.error_types import PyVideoError, UsageError
from pyvideo_kernels.sampler.problems import Exit, did_you_mean, exit_code
from pyvideo_kernels.sampler.video import check_folder

COMMITTED = Path(__file__).resolve().parent / "results"
_CLIP_ROUNDS = 15
"""A clip of the embedded model takes a fraction of a second, in which other processes show."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One result file of a run.

    Args:
        name: of the file.
        what: for people.
        minutes: it takes about so long on two cores of an AMD EPYC (Zen 4); None: on a GPU, where that says nothing.
        work: measures; given the path, under which unfinished results are kept.
    """

    name: str
    what: str
    minutes: float | None
    work: Callable[[Path], Result]


class Bench:
    """Parts of a run, one result file each; a part that fails leaves the others standing.

    Args:
        folder: where files go.
        device: what is measured.
        quick: a shape an op, eager alone, and no clip.
        only: names of parts; none: all.
        save_as: also write each finished part among the committed results, under this name.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        quick: bool = False,
        only: Sequence[str] = (),
        save_as: str | None = None,
    ) -> None:
        self.folder, self.device, self.quick, self.save_as = folder, device, quick, save_as
        self.start = time.monotonic()
        self.paths: list[Path] = []
        self.finished: list[Path] = []
        self.wrong: list[str] = []
        self.begun: list[Path] = []
        self.parts = self._chosen(only)
        if quick and save_as:
            raise UsageError("--save-as is for results that others may rely on, which those of --quick are not")

    @property
    def kept(self) -> list[Path]:
        """What this run has written, parts that it is in the middle of too."""
        return [path for path in self.begun if path.exists()]

    def _chosen(self, only: Sequence[str]) -> list[Part]:
        there = {part.name: part for part in self._plan()}
        for name in only:
            if name not in there:
                hint = did_you_mean(name, there)
                raise UsageError(f"--only must be one of {', '.join(there)}; got {name!r}{hint}")
        return [part for name, part in there.items() if name in only or not only]

    def _plan(self) -> list[Part]:
        """What there is to measure, the quick parts first."""
        if self.device.type == "cuda":
            ops = Part("ops-bf16", "every op, every baseline", None, lambda path: self.ops(path, torch.bfloat16, None))
            return [ops] if self.quick else [ops, Part("e2e-tiny", "a clip of the embedded model", None, self.clip)]
        first = goals.sampler_dtype(self.device)
        second = torch.float32 if first == torch.bfloat16 else torch.bfloat16
        names = {torch.bfloat16: "ops-bf16", torch.float32: "ops-fp32"}
        both = ["eager", "compile"]
        ops = Part(names[first], "ops, eager and torch.compile", 4, lambda path: self.ops(path, first, both))
        if self.quick:
            return [ops]
        return [
            ops,
            Part("e2e-tiny", "a clip of the embedded model", 2, self.clip),
            Part("e2e-blocks", "two blocks of Wan 1.3B, 4,096 tokens", 2, self.blocks),
            Part("vae-wan", "Wan's VAE decoder, 256×256×17", 7, self.decoder),
            Part(names[second], "ops, eager alone", 1.5, lambda path: self.ops(path, second, ["eager"])),
        ]

    def announce(self) -> None:
        """What will be done, and how long it takes."""
        if len(self.parts) == 1:
            return
        known = [part.minutes for part in self.parts if part.minutes is not None]
        if known:
            print(f"about {sum(known):.0f} minutes on two Zen 4 cores; a part is in {self.folder} as soon as it ends, ")
            print("and Ctrl-C keeps those that have; --only NAME runs one of them, --quick takes less than a minute")
        for part in self.parts:
            minutes = "" if part.minutes is None else f"{part.minutes:4} min"
            print(f"  {part.name:12}{minutes:10}{part.what}")

    def run(self) -> None:
        """Every part, then the page, the plots and the goals."""
        self.announce()
        for part in self.parts:
            self.part(part)
        self.report()
        self.show_goals()

    def part(self, part: Part) -> None:
        """One result file."""
        path = self.folder / f"{part.name}.json"
        path.unlink(missing_ok=True)  # a result of an earlier run must not pass for this one's
        self.begun.append(path)
        print(f"\n{part.name}", flush=True)
        try:
            result = part.work(path)
        except PyVideoError as error:
            print(f"{part.name}: {error}")
            self.wrong.append(part.name)
            return
        self.finished.append(results.write(path, result))
        self.paths.append(path)
        if self.save_as:
            self.paths.append(results.write(COMMITTED / f"{self.save_as}-{saved_name(result)}.json", result))
        self.wrong += [
            f"{part.name}: {row.get('op') or row.get('variant')}" for row in result["rows"] if "error" in row
        ]

    def ops(self, path: Path, dtype: torch.dtype, baselines: list[str] | None) -> Result:
        """The ops; finished rows are on disk if this is interrupted."""
        import pyvideo_kernels.benchmarks.ops as ops
        from pyvideo_kernels.benchmarks.ops.table import printer_for

        printer = printer_for(self.device)
        begun: Result = {}

        def start(result: Result) -> None:
            begun.update(result)
            printer.start(result)

        def row(found: Result) -> None:
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

    def clip(self, path: Path) -> Result:
        """A short clip of the embedded model."""
        if self.device.type == "cuda":
            return self._e2e(model="tiny")
        # The decoder too: of the ways to compile the stock model the fastest is what counts.
        variants = ("eager", "compile", "compile:vae=true", "ours")
        return self._e2e(**goals.CLIP, variants=variants, rounds=_CLIP_ROUNDS)

    def blocks(self, path: Path) -> Result:
        """Two blocks at the width of a true model: a forward of the transformer."""
        dtype = goals.DTYPES[goals.sampler_dtype(self.device)]
        # With the model's own attention too: what accelerate() does without being asked for more.
        variants = ("eager", "ours:loop=pipeline", goals.ACCELERATED)
        return self._e2e(**goals.BLOCKS, variants=variants, random_weights=True, rounds=goals.ROUNDS, dtype=dtype)

    def _e2e(self, **asked: Any) -> Result:
        import pyvideo_kernels.benchmarks.e2e as e2e
        from pyvideo_kernels.benchmarks.e2e.console import Console

        request = e2e.Request(**{"variants": ("eager", "ours"), "device": str(self.device), **asked})
        console = Console(request.rounds)
        result = e2e.run(request, console.show)
        console.table(result)
        return result

    def decoder(self, path: Path) -> Result:
        """The VAE's decoder, at full width."""
        import pyvideo_kernels.benchmarks.vae as vae
        from pyvideo_kernels.benchmarks.vae import tables

        dtype = goals.DTYPES[goals.sampler_dtype(self.device)]
        request = vae.Request(
            **goals.DECODER, variants=("eager", "ours"), rounds=goals.ROUNDS, layers=False, device=str(self.device),
            dtype=dtype,
        )  # fmt: skip
        result = vae.run(request, tables.console)
        print(tables.variants(result["rows"]))
        return result

    def report(self) -> None:
        """One page of all parts, and their plots."""
        import pyvideo_kernels.benchmarks.numbers as numbers

        if self.finished:
            self.paths += numbers.report(self.finished, self.folder, "This machine", judged=not self.quick)

    def show_goals(self) -> None:
        """Which goals the parts that are finished reach; on a CPU, where there are goals."""
        if self.device.type == "cuda" or self.quick or not self.finished:
            return
        from pyvideo_kernels.benchmarks.report import tables

        found = goals.outcomes(results.read(path) for path in self.finished)
        shown = [outcome for outcome in found if outcome.measurable]
        print("\ngoals (of two Zen 4 cores; another machine may miss some, which is no error)")
        try:
            from rich.console import Console as Rich

            Rich(width=None if sys.stdout.isatty() else 160).print(tables.to_rich(goals.table(shown)))
        except ImportError:
            print(tables.to_markdown(goals.table(shown)))
        left = f"; {len(found) - len(shown)} are of parts that were not run" if len(shown) < len(found) else ""
        print(goals.summary(shown) + left)


def saved_name(result: Result) -> str:
    """What a committed result is called after its machine."""
    from pyvideo_kernels.benchmarks import e2e
    from pyvideo_kernels.benchmarks.report.tables import short_dtype
    from pyvideo_kernels.benchmarks.vae import tables

    if result["kind"] == "ops":
        return short_dtype(result["settings"]["dtype"])
    where = result["provenance"]
    name = tables.stem(result) if result["kind"] == "vae" else e2e.stem(result)
    # The name of the machine says it.
    return name.removesuffix(f"-{slug(where['gpu']) if where['device'] == 'cuda' else where['device']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and say where the files are; 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape an op, eager alone, no clip: under a minute")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PART", help="a part, once or more; default: all"
    )
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:N]")
    parser.add_argument("--output", "-o", type=Path, default=Path("runs/bench"), metavar="DIR")
    parser.add_argument(
        "--save-as", metavar="MACHINE", help="also write to benchmarks/results/MACHINE-*.json, to be committed"
    )
    options = parser.parse_args(argv)
    bench: Bench | None = None
    try:
        from pyvideo_kernels.benchmarks.ops import device_named

        device = device_named(options.device)
        bench = Bench(options.output, device, quick=options.quick, only=options.only, save_as=options.save_as)
        check_folder(options.output, "output")
        bench.run()
    except PyVideoError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(exit_code(error) or Exit.FAILED)
    except KeyboardInterrupt:
        if bench:
            bench.show_goals()
        kept = ", ".join(map(str, bench.kept)) if bench else ""
        print(f"\ninterrupted; {f'what was finished is in {kept}' if kept else 'nothing was written'}", file=sys.stderr)
        return Exit.INTERRUPTED
    if bench.wrong:
        print(f"\nwrong or not measured: {', '.join(bench.wrong)}")
    print(f"\n{time.monotonic() - bench.start:.0f} s; written:", *map(str, bench.paths), sep="\n  ")
    return Exit.FAILED if bench.wrong else Exit.OK


if __name__ == "__main__":
    sys.exit(main())
