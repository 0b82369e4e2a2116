"""Oracle of blend_tile_ and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up


def ramp(extent: int, grain: int, x: Tensor, dim: int) -> Tensor:
    """The tile's own weight along a seam, one step every ``grain`` pixels, shaped for dimension ``dim`` of ``x``."""
    steps = torch.arange(extent, device=x.device) // grain
    shape = [1] * x.dim()
    shape[dim] = extent
    return (steps.to(x.dtype) / (extent // grain)).view(shape)


def blended(tile: Tensor, above: Tensor | None, left: Tensor | None, grain: int) -> Tensor:
    """The whole tile blended over its upper seam, then over its left one, in the compute dtype."""
    v = up(tile, compute_dtype(tile)).clone()
    for strip, dim in ((above, 3), (left, 4)):
        if strip is None or not strip.shape[dim]:
            continue
        w = ramp(strip.shape[dim], grain, v, dim)
        seam = v.narrow(dim, 0, strip.shape[dim])
        seam.copy_(strip.to(v.dtype) * (1 - w) + seam * w)
    return v


def finished(v: Tensor, dtype: torch.dtype, clamp: bool) -> Tensor:
    """Pixels of ``v`` as the canvas takes them: bytes of [-1, 1], or floats."""
    if dtype == torch.uint8:
        return ((v / 2 + 0.5).clamp(0, 1) * 255).round().to(dtype)
    return (v.clamp(-1, 1) if clamp else v).to(dtype)


def blend_tile(
    out: Tensor,
    below: Tensor | None,
    right: Tensor | None,
    tile: Tensor,
    above: Tensor | None,
    left: Tensor | None,
    grain: int,
    clamp: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What blend_tile_ leaves in ``out``, ``below`` and ``right``."""
    v = blended(tile, above, left, grain)
    h, w = v.shape[3:]
    own = finished(v[..., : out.shape[3], : out.shape[4]], out.dtype, clamp)
    kept_below = None if below is None else v[:, :, :, h - below.shape[3] :].to(below.dtype)
    kept_right = None if right is None else v[..., w - right.shape[4] :].to(right.dtype)
    return own, kept_below, kept_right


def blend_tile_(out: Tensor, below: Tensor | None, right: Tensor | None, *rest: Any) -> None:
    """``impl="reference"`` of the op."""
    for target, value in zip((out, below, right), blend_tile(out, below, right, *rest), strict=True):
        if target is not None and value is not None:
            target.copy_(value)


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """First, middle and last tiles, channels-last and not, patches, bytes, seams wider than what is kept."""
    g = generator()

    def case(
        tile: tuple[int, ...],
        own: tuple[int, int],
        seams: tuple[int, int],
        keep: tuple[int, int],
        *,
        last: bool = False,
        to: torch.dtype = dtype,
        grain: int = 1,
        clamp: bool = False,
    ) -> dict[str, Any]:
        b, c, t, h, w = tile

        def frames(height: int, width: int, mean: float = 0.0) -> Tensor:
            if last:
                return randn(b, t, height, width, c, dtype=dtype, g=g, mean=mean).permute(0, 4, 1, 2, 3)
            return randn(b, c, t, height, width, dtype=dtype, g=g, mean=mean)

        canvas = torch.zeros((b, c, t + 1, own[0] + 3, own[1] + 2), dtype=to)
        return {
            "out": canvas[:, :, 1:, 2 : 2 + own[0], 1 : 1 + own[1]],
            "below": frames(keep[0], w) if keep[0] else None,
            "right": frames(h, keep[1]) if keep[1] else None,
            "tile": frames(h, w),
            "above": frames(seams[0], w, mean=1.0) if seams[0] else None,
            "left": frames(h, seams[1], mean=-1.0) if seams[1] else None,
            "grain": grain,
            "clamp": clamp,
        }

    yield case((1, 3, 1, 7, 9), (5, 6), (0, 0), (2, 3))
    yield case((2, 3, 2, 7, 9), (5, 6), (2, 3), (2, 3), last=True, clamp=True)
    yield case((1, 3, 2, 5, 4), (5, 4), (3, 0), (0, 0), to=torch.uint8)
    yield case((1, 4, 1, 8, 6), (6, 4), (4, 2), (2, 2), grain=2, last=True)
    # One row is left of the tile's own, all of it on the seam; nothing goes on below.
    yield case((1, 1, 1, 1, 33), (1, 17), (1, 16), (0, 16), to=torch.float32 if dtype == torch.float16 else dtype)
