"""From a checked model directory to a pipeline on its device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..error_types import ModelError, UsageError
from ..nn.memory import is_out_of_memory as is_out_of_memory
from . import cpu_dtype
from .modeldir import Model
from .problems import OutOfMemoryError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_HEADROOM = 1.05  # weights plus what loading them needs beside


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = "this torch was built without CUDA" if not torch.backends.cuda.is_built() else "torch finds no GPU"
            raise UsageError(f"--device {name}: {built}; use --device cpu, or install a torch with CUDA")
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return device


def pick_dtype(name: str, device: torch.device, width: int | None = None) -> torch.dtype:
    """``auto`` is bf16 on a GPU that has it (fp16 on one that has not), and on a CPU what it does faster.

    Args:
        width: of the transformer; None: there is none, and a CPU computes in fp32.
    """
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cpu":
        return cpu_dtype.choose(width).dtype
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def transformer_width(config: Mapping[str, Any]) -> int | None:
    """Features of a token, from a transformer's configuration."""
    heads, head_dim = config.get("num_attention_heads"), config.get("attention_head_dim")
    return int(heads) * int(head_dim) if heads and head_dim else None


def dtype_name(dtype: torch.dtype) -> str:
    return {value: key for key, value in _DTYPES.items()}.get(dtype, str(dtype).removeprefix("torch."))


def check_fits(model: Model, dtype: torch.dtype, device: torch.device, offload: str) -> None:
    """Refuse weights that cannot fit before they are read."""
    # The VAE stays in fp32: that is how its authors run it.
    sizes = {
        name: count * (4 if name == "vae" else dtype.itemsize) * _HEADROOM for name, count in model.parameters.items()
    }
    need_host = sum(sizes.values())
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        need = {"none": sum(sizes.values()), "model": max(sizes.values(), default=0), "group": 0}[offload]
        if need > free:
            remedy = "--offload model or --offload group" if offload == "none" else "--offload group"
            raise OutOfMemoryError(
                f"{model.name} needs {_gb(need)} for its weights and {device} has {_gb(free)} free: add {remedy}, "
                "or choose a smaller model"
            )
        if offload == "none":
            return
    host = host_memory()
    if host is not None and need_host > host:
        raise OutOfMemoryError(
            f"{model.name} needs {_gb(need_host)} for its weights and this machine has {_gb(host)}: "
            f"use --dtype bf16{' (now fp32)' if dtype == torch.float32 else ''} or a smaller model"
        )


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def host_memory() -> int | None:
    """Memory and swap this machine could give at most, in bytes."""
    try:
        with open("/proc/meminfo") as file:
            rows = dict(line.split(":", 1) for line in file)
        return sum(int(rows[key].split()[0]) * 1024 for key in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars and no advice of diffusers and transformers while we show our own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [(lib, lib.get_verbosity(), _bar_enabled(lib)) for lib in libraries]
    try:
        for lib in libraries:
            lib.set_verbosity_error()
            lib.disable_progress_bar()
        yield
    finally:
        for lib, verbosity, bar in before:
            lib.set_verbosity(verbosity)
            if bar:
                lib.enable_progress_bar()


def _bar_enabled(lib: Any) -> bool:
    return bool(lib.is_progress_bar_enabled()) if hasattr(lib, "is_progress_bar_enabled") else True


def load_pipeline(
    model: Model, dtype: torch.dtype, *, image: bool = False, vae_dtype: torch.dtype = torch.float32
) -> Any:
    """The pipeline in evaluation mode, on the CPU; its VAE in fp32 by default, as the authors of Wan run it.

    Only safetensors is read, and only from ``model.path``.
    """
    assert model.path is not None
    try:
        import diffusers
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(f"sampling needs {error.name}: pip install 'pyvideo-kernels[sampler]'") from None
    # A TI2V model is one set of weights behind two pipelines.
    kind = "WanImageToVideoPipeline" if image else model.pipeline
    with quiet_libraries():
        try:
            pipe = getattr(diffusers, kind).from_pretrained(
                str(model.path),
                dtype={"default": dtype, "vae": vae_dtype},
                use_safetensors=True,
                local_files_only=True,
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{model.path} cannot be loaded ({reason}); download or save the model again") from error
    # diffusers leaves a parameter that no file holds without memory, and says nothing.
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            missing = [key for key, value in part.named_parameters() if value.is_meta]
            if missing:
                some = missing[0] + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                raise ModelError(
                    f"{model.path / name} holds no weights for {some}, which its config.json calls for; download or "
                    "save the model again"
                )
    return pipe


def place(pipe: Any, device: torch.device, offload: str) -> None:
    """Onto its device, or under the hooks that bring each part there when it is used."""
    if device.type == "cuda" and offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif device.type == "cuda" and offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)
    else:
        # diffusers advises against fp16 on a CPU here, in its own words and once a component.
        with quiet_libraries():
            pipe.to(device)


@contextlib.contextmanager
def memory_remedy(what: str, device: torch.device, offload: str) -> Iterator[None]:
    """Turn running out of memory into one sentence with the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        tips = ["smaller --height and --width", "fewer --frames"]
        if device.type == "cuda" and offload != "group":
            tips.insert(0, "--offload " + ("model" if offload == "none" else "group"))
        raise OutOfMemoryError(f"{device} ran out of memory during {what}: try {', or '.join(tips)}") from error


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Words of the prompt that the tokenizer maps to its unknown token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return []
    words = dict.fromkeys(prompt.split())
    ids = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in words}
    return [word for word, tokens in ids.items() if unknown in tokens]
