"""Configuration of patch_embed3d: tile of the matrix product whose left operand is gathered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import ValueOptionError
from .tuned import around, combinations, family, require

# Columns of one patch whose gathered tile stays resident while a program walks over the outputs.
MAX_RESIDENT = 256


@dataclass(frozen=True)
class Config:
    """Tile ``block_m`` tokens × ``block_n`` outputs × ``block_k`` pixels; a program makes ``n_tiles`` of them.

    ``k_chunks`` tiles of pixels are gathered once and kept for all ``n_tiles``; 0: gathered again for each.
    """

    block_m: int
    block_n: int
    block_k: int
    k_chunks: int
    n_tiles: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        require(self, powers=("block_m", "block_n", "block_k"), at_least=16, tile=self.block_m * self.block_n)
        if self.n_tiles < 1 or self.k_chunks < 0:
            raise ValueOptionError(f"Config: `n_tiles` must be 1 or more and `k_chunks` 0 or more; got {self}")

    @property
    def per_warp(self) -> float:
        """Results and resident pixels that a warp holds."""
        return self.block_m * (self.block_n + self.k_chunks * self.block_k) / self.num_warps


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@family("patch_embed3d", Config, limit=40)
def select(arch: str, *, width: int, columns: int, itemsize: int) -> Config:
    """Gathering costs an instruction a pixel, so it is shared by up to four output tiles.

    The pixel tile is 64 wide, or 32 where that pads less (sm_100 has no matrix instructions for less).
    """
    if arch == "cpu":
        block_m, block_n, block_k, n_tiles = 16, 16, 16, 2
        return Config(block_m, block_n, block_k, _cdiv(columns, block_k) if columns <= 32 else 0, n_tiles, 1, 1)
    block_k = min((64, 32), key=lambda k: _cdiv(columns, k) * k)
    if itemsize == 4:
        # fp32 products run on the ordinary units: small tiles, operands twice as wide.
        block_m, block_n, block_k = 64, 64, min(block_k, 32)
    else:
        # Many columns make the resident pixels wide: narrower weight tiles leave room for a second block an SM.
        block_m, block_n = 128, 128 if columns <= 64 else 64
    tiles = _cdiv(width, block_n)
    n_tiles = _cdiv(tiles, _cdiv(tiles, 4))
    k_chunks = _cdiv(columns, block_k) if columns <= MAX_RESIDENT // (itemsize // 2) else 0
    return Config(block_m, block_n, block_k, k_chunks, n_tiles, 8 if itemsize == 2 else 4, 2)


@select.legality
def illegal(config: Config, arch: str, *, width: int, columns: int, itemsize: int) -> str | None:
    whole = _cdiv(columns, config.block_k)
    return None if config.k_chunks in (0, whole) else f"`k_chunks` must be 0 or {whole} for {columns} columns"


@select.neighbourhood
def candidates(arch: str, rule: Config, *, width: int, columns: int, itemsize: int) -> Iterator[Config]:
    for block_k in (k for k in around(rule.block_k) if 16 <= k < 2 * max(columns, 16)):
        whole = _cdiv(columns, block_k)
        resident = columns <= 2 * MAX_RESIDENT // (itemsize // 2)
        yield from combinations(
            replace(rule, block_k=block_k, k_chunks=0),
            block_m=around(rule.block_m),
            block_n=around(rule.block_n),
            k_chunks=(whole, 0) if resident else (0,),
            n_tiles=around(rule.n_tiles),
            num_warps=[n for n in around(rule.num_warps) if n >= min(4, rule.num_warps)],
            num_stages=range(max(1, rule.num_stages - 1), rule.num_stages + 2),
        )
