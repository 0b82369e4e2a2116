"""``python -m benchmarks.campaign --minutes 9 [--resume]``: everything worth knowing about a card, slice by slice.

Environment and ceilings, correctness of every op, implementation and dtype on the card, tuning, microbenchmarks
against peers, whole clips, VAE decode, pictures. Each slice runs in a process that may crash or hang without harm to
the others, and its result is in its file before the next one starts: whatever ends the campaign (the time limit,
Ctrl-C, SIGTERM, a machine that goes away), what was finished stays, and ``--resume`` goes on from there. The most
valuable slices come first; one that does not fit the time that is left gives way to smaller ones.

Runs from a checkout, without installing anything and without a network, in a Python with torch, triton, numpy and
pytest. ``--device cpu --dry`` walks the same slices on tiny shapes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fnmatch
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyvideo_kernels import verdicts
from pyvideo_kernels.configs import tuned
from pyvideo_kernels.error_types import PyVideoError, UnsupportedError, ValueOptionError
from pyvideo_kernels.sampler.problems import Exit, did_you_mean, exit_code
from pyvideo_kernels.sampler.video import check_folder

from . import slices
from .slices import ROOT, Slice
from .state import State
from .worker import RUNNING, Process

RESERVE = 10.0
"""Seconds kept for the last pictures and the summary."""
ATTEMPTS = 2
"""A slice that failed is tried once more by a later ``--resume``."""
_RESTS = "tune"
"""The group whose process outlives the slices of others that come between its own."""
_ANSWER_S = 120.0
"""Seconds in which a card must say what it is: importing torch from a cold disk takes a good part of them."""


class Campaign:
    """A plan, where its results go, and how long it may take.

    Args:
        plan: the slices, the most wanted first.
        state: what is done already, and the folder of the result files.
        device: ``"cuda"`` or ``"cpu"``.
        seconds: the whole time limit.
        keep: a result of other sources than the present ones counts as done.
        pack: archive of everything to take home, rewritten after each slice.
    """

    def __init__(
        self, plan: Sequence[Slice], state: State, *, device: str, seconds: float, keep: bool = False,
        pack: Path | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.state, self.device, self.keep, self.pack = list(plan), state, device, keep, pack
        self.deadline = time.monotonic() + seconds
        self.processes: dict[str, Process] = {}
        self.runs: collections.Counter[str] = collections.Counter()

    @property
    def left(self) -> float:
        """Seconds until the time limit."""
        return self.deadline - time.monotonic()

    def run(self) -> None:
        """Run slices until none is left or none fits; what is finished is on disk, whatever ends this."""
        self.state.out.mkdir(parents=True, exist_ok=True)
        for each in self.plan:
            if missing := each.missing():
                self.state.record(each.name, status="skipped", summary=f"needs {', '.join(missing)}")
                say(f"skipped  {each.name}: needs {', '.join(missing)}, not installed")
        try:
            while (chosen := self._next()) is not None:
                self._run(chosen)
        finally:
            self._end_processes()
            shutil.rmtree(self.state.out / RUNNING, ignore_errors=True)

    def _next(self) -> Slice | None:
        """The first slice that is wanted and fits: those never measured, then stale ones, then those that failed."""
        ranked: dict[str, list[Slice]] = {"left": [], "stale": [], "failed": []}
        for each in self.plan:
            # Stale twice in one run: something that it depends on changes under it, which another round cannot help.
            if self.runs[each.name] < 2 and not each.missing():
                status = self.state.status(each, keep=self.keep)
                tried = self.runs[each.name] and status in ("left", "failed")
                if status in ranked and not tried and self.state.attempts(each) < ATTEMPTS:
                    ranked[status].append(each)
        fits = (s for status in ranked for s in ranked[status] if self.state.least(s) <= self.left - RESERVE)
        return next(fits, None)

    def _run(self, each: Slice) -> None:
        key, start = each.key(self.state.where), time.monotonic()
        limit = min(each.limit, self.left - RESERVE)
        say(f"running  {each.name} (about {self.state.estimate(each):.0f} s; {self.left:.0f} s left)")
        self.runs[each.name] += 1
        request = {
            "run": each.run,
            "out": str(self.state.out.resolve() / f"{each.name}.json"),
            "dry": self.state.dry,
            "parameters": dict(each.parameters),
            "seconds": limit,
        }
        answer = self._process_for(each).run(request, limit)
        if answer.status == "left":  # its compilers may be at work for what there was no time for
            self._end_processes()
        status = answer.status
        if status == "stopped":  # by its own limit: it hangs; by the end of the campaign: it waits for the next one
            status = "failed" if limit >= each.limit else "left"
        seconds = time.monotonic() - start
        self.state.record(
            each.name, status=status, key=key, seconds=seconds, summary=answer.summary, red=answer.red, tail=answer.tail
        )
        say(f"{status:8} {each.name} in {seconds:.0f} s: {answer.summary}{'  RED' if answer.red else ''}")
        if status == "failed" and answer.tail:
            say("\n".join(f"    | {line}" for line in answer.tail.splitlines()[-8:]))
        if self.pack is not None:
            pack(self.pack, self.state.out)

    def report(self) -> None:
        """The results so far as one page with plots, in the time that is left."""
        if not any(self.state.out.glob("*-*.json")) or self.left <= 0:
            return
        process = Process(self.device, {})
        request = {
            "run": f"{slices.RUNS}:report",
            "out": str(self.state.out.resolve() / "report"),
            "dry": self.state.dry,
            "parameters": {"folder": str(self.state.out.resolve())},
            "seconds": self.left,
        }
        try:
            answer = process.run(request, self.left)
        finally:
            process.close()
            shutil.rmtree(self.state.out / RUNNING, ignore_errors=True)
        say(f"report: {answer.summary}")
        if self.pack is not None:
            pack(self.pack, self.state.out)

    def _process_for(self, each: Slice) -> Process:
        """A worker: the group's where it may be shared, else a new one.

        Between its turns the tuner's rests with its compilers, which take long to start; one that measures alone has
        the card to itself. A dry run shares one process for all: it is about the walk, not about timings that a
        neighbour could disturb.
        """
        group = "dry" if self.state.dry else each.name if each.alone else each.group
        resting = () if each.alone else (_RESTS,)
        self._end_processes(but=[name for name in (group, *resting) if name in self.processes])
        if group not in self.processes:
            # The interpreter takes the place of the card; Triton reads this when it is imported.
            environment = {"TRITON_INTERPRET": "1"} if self.device == "cpu" else {}
            self.processes[group] = Process(self.device, environment)
        return self.processes[group]

    def _end_processes(self, but: Sequence[str] = ()) -> None:
        """End those that are not of these groups, and those that have failed."""
        for name, process in list(self.processes.items()):
            if name not in but or not process.usable:
                process.close()
                del self.processes[name]


def say(text: str) -> None:
    """One line of progress, at once: the output of a run that is cut off ends with what was going on."""
    print(text, flush=True)


def pack(archive: Path, out: Path) -> None:
    """Everything to take home, in one file: the results, the tuned tables and the record of verified kernels."""
    temporary = archive.with_name(f".{archive.name}.{os.getpid()}.tmp")
    archive.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(temporary, "w:gz") as tar:
            for path in (*sorted(out.glob("*.json")), *sorted(tuned.FOLDER.glob("*.json")), verdicts.VERIFIED):
                inside = path.resolve().is_relative_to(ROOT)
                tar.add(path, arcname=str(path.resolve().relative_to(ROOT)) if inside else f"{out.name}/{path.name}")
        os.replace(temporary, archive)
    finally:
        temporary.unlink(missing_ok=True)


def summary(campaign: Campaign, command: str) -> str:
    """The last thing printed: a line a slice, what is red, and how to go on."""
    lines, counts = campaign.state.table(campaign.plan, keep=campaign.keep)
    text = ["", f"{'':8}slice", *lines, ""]
    text.append(", ".join(f"{n} {status}" for status, n in counts.items() if n) + f"; results in {campaign.state.out}")
    if campaign.pack is not None:
        text.append(f"to take home: {campaign.pack}")
    if any(counts[status] for status in ("left", "stale", "failed")):
        seconds = sum(campaign.state.estimate(s) for s in campaign.plan
                      if campaign.state.status(s, keep=campaign.keep) in ("left", "stale"))  # fmt: skip
        text.append(f"about {seconds / 60:.0f} minutes are left; go on with: {command}")
    return "\n".join(text)


# Command ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign; 0: nothing failed and nothing is red (slices may be left), 1: something is, 2: usage."""
    options = _parser().parse_args(argv)
    try:
        return _main(options)
    except PyVideoError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(exit_code(error) or Exit.FAILED)


def _main(options: argparse.Namespace) -> int:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = select(slices.plan(dry=options.dry), options.only or [])
    if options.list:
        print("\n".join(f"{each.name:44}{each.seconds:>6.0f} s" for each in plan))
        print(f"{len(plan)} slices, about {sum(each.seconds for each in plan) / 60:.0f} minutes on an H100")
        return Exit.OK
    if device == "cpu" and not options.dry:
        raise UnsupportedError("a campaign measures a card and none is here; --device cpu walks it with --dry alone")
    if options.revision:
        os.environ["PYVIDEO_REVISION"] = options.revision
    where, name = machine(device)
    out = options.out or (ROOT / "runs" / "campaign-dry" if options.dry else ROOT / "benchmarks" / "results" / name)
    check_folder(out, "out")
    if options.pack is not None:
        check_folder(options.pack.resolve().parent, "pack")
    state = State(out, where, dry=options.dry, fresh=not options.resume)
    campaign = Campaign(
        plan, state, device=device, seconds=60 * options.minutes, keep=options.keep, pack=options.pack
    )  # fmt: skip
    say(f"{where.get('gpu', device)}: {len(plan)} slices, {options.minutes:g} minutes, results in {out}")
    ended = Exit.OK
    with _signals():
        try:
            campaign.run()
            campaign.report()
        except KeyboardInterrupt:
            ended = Exit.INTERRUPTED
            say("interrupted; everything finished is kept")
    print(summary(campaign, _again(options)), flush=True)
    if ended is Exit.OK:
        _, counts = state.table(plan, keep=options.keep)
        ended = Exit.FAILED if counts["failed"] or counts["red"] else Exit.OK
    return ended


def select(plan: Sequence[Slice], only: Sequence[str]) -> list[Slice]:
    """The slices whose name or group is asked for, or whose name matches a pattern; all without a wish."""
    unknown = [w for w in only if not any(w == s.group or fnmatch.fnmatch(s.name, w) for s in plan)]
    if unknown:
        groups = dict.fromkeys(each.group for each in plan)
        raise ValueOptionError(
            f"--only {unknown[0]}: no slice or group is called so{did_you_mean(unknown[0], [s.name for s in plan])}; "
            f"groups: {', '.join(groups)}; --list shows the slices"
        )
    return [s for s in plan if not only or any(w == s.group or fnmatch.fnmatch(s.name, w) for w in only)]


def machine(device: str) -> tuple[dict[str, Any], str]:
    """What names the machine in the slices' keys, and its folder of results.

    A card is asked in a process of its own: this one must not hold a context on it while others are measured.

    Raises:
        UnsupportedError: that process fails, hangs or answers with something else.
        ValueOptionError: the checkout has no revision.
    """
    where: dict[str, Any] = {"torch": torch.__version__, "triton": verdicts.triton_version(), "device": device}
    if device == "cpu":
        return where, "cpu"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pyvideo_kernels.collect_env", "--json"],
            capture_output=True, text=True, cwd=ROOT, timeout=_ANSWER_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UnsupportedError(f"the card does not answer: nothing came of it in {_ANSWER_S:.0f} s") from None
    if done.returncode:
        raise UnsupportedError(f"the card does not answer: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    try:
        facts = json.loads(done.stdout)
    except ValueError as error:
        raise UnsupportedError(
            f"the card does not answer: expected JSON of collect_env; got {done.stdout[:80]!r} ({error})"
        ) from None
    return named(facts, where)


def named(facts: Mapping[str, Any], where: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """``where`` with the card of `collect_env.collect`, and the card's folder."""
    if not facts["gpus"]:
        raise UnsupportedError(f"the card does not answer: {facts['why_no_gpu']}")
    if not facts.get("revision"):
        raise ValueOptionError(
            "this copy of the checkout has no git revision, and a result must name one: give --revision, the output "
            "of `git rev-parse --short HEAD` where it was copied from"
        )
    gpu = facts["gpus"][0]
    found = {"gpu": gpu["gpu"], "arch": gpu["arch"], "extension": facts["extension"]["cuda"]}
    return {**where, **found}, slices.slug(gpu["gpu"])


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends the campaign as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _again(options: argparse.Namespace) -> str:
    words = ["python -m benchmarks.campaign", f"--minutes {options.minutes:g}", "--resume"]
    words += [f"--{name} {shlex.quote(str(value))}" for name in ("out", "device", "revision", "pack")
              if (value := getattr(options, name))]  # fmt: skip
    words += [f"--{name}" for name in ("dry", "keep") if getattr(options, name)]
    return " ".join(words + [f"--only {shlex.quote(name)}" for name in options.only or []])


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < 24 * 60:
        raise argparse.ArgumentTypeError(f"expected minutes, more than 0; got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaign", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="time limit of this run (default: 9)")
    parser.add_argument("--resume", action="store_true", help="go on with what is not done")
    parser.add_argument("--keep", action="store_true", help="keep results that were measured with other sources")
    parser.add_argument("--only", action="append", metavar="NAME", help="a slice, a pattern or a group; more than once")
    parser.add_argument("--list", action="store_true", help="show the slices and what they cost, run nothing")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/<card>)")
    parser.add_argument("--pack", type=Path, metavar="FILE.tar.gz", help="archive of results, tuned tables and record")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--dry", action="store_true", help="the same slices on tiny shapes; refused by every table")
    parser.add_argument("--revision", help="git revision of a checkout that was copied without its .git")
    return parser
