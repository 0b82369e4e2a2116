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


ENTRIES = (
    Entry("rms_norm_silu", shapes.VAE_GPU, shapes.VAE_CPU, _vae_norm_inputs, eager.rms_norm_silu, _vae_norm_bytes,
          stock=_channels_first),
    Entry("causal_conv3d", shapes.VAE_GPU, shapes.VAE_CPU, _conv_inputs, eager.causal_conv3d, _conv_bytes, _conv_flops,
          stock=_channels_first, convolves=True),
)  # fmt: skip
