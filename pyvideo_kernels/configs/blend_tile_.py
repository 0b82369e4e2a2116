"""Configuration of blend_tile_: consecutive elements of one row of one image, of one channel or of all of them."""

from __future__ import annotations

from collections.abc import Iterator

from .elementwise import FlatConfig
from .tuned import around, combinations, family


@family("blend_tile_", FlatConfig, limit=12)
def select(arch: str, *, width: int, itemsize: int) -> FlatConfig:
    """A row of a tile is some hundred elements: a block of 1024 would leave most of its lanes idle."""
    block = max(64, min(1024, 1 << max(width - 1, 0).bit_length()))
    # Three blocks of 256 fill a row of 768, one of 1024 leaves a quarter idle.
    while block > 256 and -width % block * 8 > width:
        block //= 2
    if arch == "cpu":
        return FlatConfig(block, 1)
    return FlatConfig(block, max(1, block // (512 if arch.startswith("gfx") else 256)))


@select.neighbourhood
def candidates(arch: str, rule: FlatConfig, *, width: int, itemsize: int) -> Iterator[FlatConfig]:
    return combinations(rule, block=around(rule.block, steps=2), num_warps=around(rule.num_warps, steps=2))
