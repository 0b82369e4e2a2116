"""The decoders' middle attention, and their last layers."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from .. import eager_vae_ends as eager
from .. import shapes
from .entry import Entry, rand


def _attention_inputs(grid: Any, channels: int, dtype: Any, device: Any, style: str = "wan") -> dict[str, Any]:
    """Wan projects to queries, keys and values at once; HunyuanVideo three times, for causal attention."""
    t, h, w = grid
    if style == "hunyuanvideo":
        parts = [rand(1, t, h * w, channels, dtype=dtype, device=device) for _ in range(3)]
    else:
        parts = list(rand(1, t, h * w, 3 * channels, dtype=dtype, device=device).chunk(3, -1))
    return dict(zip("qkv", parts, strict=True)) | ({"causal": True} if style == "hunyuanvideo" else {})


def _attention_bytes(grid: Any, channels: int, dtype: torch.dtype, style: str = "wan") -> int:
    return 4 * prod(grid) * channels * dtype.itemsize


def _attention_flops(grid: Any, channels: int, style: str = "wan") -> float:
    t, h, w = grid
    pairs = t * (t + 1) / 2 if style == "hunyuanvideo" else t
    return 4.0 * pairs * (h * w) ** 2 * channels


# Output channels and what a model asks of the op; Wan alone has a cache, the others decode whole clips.
_HEADS: dict[str, tuple[int, dict[str, Any]]] = {
    "wan": (3, {}),
    "wan-2.2": (12, {"patch": (1, 2, 2)}),
    "hunyuanvideo": (3, {"pad_mode": "replicate", "clamp": False}),
    "ltx": (48, {"pad_mode": "first_frame", "patch": (1, 4, 4), "clamp": False}),
}


def _cached(style: str) -> int:
    return 2 if style.startswith("wan") else 0


def _head_inputs(grid: Any, channels: int, dtype: Any, device: Any, style: str = "wan") -> dict[str, Any]:
    """Frames go to the middle of a clip."""
    t, h, w = grid
    out, options = _HEADS[style]
    p = options.get("patch", (1, 1, 1))[1]
    clip = torch.zeros(1, out // p**2, t + 8, h * p, w * p, dtype=dtype, device=device)
    inputs = {
        "out": clip[:, :, 4:-4],
        "x": rand(1, *grid, channels, dtype=dtype, device=device),
        "weight": rand(out, channels, 3, 3, 3, dtype=dtype, device=device) * 0.02,
        "bias": rand(out, dtype=dtype, device=device),
        **options,
    }
    if cached := _cached(style):
        inputs["cache"] = rand(1, cached, h, w, channels, dtype=dtype, device=device)
    return inputs


def _head_bytes(grid: Any, channels: int, dtype: torch.dtype, style: str = "wan") -> int:
    t, h, w = grid
    out = _HEADS[style][0]
    return ((t + _cached(style)) * h * w * channels + out * (27 * channels + 1 + t * h * w)) * dtype.itemsize


def _head_flops(grid: Any, channels: int, style: str = "wan") -> float:
    return 2.0 * 27 * prod(grid) * channels * _HEADS[style][0]


def _head_stock(inputs: dict[str, Any]) -> dict[str, Any]:
    """Clips as the stock decoder has them: ``[B, C, T, H, W]``, contiguous."""
    return inputs | {
        name: inputs[name].permute(0, 4, 1, 2, 3).contiguous() for name in ("x", "cache") if name in inputs
    }


ENTRIES = (
    Entry("vae_attention", shapes.MIDDLE_GPU, shapes.MIDDLE_CPU, _attention_inputs, eager.vae_attention,
          _attention_bytes, _attention_flops),
    Entry("decode_head_", shapes.HEAD_GPU, shapes.HEAD_CPU, _head_inputs, eager.decode_head_, _head_bytes,
          _head_flops, stock=_head_stock, convolves=True, returns="out"),
)  # fmt: skip
