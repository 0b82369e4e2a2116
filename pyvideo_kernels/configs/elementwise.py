"""Configurations of the elementwise kernels: no reduction, so a tile is only a load width and an occupancy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .tuned import around, combinations, family, require


@dataclass(frozen=True)
class FlatConfig:
    """``block`` consecutive elements a program, ``num_warps`` warps."""

    block: int
    num_warps: int

    def __post_init__(self) -> None:
        require(self, powers=("block",), tile=self.block)

    @property
    def per_warp(self) -> float:
        """Elements that a warp holds."""
        return self.block / self.num_warps


@dataclass(frozen=True)
class TileConfig:
    """``rows`` tokens by ``block_d`` columns a program, ``num_warps`` warps."""

    rows: int
    block_d: int
    num_warps: int

    def __post_init__(self) -> None:
        require(self, powers=("rows", "block_d"), tile=self.rows * self.block_d)

    @property
    def per_warp(self) -> float:
        """Elements that a warp holds."""
        return self.rows * self.block_d / self.num_warps


@family("flat", FlatConfig, limit=12)
def select_flat(arch: str, *, op: str, itemsize: int) -> FlatConfig:
    """Eight elements a thread: one 16-byte load of each bf16 input, two of each fp32 one."""
    if arch == "cpu":
        return FlatConfig(128, 1)
    return FlatConfig(2048 if arch.startswith("gfx") else 1024, 4)


@select_flat.neighbourhood
def candidates_flat(arch: str, rule: FlatConfig, *, op: str, itemsize: int) -> Iterator[FlatConfig]:
    return combinations(rule, block=around(rule.block, steps=2), num_warps=around(rule.num_warps, steps=2))


@family("tile", TileConfig, limit=12)
def select_tile(arch: str, *, op: str, width: int, itemsize: int) -> TileConfig:
    """The widest power of two up to 1024 columns that leaves few lanes idle; 16 elements a thread."""
    wide = 1 << max(width - 1, 0).bit_length()
    block_d = max(16, min(1024, wide))
    # 1536 is three chunks of 512, 5120 five of 1024: an eighth of idle lanes at most, or small chunks.
    while block_d > 256 and -width % block_d * 8 > width:
        block_d //= 2
    elements = 256 if arch == "cpu" else 4096 if arch.startswith("gfx") else 2048
    return TileConfig(max(1, elements // block_d), block_d, 1 if arch == "cpu" else 4)


@select_tile.neighbourhood
def candidates_tile(arch: str, rule: TileConfig, *, op: str, width: int, itemsize: int) -> Iterator[TileConfig]:
    return combinations(
        rule, rows=around(rule.rows, steps=2), block_d=around(rule.block_d), num_warps=around(rule.num_warps)
    )
