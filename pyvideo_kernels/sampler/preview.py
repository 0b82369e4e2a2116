"""A cheap look at latents: one linear map from latent channels to RGB, fitted to the model's own VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .video import write_bytes

_PICTURES = 8
_CELLS = 8
"""Latents along an edge of a fitting picture."""
_TILE = 128
"""Shortest edge of a tile in the strip, in pixels, reached by repeating pixels."""


@torch.no_grad()
def fit_projection(vae: Any, device: torch.device) -> Tensor:
    """``[channels + 1, 3]``: least squares from normalised latents (and 1) to RGB in [0, 1].

    The VAE encodes a few pictures of smooth random colour; each latent is paired with the mean colour of the pixels
    it stands for. Eight 64×64 pictures for an 8× VAE: a second on a CPU, nothing on a GPU, and no table per model.
    """
    scale = int(vae.config.scale_factor_spatial or 8)
    generator = torch.Generator("cpu").manual_seed(0)
    colors = torch.rand((_PICTURES, 3, 3, 3), generator=generator)
    pictures = interpolate(colors, size=_CELLS * scale, mode="bicubic", align_corners=True).clamp(0, 1)
    cells = interpolate(pictures, size=_CELLS, mode="area")
    shape = (1, -1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape)
    std = torch.tensor(vae.config.latents_std).view(shape)
    rows = []
    for picture in pictures:
        video = (picture * 2 - 1)[None, :, None].to(device, vae.dtype)
        latent = vae.encode(video).latent_dist.mode()[:, :, 0].float().cpu()
        rows.append((latent - mean) / std)
    x = torch.cat(rows).movedim(1, -1).flatten(0, -2).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    y = cells.movedim(1, -1).flatten(0, -2).double()
    # A little ridge: the pictures need not excite every channel.
    ridge = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + ridge, x.T @ y).float()


def strip(latents: Tensor, projection: Tensor) -> Any:
    """The latent frames side by side as ``[H, T·W, 3]`` uint8."""
    x = latents[0].float().cpu().movedim(0, -1)  # [T, h, w, C]
    rgb = (x @ projection[:-1] + projection[-1]).clamp(0, 1)
    repeat = max(1, -(-_TILE // min(rgb.shape[1:3])))
    tiles = (rgb * 255).round().to(torch.uint8).repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
    return np.concatenate(list(tiles.numpy()), axis=1)


def write_strip(path: Path, latents: Tensor, projection: Tensor) -> Path:
    """Replace ``path`` by the strip of ``latents``."""
    from PIL import Image

    picture = Image.fromarray(strip(latents, projection))
    return write_bytes(path, lambda temporary: picture.save(temporary, format="PNG"))
