"""Configuration of patch_embed3d: tile of the matrix product whose left operand is gathered."""

from __future__ import annotations

from dataclasses import dataclass

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


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


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
