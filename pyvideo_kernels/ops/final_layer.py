"""The last layer of a video transformer: norm, modulation, projection and unpatchify in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import DTypeError, bad_shape, check_last_dim_contiguous, check_same_device, check_tensor
from ..reference.final_layer import unpatchify
from ._checks import check_modulation, check_patch, check_vector
from .patch_embed3d import check_linear


def final_layer(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    patch: Sequence[int],
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Normalise and modulate the tokens, project each to its patch of pixels, and put the patches in place.

        m = cast((x - mean(x)) * rsqrt(var(x) + eps) * (1 + scale) + shift)
        out[b, c, t*pt + i, h*ph + j, w*pw + l] = (m @ weightᵀ + bias)[b, (t*H + h)*W + w, ((i*ph + j)*pw + l)*C + c]

    Args:
        x: ``[B, S, D]``, bf16/fp16/fp32 (fp64 by the reference), last dim contiguous, S = T*H*W of ``grid``.
        scale, shift: ``[B, 1, D]`` per batch or ``[B, S, D]`` per token, fp32 or the dtype of ``x``.
        weight: ``[C*pt*ph*pw, D]``, channel last inside a patch (Wan's ``proj_out``); dtype of ``x``.
        bias: ``[C*pt*ph*pw]``, or None.
        grid: (T, H, W), tokens an axis.
        patch: (pt, ph, pw), pixels a token.
        eps: added to the variance, in units of x².
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        ``[B, C, T*pt, H*ph, W*pw]``, contiguous, dtype of ``x``; norm and modulation in fp32, rounded to the dtype of
        ``x`` once before the projection as the models do, accumulated in fp32, rounded once more.
    Raises:
        ShapeError, DTypeError, DeviceError: names the argument, what was expected, what came.
        UnsupportedError: this implementation cannot be had here; names the remedy.
    Supports: sm_80+, gfx942+, CPU | fwd, bwd | fullgraph, CUDA graphs, dynamic grid.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748, sec. 3.2 (decoder).
    """
    op = "final_layer"
    check_tensor(op, "x", x, ndim=3)
    check_tensor(op, "scale", scale)
    check_tensor(op, "shift", shift)
    check_modulation(op, x, scale=scale, shift=shift)
    check_tensor(op, "weight", weight, ndim=2)
    sizes = check_patch(op, grid, "grid", least=0)
    pt, ph, pw = check_patch(op, patch)
    if sizes[0] * sizes[1] * sizes[2] != x.shape[1]:
        bad_shape(op, "x", f"[B, {sizes[0]}*{sizes[1]}*{sizes[2]}, D] for `grid` {sizes}", x)
    if weight.shape[1] != x.shape[2] or weight.shape[0] % (pt * ph * pw):
        bad_shape(op, "weight", f"[C*{pt * ph * pw}, {x.shape[2]}] for `patch` ({pt}, {ph}, {pw})", weight)
    if weight.dtype != x.dtype:
        raise DTypeError(f"{op}: `weight` must be {x.dtype} like `x`; got {weight.dtype}")
    check_vector(op, weight.shape[0], bias=bias)
    check_last_dim_contiguous(op, x=x, scale=scale, shift=shift, weight=weight, bias=bias)
    check_same_device(op, x=x, scale=scale, shift=shift, weight=weight, bias=bias)
    out: Tensor = torch.ops.pyvideo.final_layer(x, scale, shift, weight, bias, sizes, [pt, ph, pw], eps, impl)
    return out


def final_layer_cpu(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    patch: Sequence[int],
    eps: float,
) -> Tensor:
    """``impl="cpu"``: the extension's norm and modulation, then one BLAS product in the inputs' dtype."""
    from .. import _native

    check_linear("final_layer", x, bias)
    modulated = _native.layer_norm_modulate(x, scale, shift, None, None, eps)
    return unpatchify(torch.nn.functional.linear(modulated, weight, bias), grid, patch)
