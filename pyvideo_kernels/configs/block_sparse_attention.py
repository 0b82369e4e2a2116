"""Configuration of block_sparse_attention: the caller's block is the tile of queries; steps and warps are ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import UnsupportedError
from . import has_tma, shared_memory_limit
from .spacetime_attention import MAX_HEAD_DIM
from .tuned import MAX_TILE_REGISTERS, around, combinations, family, require, threads


@dataclass(frozen=True)
class BlockConfig:
    """``key_t`` × ``key_h`` × ``key_w``: the box of keys taken at a step, a part of the caller's block.

    ``descriptors``: boxes of keys are moved by tensor descriptors (TMA) instead of pointers.
    """

    key_t: int
    key_h: int
    key_w: int
    block_d: int
    num_warps: int
    num_stages: int
    descriptors: bool = False

    def __post_init__(self) -> None:
        require(self, powers=("key_t", "key_h", "key_w"))
        require(self, powers=("block_d",), at_least=16, tile=self.keys * self.block_d)

    @property
    def keys(self) -> int:
        """Keys of a step."""
        return self.key_t * self.key_h * self.key_w

    @property
    def per_warp(self) -> float:
        """Elements of keys that a warp handles a step."""
        return self.keys * self.block_d / self.num_warps


def part(tile: tuple[int, int, int], tokens: int) -> tuple[int, int, int]:
    """``tile`` halved along time, then height, then width, until it holds no more than ``tokens``."""
    sides = list(tile)
    while sides[0] * sides[1] * sides[2] > tokens:
        axis = next(a for a in range(3) if sides[a] > 1)
        sides[axis] //= 2
    return sides[0], sides[1], sides[2]


def _block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


@family("block_sparse_attention", BlockConfig, limit=24)
def select(
    arch: str, *, head_dim: int, itemsize: int, aligned: bool, tile_t: int, tile_h: int, tile_w: int
) -> BlockConfig:
    """No spills and within shared memory everywhere (tests/static); ``aligned``: descriptors can address the views."""
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"block_sparse_attention: impl 'triton' has head_dim up to {MAX_HEAD_DIM}, got {head_dim}; "
            "use impl='reference'"
        )
    block_d = _block_d(head_dim)
    block = tile_t * tile_h * tile_w
    warps = 8 if block >= 128 or block_d > 128 else 4

    def config(keys: int, warps: int, stages: int, descriptors: bool = False) -> BlockConfig:
        return BlockConfig(*part((tile_t, tile_h, tile_w), keys), block_d, warps, stages, descriptors)

    if arch == "cpu":
        return config(32, 8, 1)
    if itemsize == 4:
        # IEEE products run on the ordinary FMA units, operands in registers: small steps.
        return config(16, 16, 1)
    if arch.startswith("gfx"):
        return config(32, warps, 1)
    if aligned and arch in ("sm_90", "sm_100", "sm_103"):
        return config(64, warps, 3 if block_d <= 128 else 2, True)
    return config(32, warps, 2)


@select.legality
def illegal(
    config: BlockConfig,
    arch: str,
    *,
    head_dim: int,
    itemsize: int,
    aligned: bool,
    tile_t: int,
    tile_h: int,
    tile_w: int,
) -> str | None:
    if config.block_d != _block_d(head_dim):
        return f"`block_d` must be {_block_d(head_dim)} for head_dim {head_dim}"
    if config.keys < 16:
        return "a step must have at least 16 keys"
    if tile_t % config.key_t or tile_h % config.key_h or tile_w % config.key_w:
        return f"a step must be a part of the block of {tile_t} x {tile_h} x {tile_w}"
    if config.descriptors and not aligned:
        return "descriptors cannot address these views"
    return None


@select.neighbourhood
def candidates(
    arch: str,
    rule: BlockConfig,
    *,
    head_dim: int,
    itemsize: int,
    aligned: bool,
    tile_t: int,
    tile_h: int,
    tile_w: int,
) -> Iterator[BlockConfig]:
    tile = tile_t, tile_h, tile_w
    for keys in around(rule.keys):
        key_t, key_h, key_w = part(tile, keys)
        for config in combinations(
            replace(rule, key_t=key_t, key_h=key_h, key_w=key_w),
            num_warps=[n for n in around(rule.num_warps) if n >= min(4, rule.num_warps)],
            num_stages=range(max(1, rule.num_stages - 1), rule.num_stages + 3),
            # fp32 products take operands in registers, which a descriptor cannot fill.
            descriptors=(True, False) if aligned and has_tma(arch) and itemsize == 2 else (False,),
        ):
            # Estimates: scores and results in registers, keys and values in flight.
            registers = tile_t * tile_h * tile_w * (config.block_d + config.keys) / threads(arch, config.num_warps)
            shared = 2 * config.num_stages * config.keys * config.block_d * itemsize
            if arch == "cpu" or (registers <= MAX_TILE_REGISTERS and shared <= shared_memory_limit(arch)):
                yield config
