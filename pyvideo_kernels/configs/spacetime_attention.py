"""Tiles of the attention kernel, by architecture, head dimension and element size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UnsupportedError
from . import has_tma, shared_memory_limit
from .tuned import MAX_TILE_REGISTERS, around, combinations, family, require, threads

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionConfig:
    """``block_m`` queries by ``block_n`` keys a step; ``block_d`` covers the head dimension.

    ``descriptors``: tiles are moved by tensor descriptors (TMA) instead of pointers.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    descriptors: bool = False

    def __post_init__(self) -> None:
        require(self, powers=("block_m", "block_n", "block_d"), at_least=16, tile=self.block_m * self.block_d)

    @property
    def per_warp(self) -> float:
        """Scores that a warp holds."""
        return self.block_m * self.block_n / self.num_warps


def _block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


@family("spacetime_attention", AttentionConfig, limit=40)
def select(arch: str, *, head_dim: int, itemsize: int, aligned: bool, vectors: bool) -> AttentionConfig:
    """No spills and within shared memory everywhere (tests/static).

    ``aligned``: descriptors can address the views; ``vectors``: rows can be read 8 bytes or more at a time.
    """
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"spacetime_attention: impl 'triton' has head_dim up to {MAX_HEAD_DIM}, got {head_dim}; "
            "use impl='reference' or 'sdpa'"
        )
    block_d = _block_d(head_dim)
    small, medium = block_d <= 64, block_d <= 128
    if arch == "cpu":
        return AttentionConfig(32, 32, block_d, 4, 1)
    if itemsize == 4:
        # IEEE products run on the ordinary FMA units, operands in registers: small tiles.
        return AttentionConfig(32, 16, block_d, 8, 1)
    if arch.startswith("gfx"):
        return AttentionConfig(128, 64 if small else 32, block_d, 4 if medium else 8, 1)
    if aligned and arch in ("sm_90", "sm_100", "sm_103"):
        return AttentionConfig(128, 128 if medium else 64, block_d, 8, 3 if medium else 2, descriptors=True)
    if small:
        return AttentionConfig(128, 64 if vectors else 32, block_d, 8, 3)
    # Shared memory of sm_89 and sm_120 then holds two blocks a multiprocessor.
    stages = 3 if shared_memory_limit(arch) > 99 * 1024 else 2
    return AttentionConfig(64, 32, block_d, 4 if medium else 8, stages)


@select.legality
def illegal(
    config: AttentionConfig, arch: str, *, head_dim: int, itemsize: int, aligned: bool, vectors: bool
) -> str | None:
    if config.block_d != _block_d(head_dim):
        return f"`block_d` must be {_block_d(head_dim)} for head_dim {head_dim}"
    if config.descriptors and not aligned:
        return "descriptors cannot address these views"
    # A box has at most 256 rows.
    if config.descriptors and max(config.block_m, config.block_n) > 256:
        return "`block_m` and `block_n` of descriptors must be at most 256"
    return None


@select.neighbourhood
def candidates(
    arch: str, rule: AttentionConfig, *, head_dim: int, itemsize: int, aligned: bool, vectors: bool
) -> Iterator[AttentionConfig]:
    for config in combinations(
        rule,
        block_m=around(rule.block_m),
        block_n=around(rule.block_n, steps=2),
        num_warps=[n for n in around(rule.num_warps) if n >= min(4, rule.num_warps)],
        num_stages=range(max(1, rule.num_stages - 1), rule.num_stages + 3),
        # fp32 products take operands in registers, which a descriptor cannot fill.
        descriptors=(True, False) if aligned and has_tma(arch) and itemsize == 2 else (False,),
    ):
        # Estimates, to spend the places on what can fit: scores and results in registers, keys and values in flight.
        registers = config.block_m * (config.block_d + config.block_n) / threads(arch, config.num_warps)
        shared = 2 * config.num_stages * config.block_n * config.block_d * itemsize
        if arch == "cpu" or (registers <= MAX_TILE_REGISTERS and shared <= shared_memory_limit(arch)):
            yield config
