"""``python -m benchmarks.tune``: times launch configurations on this card and writes ``configs/<gpu>.json``.

    python -m benchmarks.tune [--op NAME ...] [--budget-seconds N] [--resume] [--out FILE]
    python -m benchmarks.tune --device cpu --dry --out FILE   # the same steps, interpreted, on tiny inputs

For every registered GPU shape it notes what the launchers ask of the configurations. For each such key: the
candidates are compiled in parallel by the static harness; what spills, exceeds shared memory or does not compile is
out. What is left must give the rule's output, or it is dropped and named. The rest is timed in turns with the rule
and halved until few are left, which are timed at every shape that asks for the key. The fastest becomes the table's
row if it beats the rule by more than 2 % and by more than twice the spread, and is slower at none of the shapes. The
table is written after each key: an interrupt loses one key at most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyvideo_kernels.configs import forced_arch, target_of, tuned
from pyvideo_kernels.dispatch import interpreting
from pyvideo_kernels.errors import DeviceError, PyVideoError, UnsupportedError, ValueOptionError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, check_op

from ..registry import ENTRIES
from ..results import SCHEMA, provenance, write
from ..timing import interleaved
from .launches import Launch, asked, launches_of, shared_compiler
from .search import GAIN, OutOfTime, Question, Say, Search, Timer


@dataclass
class Summary:
    """What a call of `tune` did; plain values alone."""

    path: str
    finished: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    improved: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    recompiled: int = 0


# The table -------------------------------------------------------------------------------------------------------


_COLUMNS = {"op", "family", "key", "config", "tuned", "default_config", "measured", "digest"}


class Table:
    """The file being written: rows of other keys are kept as long as card and compiler are the same."""

    def __init__(self, path: Path, device: torch.device, settings: dict[str, Any]) -> None:
        self.path = path
        where = provenance(device) | {"triton": tuned.triton_version()}
        if device.type == "cuda":
            where["gpu"] = torch.cuda.get_device_name(device)  # the name that tables are looked up by
        where["revision"] = where.get("revision") or "unknown"  # a copy without git: the rows' digests tell
        self.result: dict[str, Any] = {
            "schema": SCHEMA, "kind": "tuning", "provenance": where, "settings": settings, "ceilings": {},
            "rows": [], "crashed": [],
        }  # fmt: skip
        self.note: str | None = None
        try:
            before = json.loads(path.read_text())
            old, same = before["provenance"], ("device", "arch", "gpu", "cpu", "triton")
            if changed := [name for name in same if old.get(name) != where.get(name)]:
                self.note = f"{path.name}: was measured with another {', '.join(changed)}; its rows are not kept"
            else:
                self.result["rows"] = [row for row in before["rows"] if row.keys() >= _COLUMNS and tuned.current(row)]
                self.result["crashed"] = [row for row in before.get("crashed", []) if tuned.current(row)]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.note = f"{path.name}: is not readable ({type(error).__name__}: {error}) and is written anew"

    def finished(self, question: Question, rule: Any) -> bool:
        """Whether the key was measured with the present kernel against the present rule, at all of its shapes."""
        shapes = [launch.shape for launch in question.launches]
        return any(
            (row["family"], row["key"]) == (question.family, dict(question.key))
            and row["digest"] == tuned.digest(question.op)
            and row["default_config"] == asdict(rule)
            and [each["shape"] for each in row["measured"]] == shapes
            for row in self.result["rows"]
        )

    def crashed(self, question: Question, config: Any, error: str) -> None:
        """Note what took the process down, so that the next one leaves it out."""
        row = tuned.as_row(question.family, question.key, config)
        self.result["crashed"].append({**row, "digest": tuned.digest(question.op), "error": error})
        write(self.path, self.result)

    def excluded(self) -> list[tuple[str, tuned.Key, Any]]:
        """Family, key and configuration of what took a process down."""
        return [
            (row["family"], tuple(sorted(row["key"].items())), tuned.families()[row["family"]].config(**row["config"]))
            for row in self.result["crashed"]
        ]

    def put(self, row: dict[str, Any]) -> None:
        """Replace the key's row and write the file."""
        kept = [r for r in self.result["rows"] if (r["family"], r["key"]) != (row["family"], row["key"])]
        self.result["rows"] = sorted([*kept, row], key=lambda r: (r["op"], r["family"], str(sorted(r["key"].items()))))
        write(self.path, self.result)
        tuned.clear()


def table_path(device: torch.device, out: Path | None) -> Path:
    """Where the table goes; refuses to put anything but a card's own table among the package's."""
    if device.type != "cuda":
        if out is None or out.resolve().parent == tuned.FOLDER:
            raise ValueOptionError(
                f"tune: `out` must be a file outside {tuned.FOLDER.name}/ on a {device.type}, whose times say nothing "
                f"about a card; got {None if out is None else str(out)!r}"
            )
        return out
    own = f"{target_of(device).gpu}.json"
    if out is not None and out.resolve().parent == tuned.FOLDER and out.name != own:
        raise ValueOptionError(f"tune: `out` in {tuned.FOLDER.name}/ must be {own} on this card; got {out.name!r}")
    return out or tuned.FOLDER / own


def questions(ops: Sequence[str], device: torch.device, dtype: torch.dtype, arch: str) -> list[Question]:
    """What the launches of ``ops`` ask, each key once."""
    found: dict[tuple[str, tuned.Key], list[Launch]] = {}
    for op in ops or ENTRIES:
        for launch in launches_of(op, device, dtype):
            for each in asked(launch, arch):
                found.setdefault((each.family, each.key), []).append(launch)
    out = [Question(*at, tuple(sorted(launches, key=Launch.weight))) for at, launches in found.items()]
    return sorted(out, key=lambda question: question.op.endswith("_backward"))  # inference first


def tune(
    ops: Sequence[str] = (),
    device: torch.device | str = "cuda",
    *,
    out: Path | str | None = None,
    budget_s: float | None = None,
    workers: int | None = None,
    rounds: int = 7,
    resume: bool = True,
    dry: bool = False,
    dtype: torch.dtype | None = None,
    timer: Timer = interleaved,
    on_progress: Say = print,
) -> dict[str, Any]:
    """Time configurations for every registered shape of ``ops`` (all, if empty) and write the card's table.

    Args:
        device: a CUDA device; a CPU needs ``dry``, Triton's interpreter and an ``out``.
        out: the table; None: the package's own for this card.
        budget_s: seconds after which no further key is started, and one in hand is given up; None: no end.
        workers: processes that compile; None: one a core but one; 0 (CPU): nothing is compiled.
        rounds: timings of the last comparison.
        resume: keys finished with the present kernel, rule and compiler are not measured again.
        dry: two candidates a key.
        dtype: of the inputs; None: bf16 (fp16 on a CPU, whose interpreter has no bf16 products).
        timer: stands in for the harness in tests.
        on_progress: is given a line at a time.
    Returns:
        `Summary` as a dictionary: keys finished, skipped (finished before), left, improved (with the ratio), wrong.
    Raises:
        ValueOptionError: a CPU without ``dry``, an unknown op, or a table among the package's that is not this card's.
        DeviceError: there is no GPU.
    """
    device = torch.device(device)
    cpu = device.type != "cuda"
    if not cpu and not torch.cuda.is_available():
        raise DeviceError(f"tune: `device` must be a GPU that is here; got {device}, and torch finds none")
    if not cpu and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if cpu and not dry:
        raise ValueOptionError(f"tune: `device` must be a CUDA device, or `dry` set; got {device}")
    if cpu and not interpreting():
        raise UnsupportedError("tune: a CPU interprets the kernels: set TRITON_INTERPRET=1 before Triton is imported")
    path = table_path(device, None if out is None else Path(out))
    # One core is left to the process that launches: the next key's candidates compile while this one's are timed.
    workers = max(1, (os.cpu_count() or 1) - 1) if workers is None else workers
    dtype = dtype or (torch.float16 if cpu else torch.bfloat16)
    until = None if budget_s is None else time.monotonic() + budget_s
    host = str(target_of(device))
    summary, table = Summary(str(path)), Table(path, device, {"rounds": rounds, "gain": GAIN, "dry": dry})
    if table.note:
        on_progress(table.note)
    todo = []
    for question in questions(ops, device, dtype, host):
        rule = tuned.families()[question.family].rule(host, **dict(question.key))
        if resume and table.finished(question, rule):
            summary.skipped.append(str(question))
        else:
            todo.append(question)
    compiler = shared_compiler(workers) if workers and todo else None
    try:
        search = Search(
            device,
            "sm_90" if cpu else host,
            compiler,
            rounds,
            2 if dry else None,
            until,
            timer,
            on_progress,
            table.excluded(),
            table.crashed,
        )
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with torch.inference_mode(), on_device:
            _search(search, todo, table, summary)
    finally:
        if compiler is not None:
            compiler.rest()
    return asdict(summary)


def _search(search: Search, todo: Sequence[Question], table: Table, summary: Summary) -> None:
    red: dict[str, str] = {}
    for number, question in enumerate(todo):
        try:
            search.check_time()
            if question.op not in red:
                search.prepare(question)
                red[question.op] = _red(question, search.device)
            if red[question.op]:
                summary.wrong.append(f"{question.op}: {red[question.op]}")
                search.say(f"{question}: NOT TUNED, the rule's own output is wrong: {red[question.op]}")
                continue
            row = search.answer(question, next(iter(todo[number + 1 :]), None))
        except OutOfTime:
            summary.left = [str(each) for each in todo[number:]]
            search.say(f"out of time with {len(summary.left)} of {len(todo)} keys left")
            break
        table.put(row)
        summary.finished.append(str(question))
        ratio = row["default_seconds"] / row["seconds"]
        if row["tuned"]:
            summary.improved[str(question)] = ratio
        what = f"{ratio:.3f} x with {row['config']}" if row["tuned"] else "the rule stays"
        search.say(f"{question}: {what} ({row['candidates']} tried, dropped {row['dropped'] or 'none'})")
    summary.wrong += search.wrong
    summary.recompiled = search.recompiled


def _red(question: Question, device: torch.device) -> str:
    """What the oracle says against the rule's own output; empty: nothing."""
    dtype = getattr(torch, question.dtype)
    try:
        with forced_arch(str(target_of(device))):
            check_op(OPS[question.op], "triton", device, dtype, partial=True)
    except Mismatch as error:
        return str(error)
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 done, 1 something was wrong, 2 refused, 5 the table cannot be written, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", choices=sorted(ENTRIES), help="once or more; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16, fp16 on a CPU")
    parser.add_argument("--budget-seconds", type=float, help="start no key after so long")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, help="processes that compile; default: one a core but one")
    parser.add_argument("--out", type=Path, help="default: this card's table among the package's configurations")
    parser.add_argument("--resume", action="store_true", help="skip keys that the table has for the present kernels")
    parser.add_argument("--dry", action="store_true", help="two candidates a key; on a CPU, tiny inputs")
    options = parser.parse_args(argv)
    if options.device == "cpu" and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    try:
        summary = tune(
            options.op or (), options.device, out=options.out, budget_s=options.budget_seconds,
            workers=options.workers, rounds=options.rounds, resume=options.resume, dry=options.dry,
            dtype=dtypes.get(options.dtype),
        )  # fmt: skip
    except PyVideoError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"the table cannot be written: {error}; --out puts it elsewhere", file=sys.stderr)
        return 5
    except KeyboardInterrupt:
        print("interrupted; finished keys are in the table, --resume goes on", file=sys.stderr)
        return 130
    print(
        f"{summary['path']}: {len(summary['finished'])} keys measured, {len(summary['improved'])} faster than the rule,"
        f" {len(summary['skipped'])} finished before, {len(summary['left'])} left, {len(summary['wrong'])} wrong"
    )
    return 1 if summary["wrong"] else 0
