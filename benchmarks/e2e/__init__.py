"""``pyvideo bench e2e``: whole clips through each variant of a model, in one process, in turns.

The same noise and the same prompt tensors go through every variant, on one set of weights. What is timed is denoising
and decoding; reading the prompt happens once, before. Results are a JSON file, a markdown table and plots.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyvideo_kernels.configs import slug
from pyvideo_kernels.errors import ModelError, UnsupportedError, UsageError
from pyvideo_kernels.sampler.loading import (
    dtype_name,
    is_out_of_memory,
    pick_device,
    pick_dtype,
    transformer_width,
)
from pyvideo_kernels.sampler.problems import Exit, Interrupted, OutOfMemoryError, did_you_mean
from pyvideo_kernels.sampler.video import check_folder, write_bytes

from .. import models, results
from ..timing import copy_bandwidth, gemm_rate
from .console import Console
from .session import Entry, Session, Source
from .statements import speed_statements
from .variants import BASE, Variant, default_attention_backend, parse_all

DTYPES = ("auto", "bf16", "fp16", "fp32")
_MIN_ROUNDS = 3
OnEvent = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """What to measure. None: the model's own default.

    Args:
        model: ``tiny``, a diffusers directory, a hub id in the local cache, or an architecture's name.
        variants: as ``--ab`` takes them (``variants.py``); ``eager`` is added if it is not there.
        random_weights: build the architecture at true size with random weights.
        layers: with random weights: so many blocks of each kind instead of all.
        rounds: timed clips a variant.
        float32: measure errors against the model in float32.
        decode: decode to pixels.
        seconds: what does not fit is left out (`session.Session`); None: no limit.
    """

    model: str = "tiny"
    variants: tuple[str, ...] = (BASE, "ours")
    random_weights: bool = False
    layers: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    prompt: str = "a red ball moves left on a black background"
    seed: int = 0
    rounds: int = _MIN_ROUNDS
    device: str = "auto"
    dtype: str = "auto"
    float32: bool = True
    decode: bool = True
    seconds: float | None = None

    def check(self) -> Request:
        """Refuse what no model could run, before one is loaded."""
        if self.rounds < _MIN_ROUNDS:
            raise UsageError(f"--rounds must be {_MIN_ROUNDS} or more; got {self.rounds}")
        if self.dtype not in DTYPES:
            raise UsageError(
                f"--dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}{did_you_mean(self.dtype, DTYPES)}"
            )
        for option in ("layers", "height", "width", "frames", "steps"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UsageError(f"--{option} must be 1 or more; got {value}")
        if self.layers is not None and not self.random_weights:
            raise UsageError("--layers needs --random-weights: a model with weights of its own comes whole")
        if self.guidance is not None and self.guidance < 0:
            raise UsageError(f"--guidance must be 0 or more; got {self.guidance:g}")
        return self


def run(request: Request, on_event: OnEvent | None = None) -> dict[str, Any]:
    """Measure.

    Args:
        request: what.
        on_event: called with a name and facts as things happen: ``load``; ``note`` (a download); ``loaded`` with
            ``settings``; then of each variant ``warm``, ``failed``, ``round`` and ``breakdown`` with ``variant``,
            ``error``, ``entry``, and ``result``: the result so far, worth keeping, marked ``interrupted``.
    Returns:
        A result of kind ``e2e``.
    Raises:
        ValueOptionError, UsageError, ModelError: before any work. OutOfMemoryError: the model itself does not fit.
    """
    say = on_event or (lambda name, facts: None)
    until = None if request.seconds is None else time.monotonic() + request.seconds
    request.check()
    variants = parse_all(request.variants)
    device = _device(request.device)
    _need_diffusers()
    dtype = _dtype(request, device, lambda text: say("note", {"text": text}))
    say("load", {"model": request.model, "device": str(device), "dtype": dtype_name(dtype)})
    try:
        source, settings = load(request, device, dtype, lambda text: say("note", {"text": text}))
        ceilings = {"copy": copy_bandwidth(device), "gemm": gemm_rate(device, dtype)}
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        what = f"{request.model} does not fit on {device}"
        raise OutOfMemoryError(f"{what}: choose a smaller one, or --dtype bf16") from None
    settings["float32"] = request.float32
    result: dict[str, Any] = {
        "schema": results.SCHEMA,
        "kind": "e2e",
        "provenance": results.provenance(device),
        "settings": settings,
        "ceilings": ceilings,
        "interrupted": True,
        "rows": [],
    }
    say("loaded", {"settings": settings})

    def on_entry(name: str, entry: Entry) -> None:
        fresh = {**result, "rows": session.rows()}
        say(name, {"variant": entry.variant.name, "error": entry.error, "entry": entry, "result": fresh})

    session = Session(source, variants, float32=request.float32, until=until, on_event=on_entry)
    session.run(request.rounds)
    result["rows"] = session.rows()
    del result["interrupted"]
    result["statements"] = speed_statements(result)
    return result


def _device(name: str) -> torch.device:
    try:
        return pick_device(name)
    except RuntimeError:
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N; got {name!r}") from None


def _dtype(request: Request, device: torch.device, note: Callable[[str], None]) -> torch.dtype:
    """As the sampler picks it; on a CPU that asks the model for its width."""
    if request.dtype != "auto" or device.type != "cpu":
        return pick_dtype(request.dtype, device)
    if request.random_weights:
        arch = models.architecture(_architecture_name(request.model))
    else:
        arch, _ = models.find(request.model, note)
    return pick_dtype("auto", device, transformer_width(arch.transformer.config))


def _need_diffusers() -> None:
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"bench e2e runs diffusers pipelines and {error.name} is not installed: "
            "pip install 'pyvideo-kernels[sampler]'"
        ) from None


def load(
    request: Request, device: torch.device, dtype: torch.dtype, note: Callable[[str], None] = lambda text: None
) -> tuple[Source, dict[str, Any]]:
    """The model and its inputs, and the result's ``settings``; ``note`` is told what is being downloaded."""
    if request.random_weights:
        arch = models.architecture(_architecture_name(request.model))
        arch = arch if request.layers is None else arch.cut(request.layers)
    else:
        arch, _ = models.find(request.model, note)
    clip = arch.clip(request.height, request.width, request.frames)
    options = functools.partial(
        models.call_options, clip, steps=request.steps, guidance=request.guidance, seed=request.seed
    )
    wanted = options()  # refuses, as clip() does, before any weight is made or read
    text_seconds = None
    if request.random_weights:
        pipe = models.random_pipeline(arch, dtype=dtype, device=device, seed=request.seed)
        prompt = models.prompt_inputs(pipe, arch, seed=request.seed)
    else:
        pipe, arch = models.load_pipeline(request.model, dtype=dtype, device=device, note=note)
        start = time.perf_counter()
        prompt = models.encode_prompt(pipe, arch, request.prompt)
        text_seconds = time.perf_counter() - start
        models.drop_text_encoders(pipe)
    latents = models.initial_latents(pipe, clip, seed=request.seed)

    def inputs() -> dict[str, Any]:
        # Schedulers and guidance may write into what they are given.
        return {**prompt, "latents": latents.clone(), **options()}

    source = Source(
        pipe=pipe,
        inputs=inputs,
        decode=functools.partial(_decode, clip=clip, seed=request.seed) if request.decode else None,
        device=device,
        dtype=dtype,
        seed=request.seed,
    )
    settings = {
        "model": arch.name,
        "weights": "random" if request.random_weights else "pretrained",
        "layers": request.layers,
        "pipeline": type(pipe).__name__,
        "height": clip.height,
        "width": clip.width,
        "frames": clip.frames,
        "steps": wanted["num_inference_steps"],
        "guidance": wanted["guidance_scale"],
        "dtype": str(dtype).removeprefix("torch."),
        "vae_dtype": str(pipe.vae.dtype).removeprefix("torch."),
        "seed": request.seed,
        "rounds": request.rounds,
        "prompt": None if request.random_weights else request.prompt,
        "tokens": clip.tokens,
        "decode": request.decode,
        "float32": request.float32,
        "text_seconds": text_seconds,
        # As the user has them; the first is set by DIFFUSERS_ATTN_BACKEND.
        "attention_backend": default_attention_backend(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    return source, settings


def _decode(pipe: Any, latents: torch.Tensor, clip: models.Clip, seed: int) -> torch.Tensor:
    return models.decode(pipe, latents, clip, seed=seed)


def _architecture_name(name: str) -> str:
    """An architecture's name, also from the hub id that it comes from."""
    sources = {models.architecture(known).source: known for known in models.ARCHITECTURES}
    return sources.get(name, name)


# The command --------------------------------------------------------------------------------------------------------


def stem(result: dict[str, Any]) -> str:
    """``<model>-<size>-<device>``, what a result's files are called."""
    settings, where = result["settings"], result["provenance"]
    device = slug(where["gpu"]) if where["device"] == "cuda" else where["device"]
    model = settings["model"]
    if settings["weights"] == "random" and "random" not in model:
        model += "-random"
    if settings.get("layers"):
        model += f"-{settings['layers']}-layers"
    return f"{model}-{settings['height']}x{settings['width']}x{settings['frames']}-{device}"


def command(request: Request, output: Path) -> None:
    """Measure, show, and write ``<model>-<size>-<device>`` as JSON, markdown and plots; their paths go to stdout.

    Raises:
        typer.Exit: code 1 if a video was broken, eager could not run, or nothing that was asked for could.
        Interrupted: what was timed before is kept in ``<...>.partial.json``.
    """
    import typer

    request.check()
    asked = parse_all(request.variants)
    check_folder(output, "output")
    console = Console(request.rounds)
    partial: list[Path] = []
    phase = "loading"

    def on_event(name: str, facts: dict[str, Any]) -> None:
        nonlocal phase
        phase = console.show(name, facts)
        so_far = facts.get("result")
        if so_far and any("seconds" in row for row in so_far["rows"]):
            partial[:] = [results.write(output / f"{stem(so_far)}.partial.json", so_far)]

    try:
        result = run(request, on_event)
    except KeyboardInterrupt:
        raise Interrupted(phase, partial) from None
    paths = write_all(result, output, console)
    for path in partial:
        path.unlink(missing_ok=True)
    console.table(result)
    for path in paths:
        typer.echo(path)
    if failed(result, asked):
        raise typer.Exit(Exit.FAILED)


def write_all(result: dict[str, Any], output: Path, console: Console) -> list[Path]:
    """JSON, markdown and plots of a result."""
    from ..report import plots, tables

    paths = [results.write(output / f"{stem(result)}.json", result)]
    page = [f"# {tables.clip(result['settings'])}, {tables.machine(result)}", "", tables.markdown(result)]
    page += [f"- {row['variant']}: {note}" for row in result["rows"] for note in row.get("notes", ())]
    page += [f"- {sentence}" for sentence in result["statements"]]
    text = "\n".join(page) + "\n"
    paths.append(write_bytes(output / f"{stem(result)}.md", lambda path: _write(path, text)))
    try:
        paths += plots.write_all(result, output, stem(result))
    except UnsupportedError as error:
        console.say(f"no plots: {error}")
    return paths


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def failed(result: dict[str, Any], asked: tuple[Variant, ...]) -> bool:
    """Whether a run is a failure: a broken video, no eager, or an error in everything else that was asked for.

    A variant that this machine or package cannot run is a row that says so, beside those that did run.
    """
    errors = {row["variant"]: row["error"] for row in result["rows"] if "error" in row}
    others = [variant.name for variant in asked if variant.name != BASE]
    broken = any(text.startswith("BrokenVideo") for text in errors.values())
    return broken or BASE in errors or (bool(others) and all(name in errors for name in others))
