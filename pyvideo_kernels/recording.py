"""Op calls as a model makes them, kept to be made again: what ``pyvideo verify`` judges kernels on."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import dispatch
from .testing.conditions import copy_layout, extent

if TYPE_CHECKING:
    from .schemas import Op


@dataclass
class Call:
    """One kind of call: all with the same op, shapes, strides, alignments, dtypes and options.

    Args:
        op: the row of the contract.
        args: in schema order, without ``impl``, from the first such call, copied to host memory in their layout;
            None: they did not fit in the recorder's limit.
        device, dtype: of the call's first tensor of floats.
        head_dim: for the ops that have one.
        count: how many such calls were made.
    """

    op: Op
    args: tuple[Any, ...] | None
    device: torch.device
    dtype: torch.dtype
    head_dim: int | None
    text: str = field(repr=False)
    count: int = 1

    def __str__(self) -> str:
        return self.text


class Recorder:
    """Takes one call of each kind. Numbers (``eps``, ``scale``, ``sigma``) do not make a kind, their values may change
    from call to call; whether one is zero does.

    Args:
        limit: bytes of arguments to keep; later kinds are listed without.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._calls: dict[Any, Call] = {}
        self._lock = threading.Lock()

    @property
    def calls(self) -> list[Call]:
        """In the order in which each kind was first seen."""
        return list(self._calls.values())

    def note(self, op: Op, args: Sequence[Any]) -> None:
        """Called by dispatch before an op runs: in place, it would be too late afterwards."""
        signature = (op.name, *(_signature(arg) for arg in args))
        with self._lock:
            known = self._calls.get(signature)
            if known is not None:
                known.count += 1
                return
            first = dispatch.judged_tensor(tensors(args))
            size = sum(extent(tensor) * tensor.element_size() for tensor in tensors(args))
            kept = self.size + size <= self.limit
            if kept:
                self.size += size
            self._calls[signature] = Call(
                op, tuple(_keep(arg) for arg in args) if kept else None, first.device, first.dtype,
                op.head_dim(args), describe(op, args),
            )  # fmt: skip


def describe(op: Op, args: Sequence[Any]) -> str:
    """``x 2×5×96, scale 2×1×96, silu``: the tensors' sizes and the options that are on."""
    parts = []
    for name, arg in zip(op.arguments[:-1], args, strict=True):
        if isinstance(arg, Tensor):
            parts.append(f"{name} {'×'.join(map(str, arg.shape)) or '1'}")
        elif isinstance(arg, (list, tuple)) and any(isinstance(item, Tensor) for item in arg):
            parts.append(f"{name} {len(arg)}")
        elif isinstance(arg, (list, tuple)) and arg and not any(isinstance(item, float) for item in arg):
            parts.append(f"{name} {'×'.join(map(str, arg))}")
        elif arg is True:
            parts.append(name)
        elif isinstance(arg, str):
            parts.append(arg)
    return ", ".join(parts)


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, those in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        # Launchers choose vector widths and descriptors by the alignment of the data.
        return value.shape, value.stride(), value.dtype, value.device, value.data_ptr() % 16
    if isinstance(value, (list, tuple)):
        return tuple(_signature(item) for item in value)
    return value == 0.0 if isinstance(value, float) else value


def _keep(value: Any) -> Any:
    if isinstance(value, Tensor):
        return copy_layout(value.detach(), "cpu")
    if isinstance(value, (list, tuple)):
        return type(value)(_keep(item) for item in value)
    return value
