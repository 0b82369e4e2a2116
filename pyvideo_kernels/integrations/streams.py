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
    stream: VaeStream = _class_of(type(vae))(vae)
    return stream


def _class_of(kind: type) -> Any:
    place = STREAMS.get(kind.__name__)
    if place is None or not kind.__module__.startswith("diffusers."):
        raise ModelError(f"vae decode: `vae` must be one of {', '.join(STREAMS)}; got {kind.__name__}")
    return importlib.import_module(place).Stream


# A graph cannot import: what torch.compiler.assume_constant_result sets.
_class_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
