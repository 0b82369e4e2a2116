"""Oracle of group_norm_silu and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up


def nearest_index(size: int, source: int, device: torch.device) -> Tensor:
    """Where ``F.interpolate(mode="nearest")`` reads ``size`` places among ``source``: in float32, as it does."""
    if size == source:
        return torch.arange(size, device=device)
    at = (torch.arange(size, device=device, dtype=torch.float32) * (source / size)).floor()
    return at.to(torch.int64).clamp_max(source - 1)


def nearest_frames(frames: int, source: int, device: torch.device) -> Tensor:
    """The same for frames: the first stands apart where there is an odd number of several."""
    if frames > 1 and frames % 2 == 1:
        rest = nearest_index(frames - 1, source - 1, device) + 1
        return torch.cat([torch.zeros(1, dtype=rest.dtype, device=device), rest])
    return nearest_index(frames, source, device)


def upsample(z: Tensor, like: Tensor) -> Tensor:
    """``z [B, Tz, Hz, Wz, C]`` at the pixels of ``like [B, T, H, W, C]``, nearest neighbour."""
    _, t, h, w, _ = like.shape
    z = z.index_select(1, nearest_frames(t, z.shape[1], z.device))
    z = z.index_select(2, nearest_index(h, z.shape[2], z.device))
    return z.index_select(3, nearest_index(w, z.shape[3], z.device))


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    per_frame: bool,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias by group, then * scale + shift, SiLU; rounded once."""
    if x.numel() == 0:
        return x.new_empty(x.shape)
    dtype = compute_dtype(x)
    c = x.shape[-1]
    rows = x.shape[0] * (x.shape[1] if per_frame else 1)
    xf = up(x, dtype).reshape(rows, -1, groups, c // groups)
    variance, mean = torch.var_mean(xf, (1, 3), correction=0, keepdim=True)
    y = ((xf - mean) * (variance + eps).rsqrt()).reshape(x.shape)
    if weight is not None:
        y = y * up(weight, dtype)
    if bias is not None:
        y = y + up(bias, dtype)
    if scale is not None:
        y = y * upsample(up(scale, dtype), x)
    if shift is not None:
        y = y + upsample(up(shift, dtype), x)
    if silu:
        y = torch.nn.functional.silu(y)
    return y.to(x.dtype).contiguous()


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Clips, frames, tokens; 1 to 8 groups; odd sizes; a large mean; slices; low-resolution scale and shift."""
    g = generator()

    def case(
        x: Tensor,
        groups: int,
        z: tuple[int, int, int] | None = None,
        silu: bool = True,
        per_frame: bool = False,
        affine: bool = True,
        wide: bool = False,
        eps: float = 1e-6,
    ) -> dict[str, Any]:
        kind = torch.float32 if wide and dtype != torch.float64 else dtype
        b, c = x.shape[0], x.shape[-1]
        return {
            "x": x,
            "weight": randn(c, dtype=kind, g=g, mean=1.0, scale=0.3) if affine else None,
            "bias": randn(c, dtype=kind, g=g, scale=0.3) if affine else None,
            "scale": None if z is None else randn(b, *z, c, dtype=dtype, g=g, mean=1.0, scale=0.5),
            "shift": None if z is None else randn(b, *z, c, dtype=dtype, g=g, scale=0.5),
            "groups": groups,
            "eps": eps,
            "silu": silu,
            "per_frame": per_frame,
        }

    yield case(randn(2, 2, 5, 5, 32, dtype=dtype, g=g), 8)
    # Each frame by itself, cut from a longer clip; the mean is many times the deviation.
    yield case(randn(2, 3, 3, 3, 24, dtype=dtype, g=g, mean=20.0)[:, 1:], 2, per_frame=True, wide=True)
    # An odd number of frames, whose first stands apart, and an even one; sizes that do not divide.
    yield case(randn(1, 5, 4, 6, 32, dtype=dtype, g=g), 4, (3, 2, 3))
    yield case(randn(2, 2, 3, 5, 12, dtype=dtype, g=g), 3, (1, 2, 3), silu=False, affine=False)
    # Tokens of a wider tensor; a group of one channel; one group of an odd width.
    yield case(randn(2, 7, 24, dtype=dtype, g=g)[..., :5], 5, silu=False)
    yield case(randn(1, 37, 3, dtype=dtype, g=g), 1, eps=1e-2)
