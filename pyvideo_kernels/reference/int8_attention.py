"""Oracle of int8_attention, and of fp8_attention: attention over what the codes stand for; and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up
from . import spacetime_attention as native
from .quantize_qk import quantize_qk


def _expand(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype) * up(scale, dtype).transpose(1, 2).unsqueeze(-1)


def int8_attention(
    q8: Tensor,
    k8: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    lse_shift: Tensor | None,
    grid: Sequence[int],
    window: Sequence[int] | None,
    stride: Sequence[int],
    causal_time: bool,
    text_len: int,
    text_side: str,
    kv_lens: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The codes times their scales, through the oracle of spacetime_attention."""
    dtype = compute_dtype(v)
    out, lse = native.spacetime_attention(
        _expand(q8, q_scale, dtype), _expand(k8, k_scale, dtype), v, grid, window, stride, causal_time, text_len,
        text_side, kv_lens, scale, return_lse, "native",
    )  # fmt: skip
    if return_lse and lse_shift is not None:
        lse = lse + scale * up(lse_shift, dtype)
    return out.to(v.dtype), lse


def summed(
    q8: Tensor, k8: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, lse_shift: Tensor | None,
    grid: Sequence[int], window: Sequence[int] | None, stride: Sequence[int], causal_time: bool, text_len: int,
    text_side: str, kv_lens: Tensor | None, scale: float, return_lse: bool,
) -> dict[int, Tensor]:  # fmt: skip
    """√terms Σ|a b| of the sums of products behind each element: as for spacetime_attention."""
    dtype = compute_dtype(v)
    return native.summed(
        _expand(q8, q_scale, dtype), _expand(k8, k_scale, dtype), v, grid, window, stride, causal_time, text_len,
        text_side, kv_lens, scale, return_lse, "native",
    )  # fmt: skip


def samples(dtype: torch.dtype, head_dim: int | None = None, precision: str = "int8") -> Iterator[dict[str, Any]]:
    """Dense and windowed, ragged grids, one token, odd head dims, grouped heads, views, text on both sides.

    ``head_dim``: that of all samples; None: each has its own.
    """
    g = generator()

    def dim(own: int) -> int:
        return own if head_dim is None else head_dim

    def draw(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return randn(*shape, dtype=dtype, g=g, scale=scale, mean=mean)

    plain: dict[str, Any] = {
        "window": None, "stride": (1, 1, 1), "causal_time": False, "text_len": 0, "text_side": "suffix",
        "kv_lens": None, "return_lse": True,
    }  # fmt: skip

    def operands(
        b: int, s: int, heads: int, groups: int, d: int, scale: float = 1.0, mean: float = 0.0
    ) -> dict[str, Any]:
        q, k = draw(b, s, heads, d, scale=scale), draw(b, s, groups, d, mean=mean)
        names = ("q8", "k8", "q_scale", "k_scale", "lse_shift")
        quantized = dict(zip(names, quantize_qk(q, k, 0, s, precision), strict=True))
        return {**quantized, "v": draw(b, s, groups, d), "scale": d**-0.5}

    def apart(x: Tensor) -> Tensor:
        """The same numbers, as every other token of a longer tensor."""
        return torch.stack((x, torch.ones_like(x)), 2)[:, :, 0]

    yield {**plain, **operands(1, 1, 1, 1, dim(64)), "grid": (1, 1, 1), "return_lse": False, "lse_shift": None}
    # Windows: one for all heads, with strides and text; one a head, in causal time.
    windowed: dict[str, Any] = {"window": (3, 2, 3), "stride": (1, 2, 2), "text_len": 3, "kv_lens": torch.tensor([2])}
    yield {**plain, **operands(1, 48, 2, 1, dim(64), mean=1.0), "grid": (3, 3, 5), **windowed}
    windowed = {"window": (2, 2, 3, 1, 4, 2), "causal_time": True, "text_len": 2, "text_side": "prefix"}
    yield {**plain, **operands(1, 50, 2, 2, dim(32)), "grid": (4, 4, 3), **windowed}
    views = operands(2, 42, 3, 3, dim(40))
    views |= {name: apart(views[name]) for name in ("q8", "k8", "v")}
    yield {**plain, **views, "grid": (2, 3, 7)}
    # Grouped heads, keys off zero, text after the video with one row that has none; and before it.
    lens = torch.tensor([5, 0], dtype=torch.int32)
    text: dict[str, Any] = {"text_len": 7, "kv_lens": lens}
    yield {**plain, **operands(2, 39, 4, 2, dim(64), mean=3.0), "grid": (1, 4, 8), **text}
    text = {"text_len": 37, "text_side": "prefix", "kv_lens": torch.tensor([33])}
    yield {**plain, **operands(1, 82, 1, 1, dim(128)), "grid": (1, 5, 9), **text}
    # Logits to about ±60.
    yield {**plain, **operands(1, 33, 1, 1, dim(96), scale=16.0), "grid": (3, 1, 11)}
    # Text alone, none of it valid in one row of the batch: zeros and -inf.
    nothing = {"text_len": 23, "kv_lens": torch.tensor([0, 17])}
    yield {**plain, **operands(2, 23, 1, 1, dim(64), scale=8.0), "grid": (0, 0, 0), **nothing}
