"""Oracle of gate_residual, its gradient, and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, reduce_to, up


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + y * gate (gate None: 1), one rounding to the dtype of ``x``."""
    dtype = compute_dtype(x)
    branch = up(y, dtype)
    if gate is not None:
        branch = branch * up(gate, dtype)
    return (up(x, dtype) + branch).to(x.dtype).contiguous()


def gate_residual_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (x, y, gate), those in ``needs``."""
    (grad,) = grads
    assert grad is not None
    dtype = compute_dtype(x)
    dout = up(grad, dtype)
    out: list[Tensor] = []
    if needs[0]:
        out.append(_fresh(dout, x))
    if needs[1]:
        dy = dout if gate is None else dout * up(gate, dtype)
        out.append(_fresh(dy, y))
    if needs[2] and gate is not None:
        out.append(reduce_to(dout * up(y, dtype), gate))
    return out


def _fresh(grad: Tensor, like: Tensor) -> Tensor:
    """``grad`` in the dtype of ``like``, in storage of its own: a custom op may not return one of its inputs."""
    return grad.to(like.dtype, copy=True, memory_format=torch.contiguous_format)


def samples(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Per-batch, per-token and no gate, odd widths, one token, strided rows, a gate cut from a packed table."""
    g = generator()
    f32 = torch.float32 if dtype != torch.float64 else dtype

    def pair(*shape: int) -> dict[str, Tensor]:
        return {name: randn(*shape, dtype=dtype, g=g) for name in ("x", "y")}

    yield {**pair(2, 5, 96), "gate": randn(2, 1, 96, dtype=f32, g=g)}
    yield {**pair(2, 3, 40), "gate": randn(2, 3, 40, dtype=dtype, g=g)}
    yield {**pair(1, 1, 131), "gate": None}
    wide = randn(2, 7, 200, dtype=dtype, g=g)
    table = randn(2, 6, 64, dtype=f32, g=g)
    yield {"x": wide[..., :64], "y": wide.transpose(0, 1)[:, :, 100:164].transpose(0, 1), "gate": table[:, 2:3]}
    yield {**pair(3, 2, 33), "gate": randn(1, 1, 33, dtype=f32, g=g)}
