"""Launch configurations: per op a frozen dataclass and a rule per architecture; tuned tables as JSON per GPU.

``configs/<op>.py`` has ``select(arch, **shape) -> Config`` and ``candidates(arch, **shape)``, what is worth timing
there. ``arch`` is ``"sm_90"``, ``"gfx942"``, … as `dispatch.arch_of` gives it, or ``"cpu"`` under the interpreter. As
`arch_for` gives it, it knows its card too: ``select`` then answers from ``configs/<gpu>.json``, if that has the shape
(see `tuned`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .tuned import Target as Target
from .tuned import forced_config as forced_config
from .tuned import slug

_forced_arch: contextvars.ContextVar[Target | None] = contextvars.ContextVar("forced_arch", default=None)


def arch_for(tensor: Tensor) -> Target:
    """Architecture, and card if there is one, that launchers choose their configuration for."""
    return _forced_arch.get() or target_of(tensor.device)


@functools.cache
def target_of(device: torch.device) -> Target:
    """Architecture and card of a device."""
    from ..dispatch import arch_of

    return Target(arch_of(device), slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else None)


@contextlib.contextmanager
def forced_arch(arch: str, gpu: str | None = None) -> Iterator[None]:
    """Choose configurations as for ``arch``, whatever is present: how kernels are checked without a GPU.

    ``gpu``: slug of the card whose table counts; None: rules alone.
    """
    token = _forced_arch.set(Target(arch, gpu))
    try:
        yield
    finally:
        _forced_arch.reset(token)


def has_tma(arch: str) -> bool:
    """Tensor descriptors are hardware TMA on sm_90 and later (not on the AMD targets)."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_").rstrip("af")) >= 90


def shared_memory_limit(arch: str) -> int:
    """Largest dynamic shared memory of one block, in bytes (CUDA C++ Programming Guide, technical specifications)."""
    if arch.startswith("gfx"):
        return 160 * 1024 if arch == "gfx950" else 64 * 1024
    return {"sm_80": 163, "sm_87": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227}.get(arch, 99) * 1024
