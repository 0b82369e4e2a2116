"""Root-mean-square normalisation over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import check_last_dim_contiguous, check_same_device, check_tensor
from ._checks import check_vector


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """Divides each row by its root mean square.

        y = x * rsqrt(mean(x², -1) + eps) * weight

    Args:
        x: one to five dimensions ``[..., D]``, bf16/fp16/fp32 (fp64 by the reference), last dim contiguous, the
            leading dims with any strides (a head slice of a packed projection, a permuted view).
        weight: ``[D]``, fp32 or the dtype of ``x``, or None: 1.
        eps: added to the mean square, in units of x².
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        Shape of ``x``, contiguous, dtype of ``x``; computed in fp32 with one rounding at the end.
    Raises:
        ShapeError, DTypeError, DeviceError: names the argument, what was expected, what came.
        UnsupportedError: this implementation cannot be had here; names the remedy.
    Supports: sm_80+, gfx942+, CPU | fwd, bwd | fullgraph, CUDA graphs, dynamic leading dims.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, eq. 4.
    """
    op = "rms_norm"
    check_tensor(op, "x", x, ndim=(1, 2, 3, 4, 5))
    check_vector(op, x.shape[-1], weight=weight)
    check_last_dim_contiguous(op, x=x, weight=weight)
    check_same_device(op, x=x, weight=weight)
    return torch.ops.pyvideo.rms_norm(x, weight, eps, impl)
