"""Query/key norm, rotary embedding and the means of the grid's tiles in one pass over q and k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import bad_shape, refuse_grad
from ._checks import check_triple
from .qk_norm_rope import _check

_OP = "qk_norm_rope_means"


def qk_norm_rope_means(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    grid: Sequence[int],
    tile: Sequence[int] = (4, 4, 4),
    norm: str = "across_heads",
    norm_type: str = "rms",
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    layout: str = "interleaved",
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`qk_norm_rope`, and `block_mean` of both results, in one pass: q and k are read once and written once.

        q', k' = qk_norm_rope(q, k)
        q_mean[n] = Σ_{i in tile n} q'[i] / |tile n|,   k_mean[n] likewise

    Args:
        q: ``[B, T*H*W, heads, head_dim]``, as for `qk_norm_rope`, tokens in (T, H, W) order.
        k: ``[B, T*H*W, kv_heads, head_dim]``.
        grid: tokens in (time, height, width); any, tiles at the far edges are cut.
        tile: tokens of a tile along each.
        q_weight, k_weight, cos, sin, norm, norm_type, q_bias, k_bias, layout, eps: as for `qk_norm_rope`; every token
            is rotated, where tables are given.
        impl: ``auto``, ``reference`` or ``triton``; an explicit choice never falls back.
    Returns:
        ``(q, k, q_mean, k_mean)``: as `qk_norm_rope`, and ``[B, heads, tiles, head_dim]`` fp32 (fp64 for fp64) for
        `video_sparse_attention`, means of the values that are stored.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: an argument requires grad, or this implementation has not what is asked for.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic S and grid.
    Numerics: as `qk_norm_rope`; sums in fp32, in a fixed order. Deterministic: yes.
    Source: as `qk_norm_rope`; the means: Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention",
        arXiv:2505.13389.
    """
    vectors = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    cos, sin, _, _ = _check(_OP, q, k, vectors, cos, sin, norm, norm_type, layout, None)
    sizes, sides = check_triple(_OP, "grid", grid, 1), check_triple(_OP, "tile", tile, 1)
    for name, x in (("q", q), ("k", k)):
        if x.shape[1] != sizes[0] * sizes[1] * sizes[2]:
            bad_shape(_OP, name, f"[B, T*H*W, heads, head_dim] for grid {sizes}", x)
    refuse_grad(_OP, q=q, k=k, cos=cos, sin=sin, **vectors)
    out: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.pyvideo.qk_norm_rope_means(
        q, k, *vectors.values(), cos, sin, norm, norm_type, layout, sizes, sides, eps, impl
    )
    return out
