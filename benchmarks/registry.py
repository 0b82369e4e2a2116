"""What is measured: per op the models' shapes, the bytes and FLOPs that must move, and what eager code does instead.

A baseline is the code that the reference model runs in eager PyTorch, at the same inputs. Bytes count each input
once and each output once; FLOPs count multiply and add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyvideo_kernels as pv


@dataclass(frozen=True)
class Entry:
    """One op's benchmark.

    Args:
        op: public name; the function is ``pyvideo_kernels.<op>``.
        shapes: name -> sizes; ``gpu`` shapes are the models' own, ``cpu`` ones fit a laptop.
        inputs: sizes, dtype, device -> keyword arguments of the public function.
        flops: sizes -> floating-point operations (0: memory-bound, judged by bytes).
        eager: the reference model's code on the same keyword arguments.
    """

    op: str
    gpu: Mapping[str, Mapping[str, Any]]
    cpu: Mapping[str, Mapping[str, Any]]
    inputs: Callable[..., dict[str, Any]]
    eager: Callable[..., Any]
    flops: Callable[..., float] = lambda **_: 0.0

    def ours(self, **kwargs: Any) -> Any:
        return getattr(pv, self.op)(**kwargs)


def moved_bytes(inputs: Mapping[str, Any], outputs: Any) -> int:
    """Bytes of every input tensor read once plus every output tensor written once."""

    def walk(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, (list, tuple)):
            return sum(walk(item) for item in value)
        return 0

    return walk(list(inputs.values())) + walk(outputs)


def _rand(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)


_WAN_GPU = {
    "wan-1.3b-480p": {"tokens": 32760, "width": 1536, "heads": 12},
    "wan-14b-480p": {"tokens": 32760, "width": 5120, "heads": 40},
    "wan-1.3b-720p": {"tokens": 75600, "width": 1536, "heads": 12},
}
_WAN_CPU = {"wan-1.3b-4k": {"tokens": 4096, "width": 1536, "heads": 12}}


# Transformer: norms, modulation, residuals ------------------------------------------------------------------------


def _norm_inputs(tokens: int, width: int, dtype: Any, device: Any, **_: int) -> dict[str, Any]:
    scale, shift = (_rand(1, 1, width, dtype=torch.float32, device=device) for _ in range(2))
    return {"x": _rand(1, tokens, width, dtype=dtype, device=device), "scale": scale, "shift": shift}


def _layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift).type_as(x)


def _residual_inputs(tokens: int, width: int, dtype: Any, device: Any, **_: int) -> dict[str, Any]:
    x, y = (_rand(1, tokens, width, dtype=dtype, device=device) for _ in range(2))
    return {"x": x, "y": y, "gate": _rand(1, 1, width, dtype=torch.float32, device=device)}


def _gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return (x.float() + y * gate).type_as(x)


def _residual_norm_inputs(tokens: int, width: int, dtype: Any, device: Any, **_: int) -> dict[str, Any]:
    modulation = _norm_inputs(1, width, dtype, device)
    return {
        **_residual_inputs(tokens, width, dtype, device),
        "scale": modulation["scale"],
        "shift": modulation["shift"],
    }


def _gate_residual_norm_modulate(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
    new = _gate_residual(x, y, gate)
    return new, _layer_norm_modulate(new, scale, shift)


def _rms_inputs(tokens: int, width: int, dtype: Any, device: Any, **_: int) -> dict[str, Any]:
    return {
        "x": _rand(1, tokens, width, dtype=dtype, device=device),
        "weight": _rand(width, dtype=dtype, device=device),
    }


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _qk_inputs(tokens: int, width: int, heads: int, dtype: Any, device: Any) -> dict[str, Any]:
    head_dim = width // heads
    packed = _rand(1, tokens, 3, heads, head_dim, dtype=dtype, device=device)
    angle = torch.rand(1, tokens, 1, head_dim // 2, device=device).repeat_interleave(2, -1) * 6.0
    return {
        "q": packed[:, :, 0],
        "k": packed[:, :, 1],
        "q_weight": _rand(width, dtype=dtype, device=device),
        "k_weight": _rand(width, dtype=dtype, device=device),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "norm": "across_heads",
        "layout": "interleaved",
    }


def _qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    def one(x: Tensor, weight: Tensor) -> Tensor:
        x = F.rms_norm(x.flatten(2), (weight.numel(),), weight, 1e-6).unflatten(2, x.shape[2:])
        x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[..., 0::2], sin[..., 1::2]
        out = torch.empty_like(x)
        out[..., 0::2] = x1 * c - x2 * s
        out[..., 1::2] = x1 * s + x2 * c
        return out.type_as(x)

    return one(q, q_weight), one(k, k_weight)


# Door and head ------------------------------------------------------------------------------------------------


_CLIP_GPU = {
    "wan-1.3b-480p": {"grid": (21, 30, 52), "width": 1536, "channels": 16},
    "wan-14b-720p": {"grid": (21, 45, 80), "width": 5120, "channels": 16},
}
_CLIP_CPU = {"wan-1.3b-256": {"grid": (5, 16, 16), "width": 1536, "channels": 16}}


def _embed_inputs(grid: Any, width: int, channels: int, dtype: Any, device: Any) -> dict[str, Any]:
    t, h, w = grid
    return {
        "video": _rand(1, channels, t, h * 2, w * 2, dtype=dtype, device=device),
        "weight": _rand(width, channels, 1, 2, 2, dtype=dtype, device=device) * 0.1,
        "bias": _rand(width, dtype=dtype, device=device),
    }


def _patch_embed3d(video: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(video, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


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


def _final_layer(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, grid: Any, patch: Any
) -> Tensor:
    y = F.linear(_layer_norm_modulate(x, scale, shift), weight, bias)
    y = y.reshape(x.shape[0], *grid, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return y.flatten(6, 7).flatten(4, 5).flatten(2, 3)


# Attention ----------------------------------------------------------------------------------------------------


def _attention_inputs(grid: Any, heads: int, head_dim: int, dtype: Any, device: Any) -> dict[str, Any]:
    q, k, v = (_rand(1, prod(grid), heads, head_dim, dtype=dtype, device=device) for _ in range(3))
    return {"q": q, "k": k, "v": v, "grid": grid}


def _attention(q: Tensor, k: Tensor, v: Tensor, grid: Any) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def _attention_flops(grid: Any, heads: int, head_dim: int) -> float:
    return 4.0 * prod(grid) ** 2 * heads * head_dim


# VAE ----------------------------------------------------------------------------------------------------------


_VAE_GPU = {
    "wan-480p-full-96": {"grid": (4, 480, 832), "channels": 96},
    "wan-480p-half-192": {"grid": (4, 240, 416), "channels": 192},
}
_VAE_CPU = {"wan-128-full-96": {"grid": (4, 128, 128), "channels": 96}}


def _vae_norm_inputs(grid: Any, channels: int, dtype: Any, device: Any) -> dict[str, Any]:
    return {
        "x": _rand(1, *grid, channels, dtype=dtype, device=device),
        "weight": _rand(channels, dtype=dtype, device=device),
    }


def _rms_norm_silu(x: Tensor, weight: Tensor) -> Tensor:
    return F.silu(F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * weight)


def _conv_inputs(grid: Any, channels: int, dtype: Any, device: Any) -> dict[str, Any]:
    return {
        "x": _rand(1, *grid, channels, dtype=dtype, device=device),
        "weight": _rand(channels, channels, 3, 3, 3, dtype=dtype, device=device) * 0.02,
        "bias": _rand(channels, dtype=dtype, device=device),
        "cache": _rand(1, 2, *grid[1:], channels, dtype=dtype, device=device),
    }


def _causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor, cache: Tensor) -> Tensor:
    # As the stock decoder has it: channels first, concatenate the cache, pad, convolve.
    video = torch.cat([cache, x], 1).permute(0, 4, 1, 2, 3)
    return F.conv3d(F.pad(video, (1, 1, 1, 1, 0, 0)), weight, bias).permute(0, 2, 3, 4, 1)


def _conv_flops(grid: Any, channels: int) -> float:
    return 2.0 * 27 * prod(grid) * channels**2


# Sampler ------------------------------------------------------------------------------------------------------


_LATENT_GPU = {"wan-480p": {"shape": (1, 16, 21, 60, 104)}, "wan-720p": {"shape": (1, 16, 21, 90, 160)}}
_LATENT_CPU = {"wan-480p": {"shape": (1, 16, 21, 60, 104)}}


def _guidance_inputs(shape: Any, dtype: Any, device: Any) -> dict[str, Any]:
    return {
        "latent": _rand(*shape, dtype=torch.float32, device=device),
        "cond": _rand(*shape, dtype=dtype, device=device),
        "uncond": _rand(*shape, dtype=dtype, device=device),
        "guidance_scale": 5.0,
        "sigma": 0.8,
        "sigma_next": 0.7,
    }


def _guidance_step(
    latent: Tensor, cond: Tensor, uncond: Tensor, guidance_scale: float, sigma: float, sigma_next: float
) -> Tensor:
    return latent + (sigma_next - sigma) * (uncond + guidance_scale * (cond - uncond))


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


def _unipc_step(
    sample: Tensor, cond: Tensor, uncond: Tensor, last_sample: Tensor, history: Any, corrector: Any, predictor: Any,
    guidance_scale: float, sigma: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # The update's linear combinations alone; diffusers' step() adds a linear solve and scalar tensors to them.
    x0 = sample - sigma * (uncond + guidance_scale * (cond - uncond))
    corrected = corrector[0] * last_sample + corrector[1] * x0 + corrector[2] * history[0]
    return predictor[0] * corrected + predictor[1] * x0 + predictor[2] * history[0], x0, corrected


ENTRIES: dict[str, Entry] = {
    entry.op: entry
    for entry in (
        Entry("layer_norm_modulate", _WAN_GPU, _WAN_CPU, _norm_inputs, _layer_norm_modulate),
        Entry("gate_residual", _WAN_GPU, _WAN_CPU, _residual_inputs, _gate_residual),
        Entry("gate_residual_norm_modulate", _WAN_GPU, _WAN_CPU, _residual_norm_inputs, _gate_residual_norm_modulate),
        Entry("rms_norm", _WAN_GPU, _WAN_CPU, _rms_inputs, _rms_norm),
        Entry("qk_norm_rope", _WAN_GPU, _WAN_CPU, _qk_inputs, _qk_norm_rope),
        Entry("patch_embed3d", _CLIP_GPU, _CLIP_CPU, _embed_inputs, _patch_embed3d, _embed_flops),
        Entry("final_layer", _CLIP_GPU, _CLIP_CPU, _final_inputs, _final_layer, _embed_flops),
        Entry(
            "spacetime_attention",
            {
                "wan-1.3b-480p": {"grid": (21, 30, 52), "heads": 12, "head_dim": 128},
                "wan-14b-480p": {"grid": (21, 30, 52), "heads": 40, "head_dim": 128},
                "hunyuan-720p": {"grid": (30, 48, 80), "heads": 24, "head_dim": 128},
                "cogvideox-480p": {"grid": (13, 30, 45), "heads": 48, "head_dim": 64},
            },
            {"wan-1.3b-256": {"grid": (5, 16, 16), "heads": 12, "head_dim": 128}},
            _attention_inputs,
            _attention,
            _attention_flops,
        ),
        Entry("rms_norm_silu", _VAE_GPU, _VAE_CPU, _vae_norm_inputs, _rms_norm_silu),
        Entry("causal_conv3d", _VAE_GPU, _VAE_CPU, _conv_inputs, _causal_conv3d, _conv_flops),
        Entry("guidance_step", _LATENT_GPU, _LATENT_CPU, _guidance_inputs, _guidance_step),
        Entry("unipc_step", _LATENT_GPU, _LATENT_CPU, _unipc_inputs, _unipc_step),
    )
}
