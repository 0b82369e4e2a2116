"""LayerNorm and adaLN modulation in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import check_last_dim_contiguous, check_same_device, check_tensor
from ._checks import check_modulation, check_vector


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Layer normalisation over the last dimension, then affine, then adaptive modulation.

        y = ((x - mean(x)) * rsqrt(var(x) + eps) * weight + bias) * (1 + scale) + shift

    Args:
        x: ``[B, S, D]``, bf16/fp16/fp32 (fp64 by the reference), last dim contiguous, any other strides.
        scale, shift: ``[B, 1, D]`` per batch or ``[B, S, D]`` per token, fp32 or the dtype of ``x``; None: 0.
        weight, bias: ``[D]``, or None: 1 and 0.
        eps: added to the variance, in units of x².
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        ``[B, S, D]``, contiguous, dtype of ``x``; computed in fp32 with one rounding at the end.
    Raises:
        ShapeError, DTypeError, DeviceError: names the argument, what was expected, what came.
        UnsupportedError: this implementation cannot be had here; names the remedy.
    Supports: sm_80+, gfx942+, CPU | fwd, bwd | fullgraph, CUDA graphs, dynamic S.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748, sec. 3.2 (adaLN).
    """
    op = "layer_norm_modulate"
    check_tensor(op, "x", x, ndim=3)
    check_modulation(op, x, scale=scale, shift=shift)
    check_vector(op, x.shape[-1], weight=weight, bias=bias)
    check_last_dim_contiguous(op, x=x, scale=scale, shift=shift, weight=weight, bias=bias)
    check_same_device(op, x=x, scale=scale, shift=shift, weight=weight, bias=bias)
    return torch.ops.pyvideo.layer_norm_modulate(x, scale, shift, weight, bias, eps, impl)
