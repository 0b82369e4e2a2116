"""Gated residual addition, then LayerNorm and modulation of the result, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import check_last_dim_contiguous, check_same_device
from ._checks import check_modulation, check_vector
from .gate_residual import check_residual


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Adds a gated branch to the residual stream and normalises it for the next branch, reading each input once.

        x_new  = x + y * gate                                                     (rounded)
        normed = (layer_norm(x_new, eps) * weight + bias) * (1 + scale) + shift

    Args:
        x: residual stream ``[B, S, D]``, bf16/fp16/fp32 (fp64 by the reference), last dim contiguous.
        y: branch output ``[B, S, D]``, any of these dtypes, last dim contiguous, its own strides.
        gate, scale, shift: ``[B, 1, D]`` per batch or ``[B, S, D]`` per token, fp32 or the dtype of ``x``;
            None: 1, 0 and 0.
        weight, bias: ``[D]``, or None: 1 and 0.
        eps: added to the variance, in units of x².
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        ``(x_new, normed)``, each ``[B, S, D]``, contiguous, dtype of ``x``. The norm reads ``x_new`` as rounded,
        like a model that stores it; everything else is fp32 with one rounding per output.
    Raises:
        ShapeError, DTypeError, DeviceError: names the argument, what was expected, what came.
        UnsupportedError: this implementation cannot be had here; names the remedy.
    Supports: sm_80+, gfx942+, CPU | fwd, bwd | fullgraph, CUDA graphs, dynamic S.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748, sec. 3.2 (adaLN-Zero).
    """
    op = "gate_residual_norm_modulate"
    check_residual(op, x, y, gate)
    check_modulation(op, x, scale=scale, shift=shift)
    check_vector(op, x.shape[-1], weight=weight, bias=bias)
    tensors = {"x": x, "y": y, "gate": gate, "scale": scale, "shift": shift, "weight": weight, "bias": bias}
    check_last_dim_contiguous(op, **tensors)
    check_same_device(op, **tensors)
    return torch.ops.pyvideo.gate_residual_norm_modulate(x, y, gate, scale, shift, weight, bias, eps, impl)
