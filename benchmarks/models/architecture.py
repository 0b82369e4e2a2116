"""Video models without their weights, and the geometry of their clips. Torch-free.

An architecture is a JSON file in ``architectures/``: the configurations of transformer, VAE and scheduler as their
authors published them, so that speed can be measured at true size with nothing downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvideo_kernels.error_types import ModelError, UsageError
from pyvideo_kernels.sampler.problems import did_you_mean

if TYPE_CHECKING:
    from .families import Family

FOLDER = Path(__file__).resolve().parent / "architectures"
ARCHITECTURES: tuple[str, ...] = tuple(
    sorted((path.stem for path in FOLDER.glob("*.json")), key=lambda name: (name.startswith("tiny"), name))
)
"""Names that ``architecture()`` takes; the small ones for tests come last."""
_LAYERS = ("num_layers", "num_single_layers")
"""Keys of a transformer's configuration that say how many blocks of a kind it has."""


@dataclass(frozen=True)
class Part:
    """A component of a pipeline: its diffusers class and configuration."""

    kind: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """What the text encoders hand to the transformer."""

    tokens: int
    width: int
    pooled_width: int | None = None


@dataclass(frozen=True)
class ClipDefaults:
    """The clip that a model's authors sample."""

    height: int
    width: int
    frames: int
    fps: float
    steps: int
    guidance: float


@dataclass(frozen=True)
class Architecture:
    """A video model without its weights."""

    name: str
    family_name: str
    source: str | None
    """Hub id the configuration comes from."""
    pipeline: str
    transformer: Part
    vae: Part
    scheduler: Part
    text: Text
    defaults: ClipDefaults
    pipeline_options: Mapping[str, Any] = field(default_factory=dict)
    vae_dtype: str = "model"
    """``float32`` where the authors decode in it whatever the transformer runs in; else ``model``."""
    vae_tiling: bool = False
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Parameters per component."""

    @property
    def min_steps(self) -> int:
        """The fewest denoising steps its scheduler can take."""
        # Stretching the sigmas so that the last is `shift_terminal` divides by zero when the last is the first.
        return 2 if self.scheduler.config.get("shift_terminal") else 1

    @property
    def family(self) -> Family:
        from .families import FAMILIES

        return FAMILIES[self.family_name]

    @property
    def layers(self) -> int:
        """Blocks of the transformer, of the kind that it has fewest of."""
        return min(int(self.transformer.config[key]) for key in _LAYERS if key in self.transformer.config)

    def cut(self, layers: int) -> Architecture:
        """The same model with ``layers`` blocks of each kind: the work of one block, in a fraction of the memory.

        Raises:
            UsageError: it has not that many.
        """
        if not 1 <= layers <= self.layers:
            raise UsageError(f"--layers must be 1 to {self.layers} for {self.name}; got {layers}")
        config = {**self.transformer.config}
        config |= {key: layers for key in _LAYERS if key in config}
        # Published counts are of the whole model.
        return replace(self, transformer=replace(self.transformer, config=config), parameters={})

    def clip(self, height: int | None = None, width: int | None = None, frames: int | None = None) -> Clip:
        """The geometry of a clip of this model; what is left out is the model's default.

        Raises:
            UsageError: a size or length the pipeline would round or refuse, with the nearest it takes.
        """
        height, width = height or self.defaults.height, width or self.defaults.width
        frames = frames or self.defaults.frames
        grid = self.family.geometry(self)
        for option, size in (("--height", height), ("--width", width)):
            if size < grid.multiple or size % grid.multiple:
                below = max(size // grid.multiple, 1) * grid.multiple
                raise UsageError(
                    f"{option} must be a multiple of {grid.multiple} for {self.name}; got {size}: use {below} or "
                    f"{below + grid.multiple}"
                )
        if frames < 1 or (frames - 1) % grid.frame_step:
            below = max(frames - 1, 0) // grid.frame_step * grid.frame_step + 1
            raise UsageError(
                f"--frames must be {grid.frame_step}k + 1 for {self.name}; got {frames}: use {below} or "
                f"{below + grid.frame_step}"
            )
        time = (frames - 1) // grid.temporal + 1
        time += -time % grid.patch[0]
        return Clip(self, height, width, frames, (time, height // grid.spatial, width // grid.spatial), grid.patch)


@dataclass(frozen=True)
class Clip:
    """A clip of an architecture: pixels, latents and tokens."""

    arch: Architecture
    height: int
    width: int
    frames: int
    latent: tuple[int, int, int]
    """Latent frames, rows and columns."""
    patch: tuple[int, int, int]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Video tokens along time, height and width."""
        t, h, w = (size // step for size, step in zip(self.latent, self.patch))
        return t, h, w

    @property
    def tokens(self) -> int:
        """Video tokens of one sequence; text tokens that a joint attention adds are not counted."""
        t, h, w = self.grid
        return t * h * w


@cache
def architecture(name: str) -> Architecture:
    """The architecture called ``name``.

    Raises:
        ModelError: there is none of that name; names the closest.
    """
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{name!r} is not a known architecture{did_you_mean(name, ARCHITECTURES)}: give one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    data = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    part = lambda key: Part(data[key]["class"], data[key]["config"])
    return Architecture(
        name=data["name"],
        family_name=data["family"],
        source=data["source"],
        pipeline=data["pipeline"]["class"],
        pipeline_options=data["pipeline"]["options"],
        transformer=part("transformer"),
        vae=part("vae"),
        vae_dtype=data["vae"]["dtype"],
        vae_tiling=data["vae"]["tiling"],
        scheduler=part("scheduler"),
        text=Text(**data["text"]),
        defaults=ClipDefaults(**data["defaults"]),
        parameters=data["parameters"],
    )


def num_tokens(
    arch: Architecture, height: int | None = None, width: int | None = None, frames: int | None = None
) -> int:
    """Video tokens the transformer sees for a clip."""
    return arch.clip(height, width, frames).tokens
