"""``pyvideo bench vae``: a VAE's decoder alone, whole and layer by layer, against the stock one.

The decoder has its true size and random weights: nothing is downloaded, and its speed does not depend on them. Every
variant decodes the same latents, in turns, on its own module tree over one set of weights. Beside the seconds stand
what the program asks for, counted without running it (`traffic`): kernels, bytes and FLOPs, and the time that this
machine's own copy and matrix product would take for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyvideo_kernels.error_types import ModelError, UsageError
from pyvideo_kernels.sampler.loading import is_out_of_memory, pick_device, pick_dtype
from pyvideo_kernels.sampler.problems import Exit, Interrupted, OutOfMemoryError, did_you_mean
from pyvideo_kernels.sampler.video import check_folder, write_bytes

from .. import models, results
from ..timing import copy_bandwidth, gemm_rate
from . import tables
from .session import VARIANTS, Session, counted

DTYPES = ("auto", "bf16", "fp16", "fp32")
OnEvent = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """What to measure. None: the model's own default.

    Args:
        model: an architecture's name.
        variants: of `VARIANTS`; ``eager`` is added if it is not there.
        rounds: timed decodes a variant.
        layers: also time the layers, in decodes of their own.
        float32: measure errors against the decoder in float32.
        seconds: what does not fit is left out; None: no limit.
    """

    model: str = "wan2.1-1.3b"
    variants: tuple[str, ...] = ("eager", "channels_last", "ours")
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    rounds: int = 3
    device: str = "auto"
    dtype: str = "auto"
    layers: bool = True
    float32: bool = True
    seed: int = 0
    seconds: float | None = None

    def check(self) -> Request:
        """Refuse what no model could run, before one is made."""
        if self.rounds < 3:
            raise UsageError(f"--rounds must be 3 or more; got {self.rounds}")
        if self.dtype not in DTYPES:
            raise UsageError(
                f"--dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}{did_you_mean(self.dtype, DTYPES)}"
            )
        for name in self.variants:
            if name not in VARIANTS:
                raise UsageError(
                    f"--ab must be one of {', '.join(VARIANTS)}; got {name!r}{did_you_mean(name, VARIANTS)}"
                )
        return self


def run(request: Request, on_event: OnEvent | None = None) -> dict[str, Any]:
    """Measure.

    Args:
        on_event: called with a name and facts as things happen: ``loaded``; then of each variant ``warm``, ``failed``,
            ``round``, ``layers``, with ``variant`` and ``result``, the result so far, marked ``interrupted``.
    Returns:
        A result of kind ``vae``.
    Raises:
        UsageError, ModelError: before any work. OutOfMemoryError: the decoder itself does not fit.
    """
    say = on_event or (lambda name, facts: None)
    request.check()
    arch = models.architecture(request.model)
    clip = arch.clip(request.height, request.width, request.frames)
    try:
        device = pick_device(request.device)
    except RuntimeError:
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N; got {request.device!r}") from None
    dtype = pick_dtype(request.dtype, device)
    _need_diffusers()
    until = None if request.seconds is None else time.monotonic() + request.seconds
    settings: dict[str, Any] = {
        "model": arch.name,
        "weights": "random",
        "vae": arch.vae.kind,
        "height": clip.height,
        "width": clip.width,
        "frames": clip.frames,
        "latent": list(clip.latent),
        "dtype": str(dtype).removeprefix("torch."),
        "tiling": arch.vae_tiling,
        "rounds": request.rounds,
        "seed": request.seed,
        "float32": request.float32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }
    result: dict[str, Any] = {
        "schema": results.SCHEMA,
        "kind": "vae",
        "provenance": results.provenance(device),
        "settings": settings,
        "interrupted": True,
        "rows": [],
    }
    try:
        result["ceilings"] = {"copy": copy_bandwidth(device), "gemm": gemm_rate(device, dtype)}
        session = Session(clip, device, dtype, seed=request.seed, float32=request.float32, until=until)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"the VAE of {arch.name} does not fit on {device}: use --dtype bf16") from None
    say("loaded", {"settings": settings})

    def on_entry(name: str, variant: str, facts: dict[str, Any]) -> None:
        say(name, {"variant": variant, **facts, "result": {**result, "rows": session.rows(result["ceilings"])}})

    session.run(tuple(dict.fromkeys(("eager", *request.variants))), request.rounds, request.layers, on_entry)
    result["rows"] = session.rows(result["ceilings"])
    del result["interrupted"]
    return result


def asked_for(request: Request) -> str:
    """A table of what the stock decoder and ours ask for: kernels, bytes, FLOPs. Nothing is decoded.

    Raises:
        UsageError, ModelError: an unknown model, or a size that it does not take.
    """
    request.check()
    arch = models.architecture(request.model)
    clip = arch.clip(request.height, request.width, request.frames)
    _need_diffusers()
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(request.dtype, torch.bfloat16)
    rows = [{"variant": name, "counts": counted(clip, dtype, ours=name == "ours")} for name in ("eager", "ours")]
    return tables.counts(rows)


def _need_diffusers() -> None:
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"bench vae runs diffusers' VAEs and {error.name} is not installed: pip install 'pyvideo-kernels[sampler]'"
        ) from None


# The command --------------------------------------------------------------------------------------------------------


def command(request: Request, output: Path) -> None:
    """Measure, show, and write ``vae-<model>-<size>-<device>`` as JSON and markdown; their paths go to stdout.

    Raises:
        typer.Exit: code 1 if a variant's frames were wrong, or eager or everything else could not run.
        Interrupted: what was timed before is kept in ``<...>.partial.json``.
    """
    import typer

    request.check()
    check_folder(output, "output")
    partial: list[Path] = []
    phase = "loading"

    def on_event(name: str, facts: dict[str, Any]) -> None:
        nonlocal phase
        phase = tables.console(name, facts)
        so_far = facts.get("result")
        if so_far and any("seconds" in row for row in so_far["rows"]):
            partial[:] = [results.write(output / f"{tables.stem(so_far)}.partial.json", so_far)]

    try:
        result = run(request, on_event)
    except KeyboardInterrupt:
        raise Interrupted(phase, partial) from None
    page = tables.markdown(result)
    paths = [results.write(output / f"{tables.stem(result)}.json", result)]
    paths.append(write_bytes(output / f"{tables.stem(result)}.md", lambda path: _write(path, page)))
    for path in partial:
        path.unlink(missing_ok=True)
    tables.console("done", {"page": page})
    for path in paths:
        typer.echo(path)
    errors = {row["variant"] for row in result["rows"] if "error" in row}
    others = {name for name in request.variants if name != "eager"}
    wrong = any(row.get("wrong") for row in result["rows"])
    if wrong or "eager" in errors or (others and others <= errors):
        raise typer.Exit(Exit.FAILED)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
