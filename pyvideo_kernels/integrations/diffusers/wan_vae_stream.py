"""Wan's VAE (2.1 and 2.2) as a stream: one frame of the first latent, then four of each."""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d
from torch import Tensor

from ...errors import bad_option
from ...nn.vae_stream import OP, VaeStream, check_latents
from ..clips import channels_first, channels_last
from ..packing import watched
from ..swap import ours
from .wan_vae_forwards import Frames, finished


class Stream(VaeStream):
    """``AutoencoderKLWan`` in steps of any number of latents; the first latent is a step of its own.

    The state is the decoder's ``feat_cache``: the last two frames of the input of every causal convolution.
    """

    fills = True
    clamps = True

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        config = vae.config
        self.patch = self.grain = config.patch_size or 1
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
        return self._frames(z, state, first, Frames(self.patch, out))

    def tile_step(self, z: Tensor, state: list[Any], *, first: bool, last: bool) -> Tensor:
        return self._frames(z, state, first, Frames(self.patch, clamp=False))

    def _frames(self, z: Tensor, state: list[Any], first: bool, frames: Frames) -> Tensor:
        vae = self.vae
        x = vae.post_quant_conv(channels_first(channels_last(z)))
        given: dict[str, Any] = {"feat_cache": state, "feat_idx": [0], "first_chunk": first}
        if ours(vae.decoder, WanDecoder3d) and not watched(vae.decoder):
            made: Tensor = vae.decoder(x, **given, frames=frames)
            return made
        return finished(vae.decoder(x, **given), frames)

    def tiled(self, latents: Tensor) -> bool:
        vae = self.vae
        height, width = (side // vae.spatial_compression_ratio for side in _least(vae))
        return bool(vae.use_tiling and (latents.shape[-1] > width or latents.shape[-2] > height))


def _least(vae: Any) -> tuple[int, int]:
    return vae.tile_sample_min_height, vae.tile_sample_min_width
