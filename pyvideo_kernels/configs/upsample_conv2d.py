"""Tiles of upsample_conv2d: those of the convolution, over a box of small pixels in one phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from . import has_tma, shared_memory_limit
from .causal_conv3d import ConvConfig, split_channels
from .tuned import MAX_TILE_REGISTERS, around, combinations, family, threads


@family("upsample_conv2d", ConvConfig, limit=40)
def select(arch: str, *, c: int, o: int, itemsize: int, aligned: bool) -> ConvConfig:
    """No spills and within shared memory everywhere (tests/static); ``aligned``: descriptors can address the views."""
    n, n2 = split_channels(o)
    block_k = 64 if c % 64 == 0 else 32 if c > 16 else 16
    if arch == "cpu":
        return ConvConfig(4, 8, 16, n, n2, 4, 1)
    if itemsize == 4:
        if n + n2 > 64:
            n, n2 = 64, 0
        if arch.startswith("gfx"):
            return ConvConfig(8, 8, min(block_k, 16), n, n2, 4, 2)
        return ConvConfig(8, 8, min(block_k, 32), n, n2, 4, 3, descriptors=has_tma(arch) and aligned)
    if arch.startswith("gfx"):
        return ConvConfig(8, 16, min(block_k, 32), n, n2, 4 if n + n2 < 128 else 8, 2)
    warps = 4 if n + n2 < 64 else 8
    roomy = arch in ("sm_80", "sm_90", "sm_100", "sm_103")
    if has_tma(arch) and aligned:
        return ConvConfig(8, 16, block_k, n, n2, warps, 4 if roomy or block_k < 64 else 3, descriptors=True)
    return ConvConfig(8, 16, block_k if roomy else min(block_k, 32), n, n2, warps, 4)


@select.legality
def illegal(config: ConvConfig, arch: str, *, c: int, o: int, itemsize: int, aligned: bool) -> str | None:
    if config.descriptors and not aligned:
        return "descriptors cannot address these views"
    if config.descriptors and max(config.block_h, config.block_w, config.block_k, config.block_n) > 256:
        return "a side of a descriptor's box must be at most 256"
    return None


@select.neighbourhood
def candidates(arch: str, rule: ConvConfig, *, c: int, o: int, itemsize: int, aligned: bool) -> Iterator[ConvConfig]:
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
            pixels, outputs = config.block_h * config.block_w, n + n2
            registers = pixels * outputs / threads(arch, config.num_warps)
            shared = config.num_stages * (pixels + outputs) * config.block_k * itemsize
            if arch == "cpu" or (registers <= MAX_TILE_REGISTERS and shared <= shared_memory_limit(arch)):
                yield config
