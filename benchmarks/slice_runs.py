"""What the slices of a campaign do, each in the worker: measure, write the result file, say what was found in a line.

Every module that measures is imported inside: a slice needs no more than what it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import results
from .campaign_state import DRY

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """One slice to run.

    Args:
        out: its result file.
        device: where.
        dry: tiny shapes, and the result says so.
        parameters: what the plan says.
    """

    out: Path
    device: torch.device
    dry: bool
    parameters: Mapping[str, Any]

    def result(self, kind: str, rows: Iterable[Mapping[str, Any]] = (), **more: Any) -> dict[str, Any]:
        """A result of this machine."""
        where = results.provenance(self.device)
        head = {"schema": results.SCHEMA, "kind": kind, "provenance": where, "settings": dict(self.parameters)}
        return {**head, "ceilings": {}, **more, "rows": list(rows)}

    def write(self, result: dict[str, Any]) -> None:
        """The result file; marked where it is dry."""
        results.write(self.out, {DRY: True, **result} if self.dry else result)


@dataclass(frozen=True)
class Outcome:
    """One line on what was found, and how many rows of it are wrong."""

    summary: str
    red: int = 0


def environment(job: Job) -> Outcome:
    """What the machine is, and the rates that shares are shares of."""
    from pyvideo_kernels import collect_env

    from .timing import copy_bandwidth, gemm_rate

    sizes = (1 << 20, 64) if job.dry else (None, None)
    ceilings = {"copy": copy_bandwidth(job.device, sizes[0]), "gemm": gemm_rate(job.device, torch.bfloat16, sizes[1])}
    facts = collect_env.collect()
    job.write(job.result("environment", ceilings=ceilings, environment=facts))
    copy, gemm = ceilings["copy"] / 1e9, ceilings["gemm"] / 1e12
    return Outcome(f"copy {copy:.0f} GB/s, bf16 product {gemm:.1f} TFLOP/s, torch {torch.__version__}")


def correctness(job: Job) -> Outcome:
    """The op's tests on this card, a row a test."""
    from .correctness import test_rows

    op = job.parameters["op"]
    rows = test_rows(ROOT / "tests" / "ops" / f"test_{op}.py", op, on_card=job.device.type == "cuda")
    job.write(job.result("correctness", rows))
    counts = {what: sum(row["outcome"] == what for row in rows) for what in ("passed", "failed", "skipped", "not run")}
    red = [row for row in rows if row["outcome"] in ("failed", "not run")]
    text = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    if red:
        text += f"; first: {red[0]['test']}: {red[0]['message']}"[:160]
    return Outcome(text or "no test", len(red))


def ops(job: Job) -> Outcome:
    """The ops against eager, torch.compile and every peer that is here."""
    from . import ops as bench

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[job.parameters["dtype"]]
    names = job.parameters["ops"]
    if job.dry:
        with tiny_shapes(names):
            result = bench.run(names, job.device, dtype, baselines=["eager"], rounds=3)
    else:
        result = bench.run(names, job.device, dtype)
    job.write(result)
    return _speeds(result["rows"])


def _speeds(rows: list[dict[str, Any]]) -> Outcome:
    wrong = [row for row in rows if "error" in row]
    best: dict[str, float] = {}
    for row in rows:
        for name, found in row.get("baselines", {}).items():
            if "ratio" in found:
                best[name] = max(best.get(name, 0.0), found["ratio"])
    text = ", ".join(f"up to {value:.2f} x {name}" for name, value in best.items())
    return Outcome(f"{len(rows)} rows; {text}" + (f"; wrong: {wrong[0]['error']}"[:120] if wrong else ""), len(wrong))


def tune(job: Job) -> Outcome:
    """Launch configurations of every registered shape of the op."""
    raise NotImplementedError


def e2e(job: Job) -> Outcome:
    """A model end to end, at its true size with random weights."""
    from . import e2e as bench

    request = bench.Request(random_weights=True, device=str(job.device), **job.parameters)
    result = bench.run(request)
    job.write(result)
    good = [row for row in result["rows"] if "error" not in row]
    wrong = [row for row in result["rows"] if "error" in row]
    phase = "decode" if job.parameters["steps"] == 1 else "step"
    text = ", ".join(f"{row['variant']} {row['seconds'][phase]['median']:.3f} s" for row in good)
    text = f"{phase}: {text}" + (f"; {wrong[0]['variant']}: {wrong[0]['error']}"[:120] if wrong else "")
    return Outcome(text, len(wrong))


def record(job: Job) -> Outcome:
    """The record of kernels that were right on this card, which ships with the package."""
    raise NotImplementedError
