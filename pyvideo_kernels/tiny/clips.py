"""Procedural clips of one antialiased shape, and the sentences that caption them.

A clip is ``background + coverage * (color - background)``: the coverage comes from a signed distance, so
edges are smooth and positions continuous.  Sizes are in pixels of a 64-pixel frame and scale with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..error_types import ValueOptionError
from . import FRAMES, HEIGHT, WIDTH
from .grammar import BACKGROUNDS, COLORS, SHAPES, Scene, all_scenes

RADIUS: dict[str | None, float] = {"small": 8.0, None: 11.0, "big": 13.5}
GROWTH = (0.6, 1.4)
_TRAVEL = (21.0, 24.0)
_JITTER = 2.0
_DIRECTION = {
    "moves left": (-1.0, 0.0),
    "moves right": (1.0, 0.0),
    "moves up": (0.0, -1.0),
    "moves down": (0.0, 1.0),
}

TRAINING_SCENES = tuple(scene for scene in all_scenes() if not scene.held_out)
HELD_OUT_SCENES = tuple(scene for scene in all_scenes() if scene.held_out)


@dataclass(frozen=True)
class Clips:
    """A batch of clips, still as coverage and two colours.

    Args:
        scenes: what each clip shows.
        coverage: ``[B, T, H, W]`` in 0..1, how much of each pixel the object covers.
        color, background: ``[B, 3]`` in -1..1.
    """

    scenes: tuple[Scene, ...]
    coverage: Tensor
    color: Tensor
    background: Tensor

    def video(self) -> Tensor:
        """``[B, 3, T, H, W]`` in -1..1, the range a Wan VAE works in."""
        base = self.background[:, :, None, None, None]
        return base + self.coverage[:, None] * (self.color - self.background)[:, :, None, None, None]

    def frames(self) -> Tensor:
        """``[B, T, H, W, 3]``, uint8."""
        return ((self.video() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance of the points (x, y) to the outline of a shape centred on the origin, negative inside.

    The proportions give the six shapes about the same area for one ``radius``; y points down.
    """
    if shape == "ball":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if shape == "diamond":
        return (x.abs() + y.abs() - 1.25 * radius) * 0.5**0.5
    if shape == "ring":
        return (torch.hypot(x, y) - 0.84 * radius).abs() - 0.27 * radius
    if shape == "cross":
        across = torch.maximum(x.abs() - 1.15 * radius, y.abs() - 0.38 * radius)
        down = torch.maximum(y.abs() - 1.15 * radius, x.abs() - 0.38 * radius)
        return torch.minimum(across, down)
    if shape == "triangle":
        # Upright and equilateral, its inradius 0.65 r; moved down a little so that the box is centred.
        drop = y - 0.3 * radius
        slope = 0.75**0.5 * x.abs() - 0.5 * drop
        return torch.maximum(slope, drop) - 0.65 * radius
    raise ValueOptionError(f"shape: expected one of {SHAPES}, got {shape!r}")


def render(
    scenes: Sequence[Scene],
    generator: torch.Generator | None = None,
    *,
    frames: int = FRAMES,
    height: int = HEIGHT,
    width: int = WIDTH,
) -> Clips:
    """Draw one clip for each scene; place, size and speed vary a little with the generator.

    Args:
        scenes: what to draw.
        generator: source of the variation; the same state gives the same clips.
    Returns:
        Clips of ``[len(scenes), frames, height, width]``.
    """
    count = len(scenes)
    unit = min(height, width) / 64
    noise = torch.rand(count, 4, generator=generator)
    radius = torch.tensor([RADIUS[s.size] for s in scenes]) * (0.97 + 0.06 * noise[:, 0]) * unit
    travel = (_TRAVEL[0] + (_TRAVEL[1] - _TRAVEL[0]) * noise[:, 1]) * unit
    direction = torch.tensor([_DIRECTION.get(s.motion, (0.0, 0.0)) for s in scenes])
    centre = torch.tensor([width / 2, height / 2]) + (noise[:, 2:] - 0.5) * 2 * _JITTER * unit
    growth = torch.tensor([{"grows": 1.0, "shrinks": -1.0}.get(s.motion, 0.0) for s in scenes])

    phase = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)
    place = centre[:, None] + phase[None, :, None] * (direction * travel[:, None])[:, None]
    middle, span = sum(GROWTH) / 2, GROWTH[1] - GROWTH[0]
    size = radius[:, None] * (1 + growth[:, None].abs() * (middle - 1) + growth[:, None] * span * phase)

    x = (torch.arange(width) + 0.5)[None, None, None] - place[:, :, 0, None, None]
    y = (torch.arange(height) + 0.5)[None, None, :, None] - place[:, :, 1, None, None]
    coverage = torch.empty(count, frames, height, width)
    for shape in SHAPES:
        rows = [i for i, scene in enumerate(scenes) if scene.shape == shape]
        if rows:
            distance = signed_distance(shape, x[rows], y[rows], size[rows][..., None, None])
            coverage[rows] = (0.5 - distance).clamp_(0, 1)
    return Clips(
        tuple(scenes),
        coverage,
        torch.tensor([COLORS[s.color] for s in scenes]) / 127.5 - 1,
        torch.tensor([BACKGROUNDS[s.background] for s in scenes]) / 127.5 - 1,
    )


def draw_scenes(
    count: int, generator: torch.Generator | None = None, pool: Sequence[Scene] = TRAINING_SCENES
) -> list[Scene]:
    """``count`` scenes drawn from ``pool`` with replacement."""
    return [pool[i] for i in torch.randint(len(pool), (count,), generator=generator).tolist()]
