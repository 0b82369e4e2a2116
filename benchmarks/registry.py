"""What is measured: per op the models' shapes, inputs, the bytes and FLOPs that must move, and the eager code.

Bytes count each input once and each output once, FLOPs a multiply and an add as two. A shape with ``style`` follows
another model's code than Wan's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

import pyvideo_kernels as pv
from pyvideo_kernels.ops.attention_cost import Cost, spacetime_attention_cost

from . import eager, shapes
from .shapes import Shapes

FP32 = 4


def _as_they_are(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs


@dataclass(frozen=True)
class Entry:
    """One op's benchmark.

    Args:
        op: public name; the function is ``pyvideo_kernels.<op>``.
        gpu, cpu: name -> sizes; ``gpu`` shapes are the models' own, ``cpu`` ones fit a laptop.
        inputs: sizes, dtype, device -> keyword arguments of the public function, random.
        eager: the reference model's code on the keyword arguments that ``stock`` gives.
        bytes: sizes, dtype -> bytes that must move; None: what inputs and outputs weigh.
        flops: sizes -> floating-point operations; 0: memory-bound, judged by bytes.
        stock: inputs as the reference model holds them, made once and not timed (channels first, say).
        convolves: a convolution of the library is involved, which takes fp32 as TF32 where cuDNN may.
    """

    op: str
    gpu: Shapes
    cpu: Shapes
    inputs: Callable[..., dict[str, Any]]
    eager: Callable[..., Any]
    bytes: Callable[..., int] | None = None
    flops: Callable[..., float] = lambda **_: 0.0
    stock: Callable[[dict[str, Any]], dict[str, Any]] = _as_they_are
    convolves: bool = False

    def ours(self, **kwargs: Any) -> Any:
        return getattr(pv, self.op)(**kwargs)

    def shapes(self, device: torch.device) -> Shapes:
        return self.gpu if device.type == "cuda" else self.cpu

    @property
    def in_place(self) -> bool:
        """Whether the op writes over its inputs."""
        return self.op.endswith("_")


def moved_bytes(inputs: Mapping[str, Any], outputs: Any) -> int:
    """Bytes of every input tensor read once plus every output tensor written once."""
    return weight_of(list(inputs.values())) + weight_of(outputs)


def weight_of(value: Any) -> int:
    """Bytes of the elements of every tensor in ``value``."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(weight_of(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(weight_of(item) for item in value)
    return 0


def _rand(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)


# Transformer: norms, modulation, residuals ------------------------------------------------------------------------


def _modulation(count: int, tokens: int, width: int, style: str, dtype: Any, device: Any) -> list[Tensor]:
    """fp32 and one row a sample as Wan has it, one row a token in Wan 2.2 5B, the model's dtype elsewhere."""
    rows = tokens if style == "per token" else 1
    kind = torch.float32 if style in ("wan", "per token") else dtype
    return [_rand(1, rows, width, dtype=kind, device=device) for _ in range(count)]


def _modulation_bytes(count: int, tokens: int, width: int, style: str, dtype: torch.dtype) -> int:
    each = FP32 if style in ("wan", "per token") else dtype.itemsize
    return count * each * width * (tokens if style == "per token" else 1)


def _norm_inputs(tokens: int, width: int, dtype: Any, device: Any, style: str = "wan", **_: int) -> dict[str, Any]:
    scale, shift = _modulation(2, tokens, width, style, dtype, device)
    inputs: dict[str, Any] = {"x": _rand(1, tokens, width, dtype=dtype, device=device), "scale": scale, "shift": shift}
    if style == "cogvideox":
        inputs |= {name: _rand(width, dtype=dtype, device=device) for name in ("weight", "bias")} | {"eps": 1e-5}
    return inputs


def _norm_bytes(tokens: int, width: int, dtype: torch.dtype, style: str = "wan", **_: int) -> int:
    affine = 2 * width * dtype.itemsize if style == "cogvideox" else 0
    return 2 * tokens * width * dtype.itemsize + _modulation_bytes(2, tokens, width, style, dtype) + affine


def _residual_inputs(tokens: int, width: int, dtype: Any, device: Any, style: str = "wan", **_: int) -> dict[str, Any]:
    x, y = (_rand(1, tokens, width, dtype=dtype, device=device) for _ in range(2))
    return {"x": x, "y": y, "gate": _modulation(1, tokens, width, style, dtype, device)[0]}


def _residual_bytes(tokens: int, width: int, dtype: torch.dtype, style: str = "wan", **_: int) -> int:
    return 3 * tokens * width * dtype.itemsize + _modulation_bytes(1, tokens, width, style, dtype)


def _residual_norm_inputs(
    tokens: int, width: int, dtype: Any, device: Any, style: str = "wan", **_: int
) -> dict[str, Any]:
    x, y = (_rand(1, tokens, width, dtype=dtype, device=device) for _ in range(2))
    gate, scale, shift = _modulation(3, tokens, width, style, dtype, device)
    return {"x": x, "y": y, "gate": gate, "scale": scale, "shift": shift}


def _residual_norm_bytes(tokens: int, width: int, dtype: torch.dtype, style: str = "wan", **_: int) -> int:
    return 4 * tokens * width * dtype.itemsize + _modulation_bytes(3, tokens, width, style, dtype)


def _rms_inputs(tokens: int, width: int, heads: int, dtype: Any, device: Any, style: str = "wan") -> dict[str, Any]:
    if style == "per head":
        x = _rand(1, tokens, heads, width // heads, dtype=dtype, device=device)
    else:
        x = _rand(1, tokens, width, dtype=dtype, device=device)
    return {"x": x} if style == "no weight" else {"x": x, "weight": _rand(x.shape[-1], dtype=dtype, device=device)}


def _rms_bytes(tokens: int, width: int, heads: int, dtype: torch.dtype, style: str = "wan") -> int:
    weight = {"per head": width // heads, "no weight": 0}.get(style, width)
    return (2 * tokens * width + weight) * dtype.itemsize


def _qk_inputs(tokens: int, width: int, heads: int, dtype: Any, device: Any, style: str = "wan") -> dict[str, Any]:
    head_dim = width // heads
    packed = _rand(1, tokens, 3, heads, head_dim, dtype=dtype, device=device)
    text = shapes.COG_TEXT * (tokens > shapes.COG_TEXT) if style == "cogvideox" else 0
    table_heads = heads if style == "tables per head" else 1
    angle = torch.rand(1, tokens - text, table_heads, head_dim // 2, device=device).repeat_interleave(2, -1) * 6.0
    per_head = style in ("per head", "cogvideox")
    names = ("q_weight", "k_weight") + (("q_bias", "k_bias") if style == "cogvideox" else ())
    inputs: dict[str, Any] = {
        "q": packed[:, :, 0],
        "k": packed[:, :, 1],
        **{name: _rand(head_dim if per_head else width, dtype=dtype, device=device) for name in names},
        "cos": angle.cos(),
        "sin": angle.sin(),
        "norm": "per_head" if per_head else "across_heads",
        "layout": "interleaved",
    }
    if style == "cogvideox":
        inputs |= {"norm_type": "layer", "rotary_range": (text, tokens)}
    return inputs


def _qk_bytes(tokens: int, width: int, heads: int, dtype: torch.dtype, style: str = "wan") -> int:
    head_dim = width // heads
    text = shapes.COG_TEXT * (tokens > shapes.COG_TEXT) if style == "cogvideox" else 0
    vectors = {"per head": 2 * head_dim, "cogvideox": 4 * head_dim}.get(style, 2 * width)
    tables = 2 * (tokens - text) * head_dim * (heads if style == "tables per head" else 1)
    return (4 * tokens * width + vectors) * dtype.itemsize + tables * FP32


# Door and head ------------------------------------------------------------------------------------------------


def _embed_inputs(grid: Any, width: int, channels: int, dtype: Any, device: Any) -> dict[str, Any]:
    t, h, w = grid
    return {
        "video": _rand(1, channels, t, h * 2, w * 2, dtype=dtype, device=device),
        "weight": _rand(width, channels, 1, 2, 2, dtype=dtype, device=device) * 0.1,
        "bias": _rand(width, dtype=dtype, device=device),
    }


def _embed_bytes(grid: Any, width: int, channels: int, dtype: torch.dtype) -> int:
    tokens, columns = prod(grid), channels * 4
    return (tokens * columns + width * columns + width + tokens * width) * dtype.itemsize


def _embed_flops(grid: Any, width: int, channels: int) -> float:
    return 2.0 * prod(grid) * width * channels * 4


def _final_inputs(grid: Any, width: int, channels: int, dtype: Any, device: Any) -> dict[str, Any]:
    return {
        **_norm_inputs(prod(grid), width, dtype, device),
        "weight": _rand(channels * 4, width, dtype=dtype, device=device) * 0.02,
        "bias": _rand(channels * 4, dtype=dtype, device=device),
        "grid": grid,
        "patch": (1, 2, 2),
    }


def _final_bytes(grid: Any, width: int, channels: int, dtype: torch.dtype) -> int:
    tokens, columns = prod(grid), channels * 4
    return (tokens * width + columns * width + columns + tokens * columns) * dtype.itemsize + 2 * width * FP32


# Attention ----------------------------------------------------------------------------------------------------


def _attention_inputs(
    grid: Any, heads: int, head_dim: int, dtype: Any, device: Any, text: int = 0, window: Any = None, stride: Any = None
) -> dict[str, Any]:
    q, k, v = (_rand(1, prod(grid) + text, heads, head_dim, dtype=dtype, device=device) for _ in range(3))
    inputs: dict[str, Any] = {"q": q, "k": k, "v": v, "grid": grid}
    if window is not None:
        inputs |= {"window": window, "stride": stride or (1, 1, 1)}
    return {**inputs, "text_len": text, "text_side": "prefix"} if text else inputs


def _attention_cost(
    grid: Any, heads: int, head_dim: int, text: int = 0, window: Any = None, stride: Any = None, itemsize: int = 2
) -> Cost:
    return spacetime_attention_cost(
        grid, heads, head_dim, window, stride=stride or (1, 1, 1), text_len=text, itemsize=itemsize
    )


def _attention_bytes(grid: Any, heads: int, head_dim: int, dtype: torch.dtype, **sizes: Any) -> int:
    return _attention_cost(grid, heads, head_dim, itemsize=dtype.itemsize, **sizes).bytes


def _attention_flops(grid: Any, heads: int, head_dim: int, **sizes: Any) -> float:
    return float(_attention_cost(grid, heads, head_dim, **sizes).flops)


def _int8_inputs(
    grid: Any, heads: int, head_dim: int, dtype: Any, device: Any, precision: str = "int8"
) -> dict[str, Any]:
    inputs = _attention_inputs(grid, heads, head_dim, dtype, device)
    q8, k8, q_scale, k_scale, _ = eager.quantize_qk(inputs["q"], inputs["k"], precision)
    return {"q8": q8, "k8": k8, "v": inputs["v"], "q_scale": q_scale, "k_scale": k_scale, "grid": grid}


def _int8_bytes(grid: Any, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    return 2 * prod(grid) * heads * (head_dim * (1 + dtype.itemsize) + FP32)


def _quantize_inputs(grid: Any, heads: int, head_dim: int, dtype: Any, device: Any) -> dict[str, Any]:
    packed = _rand(1, prod(grid), 3, heads, head_dim, dtype=dtype, device=device)
    return {"q": packed[:, :, 0], "k": packed[:, :, 1]}


def _quantize_bytes(grid: Any, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    return prod(grid) * heads * (2 * head_dim * (dtype.itemsize + 1) + 3 * FP32)


def _qk_int8_bytes(tokens: int, width: int, heads: int, dtype: torch.dtype, style: str = "wan") -> int:
    codes = 2 * tokens * width * (dtype.itemsize - 1)
    return _qk_bytes(tokens, width, heads, dtype, style) - codes + 3 * tokens * heads * FP32


def _boxes(grid: Any, tile: Any) -> int:
    return prod(-(-n // side) for n, side in zip(grid, tile, strict=True))


def _listed(grid: Any, tile: Any, sparsity: float) -> int:
    """Blocks in each list."""
    return max(1, round(_boxes(grid, tile) * (1 - sparsity)))


def _sparse_inputs(
    grid: Any, heads: int, head_dim: int, tile: Any, sparsity: float, dtype: Any, device: Any
) -> dict[str, Any]:
    """Lists at random, a list a head and block, all of one length."""
    blocks, listed = _boxes(grid, tile), _listed(grid, tile, sparsity)
    order = torch.rand(1, heads, blocks, blocks, device=device).argsort(-1)[..., :listed]
    return {
        **_attention_inputs(grid, heads, head_dim, dtype, device),
        "tile": tile,
        "block_indices": order.sort(-1).values.to(torch.int32),
        "block_counts": torch.full((1, heads, blocks), listed, dtype=torch.int32, device=device),
    }


def _sparse_bytes(grid: Any, heads: int, head_dim: int, tile: Any, sparsity: float, dtype: torch.dtype) -> int:
    lists = heads * _boxes(grid, tile) * (_listed(grid, tile, sparsity) + 1) * 4
    return _attention_bytes(grid, heads, head_dim, dtype) + lists


def _sparse_flops(grid: Any, heads: int, head_dim: int, tile: Any, sparsity: float) -> float:
    """Of the listed blocks: on average they hold their share of the tokens, the short ones at the edges included."""
    share = _listed(grid, tile, sparsity) / _boxes(grid, tile)
    return _attention_flops(grid, heads, head_dim) * share


def _mean_inputs(grid: Any, heads: int, head_dim: int, tile: Any, dtype: Any, device: Any) -> dict[str, Any]:
    """Off zero, or the check of the means would compare what is left when all cancels."""
    return {"x": _rand(1, prod(grid), heads, head_dim, dtype=dtype, device=device) + 1, "grid": grid, "tile": tile}


def _qk_means_inputs(
    grid: Any, heads: int, head_dim: int, tile: Any, dtype: Any, device: Any, style: str = "wan"
) -> dict[str, Any]:
    inputs = _qk_inputs(prod(grid), heads * head_dim, heads, dtype, device, style)
    return {**inputs, "grid": grid, "tile": tile}


def _qk_means_bytes(grid: Any, heads: int, head_dim: int, tile: Any, dtype: torch.dtype, style: str = "wan") -> int:
    width = heads * head_dim
    return _qk_bytes(prod(grid), width, heads, dtype, style) + 2 * _boxes(grid, tile) * width * FP32


def _mean_bytes(grid: Any, heads: int, head_dim: int, tile: Any, dtype: torch.dtype) -> int:
    return heads * head_dim * (prod(grid) * dtype.itemsize + _boxes(grid, tile) * FP32)


# VAE ----------------------------------------------------------------------------------------------------------


def _channels_first(inputs: dict[str, Any]) -> dict[str, Any]:
    """Clips as the stock decoder has them: ``[B, C, T, H, W]``, contiguous."""
    clips: dict[str, Any] = {
        name: inputs[name].permute(0, 4, 1, 2, 3).contiguous() for name in ("x", "cache") if name in inputs
    }
    return {**inputs, **clips}


def _vae_norm_inputs(grid: Any, channels: int, dtype: Any, device: Any) -> dict[str, Any]:
    return {
        "x": _rand(1, *grid, channels, dtype=dtype, device=device),
        "weight": _rand(channels, dtype=dtype, device=device),
    }


def _vae_norm_bytes(grid: Any, channels: int, dtype: torch.dtype) -> int:
    return (2 * prod(grid) + 1) * channels * dtype.itemsize


def _conv_inputs(grid: Any, channels: int, dtype: Any, device: Any) -> dict[str, Any]:
    return {
        "x": _rand(1, *grid, channels, dtype=dtype, device=device),
        "weight": _rand(channels, channels, 3, 3, 3, dtype=dtype, device=device) * 0.02,
        "bias": _rand(channels, dtype=dtype, device=device),
        "cache": _rand(1, 2, *grid[1:], channels, dtype=dtype, device=device),
    }


def _conv_bytes(grid: Any, channels: int, dtype: torch.dtype) -> int:
    t, h, w = grid
    return ((2 * t + 2) * h * w + 27 * channels + 1) * channels * dtype.itemsize


def _conv_flops(grid: Any, channels: int) -> float:
    return 2.0 * 27 * prod(grid) * channels**2


# Sampler ------------------------------------------------------------------------------------------------------


def _guidance_inputs(shape: Any, dtype: Any, device: Any) -> dict[str, Any]:
    return {
        "latent": _rand(*shape, dtype=torch.float32, device=device),
        "cond": _rand(*shape, dtype=dtype, device=device),
        "uncond": _rand(*shape, dtype=dtype, device=device),
        "guidance_scale": 5.0,
        "sigma": 0.8,
        "sigma_next": 0.7,
    }


def _guidance_bytes(shape: Any, dtype: torch.dtype) -> int:
    return prod(shape) * 2 * (FP32 + dtype.itemsize)


def _unipc_inputs(shape: Any, dtype: Any, device: Any) -> dict[str, Any]:
    sample, last, m0 = (_rand(*shape, dtype=torch.float32, device=device) for _ in range(3))
    cond, uncond = (_rand(*shape, dtype=dtype, device=device) for _ in range(2))
    return {
        "sample": sample,
        "cond": cond,
        "uncond": uncond,
        "last_sample": last,
        "history": [m0],
        "guidance_scale": 5.0,
        "sigma": 0.8,
        # A second-order step in the middle of a schedule.
        "corrector": (0.97, 0.04, -0.01),
        "predictor": (0.96, 0.09, -0.05),
    }


def _unipc_bytes(shape: Any, dtype: torch.dtype) -> int:
    return prod(shape) * (6 * FP32 + 2 * dtype.itemsize)


_S = shapes
ENTRIES: dict[str, Entry] = {
    entry.op: entry
    for entry in (
        Entry("layer_norm_modulate", _S.MODULATE_GPU, _S.MODULATE_CPU, _norm_inputs, eager.layer_norm_modulate,
              _norm_bytes),
        Entry("gate_residual", _S.RESIDUAL_GPU, _S.RESIDUAL_CPU, _residual_inputs, eager.gate_residual,
              _residual_bytes),
        Entry("gate_residual_norm_modulate", _S.RESIDUAL_GPU, _S.RESIDUAL_CPU, _residual_norm_inputs,
              eager.gate_residual_norm_modulate, _residual_norm_bytes),
        Entry("rms_norm", _S.RMS_GPU, _S.RMS_CPU, _rms_inputs, eager.rms_norm, _rms_bytes),
        Entry("qk_norm_rope", _S.QK_GPU, _S.QK_CPU, _qk_inputs, eager.qk_norm_rope, _qk_bytes),
        Entry("qk_norm_rope_", _S.QK_IN_PLACE_GPU, _S.QK_IN_PLACE_CPU, _qk_inputs, eager.qk_norm_rope, _qk_bytes),
        Entry("patch_embed3d", _S.EMBED_GPU, _S.EMBED_CPU, _embed_inputs, eager.patch_embed3d, _embed_bytes,
              _embed_flops, convolves=True),
        Entry("final_layer", _S.FINAL_GPU, _S.EMBED_CPU, _final_inputs, eager.final_layer, _final_bytes,
              _embed_flops),
        Entry("spacetime_attention", _S.ATTENTION_GPU, _S.ATTENTION_CPU, _attention_inputs, eager.spacetime_attention,
              _attention_bytes, _attention_flops),
        Entry("int8_attention", _S.INT8_GPU, _S.INT8_CPU, _int8_inputs, eager.int8_attention, _int8_bytes,
              _attention_flops),
        Entry("fp8_attention", _S.INT8_GPU, _S.INT8_CPU, partial(_int8_inputs, precision="fp8"), eager.int8_attention,
              _int8_bytes, _attention_flops),
        Entry("quantize_qk", _S.INT8_GPU, _S.INT8_CPU, _quantize_inputs, eager.quantize_qk, _quantize_bytes),
        Entry("qk_norm_rope_int8", _S.QK_INT8_GPU, _S.QK_IN_PLACE_CPU, _qk_inputs, eager.qk_norm_rope_int8,
              _qk_int8_bytes),
        Entry("qk_norm_rope_means", _S.QK_MEANS_GPU, _S.MEAN_CPU, _qk_means_inputs, eager.qk_norm_rope_means,
              _qk_means_bytes),
        Entry("block_sparse_attention", _S.SPARSE_GPU, _S.SPARSE_CPU, _sparse_inputs, eager.block_sparse_attention,
              _sparse_bytes, _sparse_flops),
        Entry("block_mean", _S.MEAN_GPU, _S.MEAN_CPU, _mean_inputs, eager.block_mean, _mean_bytes),
        Entry("rms_norm_silu", _S.VAE_GPU, _S.VAE_CPU, _vae_norm_inputs, eager.rms_norm_silu, _vae_norm_bytes,
              stock=_channels_first),
        Entry("causal_conv3d", _S.VAE_GPU, _S.VAE_CPU, _conv_inputs, eager.causal_conv3d, _conv_bytes, _conv_flops,
              stock=_channels_first, convolves=True),
        Entry("guidance_step", _S.EULER_GPU, _S.LATENT_CPU, _guidance_inputs, eager.guidance_step, _guidance_bytes),
        Entry("unipc_step", _S.LATENT_GPU, _S.LATENT_CPU, _unipc_inputs, eager.unipc_step, _unipc_bytes),
    )
}  # fmt: skip
