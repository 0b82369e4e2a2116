"""What a run was asked to do: the options, their checks, run.yaml and prompts.jsonl. Torch-free."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attention_text import choose
from ..error_types import UsageError, ValueOptionError
from .problems import did_you_mean

SCHEDULERS = ("unipc", "euler")
DTYPES = ("auto", "bf16", "fp16", "fp32")
OFFLOADS = ("none", "model", "group")
AUTO_ON_OFF = ("auto", "on", "off")
IMPLS = ("auto", "reference", "triton", "cuda", "cpu", "sdpa", "flash", "cudnn", "cublas")

# Its text, or in files and in Python the mapping that accelerate() takes.
Attention = str | Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """The options of one film; None means the model's own default.

    Args:
        prompt: what the film shows.
        model: ``tiny``, a diffusers directory or a hub id.
        image: first frame, for image-to-video models.
        negative: what the film shall not show.
        height, width, frames: size in pixels and frames.
        fps: frames per second of the file; it does not change what is sampled.
        steps, guidance, scheduler: the sampler; ``unipc``, ``euler`` or the model's own.
        seed: same seed, same film.
        ops, attention, impl: passed to ``accelerate``; eager runs diffusers' own modules and scheduler instead.
        guidance_batch: ``auto|on|off``: the predictions with and without the prompt as one batch of two, or two calls.
        text_kv_cache: ``auto|on|off``: compute what depends on the text alone once a film, or in each step.
        dtype, device, offload: ``auto|bf16|fp16|fp32``, ``auto|cpu|cuda[:n]``, ``none|model|group``.
        lora: ``FILE`` or ``FILE:scale``.
        output: the film; its suffix chooses the format.
        preview: write a strip of what is being denoised beside the output.
        upscale: repeat every pixel this many times in the written film.
    """

    prompt: str = ""
    model: str = "tiny"
    image: str | None = None
    negative: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: float | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    seed: int = 0
    ops: str = "all"
    attention: Attention | None = None
    impl: str = "auto"
    eager: bool = False
    guidance_batch: str = "auto"
    text_kv_cache: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    offload: str = "none"
    lora: str | None = None
    output: str | None = None
    preview: bool = False
    upscale: int | None = None

    def check(self) -> Settings:
        """Self, or UsageError naming the option, what it takes and what came."""
        for name, kind in _FIELDS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not _fits(value, kind):
                raise UsageError(f"--{name} must be of type {_NAMES.get(kind, kind)}; got {value!r}")
        if not self.prompt.strip():
            raise UsageError("the prompt is empty: say what the film shall show, in quotes")
        for name in ("height", "width", "frames", "steps", "upscale"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1; got {value}")
        if self.upscale is not None and self.upscale > 16:
            raise UsageError(f"--upscale must be at most 16; got {self.upscale}")
        if self.fps is not None and not 0 < self.fps <= 240:
            raise UsageError(f"--fps must be above 0 and at most 240; got {self.fps:g}")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UsageError(f"--guidance must be a number of at least 0 (1 switches it off); got {self.guidance}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be between 0 and 2**63 - 1; got {self.seed}")
        if self.scheduler is not None:
            _choice("scheduler", self.scheduler, SCHEDULERS)
        _choice("dtype", self.dtype, DTYPES)
        _choice("offload", self.offload, OFFLOADS)
        _choice("impl", self.impl, IMPLS)
        _choice("guidance-batch", self.guidance_batch, AUTO_ON_OFF)
        _choice("text-kv-cache", self.text_kv_cache, AUTO_ON_OFF)
        try:
            choose(self.attention, "--attention")
        except ValueOptionError as error:
            raise UsageError(str(error)) from None
        kind, _, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
            raise UsageError(f"--device must be auto, cpu, cuda or cuda:N; got {self.device!r}")
        if self.eager and (self.impl != "auto" or self.attention or self.ops != "all"):
            raise UsageError("--eager runs diffusers' own modules: drop --ops, --attention and --impl, or --eager")
        if self.eager and "on" in (self.guidance_batch, self.text_kv_cache):
            raise UsageError(
                "--eager evaluates as diffusers does: drop --guidance-batch and --text-kv-cache, or --eager"
            )
        if self.image is not None and not Path(self.image).is_file():
            raise UsageError(f"--image {self.image} is not a file; give a PNG, JPEG or WebP picture")
        if self.lora is not None:
            lora_file(self.lora)
        return self


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"--{name} must be one of {', '.join(choices)}; got {value!r}{did_you_mean(value, choices)}")


def lora_file(text: str) -> tuple[Path, float]:
    """``FILE[:scale]`` as a checked path and a number."""
    head, _, tail = text.rpartition(":")
    path, scale = Path(text), 1.0
    if head and not path.exists():
        try:
            path, scale = Path(head), float(tail)
        except ValueError:
            pass
    if path.suffix != ".safetensors":
        raise UsageError(f"--lora {path} is not a .safetensors file; only safetensors is ever loaded: convert it first")
    if not path.is_file():
        raise UsageError(f"--lora {path} does not exist; give FILE.safetensors or FILE.safetensors:scale")
    if not math.isfinite(scale):
        raise UsageError(f"--lora takes a finite scale; got {tail!r}")
    return path, scale


# Files of options ----------------------------------------------------------------------------------------------

# The abstract numbers: numpy's are welcome too.
_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str, "int": numbers.Integral, "float": numbers.Real, "bool": bool, "Attention": (str, Mapping),
}  # fmt: skip
_NAMES = {"Attention": "str or mapping"}
_FIELDS = {field.name: str(field.type).removesuffix(" | None") for field in dataclasses.fields(Settings)}
_OPTIONAL = {field.name for field in dataclasses.fields(Settings) if field.default is None}
# Keys of run.yaml that belong to the command rather than to one film.
_RUN_ONLY = {"prompts": "str", "stats": "str"}
# What a line of prompts.jsonl may set: everything that does not need the model to be loaded again.
PER_LINE = ("prompt", "negative", "image", "height", "width", "frames", "fps", "steps", "guidance", "scheduler",
            "seed", "output", "preview", "upscale")  # fmt: skip


def _fits(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))


_SWITCHES = ("guidance_batch", "text_kv_cache")
"""Options whose choices are `AUTO_ON_OFF`."""


def _typed(where: str, key: str, value: Any, kind: str) -> Any:
    if value is None:
        return None
    if isinstance(value, bool) and key.replace("-", "_") in _SWITCHES:
        value = "on" if value else "off"  # YAML reads a bare on or off as a boolean
    if not _fits(value, kind):
        raise UsageError(f"{where}: {key} must be of type {_NAMES.get(kind, kind)}; got {value!r}")
    return float(value) if kind == "float" else value


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"--{option} {path} does not exist; give the path of a file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--{option} {path} cannot be read ({error}); give a UTF-8 text file") from None


def read_config(path: Path) -> dict[str, Any]:
    """The options in a run.yaml: keys are option names without the dashes."""
    try:
        import yaml
    except ImportError:
        raise UsageError("--config needs PyYAML: pip install 'pyvideo-kernels[sampler]'") from None
    text = _read(path, "config")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise UsageError(f"--config {path} must hold options as `name: value` lines; got a {type(data).__name__}")
    known = _FIELDS | _RUN_ONLY
    options = {}
    for key, value in data.items():
        name = str(key).removeprefix("--").replace("-", "_")
        if name not in known:
            raise UsageError(f"--config {path}: unknown option {key!r}{did_you_mean(name, known)}")
        options[name] = _typed(f"--config {path}", name, value, known[name])
    return options


def read_prompts(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The films of a prompts.jsonl, as (where it stands, options); a bad line is named before any work starts."""
    films = []
    for number, line in enumerate(_read(path, "prompts").splitlines(), 1):
        if not line.strip():
            continue
        where = f"--prompts {path}, line {number}"
        try:
            data = json.loads(line)
        except ValueError as error:
            raise UsageError(f'{where} is not JSON ({error}); write {{"prompt": "..."}}') from None
        if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
            raise UsageError(f'{where} has no prompt; write {{"prompt": "..."}}')
        for key in data:
            if key not in _FIELDS:
                raise UsageError(f"{where}: unknown option {key!r}{did_you_mean(key, PER_LINE)}")
            if key not in PER_LINE:
                raise UsageError(f"{where}: {key!r} holds for the whole run; give it on the command line")
        films.append((where, {key: _typed(where, key, value, _FIELDS[key]) for key, value in data.items()}))
    if not films:
        raise UsageError(f'--prompts {path} names no film; write one {{"prompt": "..."}} a line')
    return films
