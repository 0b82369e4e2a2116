"""A decoded tile blended into its place in the frames, over the seams with the tiles above and to the left."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import DTypeError, bad_option, bad_shape, check_same_device, check_tensor, describe, refuse_grad
from ..reference.blend_tile_ import finished, ramp
from ._checks import check_no_broadcast


def blend_tile_(
    out: Tensor,
    tile: Tensor,
    *,
    above: Tensor | None = None,
    left: Tensor | None = None,
    below: Tensor | None = None,
    right: Tensor | None = None,
    grain: int = 1,
    clamp: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Blend a tile over its upper seam, then over its left one, and write its own part and the strips others need.

        v     = tile;   v[y < n] = above * (1 - y/n) + v * y/n;   v[x < m] = left * (1 - x/m) + v * x/m
        out   = v[:H', :W'];   below = v[H - k:];   right = v[:, W - l:]

    With n and m the widths of ``above`` and ``left``, and y and x counted in steps of ``grain``. Tiles are given row
    by row, each with the ``below`` of the tile over it as ``above`` and the ``right`` of the one before it as ``left``.

    Args:
        out: ``[B, C, T, H', W']``, the tile's own part of the frames: H' ≤ H and W' ≤ W from its upper left corner;
            any strides (a slice of the frames), a floating dtype, or uint8: then [-1, 1] becomes 0 to 255. Overwritten.
        tile: ``[B, C, T, H, W]``, channels-last or not, any strides; bf16/fp16/fp32 (fp64 by the reference).
        above, left: ``[B, C, T, n, W]`` and ``[B, C, T, H, m]``, what the neighbours kept; dtype of ``tile``.
            None: no such neighbour.
        below, right: ``[B, C, T, k, W]`` and ``[B, C, T, H, l]``, dtype of ``tile``: overwritten by the last k rows and
            l columns of the blended tile, past its own part too. None: nobody needs them. They must not share memory
            with ``above`` and ``left``.
        grain: pixels that share a weight; the seams are multiples of it. Models that are tiled before pixels are
            unpacked from channels (Wan 2.2) blend so.
        clamp: the frames (not the strips) to [-1, 1].
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        ``out``.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: an input requires grad (no backward), or this implementation cannot be had here.
    Supports: sm_80+, gfx942+, CPU | fwd, in place | fullgraph, CUDA graphs, dynamic sizes.
    Numerics: fp32 inside, one rounding; error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: the blending of tiled decoding in diffusers (``blend_v``, ``blend_h``), its result in one pass.
    """
    op = "blend_tile_"
    check_tensor(op, "tile", tile, ndim=5)
    b, c, t, h, w = tile.shape
    if isinstance(out, Tensor) and out.dtype == torch.uint8:
        if out.dim() != 5:
            bad_shape(op, "out", "of 5 dimensions", out)
    else:
        check_tensor(op, "out", out, ndim=5)
    if out.shape[:3] != (b, c, t) or out.shape[3] > h or out.shape[4] > w:
        bad_shape(op, "out", f"[{b}, {c}, {t}, at most {h}, at most {w}] for `tile` {list(tile.shape)}", out)
    strips = {"above": (above, 3), "left": (left, 4), "below": (below, 3), "right": (right, 4)}
    for name, (strip, dim) in strips.items():
        if strip is None:
            continue
        check_tensor(op, name, strip, ndim=5)
        wanted = list(tile.shape)
        most, wanted[dim] = wanted[dim], strip.shape[dim]
        if list(strip.shape) != wanted or strip.shape[dim] > most:
            bad_shape(op, name, f"{wanted[:dim] + [f'at most {most}'] + wanted[dim + 1 :]}".replace("'", ""), strip)
        if strip.dtype != tile.dtype:
            raise DTypeError(f"{op}: `{name}` must be {tile.dtype} like `tile`; got {describe(strip)}")
    seams = [strip.shape[dim] for strip, dim in ((above, 3), (left, 4)) if strip is not None]
    if isinstance(grain, bool) or not isinstance(grain, int) or grain < 1 or any(seam % grain for seam in seams):
        bad_option(op, "grain", "an integer, at least 1 and a divisor of the widths of `above` and `left`", grain)
    check_no_broadcast(op, out=out, below=below, right=right)
    tensors = {"tile": tile, "out": out} | {name: strip for name, (strip, _) in strips.items()}
    check_same_device(op, **tensors)
    refuse_grad(op, **tensors)
    torch.ops.pyvideo.blend_tile_(out, below, right, tile, above, left, grain, clamp, impl)
    return out


def blend_tile_cpu(
    out: Tensor,
    below: Tensor | None,
    right: Tensor | None,
    tile: Tensor,
    above: Tensor | None,
    left: Tensor | None,
    grain: int,
    clamp: bool,
) -> None:
    """``impl="cpu"``: the seams alone are computed; the rest of the tile is copied."""
    n, m = 0 if above is None else above.shape[3], 0 if left is None else left.shape[4]
    compute = torch.promote_types(tile.dtype, torch.float32)
    h, w = tile.shape[3:]

    def seam(y0: int, y1: int, x0: int, x1: int) -> Tensor:
        part = tile[..., y0:y1, x0:x1].to(compute)
        for strip, dim, size, first in ((above, 3, n, y0), (left, 4, m, x0)):
            if strip is None or first >= size:
                continue
            weight = ramp(size, grain, part, dim)
            part = torch.lerp(strip[..., y0:y1, x0:x1].to(compute), part, weight)
        return part

    # At most four boxes, each on one side of either seam.
    boxes = [(y0, y1, x0, x1) for y0, y1 in ((0, n), (n, h)) for x0, x1 in ((0, m), (m, w)) if y1 > y0 and x1 > x0]
    for y0, y1, x0, x1 in boxes:
        plain = y0 >= n and x0 >= m
        v = tile[..., y0:y1, x0:x1] if plain else seam(y0, y1, x0, x1)
        oh, ow = min(y1, out.shape[3]), min(x1, out.shape[4])
        if oh > y0 and ow > x0:
            own = v[..., : oh - y0, : ow - x0]
            wide = own.to(compute) if out.dtype == torch.uint8 else own
            out[..., y0:oh, x0:ow].copy_(finished(wide, out.dtype, clamp))
        if below is not None:
            first = h - below.shape[3]
            if y1 > (start := max(y0, first)):
                below[..., start - first : y1 - first, x0:x1].copy_(v[..., start - y0 :, :])
        if right is not None:
            first = w - right.shape[4]
            if x1 > (start := max(x0, first)):
                right[..., y0:y1, start - first : x1 - first].copy_(v[..., start - x0 :])
