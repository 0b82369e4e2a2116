"""What the slices of a campaign do, each in the worker: measure, write the result file, say what was found in a line.

Every module that measures is imported inside: a slice needs no more than what it runs.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from .worker import Job, Outcome

if TYPE_CHECKING:
    from ..timing import Timing

# What a key in hand takes to stop, and the process to start, of the seconds that a tuning slice has.
_TUNE_MARGIN = 15.0
# What the last row of an op may take beyond the longest before it.
_ROW_MARGIN = 15.0
# What the last clip in hand may take beyond what was foreseen.
_CLIP_MARGIN = 30.0


def environment(job: Job) -> Outcome:
    """What the machine is, and the rates that shares are shares of."""
    from pyvideo_kernels import collect_env

    from ..timing import copy_bandwidth, gemm_rate

    device = torch.device(job.device)
    sizes = (1 << 20, 64) if job.dry else (None, None)
    ceilings = {"copy": copy_bandwidth(device, sizes[0]), "gemm": gemm_rate(device, torch.bfloat16, sizes[1])}
    facts = collect_env.collect()
    job.write(job.result("environment", ceilings=ceilings, environment=facts))
    copy, gemm = ceilings["copy"] / 1e9, ceilings["gemm"] / 1e12
    return Outcome(f"copy {copy:.0f} GB/s, bf16 product {gemm:.1f} TFLOP/s, torch {torch.__version__}")


def correctness(job: Job) -> Outcome:
    """The op's canaries and its tests on this card, a row each; what is all green enters the record that ships."""
    from pyvideo_kernels import verdicts

    from .correctness import canary_rows, judged, shown, test_rows

    op, device = job.parameters["op"], torch.device(job.device)
    on_card = device.type == "cuda"
    canaries = canary_rows(op, device)
    rows = test_rows(op, on_card=on_card)
    result = job.result("correctness", [*map(shown, canaries), *rows])
    job.write(result)
    if on_card:
        verdicts.commit(verdicts.VERIFIED, judged(canaries, rows), result["provenance"])
    return _outcomes(result["rows"])


def _outcomes(rows: list[dict[str, Any]]) -> Outcome:
    counts = collections.Counter(row["outcome"] for row in rows)
    red = [row for row in rows if row["outcome"] in ("failed", "not run")]
    text = ", ".join(f"{n} {what}" for what, n in counts.items()) or "no test"
    if red:
        text += f"; first: {red[0]['test']}: {red[0].get('message', '')}"[:160]
    return Outcome(text, len(red))


def ops(job: Job) -> Outcome:
    """The ops against eager, torch.compile and every peer that is here; what does not fit waits for another time."""
    from .. import ops as bench

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[job.parameters["dtype"]]
    names, device, began = job.parameters["ops"], torch.device(job.device), time.monotonic()
    if job.dry:
        with tiny_shapes(names):
            result = bench.run(names, device, dtype, baselines=["eager"], rounds=3)
    else:
        result = bench.run(names, device, dtype, deadline=began + max(1.0, job.seconds - _ROW_MARGIN))
    if result["rows"]:  # a table cannot take a file without one
        job.write(result)
    found, late = _speeds(result["rows"]), result.get("unfinished", [])
    if not late:
        return found
    return dataclasses.replace(found, summary=f"{found.summary}; no time for {', '.join(late)}"[:300], unfinished=True)


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
    """Launch configurations of every registered shape of the op, into the card's table."""
    from pyvideo_kernels.testing import compare

    from ..tune import run as tuner

    names = job.parameters["ops"]
    if job.dry:
        questions, table = tuner.questions, job.out.with_name("tables") / "dry.json"
        # The samples of attention's backward take the interpreter minutes.
        forward = lambda *asked: [q for q in questions(*asked) if not q.op.endswith("_backward")]
        every = compare.samples
        first = lambda *asked, **more: itertools.islice(every(*asked, **more), 1)  # the ops' tests check them all
        patched = mock.patch.object(tuner, "questions", forward), mock.patch.object(compare, "samples", first)
        with tiny_shapes(names), patched[0], patched[1]:
            found = tuner.tune(names, job.device, out=table, dry=True, rounds=3, workers=0, timer=_once)
    else:
        found = tuner.tune(names, job.device, budget_s=max(1.0, job.seconds - _TUNE_MARGIN))
    # Not the table's path: it is of this checkout.
    job.write(job.result("tuning", found={key: value for key, value in found.items() if key != "path"}))
    best = max(found["improved"].values(), default=1.0)
    text = f"{len(found['finished']) + len(found['skipped'])} keys, {len(found['improved'])} faster, best {best:.2f} x"
    if found["left"]:
        text += f", {len(found['left'])} left"
    return Outcome(
        text + (f"; {found['wrong'][0]}"[:120] if found["wrong"] else ""), len(found["wrong"]), bool(found["left"])
    )


def e2e(job: Job) -> Outcome:
    """A model end to end, at its true size with random weights; variants that do not fit wait for another time."""
    from .. import e2e as bench
    from ..e2e.session import LEFT_OUT

    seconds = max(1.0, job.seconds - _CLIP_MARGIN)
    result = bench.run(bench.Request(random_weights=True, device=job.device, seconds=seconds, **job.parameters))
    late = [row["variant"] for row in result["rows"] if row.get("error", "").startswith(LEFT_OUT)]
    result["rows"] = [row for row in result["rows"] if row["variant"] not in late]
    job.write(result)
    good = [row for row in result["rows"] if "error" not in row]
    wrong = [row for row in result["rows"] if "error" in row]
    text = ", ".join(f"{row['variant']} {row['seconds']['step']['median']:.3f} s" for row in good)
    text = f"step: {text}" + (f"; {wrong[0]['variant']}: {wrong[0]['error']}"[:120] if wrong else "")
    text += f"; no time for {', '.join(late)}" if late else ""
    return Outcome(text, len(wrong), unfinished=bool(late))


def vae(job: Job) -> Outcome:
    """A VAE's decoder alone, at its true size with random weights."""
    from .. import vae as bench

    parameters = {**job.parameters, "variants": tuple(job.parameters["variants"])}
    seconds = max(1.0, job.seconds - _CLIP_MARGIN)
    # The error against float32 costs a decode without tensor cores; the clip's own bench has it.
    result = bench.run(bench.Request(device=job.device, seconds=seconds, float32=job.dry, **parameters))
    job.write(result)
    wrong = [row for row in result["rows"] if "error" in row]
    text = ", ".join(f"{row['variant']} {row['seconds']:.3f} s" for row in result["rows"] if "seconds" in row)
    return Outcome(
        f"decode: {text}" + (f"; {wrong[0]['variant']}: {wrong[0]['error']}"[:120] if wrong else ""), len(wrong)
    )


def report(job: Job) -> Outcome:
    """The results so far as a page and plots where git ignores them."""
    from .. import numbers

    folder = Path(job.parameters["folder"])
    into = folder / "report" if job.dry else numbers.ROOT / "runs" / "campaign" / folder.name
    found = (path for path in sorted(folder.glob("*.json")) if path.name != numbers.STATE)
    paths = numbers.report(found, into, f"Campaign: {folder.name}", dry=job.dry)
    return Outcome(f"{paths[0]} and {len(paths) - 1} plots")


# Dry runs ----------------------------------------------------------------------------------------------------------

_TINY = {
    "tokens": 6, "width": 32, "heads": 2, "grid": (2, 3, 4), "channels": 8, "head_dim": 16, "shape": (1, 4, 2, 4, 4),
    "ffn": 48,
}  # fmt: skip


def _once(
    calls: Mapping[str, Callable[[Any], Any]], sets: Sequence[Any], *, failures: dict[str, Exception], **_: Any
) -> dict[str, Timing]:
    """Stands in for `timing.interleaved` where the interpreter runs, whose seconds mean nothing: one call of each."""
    from ..timing import Timing

    out: dict[str, Timing] = {}
    for name, call in calls.items():
        began = time.perf_counter()
        try:
            call(sets[0])
        except Exception as error:
            failures[name] = error
        else:
            out[name] = Timing(time.perf_counter() - began, 0.0, 1)
    return out


@contextlib.contextmanager
def tiny_shapes(names: Iterable[str]) -> Iterator[None]:
    """Within: the registry's CPU shapes of these ops are one of a few elements."""
    from ..registry import ENTRIES

    before = {name: ENTRIES[name] for name in names}
    for name, entry in before.items():
        sizes = next(iter(entry.cpu.values()))
        ENTRIES[name] = dataclasses.replace(entry, cpu={"tiny": {key: _TINY.get(key, v) for key, v in sizes.items()}})
    try:
        yield
    finally:
        ENTRIES.update(before)
