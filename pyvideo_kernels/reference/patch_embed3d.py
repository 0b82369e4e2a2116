"""Oracle of patch_embed3d, its gradient, and its sample inputs: reshape and matmul, no convolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up


def patchify(video: Tensor, patch: Sequence[int]) -> Tensor:
    """``[B, C, T, H, W]`` as ``[B, tokens, C*pt*ph*pw]``: tokens in (T, H, W) order, columns as a conv weight's."""
    b, c, t, h, w = video.shape
    pt, ph, pw = patch
    boxes = video.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return boxes.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, (t // pt) * (h // ph) * (w // pw), c * pt * ph * pw)


def unpatchify(columns: Tensor, shape: Sequence[int], patch: Sequence[int]) -> Tensor:
    """The inverse of `patchify`, contiguous."""
    b, c, t, h, w = shape
    pt, ph, pw = patch
    boxes = columns.reshape(b, t // pt, h // ph, w // pw, c, pt, ph, pw)
    return boxes.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(b, c, t, h, w)


def patch_embed3d(video: Tensor, weight: Tensor, bias: Tensor | None, patch: Sequence[int]) -> Tensor:
    """tokens = patchify(video) @ weightᵀ + bias, one rounding at the end."""
    dtype = compute_dtype(video)
    y = patchify(up(video, dtype), patch) @ up(weight, dtype).reshape(weight.shape[0], -1).T
    if bias is not None:
        y = y + up(bias, dtype)
    return y.to(video.dtype)


def patch_embed3d_backward(
    grads: Sequence[Tensor | None],
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    patch: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (video, weight, bias), those in ``needs``."""
    (grad,) = grads
    assert grad is not None
    dtype = compute_dtype(video)
    dy = up(grad, dtype)
    out: list[Tensor] = []
    if needs[0]:
        columns = dy @ up(weight, dtype).reshape(weight.shape[0], -1)
        out.append(unpatchify(columns, video.shape, patch).to(video.dtype).contiguous())
    if needs[1]:
        a = patchify(up(video, dtype), patch).flatten(0, 1)
        out.append((dy.flatten(0, 1).T @ a).reshape(weight.shape).to(weight.dtype))
    if needs[2] and bias is not None:
        out.append(dy.sum((0, 1)).to(bias.dtype))
    return out


def summed(video: Tensor, weight: Tensor, bias: Tensor | None, patch: Sequence[int]) -> dict[int, Tensor]:
    """√terms Σ|a b| of the sum of products behind each element."""
    magnitude = patch_embed3d(video.abs(), weight.abs(), None if bias is None else bias.abs(), patch)
    return {0: magnitude * weight[0].numel() ** 0.5}


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Wan's patch, a temporal patch, patch 1, widths that fill no tile, channels last, sliced and permuted video."""
    g = generator()

    def weight(d: int, c: int, patch: tuple[int, int, int], flat: bool = False) -> dict[str, Any]:
        k = c * patch[0] * patch[1] * patch[2]
        w = randn(d, c, *patch, dtype=dtype, g=g, scale=k**-0.5)
        return {"weight": w.flatten(1) if flat else w, "bias": randn(d, dtype=dtype, g=g), "patch": list(patch)}

    yield {"video": randn(2, 16, 2, 4, 6, dtype=dtype, g=g), **weight(24, 16, (1, 2, 2))}
    # A temporal patch and odd everything: K = 60, 9 tokens, 7 outputs.
    yield {"video": randn(1, 5, 6, 6, 3, dtype=dtype, g=g), **weight(7, 5, (2, 2, 3), flat=True)}
    # LTX's door: a linear layer on each latent pixel, no bias; one token.
    yield {"video": randn(1, 20, 1, 1, 1, dtype=dtype, g=g), **weight(16, 20, (1, 1, 1)), "bias": None}
    channels_last = randn(1, 3, 4, 4, 9, dtype=dtype, g=g).permute(0, 4, 1, 2, 3)
    yield {"video": channels_last, **weight(33, 9, (1, 2, 2))}
    # Frames before channels in memory, a window cut out of a wider picture.
    cut = randn(2, 3, 2, 8, 10, dtype=dtype, g=g).transpose(1, 2)[..., 2:6, 1:7]
    yield {"video": cut, **weight(16, 2, (3, 1, 2))}
