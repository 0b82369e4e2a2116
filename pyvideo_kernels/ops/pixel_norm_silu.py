"""Channel RMS norm with an optional modulation by clip, and SiLU, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import bad_shape, check_last_dim_contiguous, check_same_device, check_tensor, refuse_grad
from ._checks import check_vector


def pixel_norm_silu(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-8,
    silu: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Root-mean-square normalisation of every pixel over its channels, modulated by clip, then SiLU.

        y = silu(x * rsqrt(mean(x², -1) + eps) * weight * (1 + scale) + shift)

    Args:
        x: ``[B, ..., C]`` channels-last, 2 to 5 dimensions, any C, bf16/fp16/fp32 (fp64 by the reference), last dim
            contiguous, any other strides. ``clip.permute(0, 2, 3, 4, 1)`` of a channels_last_3d clip is such a view.
        weight: ``[C]``, fp32 or the dtype of ``x``; None: 1.
        scale, shift: ``[B, C]`` or ``[1, C]``, fp32 or the dtype of ``x`` (LTX's timestep conditioning); None: 0.
        eps: added to the mean square, in units of x².
        silu: False stops before the activation.
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        Shape of ``x``, contiguous, dtype of ``x``; computed in fp32 with one rounding at the end.
    Raises:
        ShapeError, DTypeError, DeviceError: names the argument, what was expected, what came.
        UnsupportedError: an input requires grad (no backward), or this implementation cannot be had here.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic leading dims.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467; HaCohen et al., "LTX-Video:
        Realtime Video Latent Diffusion", arXiv:2501.00103 (the pixel norm and the denoising decoder).
    """
    op = "pixel_norm_silu"
    check_tensor(op, "x", x, ndim=(2, 3, 4, 5))
    b, c = x.shape[0], x.shape[-1]
    check_vector(op, c, weight=weight)
    for name, z in (("scale", scale), ("shift", shift)):
        if z is not None:
            check_tensor(op, name, z, ndim=2)
            if z.shape[1] != c or z.shape[0] not in (1, b):
                bad_shape(op, name, f"[{b}, {c}] or [1, {c}] for `x` {list(x.shape)}", z)
    check_last_dim_contiguous(op, x=x, weight=weight, scale=scale, shift=shift)
    check_same_device(op, x=x, weight=weight, scale=scale, shift=shift)
    refuse_grad(op, x=x, weight=weight, scale=scale, shift=shift)
    return torch.ops.pyvideo.pixel_norm_silu(x, weight, scale, shift, eps, silu, impl)
