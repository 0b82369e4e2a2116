"""Which VAEs decode as a stream, and the method of theirs that then does."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from ..errors import ModelError
from ..nn.streaming_vae_decoder import decode_clip, records
from ..nn.tiling import tile_of_flags
from ..nn.vae_stream import VaeStream
from .packing import forget_offloaded

# diffusers model class -> the file with its ``Stream``.
STREAMS = {
    "AutoencoderKLWan": "pyvideo_kernels.integrations.diffusers.wan_vae_stream",
    "AutoencoderKLHunyuanVideo": "pyvideo_kernels.integrations.diffusers.hunyuan_video_vae_stream",
    "AutoencoderKLLTXVideo": "pyvideo_kernels.integrations.diffusers.ltx_vae_stream",
    "AutoencoderKLCogVideoX": "pyvideo_kernels.integrations.diffusers.cogvideox_vae_stream",
}


def stream_of(vae: Any) -> VaeStream:
    """The stream of a diffusers VAE; raises ModelError if there is none."""
    place = STREAMS.get(type(vae).__name__)
    if place is None or not type(vae).__module__.startswith("diffusers."):
        raise ModelError(f"vae decode: `vae` must be one of {', '.join(STREAMS)}; got {type(vae).__name__}")
    stream: VaeStream = importlib.import_module(place).Stream(vae)
    return stream


# Named like what it replaces: a pickled bound method is looked up by name, and finds that of the class.
def _decode(self: Any, z: Tensor, return_dict: bool = True) -> Any:
    """``AutoencoderKL*._decode`` as a stream; in the VAE's own tiles where its flags ask for them."""
    from diffusers.models.autoencoders.vae import DecoderOutput

    stream = stream_of(self)
    stream.check(z)
    tiling = None
    if stream.tiled(z):
        if records(stream, z):
            return type(self)._decode(self, z, return_dict=return_dict)
        tiling = tile_of_flags(stream)
    try:
        frames = decode_clip(stream, z, tiling=tiling)
    finally:
        forget_offloaded(self)
    return DecoderOutput(sample=frames) if return_dict else (frames,)
