"""What each op allocates: the fakes of the table in schemas.py.

They allocate with new_empty(shape), as the implementations do: empty_like would copy permuted strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def like_first(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def like_first_twice(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def qk_norm_rope(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def nothing(*_: Any) -> None:
    return None


def patch_embed3d(video: Tensor, weight: Tensor, bias: Tensor | None, patch: Sequence[int], impl: str) -> Tensor:
    b, _, t, h, w = video.shape
    return video.new_empty((b, (t // patch[0]) * (h // patch[1]) * (w // patch[2]), weight.shape[0]))


def final_layer(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Any,
    grid: Any,
    patch: Any,
    eps: float,
    impl: str,
) -> Tensor:
    channels = weight.shape[0] // (patch[0] * patch[1] * patch[2])
    return x.new_empty((x.shape[0], channels, grid[0] * patch[0], grid[1] * patch[1], grid[2] * patch[2]))


def linear_gelu(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def spacetime_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return_lse = rest[-3]
    b, s, heads, _ = q.shape
    lse_shape = (b, heads, s) if return_lse else (0,)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((b, s, heads, v.shape[-1])), q.new_empty(lse_shape, dtype=lse_dtype)


def boxes(grid: Sequence[int], tile: Sequence[int]) -> int:
    counts = [(n + side - 1) // side for n, side in zip(grid, tile, strict=True)]
    return counts[0] * counts[1] * counts[2]


def fp32_or_64(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def block_mean(x: Tensor, grid: Sequence[int], tile: Sequence[int], impl: str) -> Tensor:
    b, _, heads, d = x.shape
    return x.new_empty((b, heads, boxes(grid, tile), d), dtype=fp32_or_64(x))


def qk_norm_rope_means(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, grid, tile, _, impl = rest
    means = (block_mean(x, grid, tile, impl) for x in (q, k))
    return (*qk_norm_rope(q, k), *means)  # type: ignore[return-value]


def block_sparse_attention(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return_lse = rest[-2]
    b, s, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, heads, s) if return_lse else (0,), dtype=fp32_or_64(q))


def quantize_qk(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.int8 if rest[-2] == "int8" else torch.float8_e4m3fn
    codes = (x.new_empty(x.shape, dtype=dtype) for x in (q, k))
    floats = (x.new_empty((x.shape[0], x.shape[2], x.shape[1]), dtype=fp32_or_64(q)) for x in (q, k, q))
    return *codes, *floats  # type: ignore[return-value]


def int8_attention(q8: Tensor, k8: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return_lse = rest[-2]
    b, s, heads, head_dim = q8.shape
    lse = v.new_empty((b, heads, s) if return_lse else (0,), dtype=fp32_or_64(v))
    return v.new_empty((b, s, heads, head_dim)), lse


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    cache: Any,
    stride: Sequence[int],
    pad_mode: str,
    pad_end: int,
    residual: Any,
    epilogue: str | None,
    factor: Sequence[int],
    norm_weight: Any,
    norm_eps: float,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    b, t, h, w, _ = x.shape
    o, _, _kt, kh, kw = weight.shape
    # Padding is kt-1 frames of past and k//2 pixels a side, so the output has ceil(n / stride) for odd k.
    t, h, w = ((t + pad_end - 1) // stride[0] + 1, (h + 2 * (kh // 2) - kh) // stride[1] + 1,
               (w + 2 * (kw // 2) - kw) // stride[2] + 1)  # fmt: skip
    ft, fh, fw = (2, 1, 1) if epilogue == "interleave" else factor
    shape = (b, t * ft, h * fh, w * fw, o // (ft * fh * fw))
    normed = epilogue == "rms_norm_silu"
    return x.new_empty(shape if keep or not normed else (0,)), x.new_empty(shape if normed else (0,))


def upsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    packed: Any,
    time_factor: int,
    cache: Any,
    first: bool,
    pad_mode: str,
    residual: Any,
    impl: str,
) -> Tensor:
    b, t, h, w, _ = x.shape
    frames = t if time_factor == 1 else 2 * t - (1 if first else 0)
    return x.new_empty((b, frames, 2 * h, 2 * w, weight.shape[0]))


def unipc_step(sample: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return sample.new_empty(sample.shape), sample.new_empty(sample.shape), sample.new_empty(sample.shape)
