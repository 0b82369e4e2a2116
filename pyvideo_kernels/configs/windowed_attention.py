"""Boxes of the windowed attention kernels, by architecture, head dimension, element size and the sides of the grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ..errors import UnsupportedError, ValueOptionError
from . import has_tma, shared_memory_limit
from .spacetime_attention import MAX_HEAD_DIM
from .tuned import MAX_TILE_REGISTERS, combinations, family, require, threads

MAX_BACKWARD_HEAD_DIM = 128


@dataclass(frozen=True)
class WindowConfig:
    """Boxes of (time, height, width): ``query`` and ``key`` tokens, one a program's own, the other those of a step.

    ``descriptors``: boxes of keys are moved by tensor descriptors (TMA) instead of pointers.
    """

    query_t: int
    query_h: int
    query_w: int
    key_t: int
    key_h: int
    key_w: int
    block_d: int
    num_warps: int
    num_stages: int
    descriptors: bool = False

    def __post_init__(self) -> None:
        sides = ("query_t", "query_h", "query_w", "key_t", "key_h", "key_w")
        require(self, powers=sides, tile=prod(self.query) * self.block_d)
        require(self, powers=("block_d",), at_least=16)
        for name in ("query", "key"):
            if prod(getattr(self, name)) < 16:
                raise ValueOptionError(f"WindowConfig: a box has at least 16 tokens; got {name} {getattr(self, name)}")
        # Bit 31 is the sign, and a shift by 32 is none.
        if sum(self.key) > 31:
            raise ValueOptionError(
                f"WindowConfig: the sides of a key box are bits of one word, 31 in all; got {self.key}"
            )

    @property
    def query(self) -> tuple[int, int, int]:
        return self.query_t, self.query_h, self.query_w

    @property
    def key(self) -> tuple[int, int, int]:
        return self.key_t, self.key_h, self.key_w

    @property
    def per_warp(self) -> float:
        """Scores that a warp holds."""
        return prod(self.query) * prod(self.key) / self.num_warps


def box(tokens: int, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """``tokens`` as a box that is near a cube in what its windows overlap, and no longer than the grid needs."""
    # A word of bits has room for 16 + 8 + 4, whatever the grid.
    need = [min(1 << max(n - 1, 0).bit_length(), 16) for n in grid]
    sides = [1, 1, 1]
    # Width first: its tokens are neighbours in memory.
    while prod(sides) < tokens:
        axis = min((2, 1, 0), key=lambda a: (sides[a] >= need[a], sides[a] // (2 if a == 2 else 1)))
        sides[axis] *= 2
    return sides[0], sides[1], sides[2]


def _block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _config(
    m: int, n: int, warps: int, stages: int, *, head_dim: int, grid: tuple[int, int, int], descriptors: bool = False
) -> WindowConfig:
    return WindowConfig(*box(m, grid), *box(n, grid), _block_d(head_dim), warps, stages, descriptors)


@family("windowed_attention", WindowConfig, limit=40)
def select(arch: str, *, op: str, head_dim: int, itemsize: int, aligned: bool, t: int, h: int, w: int) -> WindowConfig:
    """No spills and within shared memory everywhere (tests/static); ``aligned``: descriptors can address the views."""
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"spacetime_attention: impl 'triton' has head_dim up to {MAX_HEAD_DIM}, got {head_dim}; "
            "use impl='reference'"
        )

    def config(m: int, n: int, warps: int, stages: int, descriptors: bool = False) -> WindowConfig:
        return _config(m, n, warps, stages, head_dim=head_dim, grid=(t, h, w), descriptors=descriptors)

    small, medium = head_dim <= 64, head_dim <= 128
    if arch == "cpu":
        return config(64, 64, 4, 1)
    if itemsize == 4:
        # IEEE products run on the ordinary FMA units, operands in registers: small tiles.
        return config(32, 16, 8, 1)
    if arch.startswith("gfx"):
        return config(128, 32, 4 if medium else 8, 1)
    if aligned and arch in ("sm_90", "sm_100", "sm_103"):
        return config(128, 64, 8, 3 if medium else 2, True)
    if small:
        return config(128, 32, 8, 2)
    return config(64, 32, 4 if medium else 8, 2)


@select.legality
def illegal(
    config: WindowConfig,
    arch: str,
    *,
    op: str = "",
    head_dim: int,
    itemsize: int,
    aligned: bool,
    t: int,
    h: int,
    w: int,
) -> str | None:
    if config.block_d != _block_d(head_dim):
        return f"`block_d` must be {_block_d(head_dim)} for head_dim {head_dim}"
    if config.descriptors and not aligned:
        return "descriptors cannot address these views"
    return None


@select.neighbourhood
def candidates(
    arch: str, rule: WindowConfig, *, op: str = "", head_dim: int, itemsize: int, aligned: bool, t: int, h: int, w: int
) -> Iterator[WindowConfig]:
    descriptors = (True, False) if aligned and has_tma(arch) and itemsize == 2 else (False,)
    yield from _nearby(arch, rule, itemsize, (t, h, w), descriptors)


@family("windowed_attention_backward", WindowConfig, limit=40)
def select_backward(
    arch: str, *, op: str, of: str, head_dim: int, itemsize: int, t: int, h: int, w: int
) -> WindowConfig:
    """``of``: "dq" (its queries a program, keys a step) or "dkv" (its keys a program, queries a step)."""
    if head_dim > MAX_BACKWARD_HEAD_DIM:
        raise UnsupportedError(
            f"spacetime_attention: the backward of impl 'triton' has head_dim up to {MAX_BACKWARD_HEAD_DIM}, got "
            f"{head_dim}; use impl='reference'"
        )

    def config(m: int, n: int, warps: int, stages: int) -> WindowConfig:
        return _config(m, n, warps, stages, head_dim=head_dim, grid=(t, h, w))

    small = head_dim <= 64
    if arch == "cpu":
        return config(64, 64, 4, 1)
    if itemsize == 4:
        return config(32 if of == "dq" else 16, 16, 8, 1)
    if arch.startswith("gfx"):
        return config(32, 32, 4, 1)
    if arch in ("sm_100", "sm_103"):
        if of == "dq":
            return config(128, 64, 8, 2) if small else config(64, 32, 4, 2)
        return config(32, 64, 8, 2) if small else config(64, 64, 8, 1)
    if arch == "sm_90":
        if of == "dq":
            return config(128 if small else 64, 64, 8, 2)
        return config(32, 64, 8, 2)
    if of == "dq":
        return config(64, 32, 4, 2) if small else config(64, 64, 8, 2)
    # Of 64 keys a program, the two accumulators and two score tiles are at the limit of what sm_80 has registers for.
    return config(64, 32, 8, 2) if small or arch == "sm_80" else config(32, 64, 8, 2)


@select_backward.legality
def illegal_backward(
    config: WindowConfig, arch: str, *, op: str = "", of: str, head_dim: int, itemsize: int, t: int, h: int, w: int
) -> str | None:
    if config.block_d != _block_d(head_dim):
        return f"`block_d` must be {_block_d(head_dim)} for head_dim {head_dim}"
    return "the backward has no descriptors" if config.descriptors else None


@select_backward.neighbourhood
def candidates_backward(
    arch: str, rule: WindowConfig, *, op: str = "", of: str, head_dim: int, itemsize: int, t: int, h: int, w: int
) -> Iterator[WindowConfig]:
    yield from _nearby(arch, rule, itemsize, (t, h, w), (False,))


def _nearby(
    arch: str, rule: WindowConfig, itemsize: int, grid: tuple[int, int, int], descriptors: tuple[bool, ...]
) -> Iterator[WindowConfig]:
    """Boxes half and twice as large, and as large in another shape; warps and stages."""
    m, n = prod(rule.query), prod(rule.key)
    for query in {rule.query, *(box(size, grid) for size in (m, 2 * m, m // 2)), *_shapes(rule.query)}:
        for key in {rule.key, *(box(size, grid) for size in (n, 2 * n, n // 2)), *_shapes(rule.key)}:
            if sum(key) > 31:
                continue
            for config in combinations(
                rule,
                query_t=[query[0]], query_h=[query[1]], query_w=[query[2]],
                key_t=[key[0]], key_h=[key[1]], key_w=[key[2]],
                num_warps=[4, 8],
                num_stages=range(1, rule.num_stages + 2),
                descriptors=descriptors,
            ):  # fmt: skip
                # Estimates, to spend the places on what can fit: scores and results in registers, keys in flight.
                registers = prod(query) * (config.block_d + prod(key)) / threads(arch, config.num_warps)
                shared = 2 * config.num_stages * prod(key) * config.block_d * itemsize
                if arch == "cpu" or (registers <= MAX_TILE_REGISTERS and shared <= shared_memory_limit(arch)):
                    yield config


def _shapes(sides: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """One axis halved, another doubled."""
    for a in range(3):
        for b in range(3):
            if a != b and sides[a] > 1:
                changed = list(sides)
                changed[a] //= 2
                changed[b] *= 2
                yield changed[0], changed[1], changed[2]
