"""HunyuanVideo's VAE as a stream of frames.

Its GroupNorms take their statistics over whatever is decoded together, so the grouping is part of the model. diffusers
decodes temporal tiles (``use_framewise_decoding``, on by default), of 4 + 1 latents every 3 with its default settings:

    tile i      latents [3i, 3i + 5) -> 17 frames; the first frame of every tile but the first is dropped
    seam i      the last 4 frames of tile i - 1 fade linearly into the first 4 of tile i
    frames i    the first 12 of tile i (13 of the first tile); the others wait for the next seam

A clip of no more than 4 latents is one tile, and with framewise decoding off every clip is. A step is a tile, whatever
chunk is asked for; what is kept between steps is the tail that the next seam needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...nn.vae_stream import VaeStream, check_latents


@dataclass(frozen=True)
class Tiles:
    """The VAE's temporal tiles."""

    whole: int  # latents of the longest clip that is one tile; a tile has one more
    stride: int  # latents from tile to tile
    frames: int  # that a tile gives, and the first one more
    blend: int  # frames that fade into the next tile


@dataclass
class State:
    """What a clip keeps between two steps: the frames of the last tile that the next one fades from."""

    tail: Tensor | None = None


class Stream(VaeStream):
    """``AutoencoderKLHunyuanVideo`` in steps of its own temporal tiles, as the flags of the VAE are at the call."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.channels = vae.config.out_channels

    def check(self, latents: Tensor, **given: Any) -> None:
        check_latents(self.vae, latents, self.vae.config.latent_channels, given)

    def frames(self, latents: int) -> int:
        ratio = self.vae.temporal_compression_ratio
        whole = (latents - 1) * ratio + 1 if latents else 0
        tiles = self._tiles()
        if tiles is None or latents <= tiles.whole or self._aligned(tiles):
            return whole
        sizes = [min(tiles.whole + 1, latents - start) - 1 for start in range(0, latents, tiles.stride)]
        return min(whole, 1 + sum(min(size * ratio, tiles.frames) for size in sizes))

    def size(self, height: int, width: int) -> tuple[int, int]:
        ratio = self.vae.spatial_compression_ratio
        return height * ratio, width * ratio

    def steps(self, latents: int, chunk: int) -> list[tuple[int, int]]:
        """A tile each; ``chunk`` leaves no choice, as another grouping would be another norm."""
        tiles = self._tiles()
        if tiles is None or latents <= tiles.whole or not self._aligned(tiles):
            return [(0, latents)]
        # A tile that begins at the last latent would have one frame, which is dropped: it is not decoded.
        starts = range(0, latents - 1, tiles.stride)
        return [(start, min(start + tiles.whole + 1, latents)) for start in starts]

    def new_state(self, **given: Any) -> State:
        return State()

    def step(self, z: Tensor, state: State, *, first: bool, last: bool, out: Tensor | None = None) -> Tensor:
        tiles = self._tiles()
        if first and last and tiles is not None and z.shape[2] > tiles.whole:
            # Sizes that a stream cannot keep: diffusers' own loop over the tiles.
            frames: Tensor = self.vae._temporal_tiled_decode(z, return_dict=False)[0]
            return frames
        frames = self.vae.decoder(self.vae.post_quant_conv(z))
        if tiles is None or (first and last):
            return frames
        if not first:
            frames = frames[:, :, 1:]
            if state.tail is not None:
                frames = _faded(state.tail, frames, tiles.blend)
        # A view would keep the whole tile alive until the next one is done.
        state.tail = None if last or not tiles.blend else frames[:, :, -tiles.blend :].clone()
        return frames if last else frames[:, :, : tiles.frames + int(first)]

    def tiled(self, latents: Tensor) -> bool:
        vae = self.vae
        height, width = (
            side // vae.spatial_compression_ratio for side in (vae.tile_sample_min_height, vae.tile_sample_min_width)
        )
        return bool(vae.use_tiling and (latents.shape[-1] > width or latents.shape[-2] > height))

    def _tiles(self) -> Tiles | None:
        vae = self.vae
        if not vae.use_framewise_decoding:
            return None
        ratio, size, step = (
            vae.temporal_compression_ratio, vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames,
        )  # fmt: skip
        return Tiles(size // ratio, step // ratio, step, size - step)

    def _aligned(self, tiles: Tiles) -> bool:
        """Whether frames lie where those of the neighbouring tile do; diffusers repeats or drops some otherwise."""
        return tiles.stride >= 1 and tiles.frames % self.vae.temporal_compression_ratio == 0 and tiles.blend >= 0


def _faded(before: Tensor, frames: Tensor, extent: int) -> Tensor:
    """``frames`` with the last ``extent`` frames of ``before`` fading into its first, in place."""
    extent = min(before.shape[2], frames.shape[2], extent)
    if extent > 0:
        dtype = torch.promote_types(frames.dtype, torch.float32)
        part = (torch.arange(extent, device=frames.device, dtype=dtype) / extent).view(-1, 1, 1)
        head = frames[:, :, :extent]
        head.copy_(torch.lerp(before[:, :, -extent:].to(dtype), head.to(dtype), part))
    return frames
