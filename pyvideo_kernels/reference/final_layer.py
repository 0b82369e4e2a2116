"""Oracle of final_layer, its gradient, and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, reduce_to, up
from .layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_backward


def unpatchify(y: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """``[B, S, pt*ph*pw*C]``, channel last inside a patch, as ``[B, C, T*pt, H*ph, W*pw]``, contiguous."""
    b = y.shape[0]
    (t, h, w), (pt, ph, pw) = grid, patch
    boxes = y.reshape(b, t, h, w, pt, ph, pw, y.shape[-1] // (pt * ph * pw))
    # Channels are named, not inferred: an empty grid has nothing to infer from.
    return boxes.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, boxes.shape[-1], t * pt, h * ph, w * pw).contiguous()


def patchify(video: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """The inverse of `unpatchify`."""
    b, c = video.shape[:2]
    (t, h, w), (pt, ph, pw) = grid, patch
    boxes = video.reshape(b, c, t, pt, h, ph, w, pw)
    return boxes.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, t * h * w, pt * ph * pw * c)


def final_layer(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    patch: Sequence[int],
    eps: float,
) -> Tensor:
    """unpatchify(cast(norm(x) * (1 + scale) + shift) @ weightᵀ + bias): rounds after the modulation and at the end."""
    dtype = compute_dtype(x)
    modulated = layer_norm_modulate(x, scale, shift, None, None, eps)
    y = up(modulated, dtype) @ up(weight, dtype).T
    if bias is not None:
        y = y + up(bias, dtype)
    return unpatchify(y.to(x.dtype), grid, patch)


def final_layer_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    patch: Sequence[int],
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (x, scale, shift, weight, bias), those in ``needs``."""
    (grad,) = grads
    assert grad is not None
    dtype = compute_dtype(x)
    dy = up(patchify(grad, grid, patch), dtype)
    out: list[Tensor] = []
    if any(needs[:3]):
        dmodulated = dy @ up(weight, dtype)
        inner = [*needs[:3], False, False]
        out += layer_norm_modulate_backward([dmodulated], x, scale, shift, None, None, eps, inner)
    if needs[3]:
        modulated = up(layer_norm_modulate(x, scale, shift, None, None, eps), dtype)
        out.append((dy.flatten(0, 1).T @ modulated.flatten(0, 1)).to(weight.dtype))
    if needs[4] and bias is not None:
        out.append(reduce_to(dy, bias))
    return out


def summed(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    patch: Sequence[int],
    eps: float,
) -> dict[int, Tensor]:
    """√terms Σ|a b| of the sum of products behind each element."""
    y = layer_norm_modulate(x, scale, shift, None, None, eps).abs() @ weight.abs().T
    if bias is not None:
        y = y + bias.abs()
    return {0: unpatchify(y, grid, patch) * weight.shape[1] ** 0.5}


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Wan's head with per-batch and per-token modulation, temporal patches, widths that fill no tile, large means."""
    g = generator()
    f32 = torch.float64 if dtype == torch.float64 else torch.float32

    def head(d: int, c: int, patch: tuple[int, int, int]) -> dict[str, Any]:
        n = c * patch[0] * patch[1] * patch[2]
        return {"weight": randn(n, d, dtype=dtype, g=g, scale=d**-0.5), "bias": randn(n, dtype=dtype, g=g),
                "patch": list(patch), "eps": 1e-6}  # fmt: skip

    def modulation(*shape: int, dtype: torch.dtype = f32) -> dict[str, Tensor]:
        return {name: randn(*shape, dtype=dtype, g=g, scale=0.5) for name in ("scale", "shift")}

    x = randn(2, 12, 48, dtype=dtype, g=g)
    yield {"x": x, **modulation(2, 1, 48), **head(48, 4, (1, 2, 2)), "grid": [1, 3, 4]}
    # Per-token modulation in the model's dtype, a temporal patch, odd widths.
    x = randn(2, 6, 37, dtype=dtype, g=g)
    yield {"x": x, **modulation(2, 6, 37, dtype=dtype), **head(37, 3, (2, 1, 3)), "grid": [3, 1, 2]}
    # One token of one pixel, no bias, a large mean.
    x = randn(1, 1, 20, dtype=dtype, g=g, mean=8.0)
    yield {"x": x, **modulation(1, 1, 20), **head(20, 5, (1, 1, 1)), "bias": None, "grid": [1, 1, 1]}
    # Every other token of a longer sequence, modulation cut from a packed table and shared by the batch.
    x = randn(2, 10, 64, dtype=dtype, g=g)[:, ::2]
    table = randn(1, 2, 64, dtype=f32, g=g, scale=0.5)
    yield {"x": x, "shift": table[:, 0:1], "scale": table[:, 1:2], **head(64, 2, (1, 2, 2)), "grid": [5, 1, 1]}
