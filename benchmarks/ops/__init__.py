"""``pyvideo bench ops``: every op against eager PyTorch, torch.compile and external kernels, on this machine.

Correctness comes first: the implementation that ran must be right on the op's samples against float64, and at the
benchmark's own size against eager (`agreement` states the rule). One that is not has an ``error`` and no speed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pyvideo_kernels import dispatch
from pyvideo_kernels.error_types import UnsupportedError, ValueOptionError
from pyvideo_kernels.sampler.problems import Exit, Interrupted, OutputError, did_you_mean
from pyvideo_kernels.schemas import OPS

from .. import goals, results
from ..registry import ENTRIES
from ..timing import ceilings, dtype_name
from .row import Row, Runner
from .table import printer_for

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
QUICK_ROUNDS = 3


class Stopped(KeyboardInterrupt):
    """Ctrl-C during `run`.

    Args:
        result: what `run` would have returned, with the rows that were finished.
    """

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__("interrupted")
        self.result = result


# Runs ---------------------------------------------------------------------------------------------------------------


def selection(ops: Sequence[str], impl: str, device: torch.device) -> list[str]:
    """The ops to measure (all when empty) that have ``impl``.

    Raises:
        ValueOptionError, UnsupportedError: an unknown op or implementation, or an op that was asked for by name and
            has not this implementation.
        DeviceError: the implementation does not run on this device.
    """
    for name in ops:
        if name not in ENTRIES:
            raise ValueOptionError(
                f"op: must be one of {', '.join(ENTRIES)}; got {name!r}{did_you_mean(name, ENTRIES)}"
            )
    if impl not in dispatch.IMPLS:
        expected = ", ".join(dispatch.IMPLS)
        raise ValueOptionError(f"impl: must be one of {expected}; got {impl!r}{did_you_mean(impl, dispatch.IMPLS)}")
    if impl == "auto":
        return list(dict.fromkeys(ops)) or list(ENTRIES)
    for name in ops:
        if impl not in OPS[name].impls:
            raise UnsupportedError(f"{name}: no implementation {impl!r}; there are {', '.join(OPS[name].impls)}")
    names = list(dict.fromkeys(ops)) or [name for name in ENTRIES if impl in OPS[name].impls]
    for name in names:
        dispatch.check_runs_on(OPS[name], impl, device)
    return names


def run(
    ops: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
    baselines: Sequence[str] | None = None,
    rounds: int = 7,
    quick: bool = False,
    deadline: float | None = None,
    on_row: Callable[[Row], None] | None = None,
    on_start: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure ``ops`` (all when empty); returns a result of kind ``ops`` (see `results`).

    Args:
        ops: names in the registry.
        device, dtype: where and in what.
        impl: implementation to measure; ``auto``: what a call would bind.
        baselines: ``eager``, ``compile``, names of external kernels; None: all.
        rounds: timings a median is taken over.
        quick: one shape an op, `QUICK_ROUNDS` rounds, eager alone unless ``baselines`` says otherwise.
        deadline: a `time.monotonic`; no row is begun that would end later, if it takes as long as the longest so far.
            Those that were not are named in the result's ``unfinished``.
        on_row: called with each row as it is finished.
        on_start: called with the result before its first row, ceilings measured.
    Raises:
        ValueOptionError, UnsupportedError, DeviceError: an unknown op, implementation or baseline, or one that cannot
            run here, before any work.
        Stopped: Ctrl-C, with the rows so far.
    """
    from .baselines import chosen

    names = selection(ops, impl, device)
    wanted = chosen(baselines if baselines or not quick else ("eager",), names, device, dtype)
    rounds = min(rounds, QUICK_ROUNDS) if quick else rounds
    tops = ceilings(device, dtype)
    result: dict[str, Any] = {
        "schema": results.SCHEMA,
        "kind": "ops",
        "provenance": results.provenance(device),
        "settings": {
            "dtype": dtype_name(dtype),
            **({"sampler_dtype": dtype_name(goals.sampler_dtype(device))} if device.type == "cpu" else {}),
            "rounds": rounds,
            "impl": impl,
            "baselines": None if wanted is None else list(wanted),
            "quick": quick,
        },
        "ceilings": tops,
        "rows": [],
    }
    runner = Runner(device, dtype, tops, impl=impl, names=wanted, rounds=rounds)
    todo = [(name, shape) for name in names for shape in list(ENTRIES[name].shapes(device))[: 1 if quick else None]]
    longest = 0.0
    try:
        if on_start:
            on_start(result)
        for number, (name, shape) in enumerate(todo):
            begun = time.monotonic()
            if deadline is not None and begun + longest > deadline:
                result["unfinished"] = [" ".join(each) for each in todo[number:]]
                break
            row = runner.row(ENTRIES[name], shape, dict(ENTRIES[name].shapes(device)[shape]))
            longest = max(longest, time.monotonic() - begun)
            result["rows"].append(row)
            if on_row:
                on_row(row)
    except KeyboardInterrupt:
        raise Stopped(result) from None
    return result


# The command --------------------------------------------------------------------------------------------------------


def device_named(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``, and it is there."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        hint = did_you_mean(name, ("auto", "cpu", "cuda"))
        raise ValueOptionError(f"--device: must be auto, cpu, cuda or cuda:N; got {name!r}{hint}")
    from pyvideo_kernels.sampler.loading import pick_device

    return pick_device(name)


def _check_writable(path: Path) -> None:
    """Refuse a result file that could not be written after minutes of measuring."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--json {path}: no such folder can be made ({error.strerror or error})") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"--json {path}: must be a file in a folder that can be written to")


def command(
    ops: Sequence[str],
    device: str,
    dtype: str,
    impl: str,
    baseline: Sequence[str] | None,
    rounds: int,
    quick: bool,
    json: Path | None,
) -> None:
    """``pyvideo bench ops``; ends with exit code 1 when a row is wrong."""
    import typer

    if dtype not in DTYPES:
        raise ValueOptionError(
            f"--dtype: must be one of {', '.join(DTYPES)}; got {dtype!r}{did_you_mean(dtype, DTYPES)}"
        )
    if json is not None:
        _check_writable(json)
    place = device_named(device)
    printer = printer_for(place, single=quick)

    def keep(result: dict[str, Any], complete: bool) -> None:
        if json is not None:
            try:
                results.write(json, result if complete else {**result, "incomplete": True})
            except OSError as error:
                raise OutputError(f"--json {json}: cannot be written ({error.strerror or error})") from None

    result: dict[str, Any] = {}

    def start(begun: dict[str, Any]) -> None:
        result.update(begun)
        printer.start(result)

    def row_done(row: Row) -> None:
        printer.row(row)
        keep(result, False)

    try:
        result = run(
            ops, place, DTYPES[dtype], impl=impl, baselines=baseline, rounds=rounds, quick=quick,
            on_row=row_done, on_start=start,
        )  # fmt: skip
    except Stopped as stopped:
        printer.finish(stopped.result)
        done = len(stopped.result["rows"])
        kept = [json] if json is not None and done else []
        if kept:
            keep(stopped.result, False)
        raise Interrupted(f"the measurement after {done} rows", kept) from None
    printer.finish(result)
    keep(result, True)
    if any("error" in row for row in result["rows"]):
        raise typer.Exit(Exit.FAILED)
