"""Launch configurations: per op a frozen dataclass and a rule per architecture; tuned tables as JSON per GPU.

``configs/<op>.py`` has ``select(arch, **shape) -> Config``. ``arch`` is ``"sm_90"``, ``"gfx942"``, … as
`dispatch.arch_of` gives it, or ``"cpu"`` under the interpreter.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from torch import Tensor

_forced_arch: contextvars.ContextVar[str | None] = contextvars.ContextVar("forced_arch", default=None)


def arch_for(tensor: Tensor) -> str:
    """Architecture that launchers choose their configuration for."""
    forced = _forced_arch.get()
    if forced is not None:
        return forced
    from ..dispatch import arch_of

    return arch_of(tensor.device)


@contextlib.contextmanager
def forced_arch(arch: str) -> Iterator[None]:
    """Choose configurations as for ``arch``, whatever is present: how kernels are checked without a GPU."""
    token = _forced_arch.set(arch)
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
