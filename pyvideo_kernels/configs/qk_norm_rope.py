"""Configuration of qk_norm_rope: how many heads a program holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UnsupportedError
from .tuned import around, combinations, family, require

MAX_TILE = 16384


@dataclass(frozen=True)
class Config:
    """A program holds ``block_heads`` heads of one token as two tiles of ``block_half`` columns, one a pair member."""

    block_heads: int
    block_half: int
    num_warps: int

    def __post_init__(self) -> None:
        require(self, powers=("block_heads", "block_half"), tile=self.tile)

    @property
    def per_warp(self) -> float:
        """Elements that a warp holds."""
        return self.tile / self.num_warps

    @property
    def tile(self) -> int:
        """Elements a program holds, padding included."""
        return self.block_heads * 2 * self.block_half


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _block_half(head_dim: int) -> int:
    return max(_power_of_two((head_dim + 1) // 2), 4)


@family("qk_norm_rope", Config, limit=12)
def select(arch: str, *, op: str, heads: int, head_dim: int, whole_row: bool, itemsize: int) -> Config:
    """All heads where one statistic spans them; else about 2 KB of them, so that no lane is padding.

    Sixteen elements a thread keep two 16-byte loads in flight; more threads only on rows too wide for that.
    """
    block_half = _block_half(head_dim)
    block_heads = _power_of_two(heads)
    if not whole_row:
        # The largest power of two that divides the head count, if it is worth a program: 24 heads are three times 8.
        dividing = heads & -heads
        block_heads = min(block_heads, max(dividing if dividing >= 4 else 8, 1), max(2048 // (2 * block_half), 1))
    tile = block_heads * 2 * block_half
    if tile > MAX_TILE:
        raise UnsupportedError(
            f"{op}: {heads} heads of {head_dim} are padded to {tile} elements, over {MAX_TILE}; use impl='reference'"
        )
    threads = 64 if arch.startswith("gfx") else 32
    num_warps = max(1, min(16, tile // (threads * 16)))
    num_warps = 1 << (num_warps.bit_length() - 1)
    # More threads than pairs in a head: the compiler then loads a row that heads share in the layout of its use,
    # where it otherwise goes through shared memory and two barriers.
    return Config(block_heads, block_half, min(16, max(num_warps, 2 * block_half // threads)))


@select.legality
def illegal(
    config: Config, arch: str, *, op: str, heads: int, head_dim: int, whole_row: bool, itemsize: int
) -> str | None:
    # One for q and k, which may differ in heads.
    if config.block_half != _block_half(head_dim):
        return f"`block_half` must be {_block_half(head_dim)} for head_dim {head_dim}"
    if whole_row and config.block_heads < heads:
        return f"`block_heads` must hold all {heads} heads, which share a statistic"
    return None


@select.neighbourhood
def candidates(
    arch: str, rule: Config, *, op: str, heads: int, head_dim: int, whole_row: bool, itemsize: int
) -> Iterator[Config]:
    return combinations(
        rule,
        block_heads=[rule.block_heads] if whole_row else around(rule.block_heads, steps=2),
        num_warps=around(rule.num_warps, steps=3),
    )


def tokens_per_chunk(arch: str) -> int:
    """Tokens that one program of the backward walks over: its row of weight gradients is written once for them."""
    return 2 if arch == "cpu" else 32


def tile_stages(arch: str) -> int:
    """Tokens of a tile in flight at once where a program walks over one: the next row is fetched while this is normed.

    Two on NVIDIA, by asynchronous copies to shared memory. AMD has registers for that alone, and spills.
    """
    return 2 if arch.startswith("sm_") else 1
