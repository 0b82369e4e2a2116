"""The rule for "correct": against float64, no worse than twice eager's own error at the same dtype.

    max|y - ref64|  <=  2 * max|eager - ref64|  +  eps(dtype) * max|ref64|
    rms(y - ref64)  <=  2 * rms(eager - ref64)  +  eps(dtype) / 4 * rms(ref64)

``ref64`` is the oracle on the same inputs upcast to float64, ``eager`` the oracle at the inputs' dtype. NaN or
infinity where the oracle is finite fails, whatever the size. Integers and fp8 are codes that numbers were rounded
to: off by one where eager is too, or in one of a thousand.

Samples are drawn so that the order of a long sum does not matter much on a CPU. It does elsewhere: tensor cores add in
an order of their own and truncate, and a model's activations are of one sign, where a thousand values added one way
err several times as much as added another, and neither way is wrong. On a GPU, and on a model's own calls, fp32
accumulation in any order is therefore granted its statistical bound, on either line

    + 2⁻²⁴ * sqrt(terms) * Σ|a b|        (Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019, with λ = 1)

where the oracle has a function ``summed`` (``summed_backward`` for the gradients) that gives the last two factors.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .conditions import Surrounded, copy_layout, poisoned, products, surround, truncate_tf32

if TYPE_CHECKING:
    from ..schemas import Op


class Mismatch(AssertionError):
    """An output is further from float64 than the rule allows."""


def to_float64(value: Any) -> Any:
    """Floating tensors upcast to float64 (in lists too); everything else, codes in fp8 too, unchanged."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() and value.element_size() > 1 else value
    if isinstance(value, (list, tuple)):
        return type(value)(to_float64(item) for item in value)
    return value


def assert_close(
    out: Tensor,
    ref64: Tensor,
    eager: Tensor,
    label: str = "output",
    summed: Tensor | None = None,
) -> None:
    """Apply the rule; ``eager`` has the dtype whose rounding is the yardstick.

    ``summed``: ``sqrt(terms) * Σ|a b|`` of each element, where any order of its sum is granted.
    """
    if out.shape != ref64.shape:
        raise Mismatch(f"{label}: shape {list(out.shape)}, expected {list(ref64.shape)}")
    if out.dtype != eager.dtype:
        raise Mismatch(f"{label}: dtype {out.dtype}, expected {eager.dtype}")
    if out.numel() == 0:
        return
    if not eager.dtype.is_floating_point or eager.dtype.itemsize == 1:
        _assert_codes(_ordinals(out), _ordinals(ref64), _ordinals(eager), label)
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
        if summed is not None:
            allowed += 2.0**-24 * float(reduce(torch.where(finite, summed, 0.0)))
        if not error <= allowed:
            at = tuple(int(i) for i in (y - r).abs().flatten().argmax().unsqueeze(0))
            raise Mismatch(f"{label}: {name} error {error:.3e} over the allowed {allowed:.3e} (flat index {at[0]})")


def _ordinals(x: Tensor) -> Tensor:
    """Codes as consecutive integers: those of fp8 are a sign and a size."""
    if not x.is_floating_point():
        return x.long()
    bits = x.view(torch.uint8).long()
    return torch.where(bits < 128, bits, 128 - bits)


def _assert_codes(out: Tensor, ref64: Tensor, eager: Tensor, label: str) -> None:
    """Integers that float64's were rounded to: a number near the middle of two may go either way, and few are."""
    off, eager_off = ((x - ref64).abs() for x in (out, eager))
    wrong, allowed = int((off > 0).sum()), 2 * int((eager_off > 0).sum()) + off.numel() // 1000 + 1
    if int(off.max()) > 1 or wrong > allowed:
        raise Mismatch(f"{label}: {wrong} codes off by up to {int(off.max())}, over the allowed {allowed} off by 1")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def samples(
    op: Op, dtype: torch.dtype, device: torch.device | str = "cpu", head_dim: int | None = None
) -> Iterator[dict[str, Any]]:
    """The op's sample inputs: small, ragged, strided, with modulation and without. Kept beside its oracle.

    ``head_dim``: of every sample, for the ops that have one; None: a mix.
    """
    module = importlib.import_module(op.impls["reference"].partition(":")[0])
    forward = op.name.removesuffix("_backward")
    size = {} if op.heads is None or head_dim is None else {"head_dim": head_dim}
    found = module.samples if forward == op.name else getattr(module, "gradient_samples", module.samples)
    for kwargs in found(dtype, **size):
        if forward != op.name:
            kwargs = _with_gradients(getattr(module, forward), forward, kwargs)
        yield {name: move(value, torch.device(device)) for name, value in kwargs.items()}


def _with_gradients(function: Callable[..., Any], name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward sample as one of the backward op: random gradients of its outputs, all of its tensors wanted.

    Its own outputs too where the backward is given them: the oracle's.
    """
    from ..schemas import OPS

    op = OPS[name]
    generator = torch.Generator().manual_seed(1)
    outputs = _as_tuple(function(*op.bind(**kwargs)))
    grads = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    given: dict[str, Any] = {"outputs": list(outputs)} if op.saves_outputs else {}
    return {"grads": grads, **given, **kwargs, "needs": [kwargs[n] is not None for n in op.differentiable]}


def move(value: Any, device: torch.device) -> Any:
    """Tensors (in lists too) on ``device``, with their strides; everything else unchanged."""
    if isinstance(value, Tensor):
        return value if value.device == device else copy_layout(value, device)
    if isinstance(value, (list, tuple)):
        return type(value)(move(item, device) for item in value)
    return value


def _out_of_place(op: Op) -> Op | None:
    """What returns what ``op`` writes over its arguments: an op or an oracle of its own; None if ``op`` returns."""
    from ..schemas import OPS

    if not op.name.endswith("_"):
        return None
    name = op.name[:-1]
    oracle = op.impls["reference"].partition(":")[0]
    return OPS.get(name) or dataclasses.replace(op, name=name, impls={"reference": f"{oracle}:{name}"})


def product_modes(op: Op, impl: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """How fp32 products are to be computed in a check: IEEE, and TF32 too where the kernel follows that switch.

    Every kernel multiplies fp32 exactly (``input_precision="ieee"``), except the convolution on NVIDIA: TF32 where
    cuDNN would be allowed it, three TF32 products in place of one otherwise. An oracle names the operands of such a
    product in ``TF32_OPERANDS``.
    """
    follows = impl == "triton" and device.type == "cuda" and dtype == torch.float32 and bool(_tf32_operands(op))
    return ("ieee", "tf32") if follows and not torch.version.hip else ("ieee",)


def _tf32_operands(op: Op) -> tuple[str, ...]:
    module = importlib.import_module(op.impls["reference"].partition(":")[0])
    return tuple(getattr(module, "TF32_OPERANDS", ()))


def _summed(op: Op, args: tuple[Any, ...]) -> dict[int, Tensor]:
    """Output -> sqrt(terms) * Σ|a b| of each of its elements; empty for ops without long sums of products."""
    module = importlib.import_module(op.impls["reference"].partition(":")[0])
    function = getattr(module, "summed_backward" if op.name.endswith("_backward") else "summed", None)
    if function is None:
        return {}
    sums: dict[int, Tensor] = function(*to_float64(args))
    return sums


def check_call(
    op: Op,
    impl: str,
    args: tuple[Any, ...],
    label: str,
    call: Callable[..., Any] | None = None,
    mode: str = "ieee",
    *,
    oracle: Callable[..., Any] | None = None,
    oracle_device: torch.device | None = None,
    any_order: bool = False,
) -> None:
    """Run ``impl`` on one call's arguments, surrounded by poison, and apply the rule.

    In-place ops are judged by what they leave in their arguments: the oracle's out-of-place twin is used.

    Args:
        args: in schema order without ``impl``; they are copied and stay as they are.
        label: names the call in a Mismatch.
        call: what is judged, instead of the op's ``impl``.
        mode: one of ``product_modes``. In TF32 the yardstick is eager's error with the operands cut to TF32.
        oracle: instead of the op's: one that gives only what ``call`` gives.
        oracle_device: where the oracle computes; None: where the arguments are.
        any_order: grant any order of the sums that the oracle's ``summed`` gives: on a GPU, or a model's own call.
    Raises:
        Mismatch: the rule is broken, or the kernel wrote where it must not.
        Whatever ``impl`` raises.
    """
    from .. import dispatch

    call = call or dispatch.load(op, impl)
    twin = _out_of_place(op)
    reference = oracle or dispatch.load(twin or op, "reference")
    with products(conv=mode):
        surrounded: list[tuple[str, Surrounded]] = []
        given = tuple(surround(arg, surrounded, n) for n, arg in zip(op.arguments[:-1], args, strict=True))
        with poisoned():
            returned = call(*given)
        with products():
            args = args if oracle_device is None else move(args, oracle_device)
            outputs = _as_tuple(reference(*to_float64(args)))
            rounded = args
            if mode == "tf32":
                cut = _tf32_operands(op)
                rounded = tuple(
                    truncate_tf32(arg) if n in cut and isinstance(arg, Tensor) else arg
                    for n, arg in zip(op.arguments[:-1], args, strict=True)
                )
            eager = _as_tuple(reference(*rounded))
            sums = _summed(op, args) if any_order and not oracle else {}
    # What an in-place op writes over comes first in its schema.
    got = _as_tuple(returned) if twin is None else given[: len(outputs)]
    for position, (out, ref64, low) in enumerate(zip(got, outputs, eager, strict=True)):
        if isinstance(ref64, Tensor):
            assert_close(out.to(ref64.device), ref64, low, f"{label} output {position}", summed=sums.get(position))
    written = () if twin is None else op.arguments[: len(outputs)]
    for name, copy in surrounded:
        if damage := copy.damage(written=name in written):
            raise Mismatch(f"{label}: the kernel wrote over `{name}`: {damage}")


def check_op(
    op: Op,
    impl: str,
    device: torch.device | str,
    dtype: torch.dtype,
    call: Callable[..., Any] | None = None,
    *,
    partial: bool = False,
    head_dim: int | None = None,
) -> int:
    """Run every sample of ``op`` through ``impl`` and apply the rule; returns how many samples were checked.

    Arguments lie in poison, fresh memory is NaN, and fp32 products are fixed (``conditions``).
    ``partial``: samples that ``impl`` refuses are left out, as long as one is not. ``head_dim``: as for `samples`.
    """
    device = torch.device(device)
    count = 0
    for mode in product_modes(op, impl, device, dtype):
        for index, kwargs in enumerate(samples(op, dtype, device, head_dim)):
            label = f"{op.name} sample {index}" + (" with TF32 products" if mode == "tf32" else "")
            try:
                args = op.bind(**kwargs)
                check_call(op, impl, args, label, call, mode, any_order=device.type == "cuda")
            except UnsupportedError:
                if not partial:
                    raise
                continue
            count += 1
    if not count:
        raise UnsupportedError(f"{op.name}: impl {impl!r} refuses every sample")
    return count
