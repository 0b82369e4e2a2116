"""Channel RMS norm of a channels-last tensor and SiLU in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import check_last_dim_contiguous, check_same_device, check_tensor, refuse_grad
from ._checks import check_vector


def rms_norm_silu(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-12,
    silu: bool = True,
    impl: str = "auto",
) -> Tensor:
    """L2 normalisation over the channels, scaled by sqrt(C) and the weight, then SiLU.

        y = silu(x / max(||x||₂, eps) * sqrt(C) * weight)

    Args:
        x: ``[..., C]`` channels-last, 1 to 5 dimensions, bf16/fp16/fp32 (fp64 by the reference), last dim contiguous,
            any other strides. ``clip.permute(0, 2, 3, 4, 1)`` of a channels_last_3d clip is such a view.
        weight: ``[C]``, fp32 or the dtype of ``x`` (Wan's ``gamma``).
        eps: smallest norm that is divided by, in units of x (not added, and not of x²).
        silu: False gives the norm alone.
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        ``[..., C]``, contiguous, dtype of ``x``; computed in fp32 with one rounding at the end.
    Raises:
        ShapeError, DTypeError, DeviceError: names the argument, what was expected, what came.
        UnsupportedError: an input requires grad (no backward), or this implementation cannot be had here.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic leading dims.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467; Wan Team, "Wan: Open and
        Advanced Large-Scale Video Generative Models", arXiv:2503.20314, sec. 4.1 (in place of GroupNorm in the VAE).
    """
    op = "rms_norm_silu"
    check_tensor(op, "x", x, ndim=(1, 2, 3, 4, 5))
    check_tensor(op, "weight", weight, ndim=1)
    check_vector(op, x.shape[-1], weight=weight)
    check_last_dim_contiguous(op, x=x, weight=weight)
    check_same_device(op, x=x, weight=weight)
    refuse_grad(op, x=x, weight=weight)
    return torch.ops.pyvideo.rms_norm_silu(x, weight, eps, silu, impl)
