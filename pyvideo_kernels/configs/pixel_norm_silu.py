"""Configuration of pixel_norm_silu: whole channel rows, several to a program."""

from __future__ import annotations

from ..errors import UnsupportedError
from . import row
from .row import MAX_WIDTH, RowConfig
from .tuned import family

__all__ = ["MAX_WIDTH", "RowConfig", "candidates", "select"]

# Elements of one program: 16 a thread for 4 warps, which keeps two 16-byte loads of bf16 a thread in flight.
_ELEMENTS = 2048


@family("pixel_norm_silu", RowConfig, limit=12)
def select(arch: str, *, width: int, itemsize: int) -> RowConfig:
    """Video channels are few (3 to 1024): a program takes as many pixels as fill its threads."""
    if width > MAX_WIDTH:
        raise UnsupportedError(f"pixel_norm_silu: rows of {width} exceed {MAX_WIDTH}; use impl='reference'")
    block_d = max(4, 1 << max(width - 1, 0).bit_length())
    if arch == "cpu":
        return RowConfig(block_d, 8, 4)
    rows = max(1, _ELEMENTS // block_d)
    threads_per_warp = 64 if arch.startswith("gfx") else 32
    num_warps = max(1, min(16, block_d * rows // (threads_per_warp * 16)))
    return RowConfig(block_d, rows, 1 << (num_warps.bit_length() - 1))


select.legality(row.illegal)
candidates = select.neighbourhood(row.nearby)
