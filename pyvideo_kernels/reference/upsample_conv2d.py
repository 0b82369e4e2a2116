"""Oracle of upsample_conv2d and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up

# Operands of the product that a kernel may compute in TF32, where torch.backends.cudnn allows that.
TF32_OPERANDS = ("x", "weight", "cache")


def output_shape(x: Tensor, weight: Tensor, time_factor: int, first: bool) -> tuple[int, ...]:
    """``[B, T', 2H, 2W, O]``: T' is T, or 2T, less one where the first frame is not doubled."""
    b, t, h, w, _ = x.shape
    frames = t if time_factor == 1 else 2 * t - (1 if first else 0)
    return (b, frames, 2 * h, 2 * w, weight.shape[0])


def past_frames(weight: Tensor, time_factor: int) -> int:
    """Small frames before ``x`` that its first output reads: those a cache may hold."""
    kt = weight.shape[2] if weight.dim() == 5 else 1
    return kt - 1 if time_factor == 1 else kt // 2


def with_past(x: Tensor, cache: Tensor | None, frames: int, pad_mode: str) -> Tensor:
    """``x`` preceded by ``frames`` frames: those of ``cache``; before them zeros, or the oldest one again."""
    known = x if cache is None else torch.cat([cache, x], 1)
    missing = frames - (known.shape[1] - x.shape[1])
    if not missing:
        return known
    oldest = known[:, :1].expand(-1, missing, -1, -1, -1)
    return torch.cat([torch.zeros_like(oldest) if pad_mode == "zeros" else oldest, known], 1)


def upsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Tensor | None,
    time_factor: int,
    cache: Tensor | None,
    first: bool,
    pad_mode: str,
    residual: Tensor | None,
) -> Tensor:
    """Repeat pixels and frames, pad, convolve; plus bias and residual; one rounding at the end."""
    if x.numel() == 0:
        return x.new_zeros(output_shape(x, weight, time_factor, first))
    dtype = compute_dtype(x)
    kernel = up(weight if weight.dim() == 5 else weight.unsqueeze(2), dtype)
    kt = kernel.shape[2]
    frames = up(with_past(x, cache, past_frames(weight, time_factor), pad_mode), dtype)
    big = frames.repeat_interleave(2, 2).repeat_interleave(2, 3)
    if time_factor == 2:
        big = big.repeat_interleave(2, 1)
    # The window of the last output ends with the last frame; that of the first output begins kt - 1 before its own.
    out = output_shape(x, weight, time_factor, first)
    big = big[:, big.shape[1] - (out[1] + kt - 1) :].permute(0, 4, 1, 2, 3)
    around = (1, 1, 1, 1, 0, 0)
    if pad_mode in ("replicate", "reflect"):
        # Mirrored about its edge pixel a doubled image shows that pixel's twin.
        big = torch.nn.functional.pad(big, around, mode="replicate")
    else:
        big = torch.nn.functional.pad(big, around)
    y = torch.nn.functional.conv3d(big, kernel, None if bias is None else up(bias, dtype)).permute(0, 2, 3, 4, 1)
    if residual is not None:
        y = y + up(residual, dtype)
    return y.to(x.dtype).contiguous()


def summed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Tensor | None,
    time_factor: int,
    cache: Tensor | None,
    first: bool,
    pad_mode: str,
    residual: Tensor | None,
) -> dict[int, Tensor]:
    """√terms Σ|a b| of the sum of products behind each element."""
    absolute = [None if t is None else t.abs() for t in (x, weight, bias, cache, residual)]
    x, weight, bias, cache, residual = absolute  # type: ignore[assignment]
    y = upsample_conv2d(x, weight, bias, None, time_factor, cache, first, pad_mode, residual)
    return {0: y * weight[0].numel() ** 0.5}


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every form of the doubling, every padding, caches, ragged sizes, one pixel, few channels, views, residual."""
    g = generator()

    def case(
        x: Tensor,
        out: int,
        kt: int = 0,
        *,
        time_factor: int = 1,
        cached: int = 0,
        first: bool = True,
        pad_mode: str = "zeros",
        residual: bool = False,
        bias: bool = True,
    ) -> dict[str, Any]:
        b, _, h, w, c = x.shape
        kernel = (3, 3) if kt == 0 else (kt, 3, 3)
        weight = randn(out, c, *kernel, dtype=dtype, g=g, scale=(c * 9 * max(kt, 1)) ** -0.5)
        return {
            "x": x,
            "weight": weight,
            "bias": randn(out, dtype=dtype, g=g) if bias else None,
            "packed": None,
            "time_factor": time_factor,
            "cache": randn(b, cached, h, w, c, dtype=dtype, g=g) if cached else None,
            "first": first,
            "pad_mode": pad_mode,
            "residual": (randn(*output_shape(x, weight, time_factor, first), dtype=dtype, g=g) if residual else None),
        }

    # Wan: frames by themselves. More than one box either way, and a group of 16 channels that ends after 8.
    yield case(randn(1, 1, 5, 9, 16, dtype=dtype, g=g), 24, residual=True)
    yield case(randn(2, 1, 1, 1, 16, dtype=dtype, g=g), 48, bias=False)
    # HunyuanVideo: (1, 2, 2) and (2, 2, 2), the edges repeated.
    yield case(randn(1, 1, 3, 4, 16, dtype=dtype, g=g), 16, 3, pad_mode="replicate")
    yield case(randn(1, 2, 3, 2, 16, dtype=dtype, g=g), 16, 3, time_factor=2, pad_mode="replicate")
    x = randn(1, 1, 2, 3, 16, dtype=dtype, g=g)
    last = case(x, 16, 3, time_factor=2, cached=1, first=False, pad_mode="replicate", residual=True)
    yield {**last, "residual": last["residual"].float() if dtype != torch.float64 else last["residual"]}
    yield case(randn(1, 1, 3, 3, 16, dtype=dtype, g=g), 3, 3, time_factor=2, pad_mode="first_frame")
    # Part of a past: two frames are read, one is there.
    yield case(randn(1, 1, 2, 5, 16, dtype=dtype, g=g), 16, 3, cached=1)
    # CogVideoX: frames doubled after the convolution, which then runs once for two of them.
    yield case(randn(1, 2, 3, 4, 20, dtype=dtype, g=g), 16, time_factor=2)
    # Frames of a longer clip, cut out of a channels_last_3d tensor: strides of the clip, not of the slice.
    clip = randn(1, 16, 4, 4, 3, dtype=dtype, g=g).contiguous(memory_format=torch.channels_last_3d)
    yield case(clip.permute(0, 2, 3, 4, 1)[:, 2:], 8, 1, time_factor=2, first=False, residual=True)
