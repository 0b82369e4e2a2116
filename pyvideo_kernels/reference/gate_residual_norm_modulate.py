"""Oracle of gate_residual_norm_modulate, its gradient, and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, reduce_to, up
from .gate_residual import gate_residual
from .layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_backward


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x_new = x + y * gate, rounded; normed = layer_norm_modulate of the rounded x_new."""
    x_new = gate_residual(x, y, gate)
    return x_new, layer_norm_modulate(x_new, scale, shift, weight, bias, eps)


def gate_residual_norm_modulate_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (x, y, gate, scale, shift, weight, bias), those in ``needs``; x_new is recomputed."""
    grad_x_new, grad_normed = grads
    dtype = compute_dtype(x)
    dx_new = torch.zeros_like(x, dtype=dtype) if grad_x_new is None else up(grad_x_new, dtype)
    if grad_normed is None:
        grad_normed = torch.zeros_like(x)
    stream = any(needs[:3])
    # The rounded x_new in the compute dtype: its gradient then comes back unrounded and is added in full precision.
    x_new = up(gate_residual(x, y, gate), dtype)
    parts = layer_norm_modulate_backward(
        [up(grad_normed, dtype)], x_new, scale, shift, weight, bias, eps, [stream, *needs[3:]]
    )
    out: list[Tensor] = []
    if stream:
        dx_new = dx_new + parts.pop(0)
    if needs[0]:
        out.append(dx_new.to(x.dtype).contiguous())
    if needs[1]:
        dy = dx_new if gate is None else dx_new * up(gate, dtype)
        out.append(dy.to(y.dtype, copy=True, memory_format=torch.contiguous_format))
    if needs[2] and gate is not None:
        out.append(reduce_to(dx_new * up(y, dtype), gate))
    return out + parts


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every mix of gate, modulation and affine parameters a block uses, strided rows, one token, odd widths."""
    g = generator()
    f32 = torch.float32 if dtype != torch.float64 else dtype
    none: dict[str, Any] = dict.fromkeys(("gate", "scale", "shift", "weight", "bias"))

    def some(*shape: int, names: str = "gate scale shift", dtype: torch.dtype = f32) -> dict[str, Tensor]:
        return {name: randn(*shape, dtype=dtype, g=g, scale=0.5) for name in names.split()}

    def pair(*shape: int) -> dict[str, Tensor]:
        return {name: randn(*shape, dtype=dtype, g=g) for name in ("x", "y")}

    yield {**none, **pair(2, 5, 96), **some(2, 1, 96), "eps": 1e-6}
    yield {**none, **pair(2, 3, 40), **some(2, 3, 40, dtype=dtype), "eps": 1e-6}
    yield {**none, **pair(1, 1, 131), **some(131, names="weight bias"), "eps": 1e-5}
    wide = randn(2, 7, 200, dtype=dtype, g=g)
    table = randn(2, 6, 64, dtype=f32, g=g, scale=0.5)
    yield {
        **none,
        "x": wide[..., :64],
        "y": wide[..., 100:164],
        **{name: table[:, i : i + 1] for name, i in (("shift", 0), ("scale", 1), ("gate", 5))},
        "eps": 1e-6,
    }
    yield {**none, **pair(1, 4, 33), **some(1, 1, 33, names="gate"), **some(33, names="weight bias"), "eps": 1e-6}
