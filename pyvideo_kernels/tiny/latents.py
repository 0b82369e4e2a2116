"""The latent space: the mean colour of an 8x8x4 block of pixels, and the form of what covers it.

The space is fixed before either network is trained, so the transformer trains at once on exact latents
while the autoencoder learns to produce them (encoder) and to undo them (decoder).  Form and colour live in
channels of their own: a red and a blue ring differ in three channels and agree in all others, which is
what lets a small transformer combine words it never saw together.  Frame 0 fills a block of its own,
repeated four times, because a Wan VAE is causal and codes the first frame alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .clips import Clips, draw_scenes, render

SPATIAL = 8
TEMPORAL = 4
SHIPPED = Path(__file__).with_name("latent_space.safetensors")
_BLOCK = TEMPORAL * SPATIAL * SPATIAL


def _blocks(coverage: Tensor) -> Tensor:
    """``[B, T, H, W]`` with T = 4k+1 to ``[B, k+1, H/8, W/8, 256]``."""
    coverage = torch.cat([coverage[:, :1].expand(-1, TEMPORAL, -1, -1), coverage[:, 1:]], 1)
    b, t, h, w = coverage.shape
    grid = coverage.reshape(b, t // TEMPORAL, TEMPORAL, h // SPATIAL, SPATIAL, w // SPATIAL, SPATIAL)
    return grid.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)


@dataclass(frozen=True)
class LatentSpace:
    """Three channels of mean colour, then principal components of the coverage.

    Args:
        mean: ``[256]``, the mean block of coverage.
        basis: ``[256, z_dim - 3]``, orthonormal columns.
        latents_mean, latents_std: ``[z_dim]``, statistics of the codes; the pipeline divides by them.
    """

    mean: Tensor
    basis: Tensor
    latents_mean: Tensor
    latents_std: Tensor

    @property
    def z_dim(self) -> int:
        return self.basis.shape[1] + 3

    @classmethod
    def fit(cls, z_dim: int, *, clips: int = 2000, seed: int = 0) -> LatentSpace:
        """Principal components of the blocks of ``clips`` random training clips."""
        generator = torch.Generator().manual_seed(seed)
        batches = [render(draw_scenes(100, generator), generator) for _ in range(max(1, clips // 100))]
        total, square, count = torch.zeros(_BLOCK).double(), torch.zeros(_BLOCK, _BLOCK).double(), 0
        for batch in batches:
            rows = _blocks(batch.coverage).reshape(-1, _BLOCK)
            total += rows.sum(0)
            square += (rows.T @ rows).double()
            count += len(rows)
        mean = total / count
        _, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
        basis = vectors.flip(1)[:, : z_dim - 3]
        # A fixed sign makes the space the same on every machine.
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        plain = cls(mean.float(), basis.float(), torch.zeros(z_dim), torch.ones(z_dim))
        codes = torch.cat([plain.encode(batch).transpose(0, 1).flatten(1) for batch in batches], 1)
        return cls(plain.mean, plain.basis, codes.mean(1), codes.std(1))

    @classmethod
    def load(cls, path: Path) -> LatentSpace:
        return cls(**load_file(path))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in vars(self).items()}, partial)
        partial.replace(path)

    @classmethod
    def for_run(cls, run: Path, z_dim: int) -> LatentSpace:
        """The space of a run folder; a new folder gets the shipped one, so that its parts fit the shipped ones.

        A new one is fitted where the shipped one has another number of channels.
        """
        path = run / "latent_space.safetensors"
        if not path.exists():
            shipped = cls.load(SHIPPED)
            (shipped if shipped.z_dim == z_dim else cls.fit(z_dim)).save(path)
        return cls.load(path)

    def normalize(self, z: Tensor) -> Tensor:
        """Codes as the transformer sees them: zero mean, unit variance."""
        return (z - self.latents_mean.view(1, -1, 1, 1, 1)) / self.latents_std.view(1, -1, 1, 1, 1)

    def denormalize(self, z: Tensor) -> Tensor:
        """Codes as the autoencoder sees them."""
        return z * self.latents_std.view(1, -1, 1, 1, 1) + self.latents_mean.view(1, -1, 1, 1, 1)

    def encode(self, clips: Clips) -> Tensor:
        """``[B, z_dim, t, H/8, W/8]`` normalised codes of clips."""
        blocks = _blocks(clips.coverage)
        form = ((blocks - self.mean) @ self.basis).permute(0, 4, 1, 2, 3)
        covered = blocks.mean(-1)[:, None]
        paint = (clips.color - clips.background)[:, :, None, None, None]
        color = clips.background[:, :, None, None, None] + covered * paint
        return self.normalize(torch.cat([color, form], 1))

    def draft(self, z: Tensor) -> Tensor:
        """The video ``[B, 3, T, H, W]`` that normalised codes stand for, without any network.

        Takes the background from the barest blocks and the colour from the fullest ones; it needs one flat
        object on one flat background, and serves to judge the transformer before there is a decoder.
        """
        z = self.denormalize(z)
        mean_color, form = z[:, :3], z[:, 3:].permute(0, 2, 3, 4, 1)
        rows = form @ self.basis.T + self.mean
        covered = rows.mean(-1)[:, None].clamp(0, 1)
        bare = ((1 - covered) ** 8).expand_as(mean_color)
        background = (mean_color * bare).sum((2, 3, 4)) / bare.sum((2, 3, 4)).clamp_min(1e-6)
        contrast = mean_color - background[:, :, None, None, None]
        color = (contrast * covered).sum((2, 3, 4)) / covered.square().sum((2, 3, 4)).clamp_min(1e-6)
        b, t, h, w, _ = rows.shape
        video = rows.reshape(b, t, h, w, TEMPORAL, SPATIAL, SPATIAL).permute(0, 1, 4, 2, 5, 3, 6)
        video = video.reshape(b, t * TEMPORAL, h * SPATIAL, w * SPATIAL)[:, TEMPORAL - 1 :].clamp(0, 1)
        return Clips((), video, (color + background).clamp(-1, 1), background.clamp(-1, 1)).video()
