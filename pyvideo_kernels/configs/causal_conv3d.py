"""Tiles of causal_conv3d: a box of pixels by a group of output channels, by architecture and channel counts."""

from __future__ import annotations

from dataclasses import dataclass

from . import has_tma


@dataclass(frozen=True)
class ConvConfig:
    """``block_h`` × ``block_w`` pixels of one frame, ``block_k`` input channels a step, and output channels in two
    powers of two, ``block_n`` and then ``block_n2`` (0: none), that share the loads of the pixels.

    ``descriptors``: boxes are moved by tensor descriptors (TMA), whose zero fill is the spatial padding.
    """

    block_h: int
    block_w: int
    block_k: int
    block_n: int
    block_n2: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


def split_channels(o: int) -> tuple[int, int]:
    """Output channels of one program. 96 and 192, Wan's widths, are no powers of two: 64 + 32 and 128 + 64."""
    if o > 192:
        return (128, 64) if o % 192 == 0 else (128, 0)
    for n, n2 in ((16, 0), (32, 0), (32, 16), (64, 0), (64, 32), (128, 0)):
        if o <= n + n2:
            return n, n2
    return 128, 64


def select(arch: str, *, c: int, o: int, itemsize: int, aligned: bool) -> ConvConfig:
    """No spills and within shared memory everywhere (tests/static); ``aligned``: descriptors can address the views."""
    n, n2 = split_channels(o)
    # The widest step that divides the channels: 96 in three of 32, 192 and 384 in steps of 64.
    block_k = 64 if c % 64 == 0 else 32 if c > 16 else 16
    if arch == "cpu":
        return ConvConfig(2, 8, 16, n, n2, 4, 1)
    if itemsize == 4:
        # fp32: half the channels for the same bytes, and half the accumulators where products take three passes.
        return _fp32(arch, min(block_k, 32), n, n2, aligned)
    if arch.startswith("gfx"):
        return ConvConfig(8, 16, min(block_k, 32), n, n2, 4 if n + n2 < 128 else 8, 2)
    warps = 4 if n + n2 < 64 else 8
    roomy = arch in ("sm_80", "sm_90", "sm_100", "sm_103")
    if has_tma(arch) and aligned:
        return ConvConfig(8, 16, block_k, n, n2, warps, 4 if roomy or block_k < 64 else 3, descriptors=True)
    # Without descriptors a step's addresses and masks cost registers, and 100 KB do not hold three wide steps.
    return ConvConfig(8, 16, block_k if roomy else min(block_k, 32), n, n2, warps, 4)


def _fp32(arch: str, block_k: int, n: int, n2: int, aligned: bool) -> ConvConfig:
    if n + n2 > 64:
        n, n2 = 64, 0
    if arch.startswith("gfx"):
        return ConvConfig(8, 8, min(block_k, 16), n, n2, 4, 2)
    return ConvConfig(8, 8, block_k, n, n2, 4, 3, descriptors=has_tma(arch) and aligned)
