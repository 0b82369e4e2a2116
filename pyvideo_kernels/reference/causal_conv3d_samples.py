"""Sample inputs of causal_conv3d."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import generator, randn


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every kernel size, pad mode and epilogue; caches of 0 to kt - 1 frames, ragged sizes, 3 and 12 channels, views,
    strides, residuals, frames past the end."""
    g = generator()

    def case(
        x: Tensor,
        out: int,
        kernel: tuple[int, int, int],
        cached: int = 0,
        stride: tuple[int, int, int] = (1, 1, 1),
        residual: bool = False,
        bias: bool = True,
        pad_mode: str = "zeros",
        pad_end: int = 0,
        epilogue: str | None = None,
        factor: Sequence[int] = (1, 1, 1),
        keep: bool = True,
    ) -> dict[str, Any]:
        b, t, h, w, c = x.shape
        ft, fh, fw = (2, 1, 1) if epilogue == "interleave" else factor
        rows = out * ft * fh * fw
        fan_in = c * kernel[0] * kernel[1] * kernel[2]
        frames = ((t + pad_end - 1) // stride[0] + 1) * ft
        normed = epilogue == "rms_norm_silu"
        return {
            "x": x,
            "weight": randn(rows, c, *kernel, dtype=dtype, g=g, scale=fan_in**-0.5),
            "bias": randn(rows, dtype=dtype, g=g) if bias else None,
            "cache": randn(b, cached, h, w, c, dtype=dtype, g=g) if cached else None,
            "stride": list(stride),
            "pad_mode": pad_mode,
            "pad_end": pad_end,
            "residual": randn(b, frames, h * fh, w * fw, out, dtype=dtype, g=g) if residual else None,
            "epilogue": epilogue,
            "factor": list(factor),
            "norm_weight": randn(out, dtype=dtype, g=g, mean=1.0, scale=0.3) if normed else None,
            "norm_eps": 1e-12,
            "keep": keep,
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
    # The other ways to look beyond the clip. Large enough for a box that touches no edge.
    yield case(randn(1, 1, 17, 33, 16, dtype=dtype, g=g), 16, (1, 3, 3), pad_mode="replicate")
    yield case(randn(1, 2, 2, 3, 16, dtype=dtype, g=g), 16, (3, 3, 3), pad_mode="replicate", residual=True)
    yield case(randn(1, 1, 3, 2, 16, dtype=dtype, g=g), 16, (3, 3, 3), cached=1, pad_mode="reflect")
    yield case(randn(1, 1, 2, 3, 16, dtype=dtype, g=g), 16, (3, 3, 3), pad_mode="replicate")
    yield case(randn(1, 3, 2, 3, 16, dtype=dtype, g=g), 16, (3, 3, 3), cached=1, pad_mode="first_frame", pad_end=1)
    # Nothing but the end of a clip: every frame is in the cache.
    held = randn(2, 2, 2, 3, 16, dtype=dtype, g=g)
    yield case(held[:, 2:], 16, (3, 3, 3), pad_mode="first_frame", pad_end=1) | {"cache": held}
    # Epilogues: the second with two accumulators, the third without its first output.
    yield case(randn(1, 2, 3, 3, 16, dtype=dtype, g=g), 20, (1, 3, 3), epilogue="rms_norm_silu")
    yield case(
        randn(1, 1, 3, 5, 16, dtype=dtype, g=g), 48, (3, 3, 3), cached=2, residual=True, epilogue="rms_norm_silu"
    )
    yield case(randn(1, 1, 2, 3, 16, dtype=dtype, g=g), 16, (1, 1, 1), epilogue="rms_norm_silu", keep=False)
    yield case(randn(1, 2, 2, 3, 16, dtype=dtype, g=g), 16, (3, 1, 1), cached=2, epilogue="interleave")
    yield case(
        randn(1, 2, 3, 3, 16, dtype=dtype, g=g), 12, (1, 1, 1), epilogue="pixel_shuffle", factor=(2, 2, 2),
        residual=True,
    )  # fmt: skip
