"""Means over boxes of a (T, H, W) grid of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import bad_shape, check_last_dim_contiguous, check_tensor, refuse_grad
from ._checks import check_triple

_OP = "block_mean"


def block_mean(x: Tensor, *, grid: Sequence[int], tile: Sequence[int], impl: str = "auto") -> Tensor:
    """Mean of the tokens in each box of the grid, a head at a time.

        mean[n] = Σ_{i in box n} x[i] / |box n|

    Boxes lie in (T, H, W) order; those at the far edges of a ragged grid are cut, and divided by what they hold.

    Args:
        x: ``[B, T*H*W, heads, head_dim]``, bf16/fp16/fp32 (fp64 by the reference), tokens in (T, H, W) order; last dim
            contiguous, any other strides (a view of a packed QKV too).
        grid: tokens in (time, height, width).
        tile: tokens of a box along each; ``(1, 1, n)`` on the grid ``(1, 1, S)`` are runs of a flat sequence.
        impl: ``auto``, ``reference`` or ``triton``; an explicit choice never falls back.
    Returns:
        ``[B, heads, boxes, head_dim]`` fp32 (fp64 for fp64), contiguous.
    Raises:
        ShapeError, DTypeError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: ``x`` requires grad, or this implementation has not what is asked for.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic S and grid.
    Numerics: sums in fp32, in a fixed order; error ≤ 2 × eager's own against float64. Deterministic: yes.
    """
    check_tensor(_OP, "x", x, ndim=4)
    check_last_dim_contiguous(_OP, x=x)
    sizes = check_triple(_OP, "grid", grid, 1)
    sides = check_triple(_OP, "tile", tile, 1)
    if x.shape[1] != sizes[0] * sizes[1] * sizes[2]:
        bad_shape(_OP, "x", f"[B, T*H*W, heads, head_dim] for grid {sizes}", x)
    refuse_grad(_OP, x=x)
    out: Tensor = torch.ops.pyvideo.block_mean(x, sizes, sides, impl)
    return out
