"""What a model directory holds, read from its JSON files and safetensors headers before any weight. Torch-free."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..error_types import ModelError
from .models import KNOWN, TINY, Defaults

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
# Components with weights; a pipeline may lack the optional ones.
_WEIGHTS = ("transformer", "transformer_2", "vae", "text_encoder", "text_encoder_2", "image_encoder")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Fields of Defaults that a pyvideo.json in the model directory may set.
_DEFAULT_KEYS = {f.name for f in dataclasses.fields(Defaults)}


@dataclass(frozen=True)
class Model:
    """What planning needs to know of a pipeline."""

    name: str
    pipeline: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    path: Path | None = None
    expand_timesteps: bool = False
    boundary_ratio: float | None = None
    defaults: Defaults = field(default_factory=Defaults)
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Parameters per component with weights."""

    @property
    def spatial(self) -> int:
        """Pixels to a latent, along height and width."""
        return int(self.vae.get("scale_factor_spatial") or 8)

    @property
    def temporal(self) -> int:
        """Frames to a latent."""
        return int(self.vae.get("scale_factor_temporal") or 4)

    @property
    def patch(self) -> tuple[int, int, int]:
        t, h, w = self.transformer.get("patch_size") or (1, 2, 2)
        return int(t), int(h), int(w)

    @property
    def multiple(self) -> int:
        """Height and width are multiples of this."""
        # diffusers itself refuses anything that 16 does not divide, whatever the VAE.
        return max(16, self.spatial * max(self.patch[1:]))

    @property
    def wants_image(self) -> bool:
        return self.pipeline == "WanImageToVideoPipeline" and not self.expand_timesteps

    @property
    def takes_image(self) -> bool:
        return self.wants_image or self.expand_timesteps

    @property
    def embedded(self) -> bool:
        return self.path is not None and self.path.resolve() == TINY


def read_model(path: Path, name: str | None = None, pipelines: Sequence[str] = PIPELINES) -> Model:
    """Check that ``path`` is a pipeline of one of these classes in safetensors and read its configuration.

    Raises:
        ModelError: what is missing or foreign, in one sentence with the remedy.
    """
    index_path = path / "model_index.json"
    if not index_path.is_file():
        above = (path.parent / "model_index.json").is_file()
        remedy = f"did you mean {path.parent}?" if above else "give the directory that save_pretrained made"
        raise ModelError(f"{path} is not a diffusers pipeline (no model_index.json); {remedy}")
    index = _json(index_path)
    pipeline = index.get("_class_name")
    if pipeline not in pipelines:
        raise ModelError(f"{path} holds a {pipeline}; what runs here is {', '.join(pipelines)}")
    present = [c for c in _WEIGHTS if isinstance(index.get(c), list) and index[c][0]]
    for component in ("transformer", "vae", "text_encoder"):
        if component not in present:
            raise ModelError(f"{path} has no {component}; give a complete diffusers pipeline")
    for component in ("tokenizer", "scheduler"):
        if not (path / component).is_dir():
            raise ModelError(f"{path} has no {component} folder; give a complete diffusers pipeline")
    parameters = {c: sum(_count(file) for file in _weight_files(path / c)) for c in present}
    known = KNOWN.get(name or "")
    defaults = known.defaults if known else Defaults()
    defaults_path = path / "pyvideo.json"
    if defaults_path.is_file():
        chosen = {k: v for k, v in _json(defaults_path).items() if k in _DEFAULT_KEYS and v is not None}
        defaults = dataclasses.replace(defaults, **chosen)
    return Model(
        name=name if name in KNOWN else path.resolve().name,
        pipeline=str(pipeline),
        transformer=_json(path / "transformer" / "config.json"),
        vae=_json(path / "vae" / "config.json"),
        scheduler=_json(path / "scheduler" / "scheduler_config.json"),
        path=path,
        expand_timesteps=bool(index.get("expand_timesteps")),
        boundary_ratio=index.get("boundary_ratio"),
        defaults=defaults,
        parameters=parameters,
    )


def describe_pipeline(pipe: Any) -> Model:
    """The same for a pipeline that is already loaded."""
    kind = type(pipe).__name__
    if kind not in PIPELINES:
        raise ModelError(f"the sampler runs {' and '.join(PIPELINES)}; got a {kind}")
    transformer = pipe.transformer if pipe.transformer is not None else pipe.transformer_2
    return Model(
        name=str(getattr(pipe, "name_or_path", "") or kind).rstrip("/").rsplit("/", 1)[-1],
        pipeline=kind,
        transformer=dict(transformer.config),
        vae=dict(pipe.vae.config),
        scheduler=dict(pipe.scheduler.config) | {"_class_name": type(pipe.scheduler).__name__},
        expand_timesteps=bool(pipe.config.expand_timesteps),
        boundary_ratio=pipe.config.boundary_ratio,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; give a complete diffusers pipeline") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); download or save the model again") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} does not hold a JSON object; download or save the model again")
    return data


def _weight_files(folder: Path) -> Iterator[Path]:
    """The safetensors files of a component; refuses one that only has pickles or lacks a shard."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is missing; give a complete diffusers pipeline")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = sorted(set(_json(index).get("weight_map", {}).values()))
        for shard in shards:
            if not (folder / shard).is_file():
                raise ModelError(
                    f"{folder / shard} is missing although {index.name} names it; download the model again"
                )
        yield from (folder / shard for shard in shards)
        return
    files = sorted(folder.glob("*.safetensors"))
    # diffusers loads the file without a variant (``model.fp16.safetensors``) in its name.
    plain = [f for f in files if f.name.count(".") == 1] or files
    if plain:
        yield from plain
        return
    pickles = sorted(f.name for pattern in _PICKLES for f in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds only {pickles[0]}, which may run code when it is unpickled; only safetensors is ever "
            "loaded: save the pipeline again with safe_serialization=True"
        )
    raise ModelError(f"{folder} holds no .safetensors weights; give a complete diffusers pipeline")


def weight_names(model: Model, component: str) -> set[str]:
    """Names of the tensors in a component's files."""
    assert model.path is not None
    return {key for file in _weight_files(model.path / component) for key in shapes_in(file)}


def shapes_in(path: Path) -> dict[str, list[int]]:
    """Name and shape of each tensor in a safetensors file, from its header; ValueError or OSError for a torn one."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 100_000_000:
                raise ValueError("the header is longer than the format allows")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if path.stat().st_size < 8 + length + end:
            raise ValueError("the file is shorter than its header says")
        return {key: [int(size) for size in tensor["shape"]] for key, tensor in header.items()}
    except (AttributeError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"its header is damaged: {error}") from error


def _count(path: Path) -> int:
    """Parameters in a safetensors file."""
    try:
        return sum(math.prod(shape) for shape in shapes_in(path).values())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({error}); download or save the model again"
        ) from None
