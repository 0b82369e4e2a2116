"""Kernels, bytes and FLOPs of a decode, counted on the meta device: no GPU, no memory, no arithmetic.

Every operation that reaches a device as a kernel is counted once: views, allocations and metadata are not. Its bytes
are those of each input that it reads (an expanded dimension once) and each output that it writes; what a kernel reads
again out of a cache is the cache's business. The count is of the program, not of a card: it says how many passes over
memory a decoder makes, and which ops make them.

    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKLWan().to(torch.bfloat16)
        with Traffic() as traffic:
            vae.decode(torch.empty(1, 16, 21, 60, 104, dtype=torch.bfloat16))
    traffic.bytes, traffic.kernels, traffic.flops
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
# Kernels none: allocations, and what only changes metadata without being marked a view.
_FREE = {
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default, _aten.detach.default, _aten.lift_fresh.default, _aten._unsafe_view.default,
    _aten._reshape_alias.default, _aten.alias.default,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One operation: its name, the bytes it reads and writes, its FLOPs (a multiply and an add are two)."""

    op: str
    read: int
    written: int
    flops: int


class Traffic(TorchDispatchMode):
    """Counts what runs within it; several decodes add up."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    @property
    def kernels(self) -> int:
        return len(self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.read + row.written for row in self.rows)

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    def by_op(self) -> dict[str, tuple[int, int, int]]:
        """op -> (kernels, bytes, FLOPs), the most bytes first."""
        out: dict[str, tuple[int, int, int]] = {}
        for row in self.rows:
            kernels, moved, flops = out.get(row.op, (0, 0, 0))
            out[row.op] = kernels + 1, moved + row.read + row.written, flops + row.flops
        return dict(sorted(out.items(), key=lambda item: -item[1][1]))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _FREE or func.is_view or func.namespace == "prim":
            return out
        inputs = list(_tensors((args, kwargs)))
        results = [tensor for tensor in _tensors(out) if not any(tensor is given for given in inputs)]
        changed = [given for given, argument in _with_schema(func, args, kwargs) if argument]
        # What is overwritten whole is not read; only in-place arithmetic reads its target, and is given it as an input.
        read = sum(map(touched, inputs))
        written = sum(map(touched, [*results, *changed]))
        if func is _aten.copy_.default:
            read -= touched(args[0])
        if read + written:
            self.rows.append(Row(_name(func), read, written, _flops(func, args, kwargs, out)))
        return out


def touched(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a view."""
    return prod(size for size, step in zip(tensor.shape, tensor.stride()) if step or size == 0) * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _with_schema(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
    """Each tensor argument, and whether the schema says that it is written."""
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value):
            yield tensor, written


def _name(func: Any) -> str:
    return str(func._schema.name)


# FLOPs --------------------------------------------------------------------------------------------------------------


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    ours = _OURS.get(_name(func).partition("::")[2]) if _name(func).startswith("pyvideo::") else None
    if ours is not None:
        names = [argument.name for argument in func._schema.arguments]
        return ours({**dict(zip(names, args)), **kwargs}, out)
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _conv(call: dict[str, Any], out: Any) -> int:
    """Every output element is a sum over the taps and channels of one filter (sub-pixels are outputs too)."""
    y = max(_tensors(out), key=Tensor.numel)
    filters = call["weight"].shape[0]
    if call.get("epilogue") in ("interleave", "pixel_shuffle"):
        return 2 * y.numel() * call["weight"][0].numel()
    return 2 * y.numel() // y.shape[-1] * filters * call["weight"][0].numel()


def _upsample(call: dict[str, Any], out: Any) -> int:
    """Phases: two taps a dimension that doubles, for each output element; all taps of time where that does not."""
    o, c, *taps = call["weight"].shape
    in_time = taps[0] if len(taps) == 3 else 1
    if in_time == 1:  # a frame that is doubled is convolved once
        return 2 * 16 * call["x"].numel() * o
    return 2 * out.numel() * c * (2 if call["time_factor"] == 2 else in_time) * 4


def _head(call: dict[str, Any], out: Any) -> int:
    return 2 * call["out"].numel() * call["weight"][0].numel()


def _attention(call: dict[str, Any], out: Any) -> int:
    b, t, s, d = call["q"].shape
    pairs = t * (t + 1) // 2 if call["causal"] else t
    return 4 * b * pairs * s * s * d


_OURS: dict[str, Callable[[dict[str, Any], Any], int]] = {
    "causal_conv3d": _conv,
    "upsample_conv2d": _upsample,
    "decode_head_": _head,
    "vae_attention": _attention,
}
