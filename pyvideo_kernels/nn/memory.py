"""How much memory there is, what a computation takes of it, and whether an error says that it ran out."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CONTAINER = Path("/sys/fs/cgroup")
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch, a library under it, or Python says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None where nobody says."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        # What torch holds and nobody uses is free to us.
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as file:
            rows = dict(line.split(":", 1) for line in file)
        free = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        # A container has less, and ends a process that takes more without an error.
        most, used = (int((_CONTAINER / f"memory.{what}").read_text()) for what in ("max", "current"))
    except (OSError, ValueError):
        return free
    return min(free, max(0, most - used))


def release(device: torch.device) -> None:
    """Give back what an abandoned computation held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Meter(TorchDispatchMode):
    """Bytes that the results of torch's operations made inside hold: ``live`` now, ``peak`` at most.

    Scratch memory inside an operation is not seen. Any device; the device's own statistics are left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id_ for id_ in map(_identity, tree_leaves((args, kwargs))) if id_ is not None}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _identity(leaf) not in given:
                self._hold(leaf)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _identity(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None
