"""The models the sampler knows by name, and where each would be looked for. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .. import tiny
from ..error_types import ModelError
from .problems import did_you_mean

TINY = tiny.MODEL_DIR

# Files a pipeline is made of; weights only as safetensors.
_DOWNLOAD = ["*.json", "*.safetensors", "*.model", "*.txt"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Defaults:
    """What a model samples when it is not told otherwise."""

    height: int = 480
    width: int = 832
    frames: int = 81
    fps: float = 16
    steps: int = 50
    guidance: float = 5.0
    guidance_2: float | None = None
    scheduler: str | None = None
    upscale: int = 1


@dataclass(frozen=True)
class Known:
    """A row of ``pyvideo models``."""

    name: str
    what: str
    defaults: Defaults = field(default_factory=Defaults)
    image: bool = False


# Its films are 64 pixels wide, which no player shows well: they are written four times as large.
_TINY = Defaults(tiny.HEIGHT, tiny.WIDTH, tiny.FRAMES, tiny.FPS, tiny.STEPS, tiny.GUIDANCE_SCALE, upscale=4)
_HD = Defaults(height=720, width=1280)
KNOWN: dict[str, Known] = {
    row.name: row
    for row in (
        Known("tiny", "the model in this package: one coloured shape that moves", _TINY),
        Known("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan 2.1 text to video, 1.3B"),
        Known("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan 2.1 text to video, 14B", _HD),
        Known("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan 2.1 image to video, 14B", image=True),
        Known("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "Wan 2.1 image to video, 14B", _HD, image=True),
        Known("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "Wan 2.2 text or image to video, 5B",
              Defaults(704, 1280, 121, 24, 50, 5.0)),
        Known("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan 2.2 text to video, two experts of 14B",
              Defaults(720, 1280, 81, 16, 40, 4.0, 3.0)),
        Known("Wan-AI/Wan2.2-I2V-A14B-Diffusers", "Wan 2.2 image to video, two experts of 14B",
              Defaults(720, 1280, 81, 16, 40, 3.5, 3.5), image=True),
    )
}  # fmt: skip


def cache_folder() -> Path:
    """Where Hugging Face keeps downloaded repositories."""
    if path := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(path).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "huggingface"
    )
    return Path(home).expanduser() / "hub"


def cached(repo: str) -> Path | None:
    """The snapshot of a hub repository in the local cache, or None."""
    folder = cache_folder() / f"models--{repo.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / revision
    return snapshot if (snapshot / "model_index.json").is_file() else None


def looked_for(name: str) -> tuple[Path, bool]:
    """Where a known model would be looked for, and whether it is there."""
    if name == "tiny":
        return TINY, (TINY / "model_index.json").is_file()
    snapshot = cached(name)
    return snapshot or cache_folder() / f"models--{name.replace('/', '--')}", snapshot is not None


def resolve(name: str, note: Callable[[str], None] = lambda text: None) -> Path:
    """The directory of a model given by name, path or hub id; downloads a hub id that is not in the cache.

    Raises:
        ModelError: nothing is there; one sentence and the remedy.
    """
    if name == "tiny":
        if not (TINY / "model_index.json").is_file():
            raise ModelError("the embedded model is missing from this installation: reinstall pyvideo-kernels")
        return TINY
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        kind = "weights that may run code when they are unpickled" if path.suffix in _PICKLES else "a single file"
        raise ModelError(f"--model {name} is {kind}; give a diffusers directory with model_index.json and safetensors")
    if _is_path(name):
        raise ModelError(f"--model {name}: there is no such directory; give a diffusers directory, a hub id or tiny")
    if name.count("/") != 1:
        raise ModelError(
            f"--model {name!r} is not known{did_you_mean(name, KNOWN)}: give one of {', '.join(KNOWN)}, "
            "or a directory (./NAME)"
        )
    return cached(name) or _download(name, note)


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name


def _download(repo: str, note: Callable[[str], None]) -> Path:
    elsewhere = f"download it where there is a network (hf download {repo}) into {cache_folder()}, or give a directory"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    except ImportError:
        raise ModelError("hub ids need huggingface_hub: pip install 'pyvideo-kernels[sampler]'") from None
    note(f"{repo} is not in {cache_folder()}: downloading it")
    try:
        return Path(snapshot_download(repo, allow_patterns=_DOWNLOAD))
    except OfflineModeIsEnabled:
        raise ModelError(f"{repo} is not in the local cache and the hub is switched off: {elsewhere}") from None
    except HFValidationError as error:
        raise ModelError(f"{repo!r} is not a hub id ({error}); see pyvideo models") from None
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            hint = did_you_mean(repo, KNOWN)
            raise ModelError(
                f"{repo} is not on the hub, or is private or gated{hint}: check the name, or hf auth login"
            ) from None
        raise ModelError(f"{repo} cannot be downloaded (HTTP {status}): {elsewhere}") from None
    except Exception as error:  # the hub's client raises its transport's own errors
        raise ModelError(f"{repo} cannot be downloaded ({type(error).__name__}): {elsewhere}") from None
