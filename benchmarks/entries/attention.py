"""Attention, dense to sparse, and what goes before it."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch

from pyvideo_kernels.ops.attention_cost import Cost, spacetime_attention_cost

from .. import eager, shapes
from .entry import FP32, Entry, rand
from .transformer import qk_bytes, qk_inputs


def _attention_inputs(
    grid: Any, heads: int, head_dim: int, dtype: Any, device: Any, text: int = 0, window: Any = None, stride: Any = None
) -> dict[str, Any]:
    q, k, v = (rand(1, prod(grid) + text, heads, head_dim, dtype=dtype, device=device) for _ in range(3))
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
    packed = rand(1, prod(grid), 3, heads, head_dim, dtype=dtype, device=device)
    return {"q": packed[:, :, 0], "k": packed[:, :, 1]}


def _quantize_bytes(grid: Any, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    return prod(grid) * heads * (2 * head_dim * (dtype.itemsize + 1) + 3 * FP32)


def _qk_int8_bytes(tokens: int, width: int, heads: int, dtype: torch.dtype, style: str = "wan") -> int:
    codes = 2 * tokens * width * (dtype.itemsize - 1)
    return qk_bytes(tokens, width, heads, dtype, style) - codes + 3 * tokens * heads * FP32


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
    return {"x": rand(1, prod(grid), heads, head_dim, dtype=dtype, device=device) + 1, "grid": grid, "tile": tile}


def _qk_means_inputs(
    grid: Any, heads: int, head_dim: int, tile: Any, dtype: Any, device: Any, style: str = "wan"
) -> dict[str, Any]:
    inputs = qk_inputs(prod(grid), heads * head_dim, heads, dtype, device, style)
    return {**inputs, "grid": grid, "tile": tile}


def _qk_means_bytes(grid: Any, heads: int, head_dim: int, tile: Any, dtype: torch.dtype, style: str = "wan") -> int:
    width = heads * head_dim
    return qk_bytes(prod(grid), width, heads, dtype, style) + 2 * _boxes(grid, tile) * width * FP32


def _mean_bytes(grid: Any, heads: int, head_dim: int, tile: Any, dtype: torch.dtype) -> int:
    return heads * head_dim * (prod(grid) * dtype.itemsize + _boxes(grid, tile) * FP32)


ENTRIES = (
    Entry("spacetime_attention", shapes.ATTENTION_GPU, shapes.ATTENTION_CPU, _attention_inputs,
          eager.spacetime_attention, _attention_bytes, _attention_flops),
    Entry("int8_attention", shapes.INT8_GPU, shapes.INT8_CPU, _int8_inputs, eager.int8_attention, _int8_bytes,
          _attention_flops),
    Entry("fp8_attention", shapes.INT8_GPU, shapes.INT8_CPU, partial(_int8_inputs, precision="fp8"),
          eager.int8_attention, _int8_bytes, _attention_flops),
    Entry("quantize_qk", shapes.INT8_GPU, shapes.INT8_CPU, _quantize_inputs, eager.quantize_qk, _quantize_bytes),
    Entry("qk_norm_rope_int8", shapes.QK_INT8_GPU, shapes.QK_IN_PLACE_CPU, qk_inputs, eager.qk_norm_rope_int8,
          _qk_int8_bytes),
    Entry("qk_norm_rope_means", shapes.QK_MEANS_GPU, shapes.MEAN_CPU, _qk_means_inputs, eager.qk_norm_rope_means,
          _qk_means_bytes),
    Entry("block_sparse_attention", shapes.SPARSE_GPU, shapes.SPARSE_CPU, _sparse_inputs, eager.block_sparse_attention,
          _sparse_bytes, _sparse_flops),
    Entry("block_mean", shapes.MEAN_GPU, shapes.MEAN_CPU, _mean_inputs, eager.block_mean, _mean_bytes),
)  # fmt: skip
