"""Configuration of block_mean: how much of a box a program reads at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UnsupportedError
from .tuned import around, combinations, family, require

MAX_HEAD_DIM = 1024


@dataclass(frozen=True)
class MeanConfig:
    """``rows`` tokens of the box at a time, by all of the head's channels (``block_d`` covers them)."""

    rows: int
    block_d: int
    num_warps: int

    def __post_init__(self) -> None:
        require(self, powers=("rows", "block_d"), tile=self.rows * self.block_d)

    @property
    def per_warp(self) -> float:
        """Elements that a warp holds."""
        return self.rows * self.block_d / self.num_warps


def _block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


@family("block_mean", MeanConfig, limit=12)
def select(arch: str, *, head_dim: int, itemsize: int, tokens: int) -> MeanConfig:
    """About 32 elements a thread: the whole of a box of 64 tokens by 128 channels; ``tokens``: of a whole box."""
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"block_mean: impl 'triton' has head_dim up to {MAX_HEAD_DIM}, got {head_dim}; use impl='reference'"
        )
    block_d = _block_d(head_dim)
    elements = 2048 if arch == "cpu" or itemsize == 4 else 4096
    rows = max(1, min(1 << (tokens - 1).bit_length(), elements // block_d))
    return MeanConfig(rows, block_d, 4)


@select.legality
def illegal(config: MeanConfig, arch: str, *, head_dim: int, itemsize: int, tokens: int) -> str | None:
    if config.block_d != _block_d(head_dim):
        return f"`block_d` must be {_block_d(head_dim)} for head_dim {head_dim}"
    return None


@select.neighbourhood
def candidates(arch: str, rule: MeanConfig, *, head_dim: int, itemsize: int, tokens: int) -> Iterator[MeanConfig]:
    return combinations(rule, rows=around(rule.rows, steps=2), num_warps=around(rule.num_warps, steps=2))
