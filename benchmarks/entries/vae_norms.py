"""Norms of the VAEs other than Wan's."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from .. import eager_vae_norms as eager
from .. import shapes
from .entry import Entry, rand


def _channels_first(inputs: dict[str, Any]) -> dict[str, Any]:
    """Clips and latents as the stock decoders have them: ``[B, C, T, H, W]``, contiguous."""
    clips = {name: z.permute(0, 4, 1, 2, 3).contiguous() for name, z in inputs.items() if getattr(z, "ndim", 0) == 5}
    return {**inputs, **clips}


def _latent(grid: Any) -> tuple[int, int, int]:
    """CogVideoX's latent of a grid of its full resolution: an odd number of frames has one apart."""
    t, h, w = grid
    return max(1, t // 4) + (t > 1 and t % 2), max(1, h // 8), max(1, w // 8)


def _group_norm_inputs(grid: Any, channels: int, dtype: Any, device: Any, style: str = "hunyuan") -> dict[str, Any]:
    inputs = {
        "x": rand(1, *grid, channels, dtype=dtype, device=device),
        "weight": rand(channels, dtype=dtype, device=device),
        "bias": rand(channels, dtype=dtype, device=device),
        "groups": min(32, channels // 2),
    }
    if style == "cogvideox":
        inputs |= {name: rand(1, *_latent(grid), channels, dtype=dtype, device=device) for name in ("scale", "shift")}
    return inputs


def _group_norm_bytes(grid: Any, channels: int, dtype: torch.dtype, style: str = "hunyuan") -> int:
    latent = 2 * prod(_latent(grid)) if style == "cogvideox" else 0
    return (2 * prod(grid) + latent + 2) * channels * dtype.itemsize


def _pixel_norm_inputs(grid: Any, channels: int, dtype: Any, device: Any, style: str = "ltx") -> dict[str, Any]:
    inputs = {"x": rand(1, *grid, channels, dtype=dtype, device=device)}
    if style == "ltx-timestep":
        inputs |= {name: rand(1, channels, dtype=dtype, device=device) for name in ("scale", "shift")}
    return inputs


def _pixel_norm_bytes(grid: Any, channels: int, dtype: torch.dtype, style: str = "ltx") -> int:
    return (2 * prod(grid) + (2 if style == "ltx-timestep" else 0)) * channels * dtype.itemsize


ENTRIES = (
    Entry("group_norm_silu", shapes.GROUP_NORM_GPU, shapes.GROUP_NORM_CPU, _group_norm_inputs, eager.group_norm_silu,
          _group_norm_bytes, stock=_channels_first),
    Entry("pixel_norm_silu", shapes.PIXEL_NORM_GPU, shapes.PIXEL_NORM_CPU, _pixel_norm_inputs, eager.pixel_norm_silu,
          _pixel_norm_bytes, stock=_channels_first),
)  # fmt: skip
