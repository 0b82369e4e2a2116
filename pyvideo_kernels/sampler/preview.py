"""A cheap look at latents: one affine map from latent channels to RGB, fitted to what the model's own VAE decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .loop import denormalise
from .video import write_bytes

_FILMS, _CELLS, _FRAMES = 8, 8, 2
"""Random latents to fit to: how many, how wide, and how many latent frames."""
_CONTRAST = 1.5
_RIDGE = 1e-2
_TRUST = 1e-2
"""Weight of the general fit against the film's own pixels."""
_TILE = 128
"""Shortest edge of a tile in the strip, in pixels, reached by repeating pixels."""


class Projection:
    """``[channels + 1, 3]``: least squares from normalised latents (and 1) to RGB in [0, 1].

    The general fit pairs smooth random latents with the mean colour of the pixels that each decodes to, once a model.
    ``refine`` then fits to the first frame of the film itself, decoded, with the general fit as the prior: one frame
    of the VAE's work against a whole denoising step.
    """

    def __init__(self, vae: Any, device: torch.device) -> None:
        self.vae, self.device = vae, device
        channels = vae.config.z_dim
        generator = torch.Generator("cpu").manual_seed(0)
        coarse = torch.randn((_FILMS, channels, _CELLS // 2, _CELLS // 2), generator=generator) * _CONTRAST
        smooth = interpolate(coarse, size=_CELLS, mode="nearest")[:, :, None]
        x, y = [], []
        for latent in smooth:
            # The last frames: a causal VAE decodes the first one alone, and a film is mostly the others.
            x.append(_rows(latent))
            y.append(self._colors(latent[None].expand(-1, -1, _FRAMES, -1, -1)))
        a, b = torch.cat(x), torch.cat(y)
        ridge = _RIDGE * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
        ridge[-1, -1] = 0
        self.general = torch.linalg.solve(a.T @ a + ridge, a.T @ b)
        self.matrix = self.general

    def refine(self, latents: Tensor) -> None:
        """Fit to the first frame of these clean latents."""
        first = latents[:, :, :1]
        a, b = _rows(first[0]), self._colors(first)
        trust = _TRUST * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
        self.matrix = torch.linalg.solve(a.T @ a + trust, a.T @ b + trust @ self.general)

    @torch.no_grad()
    def _colors(self, latents: Tensor) -> Tensor:
        """Mean colours of the last decoded frame, a row for each latent of a frame."""
        latents = denormalise(self.vae, latents.to(self.device, self.vae.dtype))
        pixels = self.vae.decode(latents, return_dict=False)[0][:, :, -1].float().cpu() / 2 + 0.5
        cells = interpolate(pixels, size=latents.shape[-2:], mode="area")
        return cells[0].movedim(0, -1).flatten(0, 1).double()

    def __call__(self, latents: Tensor) -> Tensor:
        """``[T, h, w, 3]`` in [0, 1]."""
        frames, h, w = latents.shape[2:]
        rgb = torch.stack([_rows(latents[0, :, t : t + 1]) @ self.matrix for t in range(frames)])
        return rgb.float().clamp(0, 1).view(frames, h, w, 3)


def _rows(latent: Tensor) -> Tensor:
    """``[C, 1, h, w]`` as rows of channels and a 1."""
    x = latent[:, 0].movedim(0, -1).flatten(0, 1).double().cpu()
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def strip(latents: Tensor, projection: Projection) -> Any:
    """The latent frames side by side as ``[H, T·W, 3]`` uint8."""
    rgb = projection(latents)
    repeat = max(1, -(-_TILE // min(rgb.shape[1:3])))
    tiles = (rgb * 255).round().to(torch.uint8).repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
    return np.concatenate(list(tiles.numpy()), axis=1)


def write_strip(path: Path, latents: Tensor, projection: Projection) -> Path:
    """Replace ``path`` by the strip of ``latents``."""
    from PIL import Image

    picture = Image.fromarray(strip(latents, projection))
    return write_bytes(path, lambda temporary: picture.save(temporary, format="PNG"))
