"""External kernels that our ops are measured against: optional, found where they are installed, named with a version.

None is a dependency, and none is dropped in silence: a peer that cannot run here says why and how to get it.
"""

from __future__ import annotations

import torch

from . import attention, other, sparse
from .package import Peer as Peer
from .package import installed


def peers_for(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, Peer]:
    """Every peer of ``op`` by name, those that cannot run on ``device`` in ``dtype`` with ``why_not``."""
    if op == "spacetime_attention":
        found = attention.peers(device, dtype)
    elif op == "block_sparse_attention":
        found = sparse.peers(device, dtype)
    elif op in other.OPS:
        found = other.OPS[op](device, dtype)
    else:
        found = []
    return {peer.name: peer for peer in found}


def detect(load: bool = True) -> list[tuple[str, str | None, str | None]]:
    """``(name, version, why_not)`` of every external package.

    Args:
        load: import those that are installed, and say why where that fails; else only their versions are looked up.
    """
    rows: list[tuple[str, str | None, str | None]] = []
    for package in attention.PACKAGES + other.PACKAGES:
        if load:
            found = package.find()
            rows.append((package.name, found.version, found.why_not))
        else:
            version = installed(package.distribution)
            rows.append((package.name, version, None if version else package.missing()))
    return rows
