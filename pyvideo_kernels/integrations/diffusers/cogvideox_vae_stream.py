"""CogVideoX's VAE as a stream: the model's own batches of two latents, the first of two or three."""

from __future__ import annotations

from typing import Any, cast

from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXDecoder3D
from torch import Tensor

from ...nn.vae_stream import VaeStream, as_dtype, check_latents
from ..swap import ours


class Stream(VaeStream):
    """``AutoencoderKLCogVideoX`` in its batches of ``num_latent_frames_batch_size``, whatever the chunk.

    Its group norms take their statistics over all frames of a batch, so the batches are part of the model; memory is
    that of one. The state is the decoder's ``conv_cache``.
    """

    fills = True

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.channels = vae.config.out_channels
        ups = [up for block in vae.decoder.up_blocks for up in block.upsamplers or ()]
        # What the modules do, whatever the configuration says of compression.
        self.ratio = 2 ** len(ups)
        self.doublings = sum(up.compress_time for up in ups)

    def check(self, latents: Tensor, **given: Any) -> None:
        check_latents(self.vae, latents, self.vae.config.latent_channels, given)

    def frames(self, latents: int) -> int:
        batch = self.vae.num_latent_frames_batch_size
        first = min(latents, batch + latents % batch)
        return self._doubled(first) + (latents - first) // batch * self._doubled(batch)

    def _doubled(self, latents: int) -> int:
        """Frames of one batch: an odd number keeps its first frame single."""
        if latents % 2:
            return 1 + (latents - 1) * 2**self.doublings
        return latents * 2**self.doublings

    def size(self, height: int, width: int) -> tuple[int, int]:
        return height * self.ratio, width * self.ratio

    def steps(self, latents: int, chunk: int) -> list[tuple[int, int]]:
        batch = self.vae.num_latent_frames_batch_size
        first = min(latents, batch + latents % batch)
        return [(0, first), *[(start, start + batch) for start in range(first, latents, batch)]]

    def new_state(self, **given: Any) -> dict[str, Any]:
        return {}

    def step(self, z: Tensor, state: dict[str, Any], *, first: bool, last: bool, out: Tensor | None = None) -> Tensor:
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        decoder: Any = self.vae.decoder
        if ours(decoder, CogVideoXDecoder3D):
            frames, cache = decoder(z, conv_cache=state, out=out)
        else:
            frames, cache = decoder(z, conv_cache=state)
            frames = frames if out is None else out.copy_(as_dtype(frames, out.dtype))
        state.clear()
        if not last:
            state.update(cache)
        return cast(Tensor, frames)

    def tiled(self, latents: Tensor) -> bool:
        vae = self.vae
        small = latents.shape[-2] <= vae.tile_latent_min_height and latents.shape[-1] <= vae.tile_latent_min_width
        return bool(vae.use_tiling) and not small
