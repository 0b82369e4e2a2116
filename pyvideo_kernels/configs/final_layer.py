"""Configuration of final_layer: tile of the projection, statistics of its rows taken on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import shared_memory_limit
from .tuned import MAX_TILE_REGISTERS, around, combinations, family, require, threads


@dataclass(frozen=True)
class Config:
    """Tile ``block_m`` tokens × ``block_n`` output features, walked in ``block_k`` channels.

    ``folded``: the modulation is in the weights and one loop does, else two.
    """

    folded: bool
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        require(self, powers=("block_m", "block_n", "block_k"), at_least=16, tile=self.block_m * self.block_n)

    @property
    def per_warp(self) -> float:
        """Results that a warp holds."""
        return self.block_m * self.block_n / self.num_warps


@family("final_layer", Config, limit=40)
def select(arch: str, *, features: int, itemsize: int, folded: bool) -> Config:
    """32 results a thread: storing a pixel takes an address each, and twice as many spill.

    Folded weights are read whole by every program: tall tiles. More than 64 features (Wan 2.2 5B has 192) go to
    neighbouring programs, which find x in the cache.
    Per-token modulation brings two fp32 tables that weigh four times x: all features in one tile, up to 256.
    """
    if arch == "cpu":
        return Config(folded, 16, 16, 16, 1, 1)
    width = 1 << max(features - 1, 15).bit_length()
    if itemsize == 4:
        # fp32 products run on the ordinary units.
        return Config(folded, 32, min(width, 64), 32, 8, 2)
    if folded:
        return Config(folded, 128, min(width, 64), 64, 8, 3)
    amd, block_n = arch.startswith("gfx"), min(width, 256)
    # On AMD a 64 × 256 tile has more lane masks than scalar registers.
    block_m = 32 if amd and block_n > 128 else 64
    num_warps = max(4, block_m * block_n // (32 * 32))
    return Config(folded, block_m, block_n, 32, num_warps, 2)


@select.legality
def illegal(config: Config, arch: str, *, features: int, itemsize: int, folded: bool) -> str | None:
    return None if config.folded == folded else f"`folded` must be {folded} for this modulation and dtype"


@select.neighbourhood
def candidates(arch: str, rule: Config, *, features: int, itemsize: int, folded: bool) -> Iterator[Config]:
    for config in combinations(
        rule,
        block_m=around(rule.block_m, steps=2),
        block_n=[n for n in around(rule.block_n) if n < 2 * max(features, 16)],
        block_k=around(rule.block_k),
        num_warps=[n for n in around(rule.num_warps) if n >= min(4, rule.num_warps)],
        num_stages=range(max(1, rule.num_stages - 1), rule.num_stages + 3),
    ):
        # Estimates, to spend the places on what can fit: results and both sums in registers, x and weights in flight.
        m, n, k = config.block_m, config.block_n, config.block_k
        registers = m * (n + 2 * k) / threads(arch, config.num_warps)
        shared = config.num_stages * (m + n) * k * itemsize
        if arch == "cpu" or (registers <= MAX_TILE_REGISTERS and shared <= shared_memory_limit(arch)):
            yield config
