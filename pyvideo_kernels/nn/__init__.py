"""Thin modules over the ops: `StreamingVaeDecoder`."""

from __future__ import annotations

from .streaming_vae_decoder import StreamingVaeDecoder as StreamingVaeDecoder

__all__ = ["StreamingVaeDecoder"]
