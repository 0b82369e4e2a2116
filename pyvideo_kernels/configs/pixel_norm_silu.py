"""Configuration of pixel_norm_silu: whole channel rows, several to a program."""

from __future__ import annotations

from . import row
from .row import MAX_WIDTH, RowConfig
from .tuned import family

__all__ = ["MAX_WIDTH", "RowConfig", "candidates", "select"]


@family("pixel_norm_silu", RowConfig, limit=12)
def select(arch: str, *, width: int, itemsize: int) -> RowConfig:
    """Video channels are few (3 to 1024)."""
    return row.pixels(arch, op="pixel_norm_silu", width=width, least=4)


select.legality(row.illegal)
candidates = select.neighbourhood(row.nearby)
