"""Tiles and boxes of the attention kernels on 8-bit codes, by architecture, head dimension and dtype of the values."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import UnsupportedError
from . import has_tma, shared_memory_limit
from .spacetime_attention import MAX_HEAD_DIM, AttentionConfig
from .tuned import MAX_TILE_REGISTERS, around, combinations, family, threads
from .windowed_attention import WindowConfig, box

# Matrix instructions take 32 bytes of codes at a time.
_MIN_BLOCK_D = 32


def _block_d(head_dim: int) -> int:
    return max(_MIN_BLOCK_D, 1 << (head_dim - 1).bit_length())


def has_e4m3(arch: str) -> bool:
    """Whether matrix instructions take e4m3 as `torch.float8_e4m3fn` has it; gfx942's is another format (fnuz)."""
    return arch in ("cpu", "gfx950") or (arch.startswith("sm_") and int(arch[3:]) >= 89)


def _refuse_wide(head_dim: int) -> None:
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"8-bit attention: impl 'triton' has head_dim up to {MAX_HEAD_DIM}, got {head_dim}; use impl='reference'"
        )


@family("int8_attention", AttentionConfig, limit=40)
def select(arch: str, *, head_dim: int, itemsize: int, aligned: bool) -> AttentionConfig:
    """No spills and within shared memory everywhere (tests/static).

    ``itemsize``: of the values; ``aligned``: descriptors can address keys and values.
    """
    _refuse_wide(head_dim)
    block_d = _block_d(head_dim)
    small, medium = block_d <= 64, block_d <= 128
    if arch == "cpu":
        return AttentionConfig(32, 32, block_d, 4, 1)
    if itemsize == 4:
        # IEEE products run on the ordinary FMA units, operands in registers: small tiles.
        return AttentionConfig(32, 16, block_d, 8, 1)
    if arch.startswith("gfx"):
        return AttentionConfig(128, 32, block_d, 4 if medium else 8, 1)
    if aligned and arch in ("sm_90", "sm_100", "sm_103"):
        return AttentionConfig(128, 128 if medium else 64, block_d, 8, 3 if medium else 2, descriptors=True)
    if small:
        return AttentionConfig(128, 64, block_d, 8, 3)
    return AttentionConfig(64, 32, block_d, 4 if medium else 8, 2)


@select.legality
def illegal(config: AttentionConfig, arch: str, *, head_dim: int, itemsize: int, aligned: bool) -> str | None:
    if config.block_d != _block_d(head_dim):
        return f"`block_d` must be {_block_d(head_dim)} for head_dim {head_dim}"
    if config.descriptors and not aligned:
        return "descriptors cannot address these views"
    # A box has at most 256 rows.
    if config.descriptors and config.block_n > 256:
        return "`block_n` of descriptors must be at most 256"
    return None


@select.neighbourhood
def candidates(
    arch: str, rule: AttentionConfig, *, head_dim: int, itemsize: int, aligned: bool
) -> Iterator[AttentionConfig]:
    for config in combinations(
        rule,
        block_m=around(rule.block_m),
        block_n=around(rule.block_n, steps=2),
        num_warps=[n for n in around(rule.num_warps) if n >= min(4, rule.num_warps)],
        num_stages=range(max(1, rule.num_stages - 1), rule.num_stages + 3),
        descriptors=(True, False) if aligned and has_tma(arch) and itemsize == 2 else (False,),
    ):
        if _fits(arch, config.block_m, config.block_n, config.block_d, config.num_warps, config.num_stages, itemsize):
            yield config


@family("int8_windowed_attention", WindowConfig, limit=40)
def select_windowed(arch: str, *, head_dim: int, itemsize: int, aligned: bool, t: int, h: int, w: int) -> WindowConfig:
    """As `select`, in boxes of the grid (t, h, w)."""
    _refuse_wide(head_dim)
    block_d = _block_d(head_dim)
    small, medium = block_d <= 64, block_d <= 128

    def config(m: int, n: int, warps: int, stages: int, descriptors: bool = False) -> WindowConfig:
        return WindowConfig(*box(m, (t, h, w)), *box(n, (t, h, w)), block_d, warps, stages, descriptors)

    if arch == "cpu":
        return config(32, 32, 4, 1)
    if itemsize == 4:
        return config(32, 16, 8, 1)
    if arch.startswith("gfx"):
        return config(128, 32, 4 if medium else 8, 1)
    if aligned and arch in ("sm_90", "sm_100", "sm_103"):
        return config(128, 64, 8, 3 if medium else 2, True)
    if small:
        return config(128, 32, 8, 2)
    return config(64, 32, 4 if medium else 8, 2)


@select_windowed.legality
def illegal_windowed(
    config: WindowConfig, arch: str, *, head_dim: int, itemsize: int, aligned: bool, t: int, h: int, w: int
) -> str | None:
    if config.block_d != _block_d(head_dim):
        return f"`block_d` must be {_block_d(head_dim)} for head_dim {head_dim}"
    if config.descriptors and not aligned:
        return "descriptors cannot address these views"
    return None


@select_windowed.neighbourhood
def candidates_windowed(
    arch: str, rule: WindowConfig, *, head_dim: int, itemsize: int, aligned: bool, t: int, h: int, w: int
) -> Iterator[WindowConfig]:
    m = rule.query_t * rule.query_h * rule.query_w
    n = rule.key_t * rule.key_h * rule.key_w
    for queries in around(m):
        for keys in around(n):
            query, key = box(queries, (t, h, w)), box(keys, (t, h, w))
            if min(queries, keys) < 16 or sum(key) > 31:
                continue
            for config in combinations(
                rule,
                query_t=[query[0]], query_h=[query[1]], query_w=[query[2]],
                key_t=[key[0]], key_h=[key[1]], key_w=[key[2]],
                num_warps=[4, 8],
                num_stages=range(1, rule.num_stages + 2),
                descriptors=(True, False) if aligned and has_tma(arch) and itemsize == 2 else (False,),
            ):  # fmt: skip
                if _fits(arch, queries, keys, config.block_d, config.num_warps, config.num_stages, itemsize):
                    yield config


def _fits(arch: str, m: int, n: int, block_d: int, warps: int, stages: int, itemsize: int) -> bool:
    """Estimates, to spend the places on what can fit: scores and results in registers, keys and values in flight."""
    registers = m * (block_d + n) / threads(arch, warps)
    shared = stages * n * block_d * (itemsize + 1)
    return arch == "cpu" or (registers <= MAX_TILE_REGISTERS and shared <= shared_memory_limit(arch))
