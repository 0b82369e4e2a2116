"""Launches of guidance_step at the models' shapes."""

import torch

from pyvideo_kernels.kernels.guidance_step import guidance_step
from pyvideo_kernels.testing.static import Case, meta


def _call(shape, guided=True, latent=torch.float32):
    cond = meta(shape)
    return lambda: guidance_step(meta(shape, latent), cond, cond if guided else None, 5.0, 0.9, 0.8)


CASES = [
    Case("wan-480p", _call((1, 16, 21, 60, 104))),
    Case("wan-720p-bf16", _call((1, 16, 21, 90, 160), latent=torch.bfloat16)),
    Case("wan-480p-unguided", _call((1, 16, 21, 60, 104), guided=False)),
]
