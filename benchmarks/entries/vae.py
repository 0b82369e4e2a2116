"""VAE ops."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from .. import eager_vae as eager
from .. import shapes
from .entry import Entry, rand


def _channels_first(inputs: dict[str, Any]) -> dict[str, Any]:
    """Clips as the stock decoder has them: ``[B, C, T, H, W]``, contiguous."""
    clips: dict[str, Any] = {
        name: inputs[name].permute(0, 4, 1, 2, 3).contiguous() for name in ("x", "cache") if name in inputs
    }
    return {**inputs, **clips}


def _vae_norm_inputs(grid: Any, channels: int, dtype: Any, device: Any) -> dict[str, Any]:
    return {
        "x": rand(1, *grid, channels, dtype=dtype, device=device),
        "weight": rand(channels, dtype=dtype, device=device),
    }


def _vae_norm_bytes(grid: Any, channels: int, dtype: torch.dtype) -> int:
    return (2 * prod(grid) + 1) * channels * dtype.itemsize


def _conv_inputs(grid: Any, channels: int, dtype: Any, device: Any) -> dict[str, Any]:
    return {
        "x": rand(1, *grid, channels, dtype=dtype, device=device),
        "weight": rand(channels, channels, 3, 3, 3, dtype=dtype, device=device) * 0.02,
        "bias": rand(channels, dtype=dtype, device=device),
        "cache": rand(1, 2, *grid[1:], channels, dtype=dtype, device=device),
    }


def _conv_bytes(grid: Any, channels: int, dtype: torch.dtype) -> int:
    t, h, w = grid
    return ((2 * t + 2) * h * w + 27 * channels + 1) * channels * dtype.itemsize


def _conv_flops(grid: Any, channels: int) -> float:
    return 2.0 * 27 * prod(grid) * channels**2


def _seams(grid: Any) -> tuple[int, int]:
    """Overlap of neighbouring tiles along height and width: a quarter, as diffusers has it."""
    return max(1, grid[1] // 4), max(1, grid[2] // 4)


def _tile_inputs(grid: Any, dtype: Any, device: Any) -> dict[str, Any]:
    """An inner tile of RGB frames as it leaves the decoder, channels last, and its place in whole frames."""
    t, h, w = grid
    n, m = _seams(grid)

    def frames(height: int, width: int) -> Any:
        return rand(1, t, height, width, 3, dtype=dtype, device=device).permute(0, 4, 1, 2, 3)

    return {
        "out": torch.empty(1, 3, t, 2 * h, 2 * w, dtype=dtype, device=device)[..., n : h, m : w],
        "tile": frames(h, w), "above": frames(n, w), "left": frames(h, m), "below": frames(n, w), "right": frames(h, m),
    }  # fmt: skip


def _tile_bytes(grid: Any, dtype: torch.dtype) -> int:
    t, h, w = grid
    n, m = _seams(grid)
    return 3 * t * (h * w + (h - n) * (w - m) + 2 * (n * w + h * m)) * dtype.itemsize


def _own_tile(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "tile": inputs["tile"].clone()}  # written over


ENTRIES = (
    Entry("rms_norm_silu", shapes.VAE_GPU, shapes.VAE_CPU, _vae_norm_inputs, eager.rms_norm_silu, _vae_norm_bytes,
          stock=_channels_first),
    Entry("causal_conv3d", shapes.VAE_GPU, shapes.VAE_CPU, _conv_inputs, eager.causal_conv3d, _conv_bytes, _conv_flops,
          stock=_channels_first, convolves=True),
    Entry("blend_tile_", shapes.TILE_GPU, shapes.TILE_CPU, _tile_inputs, eager.blend_tile_, _tile_bytes,
          stock=_own_tile, returns="out"),
)  # fmt: skip
