"""Configuration of the row kernels: one program reads whole rows (norms, modulation, residuals)."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedError

MAX_WIDTH = 16384


@dataclass(frozen=True)
class RowConfig:
    """``block_d`` covers the row; ``rows`` rows a program; ``num_warps`` warps of 32 (64 on AMD)."""

    block_d: int
    rows: int
    num_warps: int


def select(arch: str, *, op: str, width: int) -> RowConfig:
    """Enough elements in flight a thread (8 to 32) without spilling; several short rows share a program."""
    if width > MAX_WIDTH:
        raise UnsupportedError(f"{op}: rows of {width} exceed {MAX_WIDTH}; use impl='reference'")
    block_d = 1 << max(width - 1, 0).bit_length()
    rows = max(1, 1024 // block_d)
    elements = block_d * rows
    threads_per_warp = 64 if arch.startswith("gfx") else 32
    num_warps = max(1, min(16, elements // (threads_per_warp * 16)))
    return RowConfig(max(block_d, 16), rows, 1 << (num_warps.bit_length() - 1))


@dataclass(frozen=True)
class SumConfig:
    """Column sums over tokens: tiles of ``rows`` by ``block_d``, ``chunk`` tokens a program in a fixed order."""

    rows: int
    block_d: int
    chunk: int
    num_warps: int


def select_sum(arch: str) -> SumConfig:
    """Sixteen elements a thread and accumulator; 32760 tokens of 1536 columns give 1536 programs."""
    if arch == "cpu":
        return SumConfig(2, 32, 4, 1)
    return SumConfig(16, 128, 256, 2 if arch.startswith("gfx") else 4)
