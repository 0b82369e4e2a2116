"""Gated residual addition in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import bad_shape, check_last_dim_contiguous, check_same_device, check_tensor
from ._checks import check_modulation


def check_residual(op: str, x: Tensor, y: Tensor, gate: Tensor | None) -> None:
    """``x`` and ``y`` are ``[B, S, D]`` alike, ``gate`` broadcasts over them."""
    check_tensor(op, "x", x, ndim=3)
    check_tensor(op, "y", y, ndim=3)
    if y.shape != x.shape:
        bad_shape(op, "y", f"{list(x.shape)} like `x`", y)
    check_modulation(op, x, gate=gate)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Adds a branch to the residual stream, scaled by a gate.

        x_new = x + y * gate

    Args:
        x: residual stream ``[B, S, D]``, bf16/fp16/fp32 (fp64 by the reference), last dim contiguous.
        y: branch output ``[B, S, D]``, any of these dtypes, last dim contiguous, its own strides.
        gate: ``[B, 1, D]`` per batch or ``[B, S, D]`` per token, fp32 or the dtype of ``x``; None: 1.
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        ``[B, S, D]``, contiguous, dtype of ``x``; computed in fp32 with one rounding at the end.
    Raises:
        ShapeError, DTypeError, DeviceError: names the argument, what was expected, what came.
        UnsupportedError: this implementation cannot be had here; names the remedy.
    Supports: sm_80+, gfx942+, CPU | fwd, bwd | fullgraph, CUDA graphs, dynamic S.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748, sec. 3.2 (adaLN-Zero).
    """
    op = "gate_residual"
    check_residual(op, x, y, gate)
    check_last_dim_contiguous(op, x=x, y=y, gate=gate)
    check_same_device(op, x=x, y=y, gate=gate)
    return torch.ops.pyvideo.gate_residual(x, y, gate, impl)
