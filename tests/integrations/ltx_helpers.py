"""Narrow LTX-Video VAEs with random weights, and what their tests call."""

import torch
from diffusers import AutoencoderKLLTXVideo

from pyvideo_kernels import StreamingVaeDecoder

from .vae_helpers import drawn

VAE_OPS = {"pixel_norm_silu", "causal_conv3d", "decode_head_"}
ENCODER_OPS = {"pixel_norm_silu", "causal_conv3d"}
KINDS = {
    "0.9.0": {
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": (1,) * 5,
        "decoder_block_out_channels": (8, 8, 16, 16),
        "decoder_layers_per_block": (1,) * 5,
    },
    # With all that came after it: noise in 0.9.1; timesteps, residual upsamplers and other downsamplers in 0.9.5.
    "0.9.5": {
        "block_out_channels": (8, 16, 16, 16, 16),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "spatio_temporal_scaling": (True,) * 4,
        "layers_per_block": (1,) * 5,
        "decoder_block_out_channels": (8, 16, 32),
        "decoder_layers_per_block": (1,) * 4,
        "decoder_inject_noise": (True, False, True, True),
        "timestep_conditioning": True,
        "decoder_spatio_temporal_scaling": (True, True, True),
        "upsample_residual": (True, True, True),
        "upsample_factor": (2, 2, 2),
    },
}
ONE_LEVEL = {
    "decoder_block_out_channels": (8,),
    "decoder_layers_per_block": (1, 1),
    "decoder_inject_noise": (True, True),
    "decoder_spatio_temporal_scaling": (True,),
    "upsample_residual": (True,),
    "upsample_factor": (2,),
}
KINDS["causal"] = {**KINDS["0.9.5"], "decoder_causal": True, "encoder_causal": False}


def tiny(kind="0.9.0", seed=0, **changes):
    """Three up- and downsamplings, one residual block each, narrow; every kind of module."""
    torch.manual_seed(seed)
    return drawn(AutoencoderKLLTXVideo(**{"latent_channels": 4, "patch_size": 2, **KINDS[kind], **changes}).eval())


def conditioned(vae, z):
    """The timestep of each clip, for a decoder that wants one."""
    return {"temb": torch.linspace(0.05, 0.3, z.shape[0])} if vae.config.timestep_conditioning else {}


def decode(vae, z):
    torch.manual_seed(7)  # the noise that a decoder injects
    with torch.no_grad():
        return vae.decode(z.to(vae.dtype), **conditioned(vae, z)).sample


def stream(vae, z, chunk):
    torch.manual_seed(7)
    decoder = StreamingVaeDecoder(vae)
    return list(decoder.stream(z.to(vae.dtype), chunk=chunk, **conditioned(vae, z)))
