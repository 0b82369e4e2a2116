"""Group norm over a clip or a frame, an optional low-resolution scale and shift, and SiLU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import (
    bad_option,
    bad_shape,
    check_last_dim_contiguous,
    check_same_device,
    check_tensor,
    refuse_grad,
)
from ._checks import check_vector

_OP = "group_norm_silu"


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    groups: int = 32,
    eps: float = 1e-6,
    silu: bool = True,
    per_frame: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Group normalisation of a channels-last clip, spatially conditioned where asked, then SiLU.

        n = (x - mean) / sqrt(var + eps) * weight + bias      mean, var: of the group's channels at all pixels
        y = silu(n * scale + shift)                           scale, shift: those of the nearest latent

    Args:
        x: ``[B, ..., C]`` channels-last, 3 to 5 dimensions (``[B, S, C]``, ``[B, H, W, C]``, ``[B, T, H, W, C]``),
            bf16/fp16/fp32 (fp64 by the reference), last dim contiguous, any other strides.
            ``clip.permute(0, 2, 3, 4, 1)`` of a channels_last_3d clip is such a view.
        weight, bias: ``[C]``, fp32 or the dtype of ``x``; None: 1 and 0.
        groups: number of groups, each of ``C / groups`` neighbouring channels.
        eps: added to the variance, in units of x².
        silu: False gives the norm alone.
        per_frame: True takes the statistics of each ``[H, W, C]`` of a 5-D ``x`` by itself.
        scale, shift: ``[B, Tz, Hz, Wz, C]`` for a 5-D ``x``, at any resolution, read at the nearest latent as
            ``F.interpolate(mode="nearest")`` does; where T is odd and > 1 the first frame reads the first latent
            frame and the rest the rest (CogVideoX). A 1x1 convolution commutes with this: apply it to the latent.
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        Shape of ``x``, contiguous, dtype of ``x``; computed in fp32 with one rounding at the end.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: an input requires grad (no backward), or this implementation cannot be had here.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic sizes.
    Numerics: error ≤ 2 × eager's own against float64; shifted two-level statistics. Deterministic: yes.
    Source: Wu & He, "Group Normalization", arXiv:1803.08494; Zheng et al., "MoVQ: Modulating Quantized Vectors for
        High-Fidelity Image Generation", arXiv:2209.09002 (the spatially conditioned norm).
    """
    check_tensor(_OP, "x", x, ndim=(3, 4, 5))
    c = x.shape[-1]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or c % groups != 0:
        bad_option(_OP, "groups", f"a divisor of the {c} channels of `x`", groups)
    if per_frame and x.dim() != 5:
        bad_shape(_OP, "x", "[B, T, H, W, C] for `per_frame`", x)
    check_vector(_OP, c, weight=weight, bias=bias)
    _check_latent(x, scale=scale, shift=shift)
    check_last_dim_contiguous(_OP, x=x, weight=weight, bias=bias, scale=scale, shift=shift)
    check_same_device(_OP, x=x, weight=weight, bias=bias, scale=scale, shift=shift)
    refuse_grad(_OP, x=x, weight=weight, bias=bias, scale=scale, shift=shift)
    return torch.ops.pyvideo.group_norm_silu(x, weight, bias, scale, shift, groups, eps, silu, per_frame, impl)


def _check_latent(x: Tensor, **tensors: Tensor | None) -> None:
    """Each given tensor is ``[B, Tz, Hz, Wz, C]`` for ``x [B, T, H, W, C]``, and all are of one resolution."""
    first: tuple[str, Tensor] | None = None
    for name, z in tensors.items():
        if z is None:
            continue
        check_tensor(_OP, name, z, ndim=5)
        if x.dim() != 5:
            bad_shape(_OP, "x", f"[B, T, H, W, C] for `{name}`", x)
        apart = x.shape[1] > 1 and x.shape[1] % 2 == 1
        if z.shape[0] != x.shape[0] or z.shape[-1] != x.shape[-1] or min(z.shape[1:4]) < 1 or z.shape[1] < 1 + apart:
            least = "Tz >= 2, of which the first is the first frame's" if apart else "Tz >= 1"
            bad_shape(_OP, name, f"[{x.shape[0]}, Tz, Hz, Wz, {x.shape[-1]}] with {least}, for `x` {list(x.shape)}", z)
        if first is not None and z.shape != first[1].shape:
            bad_shape(_OP, name, f"{list(first[1].shape)} like `{first[0]}`", z)
        first = (name, z)
