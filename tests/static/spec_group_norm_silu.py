"""Launches of group_norm_silu at the shapes of HunyuanVideo's and CogVideoX's decoders."""

import torch

from pyvideo_kernels.kernels.group_norm_silu import group_norm_silu
from pyvideo_kernels.testing.static import Case, meta


def _call(shape, latent=None, per_frame=False, dtype=torch.bfloat16, first=0, affine=True):
    def call():
        c = shape[-1]
        x = meta(shape, dtype)[:, first:]
        weight, bias = (meta((c,), dtype) if affine else None for _ in range(2))
        scale, shift = (None if latent is None else meta((shape[0], *latent, c), dtype) for _ in range(2))
        group_norm_silu(x, weight, bias, scale, shift, 32, 1e-6, True, per_frame)

    return call


CASES = [
    Case("hunyuan-tile-128", _call((1, 17, 256, 256, 128))),
    Case("hunyuan-512", _call((1, 5, 32, 32, 512))),
    # Odd frames of a clip of two batches: the first latent frame stands apart.
    Case("cogvideox-spatial-128", _call((1, 9, 480, 720, 128), latent=(3, 60, 90))),
    # Frames of a longer clip, three channels a group, fp32.
    Case(
        "frames-96-float32",
        _call((2, 4, 60, 104, 96), per_frame=True, first=1, dtype=torch.float32, affine=False),
        archs=("sm_80", "sm_90", "sm_120", "gfx942"),
    ),
]
