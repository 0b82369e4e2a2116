"""A linear layer and GELU, as the first half of a transformer's feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import (
    DTypeError,
    bad_option,
    bad_shape,
    check_last_dim_contiguous,
    check_same_device,
    check_tensor,
    describe,
)
from ..reference.linear_gelu import APPROXIMATIONS
from ._checks import check_vector


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh", impl: str = "auto"
) -> Tensor:
    """A linear layer whose result goes through GELU before it is written.

        y = gelu(x @ weightᵀ + bias)

        ``tanh``:  gelu(u) = u / 2 * (1 + tanh(√(2/π) (u + 0.044715 u³)))
        ``none``:  gelu(u) = u / 2 * (1 + erf(u / √2))

    Args:
        x: one to five dimensions ``[..., K]``, bf16/fp16/fp32 (fp64 by the reference), last dim contiguous, the
            leading dims with any strides.
        weight: ``[N, K]`` as a Linear has it, dtype of ``x``, last dim contiguous.
        bias: ``[N]`` or None.
        approximate: ``tanh`` or ``none``, as torch's GELU.
        impl: ``auto``, ``reference``, ``triton``, ``cublas`` or ``cpu``; an explicit choice never falls back.
    Returns:
        ``[..., N]``, contiguous, dtype of ``x``; sum and GELU in fp32, one rounding at the end (the two layers apart
        round between them too).
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: this implementation cannot be had here; names the remedy.
    Supports: sm_80+, gfx942+, CPU | fwd, bwd | fullgraph, CUDA graphs, dynamic leading dims.
    Numerics: error ≤ 2 × eager's own against float64; fp32 by cuBLAS or oneDNN follows torch's switches for fp32
        products (TF32, bf16), as a Linear does. Deterministic: yes.
    Source: Hendrycks & Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415, sec. 2.
    """
    op = "linear_gelu"
    check_tensor(op, "x", x, ndim=(1, 2, 3, 4, 5))
    check_tensor(op, "weight", weight, ndim=2)
    columns = x.shape[-1]
    if columns < 1:
        bad_shape(op, "x", "[..., K] with K >= 1", x)
    if weight.shape[1] != columns:
        bad_shape(op, "weight", f"[N, {columns}] for `x` {list(x.shape)}", weight)
    if weight.dtype != x.dtype:
        raise DTypeError(f"{op}: `weight` must be {x.dtype} like `x`; got {describe(weight)}")
    check_vector(op, weight.shape[0], bias=bias)
    if approximate not in APPROXIMATIONS:
        bad_option(op, "approximate", f"one of {', '.join(APPROXIMATIONS)}", approximate)
    check_last_dim_contiguous(op, x=x, weight=weight, bias=bias)
    check_same_device(op, x=x, weight=weight, bias=bias)
    out: Tensor = torch.ops.pyvideo.linear_gelu(x, weight, bias, approximate, impl)
    return out
