"""The models that clips are timed with: built with random weights or loaded, called without their text encoders.

In short::

    arch = architecture("wan2.1-1.3b")
    pipe = random_pipeline(arch, dtype=torch.bfloat16, device="cuda")
    clip = arch.clip(480, 832, 81)
    inputs = prompt_inputs(pipe, arch) | call_options(clip, steps=4)
    latents = pipe(**inputs, latents=initial_latents(pipe, clip))[0]
    video = decode(pipe, latents, clip)

What a model is stands in ``architecture.py``, how its pipeline is called in ``families.py``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyvideo_kernels.error_types import ModelError, UsageError, ValueOptionError
from pyvideo_kernels.sampler import loading, modeldir
from pyvideo_kernels.sampler.models import resolve
from pyvideo_kernels.sampler.problems import OutOfMemoryError

from .architecture import ARCHITECTURES as ARCHITECTURES
from .architecture import Architecture as Architecture
from .architecture import Clip as Clip
from .architecture import ClipDefaults, Part, Text
from .architecture import architecture as architecture
from .architecture import num_tokens as num_tokens
from .families import FAMILIES, PROMPT_SHARE, Prompt
from .random_weights import diffusers_class, fill, skeleton, weight_bytes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HALF = "--dtype bf16 or "
# What loading needs beside the weights.
_HEADROOM = 1.05


def random_pipeline(
    arch: Architecture,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
    vae_dtype: torch.dtype | None = None,
) -> Any:
    """A diffusers pipeline of ``arch`` with random weights and no text encoder.

    Nothing of it passes through host memory: weights are drawn where they live. Activations stay O(1) through all
    layers. Reproducible on one kind of device (CPU and GPU draw different numbers), and the same up to rounding in
    every dtype.

    Args:
        dtype: of the transformer; its parameters that diffusers keeps in float32 stay so.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        vae_dtype: of the VAE; default: float32 for Wan, as its authors decode, else ``dtype``.
    Raises:
        UsageError: there is no such device.
        ValueOptionError: another dtype.
        OutOfMemoryError: the weights do not fit; named before anything is allocated, with the remedy.
        ModelError: diffusers is missing or lacks the model's classes.
    """
    vae_dtype = _check_dtypes("random_pipeline", arch, dtype, vae_dtype)
    device = loading.pick_device(str(device))
    modules = {"transformer": skeleton(arch.transformer, dtype), "vae": skeleton(arch.vae, vae_dtype)}
    check_fits(arch.name, weight_bytes(modules), dtype, device)
    with _memory_remedy(arch.name, dtype, device):
        parts: dict[str, Any] = {name: fill(module, name, device, seed) for name, module in modules.items()}
    parts["scheduler"] = diffusers_class(arch.scheduler.kind)(**arch.scheduler.config)
    kind = diffusers_class(arch.pipeline)
    absent = [key for key in ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2") if _takes(kind, key)]
    with loading.quiet_libraries():
        pipe = kind(**parts, **dict.fromkeys(absent), **arch.pipeline_options)
    _settle(pipe, arch)
    return pipe


def _takes(kind: Any, key: str) -> bool:
    return key in inspect.signature(kind.__init__).parameters


def _check_dtypes(function: str, arch: Architecture, dtype: torch.dtype, vae_dtype: torch.dtype | None) -> torch.dtype:
    """Refuse other dtypes; the VAE's."""
    for argument, value in (("dtype", dtype), ("vae_dtype", vae_dtype)):
        if value not in DTYPES and not (argument == "vae_dtype" and value is None):
            raise ValueOptionError(
                f"{function}: `{argument}` must be torch.bfloat16, torch.float16 or torch.float32; got {value!r}"
            )
    return vae_dtype or (torch.float32 if arch.vae_dtype == "float32" else dtype)


def check_fits(name: str, need: float, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse weights of ``need`` bytes that ``device`` has no room for."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else loading.host_memory()
    if free is not None and need > free:
        raise OutOfMemoryError(
            f"{name} needs {need / 1e9:.3g} GB for its weights and {device} has {free / 1e9:.3g} GB free: "
            f"use {_HALF if dtype == torch.float32 else ''}a smaller model"
        )


@contextlib.contextmanager
def _memory_remedy(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Running out of memory for weights, in one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not loading.is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"{device} ran out of memory for the weights of {name}: stop what else uses it, or use "
            f"{_HALF if dtype == torch.float32 else ''}a smaller model"
        ) from error


# Real weights -------------------------------------------------------------------------------------------------------


def find(name: str, note: Callable[[str], None] = lambda text: None) -> tuple[Architecture, modeldir.Model]:
    """What a model with weights is, from its files, before any weight is read.

    Args:
        name: ``tiny``, an architecture, a hub id (downloaded if it is not in the cache), or the directory of a
            diffusers pipeline of one of the four families.
        note: told what is being downloaded.
    Raises:
        ModelError: nothing is there, or it is not such a pipeline in safetensors; names the remedy.
    """
    known = architecture(name) if name in ARCHITECTURES else None
    if known is not None and known.source is None:
        raise ModelError(f"{name} has no weights anywhere, it is for tests: add --random-weights, or use --model tiny")
    repo = known.source if known is not None and known.source is not None else name
    families = {family.pipeline: family for family in FAMILIES.values()}
    model = modeldir.read_model(resolve(repo, note), repo, tuple(families))
    family = families[model.pipeline]
    parts = {}
    for key, config in (("transformer", model.transformer), ("vae", model.vae), ("scheduler", model.scheduler)):
        parts[key] = Part(str(config.get("_class_name")), config)
    like = next((arch for arch in map(architecture, ARCHITECTURES) if repo == arch.source), None)
    stand_in = like or architecture(family.reference)
    for key, expected in (("transformer", stand_in.transformer.kind), ("vae", stand_in.vae.kind)):
        if parts[key].kind != expected:
            raise ModelError(f"{model.path}/{key} is a {parts[key].kind}; a {model.pipeline} has a {expected} there")
        # A configuration saved long ago leaves out what was added since; the class knows.
        module: Any = skeleton(parts[key])
        parts[key] = Part(expected, dict(module.config))
    defaults = stand_in.defaults
    if like is None and family.name == "wan":
        d = model.defaults
        defaults = ClipDefaults(d.height, d.width, d.frames, d.fps, d.steps, d.guidance)
    width, pooled = family.text_widths(parts["transformer"].config)
    tokens = parts["transformer"].config.get("max_text_seq_length") or stand_in.text.tokens
    arch = replace(
        stand_in,
        name=like.name if like is not None else model.name,
        source=repo if like is not None else None,
        pipeline=model.pipeline,
        pipeline_options={"expand_timesteps": True} if model.expand_timesteps else {},
        text=Text(tokens, width, pooled),
        defaults=defaults,
        parameters=model.parameters,
        transformer=parts["transformer"],
        vae=parts["vae"],
        scheduler=parts["scheduler"],
    )
    return arch, model


def load_pipeline(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    vae_dtype: torch.dtype | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Any, Architecture]:
    """A pipeline with its own weights on ``device``, and what it is; ``name`` and errors as for ``find``.

    Raises:
        OutOfMemoryError: the weights do not fit; named before any is read.
    """
    arch, model = find(name, note)
    vae_dtype = _check_dtypes("load_pipeline", arch, dtype, vae_dtype)
    device = loading.pick_device(str(device))
    need = _HEADROOM * sum(
        count * (vae_dtype if key == "vae" else dtype).itemsize for key, count in model.parameters.items()
    )
    for place in {torch.device("cpu"), device}:  # a GPU's weights pass through the host
        check_fits(arch.name, need, dtype, place)
    with _memory_remedy(arch.name, dtype, device):
        pipe = loading.load_pipeline(model, dtype, vae_dtype=vae_dtype)
        loading.place(pipe, device, "none")
    _settle(pipe, arch)
    return pipe, arch


def _settle(pipe: Any, arch: Architecture) -> None:
    if arch.vae_tiling:
        pipe.vae.enable_tiling()
    pipe.set_progress_bar_config(disable=True)


def drop_text_encoders(pipe: Any) -> None:
    """Free the text encoders' memory once every prompt is encoded."""
    for key in ("text_encoder", "text_encoder_2"):
        if getattr(pipe, key, None) is not None:
            setattr(pipe, key, None)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Calls --------------------------------------------------------------------------------------------------------------


def prompt_inputs(
    pipe: Any,
    arch: Architecture,
    *,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Keyword arguments of ``pipe.__call__`` that stand for ``batch`` prompts: random text embeddings of true length.

    A negative prompt is there wherever guidance compares with one; leave ``guidance`` at 1 in ``call_options`` to
    switch it off.
    """
    dtype, device = dtype or pipe.transformer.dtype, device or pipe.transformer.device
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)

    def one(share: float) -> Prompt:
        mask = torch.zeros(batch, arch.text.tokens, dtype=torch.bool, device=device)
        mask[:, : max(1, round(arch.text.tokens * share))] = True
        pooled = arch.text.pooled_width
        return Prompt(
            draw(batch, arch.text.tokens, arch.text.width), mask, None if pooled is None else draw(batch, pooled)
        )

    return arch.family.text_inputs(one(PROMPT_SHARE), one(PROMPT_SHARE / 2))


def initial_latents(pipe: Any, clip: Clip, *, batch: int = 1, seed: int = 0) -> Tensor:
    """Noise for ``clip``, drawn on the CPU (the same on every device), as ``pipe.__call__`` takes it."""
    shape = (batch, pipe.transformer.config.in_channels, *clip.latent)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return clip.arch.family.from_noise(pipe, noise.to(pipe.transformer.device))


def call_options(
    clip: Clip, *, steps: int | None = None, guidance: float | None = None, seed: int = 0
) -> dict[str, Any]:
    """The other keyword arguments of ``pipe.__call__``; it returns ``(latents,)``.

    Raises:
        UsageError: fewer steps than the model's scheduler can take.
    """
    defaults = clip.arch.defaults
    steps = defaults.steps if steps is None else steps
    if steps < clip.arch.min_steps:
        raise UsageError(f"--steps must be at least {clip.arch.min_steps} for {clip.arch.name}; got {steps}")
    return {
        "height": clip.height,
        "width": clip.width,
        "num_frames": clip.frames,
        "num_inference_steps": steps,
        "guidance_scale": defaults.guidance if guidance is None else guidance,
        # Only stochastic schedulers draw from it.
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "return_dict": False,
        **clip.arch.family.call_options(clip),
    }


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, clip: Clip, *, seed: int = 0) -> Tensor:
    """Video ``[B, 3, frames, height, width]`` in [-1, 1], float32, from latents as the pipeline returns them."""
    family = clip.arch.family
    video = family.denormalise(pipe.vae, family.to_vae(pipe, clip, latents).to(pipe.vae.dtype))
    video, options = family.decode_options(clip, video, seed)
    out: Tensor = pipe.vae.decode(video, **options, return_dict=False)[0].float()
    # Clamped, an infinity would pass for a white pixel.
    return out.nan_to_num_(nan=torch.nan, posinf=torch.nan, neginf=torch.nan).clamp_(-1, 1)


def encode_prompt(pipe: Any, arch: Architecture, prompt: str, negative: str = "") -> dict[str, Any]:
    """What ``prompt_inputs`` gives, from words, through the pipeline's text encoders.

    Raises:
        UsageError: the pipeline has none (random weights).
    """
    if getattr(pipe, "text_encoder", None) is None:
        raise UsageError(f"{arch.name} has no text encoder: use prompt_inputs()")
    with torch.no_grad():
        return arch.family.encode(pipe, arch, prompt, negative)
