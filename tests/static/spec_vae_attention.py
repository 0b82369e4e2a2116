"""Ahead-of-time cases of vae_attention: the middle blocks of the decoders."""

from functools import partial

import torch

from pyvideo_kernels.kernels.vae_attention import vae_attention
from pyvideo_kernels.testing.static import Case, meta


def _attention(frames, tokens, d, causal=False, fused=True, dtype=torch.bfloat16):
    if fused:
        q, k, v = meta((1, frames, tokens, 3 * d), dtype).chunk(3, -1)
    else:
        q, k, v = (meta((1, frames, tokens, d), dtype) for _ in range(3))
    vae_attention(q, k, v, causal, d**-0.5)


WAN = partial(_attention, 1, 60 * 104, 384)  # 480p
HUNYUAN = partial(_attention, 5, 32 * 32, 512, causal=True, fused=False)  # a tile of 256 x 256 pixels
WAN_5B = partial(_attention, 1, 44 * 80, 1024)  # Wan 2.2, 704 x 1280
POINTERS = ("sm_80", "sm_89", "sm_120", "gfx942", "gfx950")
DESCRIPTORS = ("sm_90", "sm_100")

# The widest heads are compiled where the most registers or the most memory are at stake.
CASES = [
    Case("wan-384", WAN, matrix=True, archs=POINTERS),
    Case("wan-384-descriptors", WAN, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("hunyuan-512-causal", HUNYUAN, matrix=True, archs=("sm_80", "sm_89")),
    Case("hunyuan-512-causal-descriptors", HUNYUAN, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("wan-2.2-1024", WAN_5B, matrix=True, archs=("sm_80", "gfx942")),
    Case("wan-2.2-1024-descriptors", WAN_5B, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("wan-384-float32", partial(_attention, 1, 60 * 104, 384, dtype=torch.float32), archs=("sm_80",)),
]
