"""Configuration of linear_gelu: tile of the matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import shared_memory_limit
from .tuned import MAX_TILE_REGISTERS, around, combinations, family, require, threads


@dataclass(frozen=True)
class Config:
    """Tile ``block_m`` rows × ``block_n`` features, walked in ``block_k``; ``group_m`` tiles of rows share features."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        require(self, powers=("block_m", "block_n", "block_k"), at_least=16, tile=self.block_m * self.block_n)
        require(self, powers=("group_m",))

    @property
    def per_warp(self) -> float:
        """Results that a warp holds."""
        return self.block_m * self.block_n / self.num_warps


@family("linear_gelu", Config, limit=60)
def select(arch: str, *, width: int, columns: int, itemsize: int, approximate: str) -> Config:
    """The largest tile whose sums fit in registers and whose operands in flight fit in shared memory.

    erf takes more registers than the tanh form, and columns that cannot be loaded 16 bytes at a time take more still.
    """
    if arch == "cpu":
        return Config(16, 16, 16, 2, 1, 1)
    if itemsize == 4:
        # fp32 products run on the ordinary units: small tiles, operands twice as wide.
        return Config(64, 64, 32, 8, 4, 2)
    if columns % 16:
        return Config(64, 64, 32, 8, 4, 2)
    block_n = 128 if width > 64 else 64
    if arch.startswith("gfx"):
        return Config(128, block_n, 64, 8, 8, 2)
    if shared_memory_limit(arch) < 128 * 1024:
        return Config(128, block_n, 64, 8, 8, 2)
    if arch in ("sm_90", "sm_100", "sm_103") and width >= 1024 and approximate == "tanh":
        return Config(128, 256, 64, 8, 8, 3)
    return Config(128, block_n, 64, 8, 8, 3)


@select.neighbourhood
def candidates(
    arch: str, rule: Config, *, width: int, columns: int, itemsize: int, approximate: str
) -> Iterator[Config]:
    for config in combinations(
        rule,
        block_m=around(rule.block_m),
        block_n=[n for n in around(rule.block_n) if n < 2 * max(width, 16)],
        block_k=[k for k in around(rule.block_k) if k < 2 * max(columns, 16)],
        group_m=around(rule.group_m),
        num_warps=[n for n in around(rule.num_warps) if n >= min(4, rule.num_warps)],
        num_stages=range(max(1, rule.num_stages - 1), rule.num_stages + 3),
    ):
        # Estimates, to spend the places on what can fit: sums in registers, operands in flight in shared memory.
        registers = config.block_m * config.block_n / threads(arch, config.num_warps)
        shared = config.num_stages * (config.block_m + config.block_n) * config.block_k * itemsize
        if arch == "cpu" or (registers <= MAX_TILE_REGISTERS and shared <= shared_memory_limit(arch)):
            yield config
