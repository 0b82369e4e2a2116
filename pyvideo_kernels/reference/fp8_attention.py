"""Oracle of fp8_attention, which is that of int8_attention; and its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .int8_attention import int8_attention as fp8_attention
from .int8_attention import samples as samples_of
from .int8_attention import summed as summed

__all__ = ["fp8_attention", "samples", "summed"]


def samples(dtype: torch.dtype, head_dim: int | None = None) -> Iterator[dict[str, Any]]:
    """Those of int8_attention, in e4m3. ``head_dim``: that of all samples; None: each has its own."""
    return samples_of(dtype, head_dim, "fp8")
