"""Tiles of the attention kernel, by architecture, head dimension and element size."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedError
from . import shared_memory_limit

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


def select(arch: str, *, head_dim: int, itemsize: int, aligned: bool, vectors: bool) -> AttentionConfig:
    """No spills and within shared memory everywhere (tests/static).

    ``aligned``: descriptors can address the views; ``vectors``: rows can be read 8 bytes or more at a time.
    """
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"spacetime_attention: impl 'triton' has head_dim up to {MAX_HEAD_DIM}, got {head_dim}; "
            "use impl='reference' or 'sdpa'"
        )
    block_d = max(16, 1 << (head_dim - 1).bit_length())
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
