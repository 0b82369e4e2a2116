"""What one call of spacetime_attention has to compute and to move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ..errors import bad_option
from .spacetime_attention import check_windows

_OP = "spacetime_attention_cost"


@dataclass(frozen=True)
class Cost:
    """What a call needs, exactly, whatever kernel runs it.

    ``flops``: a multiply and an add are two; the products alone, not the softmax. ``bytes``: each input read once,
    each output written once. ``pairs``: (query, key) pairs that are seen, over batch and heads. ``sparsity``: the share
    of all pairs that is not.
    """

    flops: int
    bytes: int
    pairs: int
    sparsity: float


def spacetime_attention_cost(
    grid: Sequence[int],
    heads: int,
    head_dim: int,
    window: Sequence[int] | Sequence[Sequence[int]] | None = None,
    *,
    stride: Sequence[int] = (1, 1, 1),
    causal_time: bool = False,
    text_len: int = 0,
    batch: int = 1,
    itemsize: int = 2,
    kv_heads: int | None = None,
    backward: bool = False,
) -> Cost:
    """FLOPs, bytes and visible pairs of `spacetime_attention`.

        pairs = batch · Σ_heads (Π_axes Σ_i |keys of i|  +  2 · T·H·W · text_len  +  text_len²)
        flops = 4 · head_dim · pairs forward,  10 · head_dim · pairs backward (five products, of which one is again)

    Args:
        grid, window, stride, causal_time, text_len: as of `spacetime_attention`; all the text counts as valid.
        heads, head_dim, batch: sizes of q.
        itemsize: bytes of an element of q, k, v and the result.
        kv_heads: heads of k and v; None: ``heads``.
        backward: the cost of dq, dk and dv, given the forward's output and lse, instead of the forward's.
    Returns:
        `Cost`: ``flops``, ``bytes``, ``pairs``, ``sparsity``.
    Raises:
        ValueOptionError: names the argument, what was expected, what came.
    """
    sizes: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "batch": batch, "itemsize": itemsize}
    for name, value in {**sizes, "kv_heads": 1 if kv_heads is None else kv_heads}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            bad_option(_OP, name, "an integer of at least 1", value)
    if isinstance(text_len, bool) or not isinstance(text_len, int) or text_len < 0:
        bad_option(_OP, "text_len", "an integer of at least 0", text_len)
    sides, step, flat = check_windows(_OP, grid, window, stride, heads)
    rows = [sides] if flat is None else [flat[i : i + 3] for i in range(0, len(flat), 3)]
    video, tokens = prod(sides), prod(sides) + text_len
    seen = [
        prod(
            _axis_pairs(length, size, each, causal_time and axis == 0)
            for axis, (length, size, each) in enumerate(zip(sides, row, step, strict=True))
        )
        for row in rows
    ]
    seen *= heads // len(seen)
    pairs = batch * (sum(seen) + heads * (2 * video + text_len) * text_len)
    every = batch * heads * tokens**2
    q, kv = (batch * tokens * n * head_dim * itemsize for n in (heads, kv_heads or heads))
    # Backward: q, k, v, the result, its gradient and lse are read, three gradients written.
    moved = 4 * q + 4 * kv + 4 * batch * heads * tokens if backward else 2 * q + 2 * kv
    return Cost((10 if backward else 4) * head_dim * pairs, moved, pairs, 1 - pairs / every if every else 0.0)


def _axis_pairs(length: int, window: int, stride: int, causal: bool) -> int:
    """Pairs seen along one axis."""
    size = min(window, length)
    if not causal:
        return length * size
    # Keys up to the query's own, from the start of the window that its group of ``stride`` shares.
    leaders = (min(i // stride * stride + stride, length) - 1 for i in range(length))
    return sum(i - max(leader - size + 1, 0) + 1 for i, leader in enumerate(leaders))
