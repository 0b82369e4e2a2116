"""Oracle of causal_conv3d and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from . import compute_dtype, generator, randn, up

# Operands of the product that a kernel may compute in TF32, where torch.backends.cudnn allows that.
TF32_OPERANDS = ("x", "weight", "cache")


def check_pad_mode(pad_mode: str) -> None:
    """Zeros are the padding that exists so far."""
    if pad_mode != "zeros":
        raise UnsupportedError(f"causal_conv3d: `pad_mode` {pad_mode!r} is not built yet; there is 'zeros'")


def output_shape(x: Tensor, weight: Tensor, stride: Sequence[int]) -> tuple[int, ...]:
    """``[B, ceil(T / st), ceil(H / sh), ceil(W / sw), O]``: padding makes up for the kernel."""
    b, *sizes, _ = x.shape
    return (b, *((size - 1) // step + 1 for size, step in zip(sizes, stride, strict=True)), weight.shape[0])


def with_past(x: Tensor, cache: Tensor | None, frames: int) -> Tensor:
    """``x [B, T, ...]`` preceded by ``frames`` frames: those of ``cache``, and zeros before them."""
    parts = [x] if cache is None else [cache, x]
    missing = frames - (0 if cache is None else cache.shape[1])
    if missing:
        b, _, *rest = x.shape
        parts.insert(0, x.new_zeros((1, 1, 1, 1, 1)).expand(b, missing, *rest))
    return torch.cat(parts, 1) if len(parts) > 1 else x


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    stride: Sequence[int],
    pad_mode: str,
    residual: Tensor | None,
) -> Tensor:
    """Convolution over [past, x], spatially zero-padded by k // 2, plus bias and residual; one rounding at the end."""
    check_pad_mode(pad_mode)
    if x.numel() == 0:
        return x.new_zeros(output_shape(x, weight, stride))
    dtype = compute_dtype(x)
    _, _, kt, kh, kw = weight.shape
    frames = up(with_past(x, cache, kt - 1), dtype).permute(0, 4, 1, 2, 3)
    y = torch.nn.functional.conv3d(
        frames,
        up(weight, dtype),
        None if bias is None else up(bias, dtype),
        stride=tuple(stride),
        padding=(0, kh // 2, kw // 2),
    ).permute(0, 2, 3, 4, 1)
    if residual is not None:
        y = y + up(residual, dtype)
    return y.to(x.dtype).contiguous()


def summed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    stride: Sequence[int],
    pad_mode: str,
    residual: Tensor | None,
) -> dict[int, Tensor]:
    """√terms Σ|a b| of the sum of products behind each element."""
    absolute = [None if t is None else t.abs() for t in (x, weight, bias, cache, residual)]
    x, weight, bias, cache, residual = absolute  # type: ignore[assignment]
    return {0: causal_conv3d(x, weight, bias, cache, stride, pad_mode, residual) * weight[0].numel() ** 0.5}


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every kernel size, caches of 0 to kt - 1 frames, ragged sizes, 3 and 12 channels, views, strides, residual."""
    g = generator()

    def case(
        x: Tensor,
        out: int,
        kernel: tuple[int, int, int],
        cached: int = 0,
        stride: tuple[int, int, int] = (1, 1, 1),
        residual: bool = False,
        bias: bool = True,
    ) -> dict[str, Any]:
        b, t, h, w, c = x.shape
        fan_in = c * kernel[0] * kernel[1] * kernel[2]
        return {
            "x": x,
            "weight": randn(out, c, *kernel, dtype=dtype, g=g, scale=fan_in**-0.5),
            "bias": randn(out, dtype=dtype, g=g) if bias else None,
            "cache": randn(b, cached, h, w, c, dtype=dtype, g=g) if cached else None,
            "stride": list(stride),
            "pad_mode": "zeros",
            "residual": randn(b, (t - 1) // stride[0] + 1, h, w, out, dtype=dtype, g=g) if residual else None,
        }

    yield case(randn(1, 2, 5, 7, 16, dtype=dtype, g=g), 24, (3, 3, 3), cached=2, residual=True)
    yield case(randn(2, 1, 3, 4, 3, dtype=dtype, g=g), 16, (3, 3, 3))
    yield case(randn(1, 3, 2, 3, 12, dtype=dtype, g=g), 3, (3, 3, 3), cached=1)
    yield case(randn(1, 3, 2, 5, 16, dtype=dtype, g=g), 32, (3, 1, 1), cached=2)
    yield case(randn(1, 3, 3, 2, 16, dtype=dtype, g=g), 16, (3, 1, 1), cached=2, stride=(2, 1, 1), bias=False)
    # One frame of a longer clip, cut out of a channels_last_3d tensor: strides of the clip, not of the slice.
    clip = randn(2, 16, 3, 4, 3, dtype=dtype, g=g).contiguous(memory_format=torch.channels_last_3d)
    yield case(clip.permute(0, 2, 3, 4, 1)[:, 1:2], 8, (1, 3, 3), residual=True)
    yield case(randn(1, 2, 3, 3, 20, dtype=dtype, g=g), 16, (1, 1, 1))
    # 48 output channels: one tile of 32 and one of 16.
    yield case(randn(1, 1, 1, 1, 16, dtype=dtype, g=g), 48, (3, 3, 3), cached=2)
