"""Which implementation each op would bind, for the plan line and ``pyvideo doctor``."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .. import _native, dispatch
from ..attention_choice import ATTENTION_OPS, AttentionChoice
from ..attention_text import choose
from ..error_types import UnsupportedError, UsageError
from ..schemas import OPS
from .problems import did_you_mean
from .settings import Settings


def forward_ops() -> list[str]:
    return [name for name in OPS if not name.endswith("_backward")]


def op_names(text: str) -> str | tuple[str, ...]:
    """``all``, or the names in a comma-separated list, checked."""
    if text == "all":
        return "all"
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in forward_ops():
            known = forward_ops()
            raise UsageError(f"--ops: there is no op {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    return names


def _chosen(ops: str | Iterable[str]) -> list[str]:
    return forward_ops() if ops == "all" else list(ops)


def _idle(choice: AttentionChoice | None) -> set[str]:
    """Ops that no run calls: updates in place, and attention that was not asked for."""
    return ({"qk_norm_rope_"} | ATTENTION_OPS) - set(() if choice is None else (*choice.ops(), *choice.prologues()))


def check(ops: str | Iterable[str], attention: str | Mapping[str, Any] | None, impl: str, device: torch.device) -> None:
    """Refuse, before loading, an explicit choice that this device or op cannot serve.

    Raises:
        UsageError, DeviceError: names the remedy.
    """
    wanted = _chosen(ops)
    from ..integrations.precision import refuse_unbuilt

    choice = choose(attention, "--attention")
    refuse_unbuilt(choice, "--attention")
    if impl == "auto":
        return
    have = [name for name in wanted if impl in OPS[name].impls]
    for name in have:
        dispatch.check_runs_on(OPS[name], impl, device)
    idle = _idle(choice)  # what a run never calls need not be there
    lacking = [name for name in wanted if impl not in OPS[name].impls and name not in idle]
    if lacking:
        remedy = f"add --ops {','.join(have)}, or --impl auto" if have else "use --impl auto"
        raise UsageError(f"--impl {impl}: {', '.join(lacking)} cannot run so; {remedy}")


def binding(
    name: str, device: torch.device, dtype: torch.dtype, args: Sequence[Any] | None = None
) -> tuple[str, list[tuple[str, bool, str]]]:
    """The implementation ``auto`` would try first and can have, and the whole walk with reasons.

    ``args``: of one call, in schema order, where the order depends on them.
    """
    rows = []
    for impl, usable, why in dispatch.explain(OPS[name], device, dtype, args):
        if impl == "cpu" and not _is_native(name, impl):
            why = "PyTorch's oneDNN"
        elif impl in ("cpu", "cuda"):
            # The compiled kernels are bound lazily: that a function is there does not say that they were built.
            try:
                _native.op(name, impl)
            except UnsupportedError as error:
                usable, why = False, str(error)
        rows.append((impl, usable, why))
    return next((impl for impl, usable, _ in rows if usable), "none"), rows


def _is_native(name: str, impl: str) -> bool:
    return OPS[name].impls[impl].startswith(f"{_native.__name__}:")


def summary(settings: Settings, device: torch.device, dtype: torch.dtype) -> str:
    """Which kernels, in a few words, and which attention if the model does not keep its own."""
    choice = choose(settings.attention)
    attention = "" if choice is None else f"; attention {choice}"
    names = [name for name in _chosen(op_names(settings.ops)) if name not in _idle(choice)]
    if settings.impl != "auto":
        return f"{len(names)} ops by {settings.impl}{attention}"
    counts = collections.Counter(binding(name, device, dtype)[0] for name in names)
    return f"{len(names)} ops: " + ", ".join(f"{count} {impl}" for impl, count in counts.most_common()) + attention


def attention_of(pipe: Any) -> AttentionChoice | None:
    """What the pipeline's self-attention was asked to be; None: the model's own."""
    from ..integrations import _models
    from ..integrations.swap import swapped

    found = (settings.attention for _, model in _models(pipe) for _, _, settings in swapped(model))
    return next((choice for choice in found if choice is not None), None)


def is_accelerated(pipe: Any) -> bool:
    """Whether some module of the pipeline already runs through our ops."""
    from ..integrations import _models
    from ..integrations.swap import swapped

    return any(True for _, model in _models(pipe) for _ in swapped(model))
