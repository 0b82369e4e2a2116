"""VAE ops."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

import pyvideo_kernels as pv

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


# Taps in time of a model's weight (0: it has no time) and the factor in time.
_UPSAMPLES = {"wan": (0, 1), "hunyuanvideo": (3, 2), "cogvideox": (0, 2)}


def _upsampled_frames(grid: Any, style: str) -> int:
    frames, factor = grid[0], _UPSAMPLES[style][1]
    return frames if factor == 1 else 2 * frames - _first_apart(grid, style)


def _first_apart(grid: Any, style: str) -> bool:
    # CogVideoX sees a clip's beginning in an odd number of frames.
    return style == "hunyuanvideo" or (style == "cogvideox" and grid[0] % 2 == 1)


def _upsample_inputs(grid: Any, channels: int, out: int, dtype: Any, device: Any, style: str = "wan") -> dict[str, Any]:
    taps, factor = _UPSAMPLES[style]
    weight = rand(out, channels, *((taps,) if taps else ()), 3, 3, dtype=dtype, device=device) * 0.02
    return {
        "x": rand(1, *grid, channels, dtype=dtype, device=device),
        "weight": weight,
        "bias": rand(out, dtype=dtype, device=device),
        "packed": pv.pack_upsample_weight(weight, factor),
        "time_factor": factor,
        "first": _first_apart(grid, style),
        "pad_mode": "replicate" if taps else "zeros",
    }


def _upsample_bytes(grid: Any, channels: int, out: int, dtype: torch.dtype, style: str = "wan") -> int:
    """Both forms of the weight are handed over: the model's, and that of the phases."""
    taps, factor = _UPSAMPLES[style]
    weights = (9 * max(taps, 1) + (64 if taps and factor == 2 else 16 * max(taps, 1))) * channels * out
    frames = _upsampled_frames(grid, style)
    pixels = grid[1] * grid[2]
    return (grid[0] * pixels * channels + weights + out + 4 * frames * pixels * out) * dtype.itemsize


def _upsample_flops(grid: Any, channels: int, out: int, style: str = "wan") -> float:
    """Those of the phases; of the large image's convolution they are 4/9, with time 8/27."""
    taps, factor = _UPSAMPLES[style]
    frames = _upsampled_frames(grid, style) if taps else grid[0]
    in_time = 2 if taps and factor == 2 else max(taps, 1)
    return 2.0 * 16 * in_time * frames * grid[1] * grid[2] * channels * out


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
    Entry("upsample_conv2d", shapes.UPSAMPLE_GPU, shapes.UPSAMPLE_CPU, _upsample_inputs, eager.upsample_conv2d,
          _upsample_bytes, _upsample_flops, stock=_channels_first, convolves=True),
    Entry("blend_tile_", shapes.TILE_GPU, shapes.TILE_CPU, _tile_inputs, eager.blend_tile_, _tile_bytes,
          stock=_own_tile, returns="out"),
)  # fmt: skip
