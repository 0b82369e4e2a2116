"""Configuration of qk_norm_rope: how many heads a program holds."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedError

MAX_TILE = 16384


@dataclass(frozen=True)
class Config:
    """A program holds ``block_heads`` heads of one token as two tiles of ``block_half`` columns, one a pair member."""

    block_heads: int
    block_half: int
    num_warps: int

    @property
    def tile(self) -> int:
        """Elements a program holds, padding included."""
        return self.block_heads * 2 * self.block_half


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def select(arch: str, *, heads: int, head_dim: int, whole_row: bool) -> Config:
    """All heads where one statistic spans them; else about 2 KB of them, so that no lane is padding.

    Sixteen elements a thread keep two 16-byte loads in flight; more threads only on rows too wide for that.
    """
    block_half = max(_power_of_two((head_dim + 1) // 2), 4)
    block_heads = _power_of_two(heads)
    if not whole_row:
        # The largest power of two that divides the head count, if it is worth a program: 24 heads are three times 8.
        dividing = heads & -heads
        block_heads = min(block_heads, max(dividing if dividing >= 4 else 8, 1), max(2048 // (2 * block_half), 1))
    tile = block_heads * 2 * block_half
    if tile > MAX_TILE:
        raise UnsupportedError(
            f"qk_norm_rope: {heads} heads of {head_dim} are padded to {tile} elements, over {MAX_TILE}; "
            "use impl='reference'"
        )
    threads = 64 if arch.startswith("gfx") else 32
    num_warps = max(1, min(16, tile // (threads * 16)))
    num_warps = 1 << (num_warps.bit_length() - 1)
    # More threads than pairs in a head: the compiler then loads a row that heads share in the layout of its use,
    # where it otherwise goes through shared memory and two barriers.
    return Config(block_heads, block_half, min(16, max(num_warps, 2 * block_half // threads)))


def tokens_per_chunk(arch: str) -> int:
    """Tokens that one program of the backward walks over: its row of weight gradients is written once for them."""
    return 2 if arch == "cpu" else 32
