"""The causal convolution, plain and with each of its epilogues."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from .. import eager_vae as eager
from .. import shapes
from .entry import Entry, rand

_NORM = {"epilogue": "rms_norm_silu"}
# What a layer of a model asks of the op, and how many rows its weight has for each channel.
_OPTIONS: dict[str, dict[str, Any]] = {
    "wan": {},
    "residual": {},
    "norm": {**_NORM, "keep": False},
    "residual-norm": _NORM,
    "interleave": {"epilogue": "interleave"},
    "hunyuanvideo": {"pad_mode": "replicate"},
    "ltx": {"pad_mode": "first_frame", "epilogue": "pixel_shuffle", "factor": (2, 2, 2)},
}
_ROWS = {"interleave": 2, "ltx": 4}


def _taps(style: str) -> tuple[int, int, int]:
    return (3, 1, 1) if style == "interleave" else (3, 3, 3)


def _cached(style: str) -> int:
    """Frames of a cache: Wan's decoder has one, the other models convolve whole clips."""
    return 0 if style in ("hunyuanvideo", "ltx") else 2


def _inputs(grid: Any, channels: int, dtype: Any, device: Any, style: str = "wan") -> dict[str, Any]:
    def made(*shape: int) -> torch.Tensor:
        return rand(*shape, dtype=dtype, device=device)

    rows = channels * _ROWS.get(style, 1)
    inputs = {
        "x": made(1, *grid, channels),
        "weight": made(rows, channels, *_taps(style)) * 0.02,
        "bias": made(rows),
        **_OPTIONS[style],
    }
    if cached := _cached(style):
        inputs["cache"] = made(1, cached, *grid[1:], channels)
    if style.startswith("residual"):
        inputs["residual"] = made(1, *grid, channels)
    if style.endswith("norm"):
        inputs["norm_weight"] = made(channels)
    return inputs


def _bytes(grid: Any, channels: int, dtype: torch.dtype, style: str = "wan") -> int:
    t, h, w = grid
    rows = _ROWS.get(style, 1)
    clips = t + _cached(style) + t * rows + t * style.startswith("residual") + t * (style == "residual-norm")
    weights = rows * (prod(_taps(style)) * channels + 1) + style.endswith("norm")
    return (clips * h * w + weights) * channels * dtype.itemsize


def _flops(grid: Any, channels: int, style: str = "wan") -> float:
    return 2.0 * prod(_taps(style)) * prod(grid) * channels**2 * _ROWS.get(style, 1)


def _stock(inputs: dict[str, Any]) -> dict[str, Any]:
    """Clips as the stock decoder has them: ``[B, C, T, H, W]``, contiguous."""
    clips = ("x", "cache", "residual")
    return inputs | {name: inputs[name].permute(0, 4, 1, 2, 3).contiguous() for name in clips if name in inputs}


ENTRIES = (
    Entry("causal_conv3d", shapes.CONV_GPU, shapes.CONV_CPU, _inputs, eager.causal_conv3d, _bytes, _flops,
          stock=_stock, convolves=True),
)  # fmt: skip
