"""Thin modules over the ops: `StreamingVaeDecoder`, and the `TilePlan` that it may follow."""

from __future__ import annotations

from .streaming_vae_decoder import StreamingVaeDecoder as StreamingVaeDecoder
from .tiling import TilePlan as TilePlan

__all__ = ["StreamingVaeDecoder", "TilePlan"]
