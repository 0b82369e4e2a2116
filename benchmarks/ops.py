"""``python -m benchmarks.ops``: every op against the model's eager code, on this machine, checked first.

    python -m benchmarks [--op NAME ...] [--device cpu|cuda] [--dtype bf16|fp32] [--rounds N] [--json FILE]

Prints one row an op and shape: median, spread, achieved rate, share of this machine's measured ceiling, ratio to
eager in the same run. An op whose check is red prints the mismatch and no speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyvideo_kernels import dispatch
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, check_op

from . import results
from .registry import ENTRIES, Entry, moved_bytes
from .timing import copy_bandwidth, gemm_rate, interleaved

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def bound_impl(entry: Entry, inputs: dict[str, Any]) -> str:
    """Which implementation ``auto`` ran for these inputs."""
    before = dispatch.calls()
    entry.ours(**inputs)
    after = dispatch.calls()
    ran = [impl for (op, impl), n in after.items() if op == entry.op and n > before.get((op, impl), 0)]
    return ran[0] if ran else "?"


def measure(
    entry: Entry,
    shape: str,
    sizes: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    ceilings: dict[str, float],
) -> dict[str, Any]:
    """One row: the check, then both sides timed in turns."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"op": entry.op, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
    inputs = entry.inputs(**sizes, dtype=dtype, device=device)
    with torch.inference_mode():
        row["impl"] = impl = bound_impl(entry, inputs)
        try:
            check_op(OPS[entry.op], impl, device, dtype, partial=True)
        except Mismatch as error:
            return {**row, "error": str(error)}
        timings = interleaved(
            {"ours": lambda: entry.ours(**inputs), "eager": lambda: entry.eager(**inputs)},
            device=device,
            rounds=rounds,
        )
        moved = moved_bytes(inputs, entry.ours(**inputs))
    ours, eager = timings["ours"], timings["eager"]
    flops = entry.flops(**sizes)
    rate, ceiling = (flops, ceilings["gemm"]) if flops else (float(moved), ceilings["copy"])
    return {
        **row,
        "seconds": ours.median,
        "spread": ours.spread,
        "eager_seconds": eager.median,
        "eager_spread": eager.spread,
        "ratio_to_eager": eager.median / ours.median,
        "rate": rate / ours.median,
        "unit": "FLOP/s" if flops else "B/s",
        "share_of_ceiling": rate / ours.median / ceiling,
    }


def run(ops: Sequence[str], device: torch.device, dtype: torch.dtype, rounds: int, echo: bool = True) -> dict[str, Any]:
    """Measure ``ops`` (all when empty); returns provenance, ceilings and rows."""
    ceilings = {"copy": copy_bandwidth(device), "gemm": gemm_rate(device, dtype)}
    result: dict[str, Any] = {
        "schema": results.SCHEMA,
        "kind": "ops",
        "provenance": results.provenance(device),
        "settings": {"dtype": str(dtype).removeprefix("torch."), "rounds": rounds},
        "ceilings": ceilings,
        "rows": [],
    }
    if echo:
        print(f"copy {ceilings['copy'] / 1e9:.1f} GB/s, gemm {ceilings['gemm'] / 1e12:.3f} TFLOP/s ({dtype}), measured")
    for name in ops or ENTRIES:
        entry = ENTRIES[name]
        for shape, sizes in (entry.gpu if device.type == "cuda" else entry.cpu).items():
            row = measure(entry, shape, dict(sizes), device, dtype, rounds, ceilings)
            result["rows"].append(row)
            if echo:
                print(format_row(row), flush=True)
    return result


def format_row(row: dict[str, Any]) -> str:
    head = f"{row['op']:28} {row['shape']:18} {row['dtype']:9} {row['impl']:10}"
    if "error" in row:
        return f"{head} WRONG: {row['error']}"
    scale, unit = (1e12, "TFLOP/s") if row["unit"] == "FLOP/s" else (1e9, "GB/s")
    return (
        f"{head} {row['seconds'] * 1e3:9.3f} ms ±{row['spread'] * 1e3:7.3f}  {row['rate'] / scale:8.3f} {unit:7} "
        f"{row['share_of_ceiling']:5.0%} of ceiling  {row['ratio_to_eager']:5.2f} x eager"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=sorted(ENTRIES), help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write provenance, ceilings and rows here")
    options = parser.parse_args(argv)
    result = run(options.op or [], torch.device(options.device), DTYPES[options.dtype], options.rounds)
    if options.json:
        results.write(options.json, result)
    return 1 if any("error" in row for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
