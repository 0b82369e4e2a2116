"""Boxes of the (T, H, W) grid: the tokens of one, the keys that a box of queries sees, and how boxes are addressed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# On the device ---------------------------------------------------------------------------------------------------


@triton.jit
def box_tokens(tile, text_tiles, tiles_h, tiles_w, t, h, w, video_start, text_start, text_len, BT: tl.constexpr,
               BH: tl.constexpr, BW: tl.constexpr):  # fmt: skip
    """Coordinates, validity and row (int64) of the tokens of a tile: ``text_tiles`` runs of text, then boxes of video.

    Returns ``is_text`` (of the tile), three coordinates, ``inside`` (the grid), ``valid`` (a token at all) and ``row``.
    """
    is_text = tile < text_tiles
    box = tl.maximum(tile - text_tiles, 0)
    m = tl.arange(0, BT * BH * BW)
    at_t = box // (tiles_h * tiles_w) * BT + m // (BH * BW)
    at_h = box // tiles_w % tiles_h * BH + m // BW % BH
    at_w = box % tiles_w * BW + m % BW
    inside = (at_t < t) & (at_h < h) & (at_w < w)
    line = tile * (BT * BH * BW) + m
    valid = tl.where(is_text, line < text_len, inside)
    row = tl.where(is_text, text_start + line, video_start + (at_t * h + at_h) * w + at_w)
    return is_text, at_t, at_h, at_w, inside, valid, row.to(tl.int64)


@triton.jit
def axis_window(at, length, window, stride, CAUSAL: tl.constexpr):
    """First and last key that a query at ``at`` sees along an axis (NATTEN's generalised neighbourhood)."""
    size = tl.minimum(window, length)
    if CAUSAL:
        leader = tl.minimum(at // stride * stride + stride - 1, length - 1)
        # A query past the edge of the grid is no query; its own place is no key either.
        return tl.maximum(leader - size + 1, 0), tl.minimum(at, length - 1)
    leader = tl.minimum(at // stride * stride + stride // 2, length - 1)
    first = tl.minimum(tl.maximum(leader, size // 2), length - 1 - (size // 2 + size % 2 - 1)) - size // 2
    return first, first + size - 1


@triton.jit
def axis_span(first, last, valid, everything, length):
    """Keys along an axis that some valid query of a box sees: first and one past the last."""
    low = tl.min(tl.where(valid, first, length), 0)
    high = tl.max(tl.where(valid, last, -1), 0) + 1
    return tl.where(everything, 0, low), tl.where(everything, length, high)


@triton.jit
def axis_bits(first, last, origin, everything, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """Which of ``BLOCK`` keys from ``origin`` on each query sees along an axis: a bit a key, from bit ``SHIFT`` on."""
    low = tl.minimum(tl.maximum(first - origin, 0), BLOCK)
    high = tl.minimum(tl.maximum(last + 1 - origin, 0), BLOCK)
    # Bits [low, high).
    some = tl.where(high > low, (1 << high) - (1 << low), 0)
    return tl.where(everything, (1 << BLOCK) - 1, some) << SHIFT


@triton.jit
def place_bits(n, BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """The three bits of `axis_bits` that key ``n`` of a box asks for: time lowest, then height, then width."""
    return (1 << (n // (BH * BW))) | (1 << (BT + n // BW % BH)) | (1 << (BT + BH + n % BW))


# On the host -----------------------------------------------------------------------------------------------------


def whole_grid(grid: Sequence[int]) -> tuple[int, int, int]:
    """``grid``, or an empty one that a kernel may divide by where it has no tokens."""
    t, h, w = grid
    return (t, h, w) if t * h * w else (0, 1, 1)


def stride_unit(*tensors: Tensor) -> int:
    """Elements, up to 16 bytes of them, that the strides of all these ``[B, S, heads, D]`` views are a multiple of.

    A head dim such as 40 is no multiple of 16, which is all that Triton looks at: kernels get strides in this unit
    and multiply, which tells it how wide a vector is aligned.
    """
    return math.gcd(16 // tensors[0].element_size(), *(step for x in tensors for step in x.stride()[:3]))


def addressable(x: Tensor) -> bool:
    """Whether TMA can read boxes of this ``[B, S, heads, D]`` view: 16-byte units, and heads side by side."""
    b, s, heads, d = x.shape
    size = x.element_size()
    if x.data_ptr() % 16 or d * size % 16 or (heads > 1 and x.stride(2) != d):
        return False
    return all(n == 1 or (x.stride(i) > 0 and x.stride(i) * size % 16 == 0) for i, n in ((0, b), (1, s)))


def box_descriptor(x: Tensor, grid: Sequence[int], start: int, box: Sequence[int], block_d: int) -> TensorDescriptor:
    """``[B, T, H, W, heads·D]`` over the video tokens of ``[B, S, heads, D]``, which begin at token ``start``.

    The text is outside: what lies past an edge of the grid is filled with zeros by the hardware.
    """
    t, h, w = grid
    b, s, heads, d = x.shape
    # The stride of a dimension of size 1 is arbitrary, and may be one that a descriptor refuses.
    row = x.stride(1) if s > 1 else heads * d
    batch = x.stride(0) if b > 1 else s * row
    return TensorDescriptor(
        x[:, start:], [b, t, h, w, heads * d], [batch, h * w * row, w * row, row, 1], [1, *box, block_d]
    )
