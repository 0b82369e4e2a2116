"""Tiles of upsample_conv2d: those of the convolution, over a box of small pixels in one phase."""

from __future__ import annotations

from . import causal_conv3d
from .causal_conv3d import ConvConfig
from .tuned import family


@family("upsample_conv2d", ConvConfig, limit=40)
def select(arch: str, *, c: int, o: int, itemsize: int, aligned: bool) -> ConvConfig:
    """No spills and within shared memory everywhere (tests/static); ``aligned``: descriptors can address the views."""
    return causal_conv3d.rule(arch, c=c, o=o, itemsize=itemsize, aligned=aligned)


@select.legality
def illegal(config: ConvConfig, arch: str, *, c: int, o: int, itemsize: int, aligned: bool) -> str | None:
    return causal_conv3d.bad_descriptors(config, aligned)


candidates = select.neighbourhood(causal_conv3d.nearby)
