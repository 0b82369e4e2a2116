"""Configuration of quantize_qk: how many tokens of a head a program holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UnsupportedError
from .spacetime_attention import MAX_HEAD_DIM
from .tuned import around, combinations, family, require


@dataclass(frozen=True)
class QuantizeConfig:
    """``rows`` tokens of one head, all of its channels (``block_d`` covers them)."""

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


@family("quantize_qk", QuantizeConfig, limit=16)
def select(arch: str, *, head_dim: int, itemsize: int) -> QuantizeConfig:
    """32 elements a thread: four 16-byte loads in flight in half precision, and 16 codes to a store."""
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"quantize_qk: impl 'triton' has head_dim up to {MAX_HEAD_DIM}, got {head_dim}; use impl='reference'"
        )
    block_d = _block_d(head_dim)
    threads = 64 if arch.startswith("gfx") else 32
    elements = 2048 if arch == "cpu" else threads * 4 * (16 if itemsize == 4 else 32)
    return QuantizeConfig(max(1, elements // block_d), block_d, 4)


@select.legality
def illegal(config: QuantizeConfig, arch: str, *, head_dim: int, itemsize: int) -> str | None:
    if config.block_d != _block_d(head_dim):
        return f"`block_d` must be {_block_d(head_dim)} for head_dim {head_dim}"
    return None


@select.neighbourhood
def candidates(arch: str, rule: QuantizeConfig, *, head_dim: int, itemsize: int) -> Iterator[QuantizeConfig]:
    return combinations(rule, rows=around(rule.rows, steps=2), num_warps=around(rule.num_warps, steps=2))
