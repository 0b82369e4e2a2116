"""A narrow CogVideoX VAE with random weights, and what its tests call."""

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import nn

from .vae_helpers import drawn

ENCODER_OPS = {"group_norm_silu", "causal_conv3d"}
VAE_OPS = ENCODER_OPS | {"upsample_conv2d", "decode_head_"}


def tiny(seed=0, **changes):
    """The model's own four levels, of which two double frames; one and two residual blocks each, narrow."""
    torch.manual_seed(seed)
    config = {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_height": 32,
        "sample_width": 48,
    }
    return drawn(AutoencoderKLCogVideoX(**{**config, **changes}).eval())


def smaller():
    """One residual block and one upsampling, for what takes its time with each of them."""
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 2, "up_block_types": ("CogVideoXUpBlock3D",) * 2}
    vae = tiny(block_out_channels=(8, 8), layers_per_block=0, temporal_compression_ratio=2, **blocks)
    vae.decoder.mid_block.resnets = vae.decoder.up_blocks[1].resnets = nn.ModuleList()
    return vae


def decode(vae, z):
    with torch.no_grad():
        return vae.decode(z.to(vae.dtype)).sample
