"""Oracle of decode_head_ and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up
from .causal_conv3d import spatial_mode, with_border, with_past

# Operands of the product that a kernel may compute in TF32, where torch.backends.cudnn allows that.
TF32_OPERANDS = ("x", "weight", "cache")


def output_shape(x: Tensor, weight: Tensor, pad_end: int, patch: Sequence[int]) -> tuple[int, ...]:
    """``[B, C, T, H, W]`` of the frames."""
    b, t, h, w, _ = x.shape
    pt, ph, pw = patch
    return (b, weight.shape[0] // (pt * ph * pw), (t + pad_end) * pt, h * ph, w * pw)


def unpatchify(y: Tensor, patch: Sequence[int]) -> Tensor:
    """``[B, T, H, W, C*pt*pw*ph]`` to ``[B, C, T*pt, H*ph, W*pw]``; inside a patch the column comes before the row."""
    b, t, h, w, o = y.shape
    pt, ph, pw = patch
    c = o // (pt * ph * pw)
    frames = y.reshape(b, t, h, w, c, pt, pw, ph).permute(0, 4, 1, 5, 2, 7, 3, 6)
    return frames.reshape(b, c, t * pt, h * ph, w * pw)


def to_uint8(frames: Tensor) -> Tensor:
    """[-1, 1] to 0 … 255, halves to even, as the sampler's to_pixels and to_bytes; NaN to 0."""
    pixels = (up(frames, compute_dtype(frames)) / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().nan_to_num(0).to(torch.uint8)


def finish(y: Tensor, patch: Sequence[int], clamp: bool, dtype: torch.dtype) -> Tensor:
    """The frames of a convolution's output: patches unfolded, clamped, as bytes."""
    frames = unpatchify(y, patch)
    if dtype == torch.uint8:
        return to_uint8(frames)
    return frames.clamp(-1, 1) if clamp else frames


def decode_head(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    pad_mode: str,
    pad_end: int,
    patch: Sequence[int],
    clamp: bool,
) -> Tensor:
    """Convolution, one rounding to the dtype of ``x``, then frames; of ``out``, the dtype alone is read."""
    if out.numel() == 0:
        return out.clone()
    dtype = compute_dtype(x)
    _, _, kt, kh, kw = weight.shape
    frames = with_past(up(x, dtype), None if cache is None else up(cache, dtype), kt - 1, pad_mode, pad_end)
    frames = with_border(frames, kh, kw, spatial_mode(pad_mode)).permute(0, 4, 1, 2, 3)
    y = torch.nn.functional.conv3d(frames, up(weight, dtype), None if bias is None else up(bias, dtype))
    return finish(y.to(x.dtype).permute(0, 2, 3, 4, 1), patch, clamp, out.dtype).contiguous()


def decode_head_(out: Tensor, *rest: Any) -> None:
    """The same, written into ``out``."""
    out.copy_(decode_head(out, *rest))


def summed(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    pad_mode: str,
    pad_end: int,
    patch: Sequence[int],
    clamp: bool,
) -> dict[int, Tensor]:
    """√terms Σ|a b| of the sum of products behind each element; bytes are codes and need none."""
    if out.dtype == torch.uint8:
        return {}
    bias, cache = (None if t is None else t.abs() for t in (bias, cache))
    sums = decode_head(out, x.abs(), weight.abs(), bias, cache, pad_mode, pad_end, patch, False)
    return {0: sums * weight[0].numel() ** 0.5}


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The heads of the decoders: every patch and padding, caches of 0 to 2 frames, ragged sizes, slices of a clip."""
    g = generator()

    def case(
        x: Tensor,
        out: int,
        patch: tuple[int, int, int],
        cached: int = 0,
        pad_mode: str = "zeros",
        pad_end: int = 0,
        kernel: tuple[int, int, int] = (3, 3, 3),
        clamp: bool = True,
        as_uint8: bool = False,
        bias: bool = True,
        channels_last: bool = False,
    ) -> dict[str, Any]:
        b, _, h, w, c = x.shape
        weight = randn(out, c, *kernel, dtype=dtype, g=g, scale=(c * kernel[0] * kernel[1] * kernel[2]) ** -0.5)
        shape = output_shape(x, weight, pad_end, patch)
        # The middle frames of a longer clip, which is what a stream fills.
        clip = (shape[0], shape[1], shape[2] + 2, *shape[3:])
        frames = torch.zeros(clip, dtype=torch.uint8 if as_uint8 else dtype)
        if channels_last:
            frames = frames.contiguous(memory_format=torch.channels_last_3d)
        return {
            "out": frames[:, :, 1:-1],
            "x": x,
            "weight": weight,
            "bias": randn(out, dtype=dtype, g=g, scale=0.5) if bias else None,
            "cache": randn(b, cached, h, w, c, dtype=dtype, g=g) if cached else None,
            "pad_mode": pad_mode,
            "pad_end": pad_end,
            "patch": list(patch),
            "clamp": clamp,
        }

    yield case(randn(1, 2, 5, 7, 16, dtype=dtype, g=g), 3, (1, 1, 1), cached=2)
    yield case(randn(2, 2, 2, 4, 24, dtype=dtype, g=g), 3, (1, 1, 1), as_uint8=True, channels_last=True)
    yield case(randn(1, 1, 3, 5, 16, dtype=dtype, g=g), 12, (1, 2, 2), cached=1, as_uint8=True)
    yield case(randn(1, 1, 2, 3, 16, dtype=dtype, g=g), 48, (1, 4, 4), pad_mode="first_frame", pad_end=1, clamp=False)
    clip = randn(1, 16, 3, 4, 5, dtype=dtype, g=g).contiguous(memory_format=torch.channels_last_3d)
    yield case(
        clip.permute(0, 2, 3, 4, 1)[:, 1:], 3, (1, 1, 1), cached=1, pad_mode="replicate", clamp=False, bias=False
    )
    yield case(randn(1, 1, 3, 4, 20, dtype=dtype, g=g), 24, (2, 2, 2), pad_mode="reflect", cached=2)
    yield case(randn(1, 2, 3, 2, 16, dtype=dtype, g=g), 3, (1, 1, 1), kernel=(1, 3, 3), pad_mode="first_frame")
