"""A narrow HunyuanVideo VAE with random weights, and what its tests call."""

import torch
from diffusers import AutoencoderKLHunyuanVideo

from .vae_helpers import drawn

TILED = 9  # latents of a clip in three temporal tiles: [0, 5), [3, 8), [6, 9)
ENCODER_OPS = {"group_norm_silu", "causal_conv3d", "vae_attention"}
VAE_OPS = ENCODER_OPS | {"upsample_conv2d", "decode_head_"}


def tiny(seed=0, **changes):
    """The model's own four levels with their up- and downsamplings, one residual block each."""
    torch.manual_seed(seed)
    config = {
        "latent_channels": 4,
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return drawn(AutoencoderKLHunyuanVideo(**{**config, **changes}).eval())


def decode(vae, z):
    with torch.no_grad():
        return vae.decode(z.to(vae.dtype)).sample
