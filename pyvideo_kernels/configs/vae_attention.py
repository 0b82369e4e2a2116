"""Tiles of the VAE's one-head attention, by architecture, D and element size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UnsupportedError
from . import has_tma, shared_memory_limit
from .tuned import MAX_TILE_REGISTERS, around, combinations, family, require, threads

MAX_D = 1024


@dataclass(frozen=True)
class VaeAttentionConfig:
    """``block_m`` queries by ``block_n`` keys a step; results in columns of two powers of two, ``width`` and then
    ``width2`` (0: none); what of D they do not cover is other programs'.

    ``step``: 0 keeps the queries, whole; else scores are summed over pieces of so many columns, queries read anew.
    ``descriptors``: keys and values are moved by tensor descriptors (TMA) instead of pointers.
    """

    block_m: int
    block_n: int
    width: int
    width2: int
    step: int
    num_warps: int
    num_stages: int
    descriptors: bool = False

    def __post_init__(self) -> None:
        require(self, powers=("block_m", "block_n", "width"), at_least=16, tile=self.block_m * self.width)
        if self.width2:
            require(self, powers=("width2",), at_least=16)
        if self.step:
            require(self, powers=("step",), at_least=16)

    @property
    def columns(self) -> int:
        """Columns of the results that a program holds; the rest of D is other programs'."""
        return self.width + self.width2

    @property
    def per_warp(self) -> float:
        """Scores that a warp holds."""
        return self.block_m * self.block_n / self.num_warps


def split_width(d: int) -> tuple[int, int]:
    """Two powers of two that cover ``d``: 384 = 256 + 128, 96 = 64 + 32; one where it is a power up to 256.

    Wider ones are shared out over as few programs as hold up to 512 columns each.
    """
    columns = -(-d // -(-d // 512))
    first = max(16, min(256, 1 << (columns.bit_length() - 1)))
    rest = columns - first
    return first, max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0


@family("vae_attention", VaeAttentionConfig, limit=24)
def select(arch: str, *, d: int, itemsize: int, aligned: bool) -> VaeAttentionConfig:
    """No spills and within shared memory everywhere (tests/static); ``aligned``: descriptors can address k and v."""
    if d > MAX_D:
        raise UnsupportedError(f"vae_attention: impl 'triton' has D up to {MAX_D}, got {d}; use impl='sdpa'")
    width, width2 = split_width(d)
    if arch == "cpu":
        return VaeAttentionConfig(16, 16, width, width2, 64 if d > 512 else 0, 4, 1)
    if itemsize == 4:
        # IEEE products run on the ordinary FMA units, operands in registers: small tiles.
        return VaeAttentionConfig(16, 16, width, width2, 32 if d > 256 else 0, 8, 1)
    if arch.startswith("gfx"):
        return VaeAttentionConfig(64, 32 if d <= 384 else 16, width, width2, 64 if d > 512 else 0, 8, 1)
    if arch in ("sm_90", "sm_100", "sm_103"):
        if arch != "sm_90" and d > 384:
            # Tensor memory is 512 columns wide, scores included.
            width, width2 = (256, 0) if d <= 512 else (256, 128)
        if d > 384:
            return VaeAttentionConfig(64, 64, width, width2, 64, 8, 4, descriptors=aligned)
        return VaeAttentionConfig(128 if aligned else 64, 32, width, width2, 0, 8, 2, descriptors=aligned)
    if d > 512:
        return VaeAttentionConfig(64 if arch == "sm_80" else 32, 32, width, width2, 64, 8, 3)
    if arch == "sm_80":
        return VaeAttentionConfig(64, 32 if d <= 384 else 16, width, width2, 0, 8, 2)
    # 99 KB of shared memory.
    return VaeAttentionConfig(64 if d <= 384 else 32, 16, width, width2, 0, 8, 2)


@select.legality
def illegal(config: VaeAttentionConfig, arch: str, *, d: int, itemsize: int, aligned: bool) -> str | None:
    if not config.step and config.columns < d:
        return f"`width` and `width2` must cover D = {d} without a `step`"
    if config.descriptors and not aligned:
        return "descriptors cannot address these views"
    # A side of a box is at most 256.
    if config.descriptors and max(config.block_n, config.width) > 256:
        return "`block_n` and `width` of descriptors must be at most 256"
    return None


@select.neighbourhood
def candidates(
    arch: str, rule: VaeAttentionConfig, *, d: int, itemsize: int, aligned: bool
) -> Iterator[VaeAttentionConfig]:
    for config in combinations(
        rule,
        block_m=around(rule.block_m),
        block_n=around(rule.block_n),
        step=around(rule.step) if rule.step else (0, 64) if d % 64 == 0 else (0,),
        num_warps=[n for n in around(rule.num_warps) if n >= min(4, rule.num_warps)],
        num_stages=range(max(1, rule.num_stages - 1), rule.num_stages + 2),
        # fp32 products take operands in registers, which a descriptor cannot fill.
        descriptors=(True, False) if aligned and has_tma(arch) and itemsize == 2 else (False,),
    ):
        # Estimates, to spend the places on what can fit: scores and results in registers, keys and values in flight.
        registers = config.block_m * (config.columns + config.block_n) / threads(arch, config.num_warps)
        queries, piece = (0, config.step + config.block_m) if config.step else (config.block_m, 2 * d)
        shared = itemsize * (queries * d + config.num_stages * config.block_n * piece)
        fits = registers <= MAX_TILE_REGISTERS and shared <= shared_memory_limit(arch)
        if arch == "cpu" or fits:
            yield config
