"""Configuration of group_norm_silu: tiles of whole pixels for the statistics and for the pass that applies them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UnsupportedError, ValueOptionError
from .tuned import around, combinations, family, require

MAX_WIDTH = 16384
# Channels of one tile: wider pixels are split over programs.
_MAX_BLOCK_C = 1024
# Elements of one tile: 16 a thread for 4 warps, which keeps two 16-byte loads of bf16 a thread in flight.
_ELEMENTS = 2048
# Partial results are three floats a channel: of fewer pixels than this they would cost a fifth of the pixels or more.
_LEAST_CHUNK = 32
MERGE_ELEMENTS = 2048


@dataclass(frozen=True)
class GroupNormConfig:
    """``rows`` pixels by ``block_c`` channels a tile; ``steps`` tiles a program where the norm is applied; about
    ``programs`` programs for the statistics, which divide the pixels among them."""

    block_c: int
    rows: int
    steps: int
    programs: int
    num_warps: int

    def __post_init__(self) -> None:
        require(self, powers=("block_c", "rows", "steps", "programs"), tile=self.block_c * self.rows)
        if self.steps > 32:
            raise ValueOptionError(f"GroupNormConfig: `steps` are unrolled, at most 32; got {self.steps}")

    @property
    def per_warp(self) -> float:
        """Elements of a tile that a warp holds."""
        return self.block_c * self.rows / self.num_warps

    @property
    def merge_warps(self) -> int:
        """Warps of the merge, whose tile is always the same."""
        return min(4, self.num_warps)

    def chunk(self, pixels: int, samples: int) -> int:
        """Pixels of one partial result: whole tiles."""
        share = -(-pixels * samples // self.programs)
        return self.rows * max(1, -(-share // self.rows), -(-min(_LEAST_CHUNK, pixels) // self.rows))


@family("group_norm_silu", GroupNormConfig, limit=12)
def select(arch: str, *, width: int, itemsize: int) -> GroupNormConfig:
    """A tile is as many whole pixels as fill its threads; a clip gives each of 132 multiprocessors several programs."""
    if width > MAX_WIDTH:
        raise UnsupportedError(f"group_norm_silu: {width} channels exceed {MAX_WIDTH}; use impl='reference'")
    block_c = max(4, min(_MAX_BLOCK_C, 1 << max(width - 1, 0).bit_length()))
    if arch == "cpu":
        return GroupNormConfig(block_c, 16, 2, 4, 4)
    rows = _ELEMENTS // block_c
    return GroupNormConfig(block_c, rows, 4, 2048, 2 if arch.startswith("gfx") else 4)


@select.legality
def illegal(config: GroupNormConfig, arch: str, *, width: int, itemsize: int) -> str | None:
    return None if config.block_c >= min(width, _MAX_BLOCK_C) else f"`block_c` must cover {min(width, _MAX_BLOCK_C)}"


@select.neighbourhood
def candidates(arch: str, rule: GroupNormConfig, *, width: int, itemsize: int) -> Iterator[GroupNormConfig]:
    return combinations(
        rule,
        rows=around(rule.rows),
        steps=around(rule.steps, steps=2),
        programs=around(rule.programs),
        num_warps=around(rule.num_warps),
    )
