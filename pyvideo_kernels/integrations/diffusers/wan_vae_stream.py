"""Wan's VAE (2.1 and 2.2) as a stream: one frame of the first latent, then four of each; and its encoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d
from torch import Tensor

from ...errors import bad_shape, check_tensor
from ...nn.vae_stream import VaeStream, check_latents
from ..clips import channels_first, channels_last
from ..packing import forget_offloaded, watched
from ..swap import ours
from .wan_vae_forwards import Frames, finished

_ENCODE = "vae encode"


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
        check_latents(self.vae, latents, self.vae.config.z_dim, given)

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


# Named like what it replaces: a pickled bound method is looked up by name, and finds that of the class.
def _encode(self: Any, x: Tensor) -> Tensor:
    """``AutoencoderKLWan._encode``: the first frame by itself, then four at a time, joined once at the end."""
    check_tensor(_ENCODE, "x", x, ndim=5)
    patch = self.config.patch_size or 1
    channels = self.config.in_channels // patch**2
    if x.shape[1] != channels or 0 in x.shape or x.shape[3] % patch or x.shape[4] % patch:
        sides = f" and sides that are multiples of {patch}" if patch > 1 else ""
        bad_shape(_ENCODE, "x", f"[B, {channels}, T, H, W] with nothing empty{sides}", x)
    height, width = _least(self)
    if self.use_tiling and (x.shape[4] > width or x.shape[3] > height):
        stock: Tensor = type(self)._encode(self, x)
        return stock
    state: list[Any] = [None] * self._cached_conv_counts["encoder"]
    pieces = []
    for group in range(1 + (x.shape[2] - 1) // 4):
        frames = x[:, :, :1] if group == 0 else x[:, :, 4 * group - 3 : 4 * group + 1]
        pieces.append(self.encoder(_patches(frames, patch), feat_cache=state, feat_idx=[0]))
    moments: Tensor = self.quant_conv(torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0])
    forget_offloaded(self)
    return moments


def _patches(x: Tensor, patch: int) -> Tensor:
    """``patchify``, which leaves the column before the row inside a patch; channels-last."""
    if patch == 1:
        return channels_first(channels_last(x))
    cells = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [B, C, T, h, row, w, column]
    return channels_first(cells.permute(0, 2, 3, 5, 1, 6, 4).flatten(4))
