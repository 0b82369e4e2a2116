"""Configuration of the row kernels: one program reads whole rows (norms, modulation, residuals)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UnsupportedError, ValueOptionError
from .tuned import around, combinations, family, require

MAX_WIDTH = 16384


@dataclass(frozen=True)
class RowConfig:
    """``block_d`` covers the row; ``rows`` rows a program; ``num_warps`` warps of 32 (64 on AMD)."""

    block_d: int
    rows: int
    num_warps: int

    def __post_init__(self) -> None:
        require(self, powers=("block_d", "rows"), tile=self.block_d * self.rows)

    @property
    def per_warp(self) -> float:
        """Elements that a warp holds."""
        return self.block_d * self.rows / self.num_warps


@family("row", RowConfig, limit=12)
def select(arch: str, *, op: str, width: int, itemsize: int) -> RowConfig:
    """Enough elements in flight a thread (8 to 32) without spilling; several short rows share a program."""
    if width > MAX_WIDTH:
        raise UnsupportedError(f"{op}: rows of {width} exceed {MAX_WIDTH}; use impl='reference'")
    block_d = 1 << max(width - 1, 0).bit_length()
    rows = max(1, 1024 // block_d)
    elements = block_d * rows
    threads_per_warp = 64 if arch.startswith("gfx") else 32
    num_warps = max(1, min(16, elements // (threads_per_warp * 16)))
    return RowConfig(max(block_d, 16), rows, 1 << (num_warps.bit_length() - 1))


def pixels(arch: str, *, op: str, width: int, least: int) -> RowConfig:
    """The rule of kernels over pixels, whose channels are few: a program takes as many as fill its threads.

    16 elements a thread for 4 warps keep two 16-byte loads of bf16 a thread in flight. ``least``: columns of a tile.
    """
    if width > MAX_WIDTH:
        raise UnsupportedError(f"{op}: rows of {width} exceed {MAX_WIDTH}; use impl='reference'")
    block_d = max(least, 1 << max(width - 1, 0).bit_length())
    if arch == "cpu":
        return RowConfig(block_d, min(8, 4 * MAX_WIDTH // block_d), 4)
    rows = max(1, 2048 // block_d)
    threads_per_warp = 64 if arch.startswith("gfx") else 32
    num_warps = max(1, min(16, block_d * rows // (threads_per_warp * 16)))
    return RowConfig(block_d, rows, 1 << (num_warps.bit_length() - 1))


@select.legality
def illegal(config: RowConfig, arch: str, *, op: str = "", width: int, itemsize: int) -> str | None:
    return None if config.block_d >= width else f"`block_d` must cover the row of {width}"


def nearby(arch: str, rule: RowConfig, *, op: str = "", width: int, itemsize: int) -> Iterator[RowConfig]:
    """Rows and warps; the tile's width is the row's."""
    return combinations(rule, rows=around(rule.rows, steps=2), num_warps=around(rule.num_warps, steps=2))


candidates = select.neighbourhood(nearby)


@dataclass(frozen=True)
class SumConfig:
    """Column sums over tokens: tiles of ``rows`` by ``block_d``, ``chunk`` tokens a program in a fixed order."""

    rows: int
    block_d: int
    chunk: int
    num_warps: int

    def __post_init__(self) -> None:
        require(self, powers=("rows", "block_d", "chunk"), tile=self.rows * self.block_d)
        if self.chunk < self.rows:
            raise ValueOptionError(f"SumConfig: `chunk` must be a multiple of `rows`; got {self.chunk}, {self.rows}")

    @property
    def per_warp(self) -> float:
        """Elements that a warp holds of each sum."""
        return self.rows * self.block_d / self.num_warps


@family("sum", SumConfig, limit=12)
def select_sum(arch: str, *, op: str, width: int, itemsize: int) -> SumConfig:
    """Sixteen elements a thread and accumulator; 32760 tokens of 1536 columns give 1536 programs."""
    if arch == "cpu":
        return SumConfig(2, 32, 4, 1)
    return SumConfig(16, 128, 256, 2 if arch.startswith("gfx") else 4)


@select_sum.neighbourhood
def candidates_sum(arch: str, rule: SumConfig, *, op: str, width: int, itemsize: int) -> Iterator[SumConfig]:
    return combinations(
        rule,
        rows=around(rule.rows),
        block_d=around(rule.block_d),
        chunk=around(rule.chunk),
        num_warps=around(rule.num_warps),
    )
