"""The rule for "correct": against float64, no worse than twice eager's own error at the same dtype.

    max|y - ref64|  <=  2 * max|eager - ref64|  +  eps(dtype) * max|ref64|
    rms(y - ref64)  <=  2 * rms(eager - ref64)  +  eps(dtype) / 4 * rms(ref64)

``ref64`` is the oracle on the same inputs upcast to float64, ``eager`` the oracle at the inputs' dtype. NaN or
infinity where the oracle is finite fails, whatever the size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from ..schemas import Op


class Mismatch(AssertionError):
    """An output is further from float64 than the rule allows."""


def to_float64(value: Any) -> Any:
    """Floating tensors upcast to float64 (in lists too); everything else unchanged."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(to_float64(item) for item in value)
    return value


def assert_close(out: Tensor, ref64: Tensor, eager: Tensor, label: str = "output") -> None:
    """Apply the rule; ``eager`` has the dtype whose rounding is the yardstick."""
    if out.shape != ref64.shape:
        raise Mismatch(f"{label}: shape {list(out.shape)}, expected {list(ref64.shape)}")
    if out.dtype != eager.dtype:
        raise Mismatch(f"{label}: dtype {out.dtype}, expected {eager.dtype}")
    if out.numel() == 0:
        return
    y, r, e = out.double(), ref64.double(), eager.double()
    finite = torch.isfinite(r)
    same_special = torch.where(torch.isnan(r), torch.isnan(y), y == r)
    broken = torch.where(finite, ~torch.isfinite(y), ~same_special)
    if bool(broken.any()):
        where = tuple(int(i) for i in broken.nonzero()[0])
        raise Mismatch(f"{label}: {int(broken.sum())} non-finite or misplaced values, first at {where}")
    y, r, e = (torch.where(finite, t, 0.0) for t in (y, r, e))
    e = torch.where(torch.isfinite(e), e, r)
    eps = torch.finfo(eager.dtype).eps
    for name, reduce, band in (
        ("max", lambda t: t.abs().max(), eps),
        ("rms", lambda t: t.square().mean().sqrt(), eps / 4),
    ):
        error, allowed = float(reduce(y - r)), 2 * float(reduce(e - r)) + band * float(reduce(r))
        if not error <= allowed:
            at = tuple(int(i) for i in (y - r).abs().flatten().argmax().unsqueeze(0))
            raise Mismatch(f"{label}: {name} error {error:.3e} over the allowed {allowed:.3e} (flat index {at[0]})")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def samples(op: Op, dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
    """The op's sample inputs: small, ragged, strided, with modulation and without. Kept beside its oracle."""
    module = importlib.import_module(op.impls["reference"].partition(":")[0])
    forward = op.name.removesuffix("_backward")
    for kwargs in module.samples(dtype):
        if forward != op.name:
            kwargs = _with_gradients(getattr(module, forward), forward, kwargs)
        yield {name: _move(value, torch.device(device)) for name, value in kwargs.items()}


def _with_gradients(function: Callable[..., Any], name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward sample as one of the backward op: random gradients of its outputs, all of its tensors wanted."""
    from ..schemas import OPS

    op = OPS[name]
    generator = torch.Generator().manual_seed(1)
    outputs = _as_tuple(function(*op.bind(**kwargs)))
    grads = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    return {"grads": grads, **kwargs, "needs": [kwargs[n] is not None for n in op.differentiable]}


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        if device.type == "cpu":
            return value
        # Keep the strides: a strided view is often what a sample is about.
        out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return out.copy_(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_move(item, device) for item in value)
    return value


def _out_of_place(op: Op) -> Op | None:
    """The op that returns what ``op`` writes over its arguments; None if ``op`` itself returns."""
    from ..schemas import OPS

    return OPS[op.name[:-1]] if op.name.endswith("_") else None


def check_op(
    op: Op,
    impl: str,
    device: torch.device | str,
    dtype: torch.dtype,
    call: Callable[..., Any] | None = None,
    *,
    partial: bool = False,
) -> int:
    """Run every sample of ``op`` through ``impl`` and apply the rule; returns how many samples were checked.

    In-place ops are judged by what they leave in their arguments: the oracle's out-of-place twin is used.
    ``partial``: samples that ``impl`` refuses are left out, as long as one is not.
    """
    from .. import dispatch

    call = call or dispatch.load(op, impl)
    twin = _out_of_place(op)
    reference = dispatch.load(twin or op, "reference")
    count = 0
    for index, kwargs in enumerate(samples(op, dtype, device)):
        args = op.bind(**kwargs)
        outputs = _as_tuple(reference(*to_float64(args)))
        eager = _as_tuple(reference(*args))
        try:
            returned = call(*args)
        except UnsupportedError:
            if not partial:
                raise
            continue
        # What an in-place op writes over comes first in its schema.
        got = _as_tuple(returned) if twin is None else args[: len(outputs)]
        for position, (out, ref64, low) in enumerate(zip(got, outputs, eager, strict=True)):
            if isinstance(ref64, Tensor):
                assert_close(out, ref64, low, f"{op.name} sample {index} output {position}")
        count += 1
    if not count:
        raise UnsupportedError(f"{op.name}: impl {impl!r} refuses every sample")
    return count
