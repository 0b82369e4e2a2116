"""Reads colour, shape, motion, size and background back from frames, by image analysis alone.

Nothing here is learned: a Reading comes from the frames' border, the largest thing that differs from it,
and the overlap of that thing with the six drawn shapes.  An attribute that the frames do not show clearly
is None, so noise and grey mush agree with no sentence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..error_types import ShapeError
from .clips import GROWTH, RADIUS, signed_distance
from .grammar import ATTRIBUTES, BACKGROUNDS, COLORS, SHAPES, Scene

_VISIBLE = 0.18  # contrast (0..sqrt 3) under which nothing stands out from the background
_SAME_BACKGROUND = 0.25
_SAME_COLOR = 0.45
_LEAST_OVERLAP = 0.6
_TRAVEL = 22.0
_STEADY = 4.0  # pixels about its path beyond which a thing jumps rather than moves
_LOG_GROWTH = 2 * math.log(GROWTH[1] / GROWTH[0])


@dataclass(frozen=True)
class Reading:
    """What a clip shows; None where it shows nothing clear.

    Args:
        color, shape, motion, background, size: as in ``Scene``; a size between small and big is None.
        overlap: how well the shape fits its template, 0..1.
        travel: displacement over the clip in pixels of a 64-pixel frame (x, y).
        growth: logarithm of the area's change over the clip.
        radius: mean radius in pixels of a 64-pixel frame.
    """

    color: str | None
    shape: str | None
    motion: str | None
    background: str | None
    size: str | None
    overlap: float = 0.0
    travel: tuple[float, float] = (0.0, 0.0)
    growth: float = 0.0
    radius: float = 0.0

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Attribute by attribute; size only where the sentence names one."""
        names = [name for name in ATTRIBUTES if name != "size" or scene.size is not None]
        return {name: getattr(self, name) == getattr(scene, name) for name in names}


def _as_float(frames: Any) -> Tensor:
    video = torch.as_tensor(frames)
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ShapeError(f"frames: expected [T, H, W, 3], got {tuple(video.shape)}")
    return video.float() / 255 if video.dtype == torch.uint8 else video.float().clamp(0, 1)


def _nearest(color: Tensor, names: dict[str, tuple[int, int, int]], limit: float) -> str | None:
    palette = torch.tensor(list(names.values())) / 255
    distance = (palette - color).norm(dim=1)
    best = int(distance.argmin())
    return list(names)[best] if distance[best] < limit else None


def _largest_component(mask: Tensor) -> Tensor:
    """Keeps, frame by frame, the largest 8-connected set of pixels; ``mask`` is ``[T, H, W]`` of bool."""
    frames, height, width = mask.shape
    labels = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width) * mask
    while True:
        spread = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    flat = labels.long().flatten(1)
    sizes = torch.zeros(frames, height * width + 1).scatter_add_(1, flat, torch.ones(flat.shape))
    sizes[:, 0] = 0
    return mask & (labels == sizes.argmax(1)[:, None, None])


def _trend(values: Tensor, weight: Tensor) -> tuple[float, float]:
    """Change of ``values`` over the clip along their weighted least-squares line, and their spread about it."""
    phase = torch.linspace(-0.5, 0.5, len(values))
    phase = phase - (phase * weight).sum() / weight.sum()
    slope = (weight * phase * values).sum() / (weight * phase.square()).sum().clamp_min(1e-6)
    rest = values - (weight * values).sum() / weight.sum() - slope * phase
    return float(slope), float(((weight * rest.square()).sum() / weight.sum()).sqrt())


def _fit_shape(cover: Tensor, mass: Tensor, cx: Tensor, cy: Tensor) -> tuple[str | None, float, Tensor]:
    """The shape whose drawing overlaps the clip best, the overlap, and its radius in every frame."""
    height, width = cover.shape[1:]
    x = (torch.arange(width) + 0.5)[None, None, :] - cx[:, None, None]
    y = (torch.arange(height) + 0.5)[None, :, None] - cy[:, None, None]
    best: tuple[str | None, float, Tensor] = (None, 0.0, torch.zeros(len(cover)))
    for shape in SHAPES:
        unit = _unit_area(shape)
        # The drawing's centroid, not its origin, belongs on the measured centroid.
        for scale in (0.94, 1.0, 1.06):
            radius = (mass / unit[0]).sqrt() * scale
            r = radius[:, None, None]
            drawn = (0.5 - signed_distance(shape, x, y + unit[1] * r, r)).clamp(0, 1)
            both = torch.minimum(drawn, cover).sum((1, 2))
            either = torch.maximum(drawn, cover).sum((1, 2)).clamp_min(1e-6)
            overlap = float((both / either * mass).sum() / mass.sum().clamp_min(1e-6))
            if overlap > best[1]:
                best = (shape, overlap, radius)
    return best


def _unit_area(shape: str) -> tuple[float, float]:
    """Area and centroid height of a shape of radius one."""
    if shape not in _UNIT:
        axis = (torch.arange(400) + 0.5) / 100 - 2
        inside = signed_distance(shape, axis[None], axis[:, None], torch.tensor(1.0)) < 0
        centroid = float((inside * axis[:, None]).sum() / inside.sum())
        _UNIT[shape] = (float(inside.sum()) * 1e-4, centroid)
    return _UNIT[shape]


_UNIT: dict[str, tuple[float, float]] = {}


def read(frames: Any) -> Reading:
    """What a clip shows.

    Args:
        frames: ``[T, H, W, 3]``, uint8 or floating point in 0..1; array or tensor.
    Returns:
        A Reading; fields are None where nothing in the grammar fits.
    Raises:
        ShapeError: the frames have another shape.
    """
    video = _as_float(frames)
    unit = min(video.shape[1:3]) / 64
    edge = torch.cat([video[:, :2].flatten(0, 2), video[:, -2:].flatten(0, 2)])
    edge = torch.cat([edge, video[:, :, :2].flatten(0, 2), video[:, :, -2:].flatten(0, 2)])
    ground = edge.median(0).values
    background = _nearest(ground, BACKGROUNDS, _SAME_BACKGROUND)

    smooth = F.avg_pool2d(video.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False).permute(0, 2, 3, 1)
    contrast = (smooth - ground).norm(dim=-1)
    strongest = float(contrast.flatten().quantile(0.98))
    if strongest < _VISIBLE:
        return Reading(None, None, None, background, None)
    mask = _largest_component(contrast > max(_VISIBLE, 0.5 * strongest))
    core = mask & (contrast > 0.8 * strongest)
    paint = video[core if core.any() else mask].median(0).values
    color = _nearest(paint, COLORS, _SAME_COLOR)

    near = F.max_pool2d(mask.float()[:, None], 5, 1, 2)[:, 0]
    toward = paint - ground
    cover = ((video - ground) @ toward / toward.square().sum()).clamp(0, 1) * near
    cover = torch.where(cover < 0.15, 0.0, cover)
    mass = cover.sum((1, 2))
    seen = (mass > 12 * unit**2).float()
    if seen.sum() < 2:
        return Reading(color, None, None, background, None)
    safe = mass.clamp_min(1e-6)
    cx = (cover.sum(1) * (torch.arange(cover.shape[2]) + 0.5)).sum(1) / safe
    cy = (cover.sum(2) * (torch.arange(cover.shape[1]) + 0.5)).sum(1) / safe
    (dx, x_spread), (dy, y_spread) = _trend(cx / unit, seen), _trend(cy / unit, seen)
    growth, _ = _trend(safe.log(), seen)

    # Every other frame is plenty for the shape, which is most of the work.
    shape, overlap, radius = _fit_shape(cover[::2], (mass * seen)[::2], cx[::2], cy[::2])
    mean_radius = float((radius * seen[::2]).sum() / seen[::2].sum().clamp_min(1)) / unit
    middle = RADIUS[None]
    small, big = (middle + RADIUS["small"]) / 2, (middle + RADIUS["big"]) / 2
    size = "small" if mean_radius < small else "big" if mean_radius > big else None

    candidates = {
        "moves left": -dx / _TRAVEL,
        "moves right": dx / _TRAVEL,
        "moves up": -dy / _TRAVEL,
        "moves down": dy / _TRAVEL,
        "grows": growth / _LOG_GROWTH,
        "shrinks": -growth / _LOG_GROWTH,
    }
    motion = max(candidates, key=lambda name: candidates[name])
    return Reading(
        color,
        shape if overlap > _LEAST_OVERLAP else None,
        motion if candidates[motion] > 0.4 and max(x_spread, y_spread) < _STEADY else None,
        background,
        size,
        overlap,
        (dx, dy),
        growth,
        mean_radius,
    )
