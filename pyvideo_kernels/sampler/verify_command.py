"""The ``pyvideo verify`` command: what it prints, and the result file it writes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from ..error_types import ModelError
from ..verify import Row
from .modeldir import PIPELINES
from .progress import Reporter
from .settings import Settings
from .verify import Verification, verify


def random_pipeline(settings: Settings) -> Any:
    """A model of true size with random weights, by the name of its architecture; no download.

    Raises:
        UsageError, ModelError, OutOfMemoryError: one sentence and the remedy.
    """
    from ..benchmarks.models import architecture
    from ..benchmarks.models import random_pipeline as build
    from .loading import pick_device, pick_dtype, transformer_width

    device = pick_device(settings.device)
    arch = architecture(settings.model)
    if arch.pipeline not in PIPELINES:
        raise ModelError(f"verify knows Wan models so far; {settings.model} is a {arch.pipeline}")
    width = transformer_width(arch.transformer.config)
    return build(arch, dtype=pick_dtype(settings.dtype, device, width), device=device)


def command(settings: Settings, json_file: Path | None, reporter: Reporter, *, random_weights: bool = False) -> bool:
    """Verify, print the tables, write the result; whether everything holds."""
    from rich.console import Console

    pipe = None
    if random_weights:
        with reporter.phase("load"):
            pipe = random_pipeline(settings)
        settings = dataclasses.replace(settings, device="auto", dtype="auto")  # the pipeline has them
    found = verify(settings, pipe=pipe, reporter=reporter)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(op_table(found.rows))
    console.print(clip_table(found))
    for op, reasons in found.fallbacks.items():
        for reason, count in reasons.items():
            reporter.note(f"{op}: {count} calls went to diffusers' own code: {reason}")
    if json_file is not None:
        write(json_file, found, settings, random_weights)
    for problem in found.problems():
        console.print(f"FAILED {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    if found.ok:
        ops = len({row.op for row in found.rows})
        console.print(f"Everything holds: {len(found.rows)} checks of {ops} ops, and the clip.", highlight=False)
    return found.ok


def op_table(rows: list[Row]) -> Any:
    """A line per check."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("op", "impl", "dtype", "check", "inputs", "calls", "verdict", title="ops", title_justify="left")
    state = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: "[dim]refuses[/]"}
    for row in rows:
        dtype = row.dtype if row.head_dim is None else f"{row.dtype}, head_dim {row.head_dim}"
        why = f": {escape(row.error)}" if row.error else ""
        table.add_row(row.op, row.impl, dtype, row.check, escape(row.what), str(row.calls or ""), state[row.ok] + why)
    return table


def clip_table(found: Verification) -> Any:
    """A line per stage of the clip."""
    from rich.table import Table

    table = Table(
        "stage", "error", "eager's", "largest", "eager's", "PSNR to eager", "verdict", title_justify="left",
        title=f"clip {found.plan.width}×{found.plan.height}×{found.plan.frames}, {found.plan.steps} steps, "
        "against a run in higher precision",
    )  # fmt: skip
    for clip in found.clips:
        table.add_row(
            clip.stage, f"{clip.error:.2e}", f"{clip.eager_error:.2e}", f"{clip.worst:.2e}", f"{clip.eager_worst:.2e}",
            f"{clip.psnr:.1f} dB", "[red]FAILED[/]" if clip.problem else "[green]ok[/]",
        )  # fmt: skip
    return table


def write(path: Path, found: Verification, settings: Settings, random_weights: bool = False) -> Path:
    """The result file, of kind ``correctness``."""
    from ..benchmarks import results

    def number(value: Any) -> Any:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    clips = [{key: number(value) for key, value in dataclasses.asdict(clip).items()} for clip in found.clips]
    return results.write(path, {
        "schema": results.SCHEMA,
        "kind": "correctness",
        "provenance": results.provenance(found.device),
        "settings": {
            "model": settings.model, "weights": "random" if random_weights else "pretrained",
            "plan": found.plan.as_dict(), "attention": settings.attention,
            "dtype": str(found.dtype).removeprefix("torch."),
        },
        "ceilings": {},
        "ok": found.ok,
        "rows": [row.as_dict() for row in found.rows],
        "clip": clips,
        "fallbacks": found.fallbacks,
        "seconds": {name: round(value, 3) for name, value in found.seconds.items()},
    })  # fmt: skip
