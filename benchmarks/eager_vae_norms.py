"""The VAEs' own norms, for the eager side of the benchmarks. Clips are ``[B, C, T, H, W]``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """HunyuanVideo's; with ``scale`` and ``shift`` CogVideoX's, less its 1x1 convolutions of the latent."""
    y = F.group_norm(x, groups, weight, bias, 1e-6)
    if scale is not None and shift is not None:
        y = y * _upsample(scale, x) + _upsample(shift, x)
    return F.silu(y).permute(0, 2, 3, 4, 1)


def _upsample(z: Tensor, like: Tensor) -> Tensor:
    t, h, w = like.shape[2:]
    if t > 1 and t % 2 == 1:
        first, rest = F.interpolate(z[:, :, :1], size=(1, h, w)), F.interpolate(z[:, :, 1:], size=(t - 1, h, w))
        return torch.cat([first, rest], 2)
    return F.interpolate(z, size=(t, h, w))


def pixel_norm_silu(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """LTX's: diffusers' RMSNorm along the last dimension, moved there and back."""
    y = x.movedim(1, -1)
    y = (y * torch.rsqrt(y.float().pow(2).mean(-1, keepdim=True) + 1e-8)).to(x.dtype).movedim(-1, 1)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None, None]) + shift[:, :, None, None, None]
    return F.silu(y).permute(0, 2, 3, 4, 1)
