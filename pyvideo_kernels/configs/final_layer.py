"""Configuration of final_layer: tile of the projection, statistics of its rows taken on the way."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Tile ``block_m`` tokens × ``block_n`` output features, walked in ``block_k`` channels."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def select(arch: str, *, features: int, itemsize: int, per_token: bool) -> Config:
    """All features in one tile up to 256, so that x is read once.

    Per-batch modulation is folded into the weights, which every program reads whole: tall tiles, fewer programs.
    Per-token modulation brings two fp32 tables a tile: shorter tiles leave them registers.
    """
    if arch == "cpu":
        return Config(16, 16, 16, 1, 1)
    block_n = min(256, 1 << max(features - 1, 15).bit_length())
    if itemsize == 4:
        # fp32 products run on the ordinary units.
        return Config(32, min(block_n, 64), 32, 4, 2)
    wide = block_n > 128
    if per_token:
        # On sm_120 the 64 × 256 tile leaves the two tables no registers, on AMD no scalar registers for lane masks.
        block_m = 32 if wide and (arch.startswith("gfx") or arch == "sm_120") else 64
        return Config(block_m, block_n, 32, 8 if block_n * block_m > 8192 else 4, 2)
    if wide:
        return Config(32 if arch.startswith("gfx") else 64, block_n, 64, 8, 2)
    return Config(128, block_n, 64, 8, 3)
