"""Tiles of causal_conv3d: a box of pixels by a group of output channels, by architecture and channel counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import ValueOptionError
from . import has_tma, shared_memory_limit
from .tuned import MAX_TILE_REGISTERS, around, combinations, family, require, threads


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

    def __post_init__(self) -> None:
        require(self, powers=("block_h", "block_w"), tile=self.block_h * self.block_w * (self.block_n + self.block_n2))
        require(self, powers=("block_k", "block_n"), at_least=16)
        if self.block_h * self.block_w < 16:
            raise ValueOptionError(f"ConvConfig: a box has at least 16 pixels; got {self.block_h} x {self.block_w}")
        if self.block_n2:
            require(self, powers=("block_n2",), at_least=16)

    @property
    def per_warp(self) -> float:
        """Results that a warp holds."""
        return self.block_h * self.block_w * (self.block_n + self.block_n2) / self.num_warps


def split_channels(o: int) -> tuple[int, int]:
    """Output channels of one program. 96 and 192, Wan's widths, are no powers of two: 64 + 32 and 128 + 64."""
    if o > 192:
        return (128, 64) if o % 192 == 0 else (128, 0)
    for n, n2 in ((16, 0), (32, 0), (32, 16), (64, 0), (64, 32), (128, 0)):
        if o <= n + n2:
            return n, n2
    return 128, 64


# With more accumulators the registers of a program are full.
MAX_NORM_CHANNELS = 192


@family("causal_conv3d", ConvConfig, limit=40)
def select(arch: str, *, c: int, o: int, itemsize: int, aligned: bool, norm: bool = False) -> ConvConfig:
    """No spills and within shared memory everywhere (tests/static).

    ``o``: channels of the result; ``aligned``: descriptors can address the views; ``norm``: the channels of a pixel are
    wanted in one program, which 16-bit results of up to `MAX_NORM_CHANNELS` fit.
    """
    return rule(arch, c=c, o=o, itemsize=itemsize, aligned=aligned)


def rule(arch: str, *, c: int, o: int, itemsize: int, aligned: bool) -> ConvConfig:
    """The rule itself, of every convolution whose programs have a box of pixels and a group of channels."""
    n, n2 = split_channels(o)
    # The widest step that divides the channels: 96 in three of 32, 192 and 384 in steps of 64.
    block_k = 64 if c % 64 == 0 else 32 if c > 16 else 16
    if arch == "cpu":
        return ConvConfig(4, 8, 16, n, n2, 4, 1)
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


@select.legality
def illegal(
    config: ConvConfig, arch: str, *, c: int, o: int, itemsize: int, aligned: bool, norm: bool = False
) -> str | None:
    if norm and itemsize == 2 and config.block_n + config.block_n2 < o:
        return f"{config.block_n} + {config.block_n2} channels do not hold the norm of {o}"
    return bad_descriptors(config, aligned)


def bad_descriptors(config: ConvConfig, aligned: bool) -> str | None:
    """Why descriptors cannot move the boxes; None where they can, or need not."""
    if config.descriptors and not aligned:
        return "descriptors cannot address these views"
    if config.descriptors and max(config.block_h, config.block_w, config.block_k, config.block_n) > 256:
        return "a side of a descriptor's box must be at most 256"
    return None


@select.neighbourhood
def candidates(
    arch: str, rule: ConvConfig, *, c: int, o: int, itemsize: int, aligned: bool, norm: bool = False
) -> Iterator[ConvConfig]:
    return nearby(arch, rule, c=c, o=o, itemsize=itemsize, aligned=aligned)


def nearby(arch: str, rule: ConvConfig, *, c: int, o: int, itemsize: int, aligned: bool) -> Iterator[ConvConfig]:
    """Other boxes, splits of the channels, steps, warps and stages, by either way of moving boxes."""
    splits = {(rule.block_n, rule.block_n2), *((n, 0) for n in (32, 64, 128, 256) if n < 2 * o)}
    for n, n2 in sorted(splits):
        for config in combinations(
            replace(rule, block_n=n, block_n2=n2),
            block_h=around(rule.block_h),
            block_w=around(rule.block_w),
            block_k=[k for k in around(rule.block_k) if k < 2 * c],
            num_warps=[w for w in around(rule.num_warps) if w >= min(4, rule.num_warps)],
            num_stages=range(max(1, rule.num_stages - 2), rule.num_stages + 3),
            descriptors=(True, False) if aligned and has_tma(arch) else (False,),
        ):
            # Estimates, to spend the places on what can fit: results in registers, pixels and weights in flight.
            pixels, outputs = config.block_h * config.block_w, n + n2
            registers = pixels * outputs / threads(arch, config.num_warps)
            shared = config.num_stages * (pixels + outputs) * config.block_k * itemsize
            if arch == "cpu" or (registers <= MAX_TILE_REGISTERS and shared <= shared_memory_limit(arch)):
                yield config
