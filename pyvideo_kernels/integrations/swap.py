"""How a module's forward is replaced in place, under the hooks that are there, and put back.

Nothing is wrapped and no class is touched: the module keeps its type, its parameters and its place in the tree, so
state dicts, LoRA, caches and offloading keep working. Only the innermost forward changes: the instance's own one, or
the one a hook of diffusers or accelerate has stored away. A replacement is a method bound to its module, which finds
everything else on the module it is bound to, so a deep copy is independent; a pickle is the stock module.

The ownership rule: a fused op that reads weights runs inside the forward of the module that owns them, because hooks
fetch, cast and evict weights around that forward. Extra arguments are passed to it by our own callers only.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attention_choice import AttentionChoice, LayerAttention
from ..dispatch import autocasting as autocasting
from ..errors import UnsupportedError

MARK = "_pyvideo_swap"
_tokens = itertools.count(1)
# (token of the settings, op, reason) -> how often a call went to the stock code.
_fallbacks: collections.Counter[tuple[int, str, str]] = collections.Counter()
# token of the settings -> the grid of tokens that a transformer with them was last called on.
_grids: dict[int, tuple[int, int, int]] = {}


@dataclass(frozen=True, eq=False)
class Settings:
    """What one call of accelerate() asked for; every module it swapped holds this."""

    ops: frozenset[str]
    attention: AttentionChoice | None = None
    impl: str = "auto"
    strict: bool = False
    # Names the counters: a number, so that compiled graphs see a constant.
    token: int = field(default_factory=lambda: next(_tokens))

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        copied = dataclasses.replace(self, token=next(_tokens))
        memo[id(self)] = copied
        return copied


@dataclass(frozen=True)
class Swap:
    """One module whose forward is to be replaced by ``forward(module, settings, *args, **kwargs)``.

    ``ops`` run inside that forward; a module that only hands arguments to the modules that run them has a ``note``.
    ``methods`` stand in for other methods of the instance: ``method(module, ...)``, which may keep what it learns in
    ``mark_of(module)``; ``forward`` is None where they are all. ``attention`` is what an attention module runs.
    """

    path: str
    module: nn.Module
    forward: Callable[..., Any] | None
    ops: tuple[str, ...]
    note: str = ""
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    attention: LayerAttention | None = None


@dataclass(frozen=True)
class Left:
    """Something a requested op could have served, and why it does not."""

    path: str
    op: str
    reason: str


@dataclass
class Plan:
    """What will be swapped, what is left although it was asked for, and what stays stock by design."""

    swaps: list[Swap] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)

    def extend(self, other: Plan) -> None:
        self.swaps += other.swaps
        self.left += other.left
        self.kept += other.kept


class Mark:
    """What a swapped module remembers: the settings, and what was replaced (None: its class's)."""

    def __init__(self, settings: Settings, original: Callable[..., Any] | None) -> None:
        self.settings = settings
        self.original = original
        self.methods: dict[str, Any] = {}
        # Parameter name -> (what it was made of, the weight in a kernel's layout): packing.py. Not of a copy.
        self.packed: dict[str, tuple[Any, Tensor]] = {}
        # Whether the denoising step that is running is a dense one; None: no step is known.
        self.dense_step: bool | None = None
        # What to take every step for, whatever the pipeline says; None: what it says.
        self.every_step: bool | None = None
        # A weak reference to the pipeline that was accelerated, whose scheduler can say the step. Not of a copy.
        self.pipeline: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        copied = Mark(copy.deepcopy(self.settings, memo), copy.deepcopy(self.original, memo))
        copied.methods = copy.deepcopy(self.methods, memo)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled module is the stock one: it must load where this package, or its version, is not the same.
        return _no_mark, ()


def _no_mark() -> None:
    return None


def mark_of(module: nn.Module) -> Mark | None:
    """What ``install`` left on a module; None if it is not swapped."""
    mark: Mark | None = module.__dict__.get(MARK)
    return mark


@functools.cache
def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(module, settings, ...)`` as ``forward(self, ...)``; one for all the modules it stands in for.

    Bound with types.MethodType, which deep-copies with its module, and which torch.compile recognises by its code: a
    functools.partial or a callable object would be guarded by identity, and every block compiled anew.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, getattr(self, MARK).settings, *args, **kwargs)

    signature = inspect.signature(function)
    module, _, *rest = signature.parameters.values()
    # The name stays "forward": a pickled bound method is looked up by it, and finds the forward of the class.
    forward.__module__, forward.__qualname__, forward.__doc__ = __name__, "forward", function.__doc__
    forward.__signature__ = signature.replace(parameters=[module, *rest])  # type: ignore[attr-defined]
    _ours.add(forward)
    return forward


_ours: weakref.WeakSet[Any] = weakref.WeakSet()


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, types.MethodType) and forward.__func__ in _ours


# Where the innermost forward lives ------------------------------------------------------------------------------


def _wrapper_of(forward: Any) -> str | None:
    """``"diffusers"`` or ``"accelerate"`` if ``forward`` is the outer shell their hooks install."""
    if not isinstance(forward, functools.partial):
        return None
    home = getattr(forward.func, "__module__", "")
    name = getattr(forward.func, "__qualname__", "")
    if home == "diffusers.hooks.hooks" and name.startswith("HookRegistry."):
        return "diffusers"
    if home == "accelerate.hooks" and name.startswith("add_hook_to_module."):
        return "accelerate"
    return None


def innermost(module: nn.Module) -> tuple[Any, str]:
    """``(holder, attribute)`` of the forward under every hook; the holder may be a hook's function reference."""
    holder: Any = module
    attribute = "forward"
    seen: set[str] = set()
    while True:
        shell = _wrapper_of(holder.__dict__.get(attribute))
        if shell is None or shell in seen:
            return holder, attribute
        seen.add(shell)
        if shell == "accelerate":
            holder, attribute = module, "_old_forward"
            continue
        registry: Any = getattr(module, "_diffusers_hook", None)
        if registry is None or not registry._fn_refs:
            return holder, attribute
        holder = registry._fn_refs[0]
        attribute = "forward" if holder.original_forward is None else "original_forward"


def _is_stock(forward: Any, module: nn.Module) -> bool:
    """Whether ``forward`` is the bound method of the module's own class."""
    return (
        isinstance(forward, types.MethodType)
        and forward.__self__ is module
        and forward.__func__ is type(module).forward
    )


def obstacle(module: nn.Module, methods: Iterable[str] = ()) -> str | None:
    """Why the forward of ``module`` (or these methods) cannot be replaced, or None. Our own earlier swap is none."""
    mark = mark_of(module)
    for name in methods:
        present = module.__dict__.get(name) if mark is None else mark.methods.get(name)
        if present is not None:
            return f"its {name} is already replaced by {getattr(present, '__module__', '?')}"
    holder, attribute = innermost(module)
    forward = holder.__dict__.get(attribute)
    if forward is None or _is_stock(forward, module) or _is_ours(forward):
        return None
    inner = forward.func if isinstance(forward, functools.partial) else forward
    name = getattr(inner, "__qualname__", type(inner).__name__)
    return f"its forward is already replaced by {getattr(inner, '__module__', '?')}.{name}"


# Install and remove ---------------------------------------------------------------------------------------------


def install(swap: Swap, settings: Settings) -> None:
    """Replace the innermost forward of ``swap.module``; an earlier swap of ours is removed first."""
    module = swap.module
    remove(module)
    holder, attribute = innermost(module)
    original = holder.__dict__.get(attribute)
    mark = module.__dict__[MARK] = Mark(settings, original)
    if swap.forward is not None:
        holder.__dict__[attribute] = types.MethodType(_as_method(swap.forward), module)
    for name, method in swap.methods.items():
        mark.methods[name] = module.__dict__.get(name)
        module.__dict__[name] = types.MethodType(method, module)


def remove(module: nn.Module) -> bool:
    """Undo ``install``; True if there was something to undo."""
    mark = module.__dict__.pop(MARK, None)
    if mark is None:
        return False
    holder, attribute = innermost(module)
    if _is_ours(holder.__dict__.get(attribute)):
        if mark.original is not None:
            holder.__dict__[attribute] = mark.original
        elif holder is module and attribute == "forward":
            del module.__dict__["forward"]
        else:
            # A hook was added over our forward: it keeps what it would have kept of a stock module.
            holder.__dict__[attribute] = types.MethodType(type(module).forward, module)
    for name, original in mark.methods.items():
        if original is None:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = original
    return True


def swapped(root: nn.Module) -> Iterator[tuple[str, nn.Module, Settings]]:
    """Every module under ``root`` whose forward is ours."""
    for path, module in root.named_modules():
        mark = module.__dict__.get(MARK)
        if mark is not None:
            yield path, module, mark.settings


def ours(module: Any, kind: type) -> bool:
    """Whether ``module`` is exactly a ``kind`` and takes the extra arguments of our forward."""
    return type(module) is kind and getattr(module, MARK, None) is not None


# Guards and counters --------------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A model on the meta device computes shapes, and does so by the same ops.
_DEVICES = ("cpu", "cuda", "meta")


def why_not(x: Tensor, *parameters: Tensor | None) -> str | None:
    """The per-call guard: why an op cannot take ``x`` and these weights, or None."""
    if x.device.type not in _DEVICES:
        return f"device {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"activation dtype {str(x.dtype).removeprefix('torch.')}"
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return "activation with a strided last dimension"
    for parameter in parameters:
        if parameter is None:
            continue
        # Quantised, sharded and packed weights are subclasses that only their own kernels can read.
        if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
            return f"weight is a {type(parameter).__name__}"
        if parameter.dtype not in _DTYPES:
            return f"weight dtype {str(parameter.dtype).removeprefix('torch.')}"
        if parameter.device != x.device:
            return "weight and activation on different devices"
    return None


def _count(token: int, op: str, reason: str) -> bool:
    # Under torch.compile this runs once, while tracing: a compiled fallback counts once per graph.
    _fallbacks[token, op, reason] += 1
    return True


# What torch.compiler.assume_constant_result sets; the decorator itself would import the compiler, a second of start.
_count._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fall_back(settings: Settings, op: str, reason: str) -> None:
    """Count a call that goes to the stock code; with ``strict`` refuse it."""
    if settings.strict:
        raise UnsupportedError(
            f"{op}: strict, and this call cannot run: {reason}; accelerate() without strict falls back"
        )
    _count(settings.token, op, reason)


def fallbacks(settings: Settings) -> dict[str, dict[str, int]]:
    """op -> reason -> calls that went to the stock code since these settings were installed."""
    out: dict[str, dict[str, int]] = {}
    for (token, op, reason), count in sorted(_fallbacks.items()):
        if token == settings.token:
            out.setdefault(op, {})[reason] = count
    return out


def saw(settings: Settings, grid: tuple[int, int, int]) -> None:
    """Remember the grid of a call, for the report; not from inside a compiled graph, which may serve many."""
    if not torch.compiler.is_compiling():
        _grids[settings.token] = grid


def seen(settings: Settings) -> tuple[int, int, int] | None:
    """The grid that a transformer was last called on with these settings."""
    return _grids.get(settings.token)
