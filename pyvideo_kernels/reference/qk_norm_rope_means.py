"""Oracle of qk_norm_rope_means: the two ops that it is; and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import block_mean as means
from . import generator, randn
from . import qk_norm_rope as prologue


def qk_norm_rope_means(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    norm_type: str,
    layout: str,
    grid: Sequence[int],
    tile: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`qk_norm_rope`, then `block_mean` of what it gave, rounded as it is stored."""
    vectors = (q_weight, k_weight, q_bias, k_bias, cos, sin)
    q, k = prologue.qk_norm_rope(q, k, *vectors, norm, norm_type, layout, 0, -1, eps)
    return q, k, means.block_mean(q, grid, tile), means.block_mean(k, grid, tile)


def summed(*args: Any) -> dict[int, Tensor]:
    """√terms Σ|x| / n of each mean."""
    *rest, grid, tile, eps = args
    inputs = [*rest, 0, -1, eps]
    rotated = prologue.qk_norm_rope(*inputs)
    return {2 + i: means.summed(x, grid, tile)[0] for i, x in enumerate(rotated)}


def samples(dtype: torch.dtype, head_dim: int | None = None) -> Iterator[dict[str, Any]]:
    """Ragged tiles in each family's use: packed QKV, grouped heads of any size, layer norm with bias, tables a head.

    ``head_dim``: that of all samples (an odd one leaves those without rotation); None: each has its own.
    """
    for kwargs in _samples(dtype, head_dim):
        if kwargs["cos"] is None or kwargs["q"].shape[-1] % 2 == 0:
            yield kwargs


def _samples(dtype: torch.dtype, head_dim: int | None) -> Iterator[dict[str, Any]]:
    g = generator()
    f32 = torch.float64 if dtype == torch.float64 else torch.float32

    def table(*shape: int, layout: str = "interleaved") -> dict[str, Any]:
        angle = torch.rand(*shape[:-1], shape[-1] // 2, generator=g, dtype=torch.float64) * 6.0
        angle = angle.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat((angle, angle), -1)
        return {"cos": angle.cos().to(f32), "sin": angle.sin().to(f32), "layout": layout}

    def vectors(n: int, m: int, *kinds: str) -> dict[str, Tensor]:
        mean = {"weight": 1.0, "bias": 0.0}
        return {f"{name}_{kind}": randn(size, dtype=dtype, g=g, scale=0.3, mean=mean[kind])
                for kind in kinds for name, size in (("q", n), ("k", m))}  # fmt: skip

    def dim(own: int) -> int:
        return own if head_dim is None else head_dim

    plain: dict[str, Any] = {
        **dict.fromkeys(("q_weight", "k_weight", "q_bias", "k_bias", "cos", "sin")),
        "norm": "across_heads",
        "norm_type": "rms",
        "layout": "interleaved",
        "eps": 1e-6,
    }
    # Wan: q and k are views of one packed projection, one table for all; tiles cut in time and width.
    d = dim(16)
    qkv = randn(2, 3 * 3, 3, 3, d, dtype=dtype, g=g, mean=0.5)
    yield {**plain, "q": qkv[:, :, 0], "k": qkv[:, :, 1], **vectors(3 * d, 3 * d, "weight"), **table(1, 9, 1, d),
           "grid": (3, 1, 3), "tile": (2, 1, 2)}  # fmt: skip
    # Grouped heads, one statistic a head, rotate-half tables, a head_dim that is no power of two; whole tiles.
    d = dim(12)
    q, k = randn(1, 4, 12, d, dtype=dtype, g=g), randn(1, 4, 3, d, dtype=dtype, g=g)
    yield {**plain, "q": q, "k": k, "norm": "per_head", **vectors(d, d, "weight"), **table(4, d, layout="half"),
           "grid": (2, 1, 2), "tile": (1, 1, 2)}  # fmt: skip
    # Affine layer norm a head, heads before tokens in memory, tables a head; runs of a flat sequence.
    d = dim(8)
    q, k = (randn(2, 2, 5, d, dtype=dtype, g=g, mean=2.0).transpose(1, 2) for _ in range(2))
    yield {**plain, "q": q, "k": k, "norm": "per_head", "norm_type": "layer", **vectors(d, d, "weight", "bias"),
           **table(2, 5, 2, d), "grid": (1, 1, 5), "tile": (1, 1, 4)}  # fmt: skip
    # No rotation and no weights; one token.
    d = dim(6)
    q, k = (randn(3, 1, 3, d, dtype=dtype, g=g, mean=1.0) for _ in range(2))
    yield {**plain, "q": q, "k": k, "grid": (1, 1, 1), "tile": (4, 4, 4)}
    # Rotation alone; tiles cut in height, sides that are no powers of two.
    q, k = (randn(1, 6, 1, d, dtype=dtype, g=g, mean=1.0) for _ in range(2))
    yield {**plain, "q": q, "k": k, "norm": "none", **table(1, 6, 1, d), "grid": (1, 3, 2), "tile": (1, 2, 3)}
