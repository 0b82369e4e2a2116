"""LTX-Video's VAE as a stream: one frame of the first latent, eight of each other, some latents late."""

from __future__ import annotations

import math
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_ltx import (
    LTXVideoCausalConv3d,
    LTXVideoDecoder3d,
    LTXVideoMidBlock3d,
    LTXVideoResnetBlock3d,
    LTXVideoUpBlock3d,
    LTXVideoUpsampler3d,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from ...errors import ModelError, bad_option, bad_shape
from ...nn.streaming_vae_decoder import decode_clip, records
from ...nn.tiling import tile_of_flags
from ...nn.vae_stream import OP, VaeStream, check_latents
from ..packing import forget_offloaded
from ..swap import ours
from .ltx_vae_clip import Clip

_LAYERS = (
    LTXVideoDecoder3d,
    LTXVideoMidBlock3d,
    LTXVideoUpBlock3d,
    LTXVideoUpsampler3d,
    LTXVideoResnetBlock3d,
    LTXVideoCausalConv3d,
)
# Elements of the widest layer in one step: a GiB in 16 bits.
_AMPLE = 2**29


class Stream(VaeStream):
    """``AutoencoderKLLTXVideo`` in steps of any number of latents.

    The convolutions of the usual decoder see one frame ahead, which makes it some 20 latents late: first frames are
    ready after so many latents, and after the last latent there are steps without any, ``(n, n)``, each letting out as
    many frames as a step with latents. A clip in one step has none of this. With ``decoder_causal`` nothing is late.

    The noise of ``decoder_inject_noise`` is drawn from the global generator as layers get their first frames, which
    gives the model's own draws if nobody else draws meanwhile.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        decoder = vae.decoder
        self.patch, self.patch_t = decoder.patch_size, decoder.patch_size_t
        self.channels = vae.config.out_channels
        # What the modules do, whatever the configuration says of compression ratios.
        self.factor = (1, 1, 1)
        for block in decoder.up_blocks:
            for up in block.upsamplers or ():
                t, h, w = self.factor
                self.factor = t * up.stride[0], h * up.stride[1], w * up.stride[2]

    def check(self, latents: Tensor, **given: Any) -> None:
        temb = given.pop("temb", None)
        check_latents(self.vae, latents, self.vae.config.latent_channels, given)
        if self.vae.config.timestep_conditioning:
            if not isinstance(temb, Tensor):
                bad_option(OP, "temb", f"a timestep for each of {latents.shape[0]} clips: the VAE is conditioned", temb)
            elif temb.numel() != latents.shape[0]:
                bad_shape(OP, "temb", f"[{latents.shape[0]}], a timestep a clip", temb)

    def late(self) -> float | None:
        """Latents that are inside the decoder when the last has gone in; None for one that cannot be a delay line.

        Every convolution that sees a frame ahead holds one back. A layer that runs somebody else's forward holds none.
        """
        late, rate = 0.0, 1
        rises: dict[Any, int] = {}
        for layer in self.vae.decoder.modules():  # in the order in which they run
            if isinstance(layer, _LAYERS) and not ours(layer, type(layer)):
                return None
            if isinstance(layer, LTXVideoUpsampler3d):
                rises[layer.conv] = layer.stride[0]
            if isinstance(layer, LTXVideoCausalConv3d):
                late += 0 if layer.is_causal else (layer.kernel_size[0] - 1) // 2 / rate
                rate *= rises.get(layer, 1)
        return late

    def frames(self, latents: int) -> int:
        # Each doubling drops the first of the frames that it made.
        count = latents
        for block in self.vae.decoder.up_blocks if latents else ():
            for up in block.upsamplers or ():
                count = count * up.stride[0] - (up.stride[0] - 1)
        return count * self.patch_t

    def size(self, height: int, width: int) -> tuple[int, int]:
        return height * self.factor[1] * self.patch, width * self.factor[2] * self.patch

    def steps(self, latents: int, chunk: int) -> list[tuple[int, int]]:
        late = self.late()
        if chunk >= latents or late is None:
            return [(0, latents)]
        given = [(start, min(start + chunk, latents)) for start in range(0, latents, chunk)]
        return [*given, *[(latents, latents)] * math.ceil(late / chunk)]

    def ample(self, latents: Tensor) -> int:
        """Latents a step that keep the GPU busy, in memory that does not grow with the clip."""
        b, _, _, height, width = latents.shape
        decoder = self.vae.decoder
        widest = decoder.conv_out.in_channels * b * height * self.factor[1] * width * self.factor[2]
        return max(1, _AMPLE // (widest * self.factor[0]))

    def new_state(self, temb: Tensor | None = None, **given: Any) -> Clip:
        return Clip(temb)

    def step(self, z: Tensor, state: Clip, *, first: bool, last: bool, out: Tensor | None = None) -> Tensor:
        frames: Tensor
        if first and last:
            frames = self.vae.decoder(z, state.temb)
        else:
            if not ours(self.vae.decoder, LTXVideoDecoder3d):
                raise ModelError(f"{OP}: the VAE was restored while a clip was under way: decode it from its beginning")
            state.begin(z.shape[2], first=first, last=last)
            frames = self.vae.decoder(z, state.temb, clip=state)
        return frames

    def framewise(self, latents: Tensor) -> bool:
        """Whether the VAE's own flags ask for tiles in time, which no stream needs: its memory is constant there."""
        vae = self.vae
        least = vae.tile_sample_min_num_frames // vae.temporal_compression_ratio
        return bool(vae.use_framewise_decoding and latents.shape[2] > least)

    def tiled(self, latents: Tensor) -> bool:
        vae = self.vae
        height, width = latents.shape[3:]
        ratio = vae.spatial_compression_ratio
        small = height <= vae.tile_sample_min_height // ratio and width <= vae.tile_sample_min_width // ratio
        return bool(vae.use_tiling) and not small


# Named like what it replaces: a pickled bound method is looked up by name, and finds that of the class.
def _decode(self: Any, z: Tensor, temb: Tensor | None = None, return_dict: bool = True) -> Any:
    """``AutoencoderKLLTXVideo._decode`` as a stream; in the VAE's own tiles where its flags ask for them."""
    stream = Stream(self)
    stream.check(z, temb=temb)
    tiled = stream.tiled(z)
    if stream.framewise(z) or (tiled and records(stream, z)):
        return type(self)._decode(self, z, temb, return_dict=return_dict)
    try:
        frames = decode_clip(stream, z, tiling=tile_of_flags(stream) if tiled else None, temb=temb)
    finally:
        forget_offloaded(self)
    return DecoderOutput(sample=frames) if return_dict else (frames,)
