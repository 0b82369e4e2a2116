"""Oracle of guidance_step and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up


def guided(cond: Tensor, uncond: Tensor | None, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    """uncond + guidance_scale * (cond - uncond) in ``dtype``; ``cond`` when there is no ``uncond``."""
    v = up(cond, dtype)
    if uncond is not None:
        base = up(uncond, dtype)
        v = base + guidance_scale * (v - base)
    return v


def guidance_step(
    latent: Tensor, cond: Tensor, uncond: Tensor | None, guidance_scale: float, sigma: float, sigma_next: float
) -> Tensor:
    """latent + (sigma_next - sigma) * guided velocity, one rounding to the dtype of ``latent``."""
    dtype = compute_dtype(latent)
    out = up(latent, dtype) + (sigma_next - sigma) * guided(cond, uncond, guidance_scale, dtype)
    return out.to(latent.dtype).contiguous()


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Latents with predictions in their dtype and in bfloat16, guided and not, ragged, permuted, one element."""
    g = generator()
    low = torch.bfloat16 if dtype == torch.float32 else dtype
    options = {"guidance_scale": 5.0, "sigma": 0.93, "sigma_next": 0.871}
    for shape, prediction in (((1, 4, 3, 5, 7), low), ((2, 130), dtype), ((1,), low)):
        latent = randn(*shape, dtype=dtype, g=g)
        cond, uncond = (randn(*shape, dtype=prediction, g=g) for _ in range(2))
        yield {"latent": latent, "cond": cond, "uncond": uncond, **options}
    latent, cond = randn(1, 4, 3, 5, 7, dtype=dtype, g=g), randn(1, 4, 3, 5, 7, dtype=low, g=g)
    yield {**options, "latent": latent, "cond": cond, "uncond": None, "sigma_next": 0.0}
    # Predictions as an unpatchify leaves them, and every other frame of a latent.
    latent = randn(1, 4, 6, 5, 6, dtype=dtype, g=g)[:, :, ::2]
    cond, uncond = (randn(1, 3, 5, 6, 4, dtype=low, g=g).permute(0, 4, 1, 2, 3) for _ in range(2))
    yield {**options, "latent": latent, "cond": cond, "uncond": uncond, "guidance_scale": 1.5}
