"""Transformer ops: norms, modulation, residuals, RoPE, the first and the last layer."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import eager, shapes
from .entry import FP32, Entry, rand


def _modulation(count: int, tokens: int, width: int, style: str, dtype: Any, device: Any) -> list[Tensor]:
    """fp32 and one row a sample as Wan has it, one row a token in Wan 2.2 5B, the model's dtype elsewhere."""
    rows = tokens if style == "per token" else 1
    kind = torch.float32 if style in ("wan", "per token") else dtype
    return [rand(1, rows, width, dtype=kind, device=device) for _ in range(count)]


def _modulation_bytes(count: int, tokens: int, width: int, style: str, dtype: torch.dtype) -> int:
    each = FP32 if style in ("wan", "per token") else dtype.itemsize
    return count * each * width * (tokens if style == "per token" else 1)


def _norm_inputs(tokens: int, width: int, dtype: Any, device: Any, style: str = "wan", **_: int) -> dict[str, Any]:
    scale, shift = _modulation(2, tokens, width, style, dtype, device)
    inputs: dict[str, Any] = {"x": rand(1, tokens, width, dtype=dtype, device=device), "scale": scale, "shift": shift}
    if style == "cogvideox":
        inputs |= {name: rand(width, dtype=dtype, device=device) for name in ("weight", "bias")} | {"eps": 1e-5}
    return inputs


def _norm_bytes(tokens: int, width: int, dtype: torch.dtype, style: str = "wan", **_: int) -> int:
    affine = 2 * width * dtype.itemsize if style == "cogvideox" else 0
    return 2 * tokens * width * dtype.itemsize + _modulation_bytes(2, tokens, width, style, dtype) + affine


def _residual_inputs(tokens: int, width: int, dtype: Any, device: Any, style: str = "wan", **_: int) -> dict[str, Any]:
    x, y = (rand(1, tokens, width, dtype=dtype, device=device) for _ in range(2))
    return {"x": x, "y": y, "gate": _modulation(1, tokens, width, style, dtype, device)[0]}


def _residual_bytes(tokens: int, width: int, dtype: torch.dtype, style: str = "wan", **_: int) -> int:
    return 3 * tokens * width * dtype.itemsize + _modulation_bytes(1, tokens, width, style, dtype)


def _residual_norm_inputs(
    tokens: int, width: int, dtype: Any, device: Any, style: str = "wan", **_: int
) -> dict[str, Any]:
    x, y = (rand(1, tokens, width, dtype=dtype, device=device) for _ in range(2))
    gate, scale, shift = _modulation(3, tokens, width, style, dtype, device)
    return {"x": x, "y": y, "gate": gate, "scale": scale, "shift": shift}


def _residual_norm_bytes(tokens: int, width: int, dtype: torch.dtype, style: str = "wan", **_: int) -> int:
    return 4 * tokens * width * dtype.itemsize + _modulation_bytes(3, tokens, width, style, dtype)


def _rms_inputs(tokens: int, width: int, heads: int, dtype: Any, device: Any, style: str = "wan") -> dict[str, Any]:
    if style == "per head":
        x = rand(1, tokens, heads, width // heads, dtype=dtype, device=device)
    else:
        x = rand(1, tokens, width, dtype=dtype, device=device)
    return {"x": x} if style == "no weight" else {"x": x, "weight": rand(x.shape[-1], dtype=dtype, device=device)}


def _rms_bytes(tokens: int, width: int, heads: int, dtype: torch.dtype, style: str = "wan") -> int:
    weight = {"per head": width // heads, "no weight": 0}.get(style, width)
    return (2 * tokens * width + weight) * dtype.itemsize


def qk_inputs(tokens: int, width: int, heads: int, dtype: Any, device: Any, style: str = "wan") -> dict[str, Any]:
    head_dim = width // heads
    packed = rand(1, tokens, 3, heads, head_dim, dtype=dtype, device=device)
    text = shapes.COG_TEXT * (tokens > shapes.COG_TEXT) if style == "cogvideox" else 0
    table_heads = heads if style == "tables per head" else 1
    angle = torch.rand(1, tokens - text, table_heads, head_dim // 2, device=device).repeat_interleave(2, -1) * 6.0
    per_head = style in ("per head", "cogvideox")
    names = ("q_weight", "k_weight") + (("q_bias", "k_bias") if style == "cogvideox" else ())
    inputs: dict[str, Any] = {
        "q": packed[:, :, 0],
        "k": packed[:, :, 1],
        **{name: rand(head_dim if per_head else width, dtype=dtype, device=device) for name in names},
        "cos": angle.cos(),
        "sin": angle.sin(),
        "norm": "per_head" if per_head else "across_heads",
        "layout": "interleaved",
    }
    if style == "cogvideox":
        inputs |= {"norm_type": "layer", "rotary_range": (text, tokens)}
    return inputs


def qk_bytes(tokens: int, width: int, heads: int, dtype: torch.dtype, style: str = "wan") -> int:
    head_dim = width // heads
    text = shapes.COG_TEXT * (tokens > shapes.COG_TEXT) if style == "cogvideox" else 0
    vectors = {"per head": 2 * head_dim, "cogvideox": 4 * head_dim}.get(style, 2 * width)
    tables = 2 * (tokens - text) * head_dim * (heads if style == "tables per head" else 1)
    return (4 * tokens * width + vectors) * dtype.itemsize + tables * FP32


# Door and head ------------------------------------------------------------------------------------------------


def _embed_inputs(grid: Any, width: int, channels: int, dtype: Any, device: Any) -> dict[str, Any]:
    t, h, w = grid
    return {
        "video": rand(1, channels, t, h * 2, w * 2, dtype=dtype, device=device),
        "weight": rand(width, channels, 1, 2, 2, dtype=dtype, device=device) * 0.1,
        "bias": rand(width, dtype=dtype, device=device),
    }


def _embed_bytes(grid: Any, width: int, channels: int, dtype: torch.dtype) -> int:
    tokens, columns = prod(grid), channels * 4
    return (tokens * columns + width * columns + width + tokens * width) * dtype.itemsize


def _embed_flops(grid: Any, width: int, channels: int) -> float:
    return 2.0 * prod(grid) * width * channels * 4


def _ffn_inputs(tokens: int, width: int, ffn: int, dtype: Any, device: Any) -> dict[str, Any]:
    return {
        "x": rand(1, tokens, width, dtype=dtype, device=device),
        "weight": rand(ffn, width, dtype=dtype, device=device) * 0.02,
        "bias": rand(ffn, dtype=dtype, device=device),
    }


def _ffn_bytes(tokens: int, width: int, ffn: int, dtype: torch.dtype) -> int:
    return (tokens * width + ffn * width + ffn + tokens * ffn) * dtype.itemsize


def _ffn_flops(tokens: int, width: int, ffn: int) -> float:
    return 2.0 * tokens * width * ffn


def _final_inputs(grid: Any, width: int, channels: int, dtype: Any, device: Any) -> dict[str, Any]:
    return {
        **_norm_inputs(prod(grid), width, dtype, device),
        "weight": rand(channels * 4, width, dtype=dtype, device=device) * 0.02,
        "bias": rand(channels * 4, dtype=dtype, device=device),
        "grid": grid,
        "patch": (1, 2, 2),
    }


def _final_bytes(grid: Any, width: int, channels: int, dtype: torch.dtype) -> int:
    tokens, columns = prod(grid), channels * 4
    return (tokens * width + columns * width + columns + tokens * columns) * dtype.itemsize + 2 * width * FP32


ENTRIES = (
    Entry("layer_norm_modulate", shapes.MODULATE_GPU, shapes.MODULATE_CPU, _norm_inputs, eager.layer_norm_modulate,
          _norm_bytes),
    Entry("gate_residual", shapes.RESIDUAL_GPU, shapes.RESIDUAL_CPU, _residual_inputs, eager.gate_residual,
          _residual_bytes),
    Entry("gate_residual_norm_modulate", shapes.RESIDUAL_GPU, shapes.RESIDUAL_CPU, _residual_norm_inputs,
          eager.gate_residual_norm_modulate, _residual_norm_bytes),
    Entry("rms_norm", shapes.RMS_GPU, shapes.RMS_CPU, _rms_inputs, eager.rms_norm, _rms_bytes),
    Entry("qk_norm_rope", shapes.QK_GPU, shapes.QK_CPU, qk_inputs, eager.qk_norm_rope, qk_bytes),
    Entry("qk_norm_rope_", shapes.QK_IN_PLACE_GPU, shapes.QK_IN_PLACE_CPU, qk_inputs, eager.qk_norm_rope, qk_bytes),
    Entry("patch_embed3d", shapes.EMBED_GPU, shapes.EMBED_CPU, _embed_inputs, eager.patch_embed3d, _embed_bytes,
          _embed_flops, convolves=True),
    Entry("linear_gelu", shapes.FFN_GPU, shapes.FFN_CPU, _ffn_inputs, eager.linear_gelu, _ffn_bytes, _ffn_flops),
    Entry("final_layer", shapes.FINAL_GPU, shapes.EMBED_CPU, _final_inputs, eager.final_layer, _final_bytes,
          _embed_flops),
)  # fmt: skip
