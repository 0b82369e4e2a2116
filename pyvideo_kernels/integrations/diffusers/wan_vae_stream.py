"""Wan's VAE (2.1 and 2.2) as a stream: one frame of the first latent, then four of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import bad_option
from ...nn.vae_stream import OP, VaeStream, as_dtype, check_latents


class Stream(VaeStream):
    """``AutoencoderKLWan`` in steps of any number of latents; the first latent is a step of its own.

    The state is the decoder's ``feat_cache``: the last two frames of the input of every causal convolution.
    """

    fills = True

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        config = vae.config
        self.patch = config.patch_size or 1
        self.channels = config.out_channels // self.patch**2
        # What the modules do, whatever the configuration says of scale factors.
        self.ratio = 2 ** (len(config.dim_mult) - 1) * self.patch
        self.per_latent = 2 ** sum(bool(up) for up in vae.temperal_upsample[: len(config.dim_mult) - 1])

    def check(self, latents: Tensor, **given: Any) -> None:
        if given:
            bad_option(OP, next(iter(given)), "left out: AutoencoderKLWan.decode takes latents alone", "it")
        check_latents(self.vae, latents, self.vae.config.z_dim)

    def frames(self, latents: int) -> int:
        return 1 + (latents - 1) * self.per_latent if latents else 0

    def size(self, height: int, width: int) -> tuple[int, int]:
        return height * self.ratio, width * self.ratio

    def steps(self, latents: int, chunk: int) -> list[tuple[int, int]]:
        rest = [(start, min(start + chunk, latents)) for start in range(1, latents, chunk)]
        return [(0, 1), *rest]

    def new_state(self, **given: Any) -> list[Any]:
        return [None] * self.vae._cached_conv_counts["decoder"]

    def step(self, z: Tensor, state: list[Any], *, first: bool, last: bool, out: Tensor | None = None) -> Tensor:
        x = self.vae.decoder(self.vae.post_quant_conv(z), feat_cache=state, feat_idx=[0], first_chunk=first)
        return _finished(x, self.patch, out)

    def tiled(self, latents: Tensor) -> bool:
        vae = self.vae
        height, width = (side // vae.spatial_compression_ratio for side in _least(vae))
        return bool(vae.use_tiling and (latents.shape[-1] > width or latents.shape[-2] > height))


def _least(vae: Any) -> tuple[int, int]:
    return vae.tile_sample_min_height, vae.tile_sample_min_width


def _finished(x: Tensor, patch: int, out: Tensor | None) -> Tensor:
    """``unpatchify`` and clamp, in one pass into ``out`` where that can be."""
    if patch > 1:
        # [B, c * p * p, T, h, w] -> [B, c, T, h, p, w, p]: the second factor of the channels is the column.
        x = x.unflatten(1, (-1, patch, patch)).permute(0, 1, 4, 5, 3, 6, 2)
    if out is None:
        x = x.clamp(-1, 1)
        return x.flatten(5, 6).flatten(3, 4) if patch > 1 else x
    into = out if patch == 1 else out.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    if out.dtype == x.dtype and out.device == x.device and not torch.compiler.is_compiling():
        torch.clamp(x, -1, 1, out=into)
    else:
        into.copy_(as_dtype(x.clamp(-1, 1), out.dtype))
    return out
