"""Tiles of decode_head: a box of pixels by the output channels of kt frames, by architecture and channel counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import ValueOptionError
from . import shared_memory_limit
from .tuned import MAX_TILE_REGISTERS, around, combinations, family, require, threads


@dataclass(frozen=True)
class HeadConfig:
    """``block_h`` × ``block_w`` pixels, ``block_k`` input channels a step, along ``run`` frames.

    ``channels`` of the output stand kt times side by side, in columns of two powers of two, ``block_n`` and then
    ``block_n2`` (0: none); other channels are other programs'.
    """

    block_h: int
    block_w: int
    block_k: int
    channels: int
    block_n: int
    block_n2: int
    run: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        require(self, powers=("block_h", "block_w"), tile=self.block_h * self.block_w * (self.block_n + self.block_n2))
        require(self, powers=("block_k", "block_n"), at_least=16)
        if self.block_n2:
            require(self, powers=("block_n2",), at_least=16)
        if self.block_h * self.block_w < 16:
            raise ValueOptionError(f"HeadConfig: a box has at least 16 pixels; got {self.block_h} x {self.block_w}")
        if self.run < 1 or self.channels < 1:
            raise ValueOptionError(f"HeadConfig: `run` and `channels` are at least 1; got {self.run}, {self.channels}")

    @property
    def per_warp(self) -> float:
        """Results that a warp holds."""
        return self.block_h * self.block_w * (self.block_n + self.block_n2) / self.num_warps


def split_columns(columns: int) -> tuple[int, int]:
    """Two powers of two that cover them: 9 in 16, 36 in 32 + 16, 144 in 128 + 16."""
    first = max(16, 1 << (columns.bit_length() - 1))
    rest = columns - first
    return first, max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0


@family("decode_head_", HeadConfig, limit=24)
def select(arch: str, *, c: int, o: int, kt: int, itemsize: int) -> HeadConfig:
    """No spills and within shared memory everywhere (tests/static)."""
    amd = arch.startswith("gfx")
    # 48 channels (a patch of 4 x 4) of three frames are 144 columns. In fp32, and beyond, several programs share them.
    # Two accumulators cost more scalar registers than AMD has.
    most = max(1, (64 if amd or (itemsize == 4 and arch != "cpu") else 192) // kt)
    channels = -(-o // -(-o // most))
    n, n2 = split_columns(kt * channels)
    if amd and n2:
        n, n2 = 2 * n, 0
    block_k = 64 if c % 64 == 0 else 32 if c > 16 else 16
    # The frames before a run are read for it too: 18 for 16, and a stream's chunk is one run.
    run = 16
    if arch == "cpu":
        return HeadConfig(4, 8, min(block_k, 32), channels, n, n2, 2, 4, 1)
    if itemsize == 4:
        return HeadConfig(8, 8, min(block_k, 16 if amd else 32), channels, n, n2, run, 4, 2)
    warps = 4 if n <= 64 else 8
    if amd:
        return HeadConfig(8, 16, min(block_k, 32), channels, n, n2, run, warps, 2)
    if n > 64 and arch != "sm_90":
        block_k = min(block_k, 32)
    stages = 4 if shared_memory_limit(arch) > 99 << 10 and block_k * n < 64 * 128 else 3
    return HeadConfig(8, 16, block_k, channels, n, n2, run, warps, stages)


@select.legality
def illegal(config: HeadConfig, arch: str, *, c: int, o: int, kt: int, itemsize: int) -> str | None:
    if config.block_n + config.block_n2 < kt * config.channels:
        return f"`block_n` and `block_n2` must cover {kt} * {config.channels} columns"
    return None


@select.neighbourhood
def candidates(arch: str, rule: HeadConfig, *, c: int, o: int, kt: int, itemsize: int) -> Iterator[HeadConfig]:
    n = rule.block_n + rule.block_n2
    whole = 1 << (n - 1).bit_length()
    for split in sorted({(rule.block_n, rule.block_n2), (whole, 0)}):
        for config in combinations(
            replace(rule, block_n=split[0], block_n2=split[1]),
            block_h=around(rule.block_h),
            block_w=around(rule.block_w),
            block_k=[k for k in around(rule.block_k) if k < 2 * c],
            run=around(rule.run),
            num_warps=around(rule.num_warps),
            num_stages=range(max(1, rule.num_stages - 1), rule.num_stages + 2),
        ):
            pixels, columns = config.block_h * config.block_w, sum(split)
            registers = pixels * columns / threads(arch, config.num_warps)
            shared = config.num_stages * (pixels + columns) * config.block_k * itemsize
            if arch == "cpu" or (registers <= MAX_TILE_REGISTERS and shared <= shared_memory_limit(arch)):
                yield config
