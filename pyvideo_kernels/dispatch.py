"""Which implementation of an op runs, and why.

``impl="auto"`` walks a fixed order per device and takes the first implementation that can run the request; an
explicit ``impl`` runs or raises, it never falls back. A compiled kernel that nobody has run on an architecture is
unverified there: ``auto`` runs it only after a small self-check against the float64 oracle passed on this card, for
this dtype and head_dim. ``accelerate()`` and ``warmup()`` have the checks made before the first call; no check is made
while torch.compile traces or a CUDA graph is captured. No environment variable chooses a kernel.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import verdicts
from .errors import DeviceError, UnsupportedError, ValueOptionError

if TYPE_CHECKING:
    from .recording import Recorder
    from .schemas import Op

IMPLS = ("auto", "reference", "triton", "cuda", "cpu", "sdpa", "flash", "cudnn", "cublas")
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda", "triton", "reference"),
    "cpu": ("cpu", "reference"),
}

# (op, implementation) -> how often it ran; read by Report.calls().
_calls: collections.Counter[tuple[str, str]] = collections.Counter()
_functions: dict[tuple[str, str], Callable[..., Any]] = {}
# Re-entrant: a kernel under check may call another op.
_lock = threading.RLock()
_recorder: Recorder | None = None
_warned: set[tuple[str, str, str]] = set()


def arch_of(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"`` or ``"cpu"``."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def load(op: Op, impl: str) -> Callable[..., Any]:
    """The function behind ``impl``; raises UnsupportedError with the remedy when it cannot be had."""
    key = (op.name, impl)
    if key in _functions:
        return _functions[key]
    if impl not in op.impls:
        raise UnsupportedError(f"{op.name}: no implementation {impl!r}; there are {', '.join(op.impls)}")
    module_name, _, attribute = op.impls[impl].partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        remedy = "pip install triton (Linux only)" if impl == "triton" else "reinstall pyvideo-kernels"
        raise UnsupportedError(f"{op.name}: impl {impl!r} cannot be imported ({error}); {remedy}") from error
    function: Callable[..., Any] = getattr(module, attribute)
    _functions[key] = function
    return function


def judged_tensor(tensors: Iterable[Tensor]) -> Tensor:
    """The one whose dtype says what a kernel is judged at: the first of floats, before any of codes or indices."""
    first: Tensor | None = None
    for tensor in tensors:
        # e4m3 is a dtype of codes.
        if tensor.is_floating_point() and tensor.element_size() > 1:
            return tensor
        first = tensor if first is None else first
    if first is None:
        raise TypeError("an op was called without a tensor")
    return first


# What `judged_tensor` takes at once.
_WIDE = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for arg in args:
        for item in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(item, Tensor):
                yield item


def check_runs_on(op: Op, impl: str, device: torch.device) -> None:
    """Raise unless ``impl`` runs on tensors of this device at all."""
    if impl == "triton" and device.type == "cpu" and not interpreting():
        raise DeviceError(
            f"{op.name}: impl 'triton' needs CUDA or ROCm tensors; got {device} (TRITON_INTERPRET=1, set before "
            "Triton is imported, interprets it on the CPU)"
        )
    if impl == "cuda" and device.type != "cuda":
        raise DeviceError(f"{op.name}: impl 'cuda' needs CUDA tensors; got {device}")
    if impl == "cpu" and device.type != "cpu":
        raise DeviceError(f"{op.name}: impl 'cpu' needs CPU tensors; got {device}")
    if impl in verdicts.LIBRARIES and device.type != "cuda":
        raise DeviceError(f"{op.name}: impl {impl!r} needs CUDA tensors; got {device}")


def autocasting(x: Tensor) -> bool:
    """Whether autocast would choose another dtype for a product of ``x``; an op computes in the dtypes it is given."""
    # torch refuses the question about the meta device.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def run(op: Op, args: tuple[Any, ...]) -> Any:
    """Execute ``op`` on schema-ordered ``args``, the last of which is ``impl``."""
    inputs, impl = args[:-1], args[-1]
    if impl not in IMPLS:
        raise ValueOptionError(f"{op.name}: `impl` must be one of {', '.join(IMPLS)}; got {impl!r}")
    # Nearly always the first argument; this runs on every call, and a call may take less than a generator.
    first = inputs[0] if inputs else None
    tensor = first if isinstance(first, Tensor) and first.dtype in _WIDE else judged_tensor(_tensors(inputs))
    device = tensor.device
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        # It would reach the matrix products inside the oracle and the library calls, and change even the dtype that
        # the fake has promised.
        with torch.autocast(device.type, enabled=False):
            return _run(op, inputs, impl, tensor)
    return _run(op, inputs, impl, tensor)


def _run(op: Op, inputs: Sequence[Any], impl: str, tensor: Tensor) -> Any:
    device, dtype = tensor.device, tensor.dtype
    if _recorder is not None:
        _recorder.note(op, inputs)
    if impl != "auto":
        check_runs_on(op, impl, device)
        result = load(op, impl)(*inputs)
        _calls[op.name, impl] += 1
        return result
    reasons = []
    head_dim = None if op.heads is None else op.head_dim(inputs)
    for candidate in _ordered(op, device, dtype, head_dim, inputs)[0]:
        try:
            if verdicts.needs_check(candidate) and not trusted(op, candidate, device, dtype, head_dim):
                reasons.append(f"{candidate}: not verified on this device")
                continue
            result = load(op, candidate)(*inputs)
        except UnsupportedError as error:
            reasons.append(f"{candidate}: {error}")
            continue
        _calls[op.name, candidate] += 1
        return result
    raise UnsupportedError(f"{op.name}: no implementation can run this call; " + "; ".join(reasons))


def order(
    op: Op,
    device: torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    args: Sequence[Any] | None = None,
) -> tuple[str, ...]:
    """Implementations ``auto`` tries on ``device``, first choice first.

    ``dtype``, ``head_dim``: of the call, where a measurement changes the order for them. ``args``: of the call, in
    schema order, where an op's row has a function that puts the implementations in order for them.
    """
    return _ordered(op, device, dtype, head_dim, args)[0]


def _ordered(
    op: Op, device: torch.device, dtype: torch.dtype | None, head_dim: int | None, args: Sequence[Any] | None
) -> tuple[tuple[str, ...], str]:
    """`order`, and what the arguments have changed about it."""
    choices = op.auto.get(device.type) or AUTO_ORDER.get(device.type, ("reference",))
    if "flash" in choices and dtype is not None and head_dim is not None:
        from .ops import attention_libraries

        choices = attention_libraries.in_order(choices, device, dtype, head_dim)
    choices, why = _built_for(op, choices), ""
    if op.in_order and device.type in op.in_order_on and args is not None:
        choices, why = _in_order(op.in_order)(choices, args)
    return choices, why


# Implementations of a row, and an order -> those of the order that the row has. The row's mapping is held, so that no
# other gets its id.
_orders: dict[tuple[int, tuple[str, ...]], tuple[Any, tuple[str, ...]]] = {}


def _built_for(op: Op, choices: tuple[str, ...]) -> tuple[str, ...]:
    key = (id(op.impls), choices)
    known = _orders.get(key)
    if known is None:
        known = _orders[key] = op.impls, tuple(impl for impl in choices if impl in op.impls)
    return known[1]


@functools.cache
def _in_order(place: str) -> Callable[..., tuple[tuple[str, ...], str]]:
    module, _, function = place.partition(":")
    found: Callable[..., tuple[tuple[str, ...], str]] = getattr(importlib.import_module(module), function)
    return found


def _require(op: Op, impl: str, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str:
    """What ``impl`` hands over to, empty if it is ours; raises UnsupportedError where that does not serve this."""
    if impl in ("cudnn", "cublas"):
        module = importlib.import_module(op.impls[impl].partition(":")[0])
        return str(getattr(module, f"{impl}_for_auto")())
    if impl != "flash":
        return ""
    from .ops import flash_attention

    return flash_attention.label(flash_attention.library_for(device, dtype, head_dim))


_WHAT = {
    "reference": "eager PyTorch",
    "cpu": "C++, in the compiled extension",
}


def explain(
    op: Op, device: torch.device, dtype: torch.dtype = torch.bfloat16, args: Sequence[Any] | None = None
) -> list[tuple[str, bool, str]]:
    """For each implementation in ``auto``'s order: would it be bound on ``device``, and why or why not.

    Attention is judged at the larger head_dim of those that models have. ``args``: of one call, in schema order: the
    order for it, and in the first row what has changed the order.
    """
    rows = []
    head_dim = None if op.heads is None else HEAD_DIMS[-1]
    choices, changed = _ordered(op, device, dtype, head_dim, args)
    for impl in choices:
        try:
            library = _require(op, impl, device, dtype, head_dim)
            load(op, impl)
        except UnsupportedError as error:
            rows.append((impl, False, str(error)))
            continue
        if impl == "sdpa":
            from .ops import attention_libraries

            # The one head of a VAE is wider than any that a transformer has.
            rows.append((impl, True, attention_libraries.describe_sdpa(device, dtype, head_dim or 384)))
        elif library:
            usable, why = _standing(op, impl, device, dtype)
            rows.append((impl, usable, f"{library}, {why}"))
        elif not verdicts.needs_check(impl):
            rows.append((impl, True, _WHAT.get(impl, "built")))
        elif device.type == "cpu":
            rows.append((impl, True, "tested on this architecture"))
        else:
            rows.append((impl, *_standing(op, impl, device, dtype)))
    if changed:
        impl, usable, why = rows[0]
        rows[0] = (impl, usable, f"{why}; {changed}")
    return rows


def _standing(op: Op, impl: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether ``auto`` would try a kernel that needs a check, and what is known of it."""
    arch = arch_of(device)
    here = verdicts.head_dims_known(op, impl, arch, dtype)
    passed = [head_dim for head_dim, verdict in here.items() if verdict]
    failed = [head_dim for head_dim, verdict in here.items() if not verdict]
    if failed:
        return bool(passed), f"self-check failed on this card{_for(failed)}" + (
            f", passed{_for(passed)}" if passed else ""
        )
    if passed:
        return True, f"self-check passed on this card{_for(passed)}"
    for head_dim in (None,) if op.heads is None else HEAD_DIMS:
        if entry := verdicts.committed(op, impl, arch, dtype, head_dim):
            return True, f"verified on {entry['gpu']}, {entry['date']}"
    return True, "unverified: self-check on first use"


def _for(head_dims: list[int | None]) -> str:
    known = ", ".join(str(head_dim) for head_dim in head_dims if head_dim is not None)
    return f" for head_dim {known}" if known else ""


# Calls ---------------------------------------------------------------------------------------------------------


def calls() -> dict[tuple[str, str], int]:
    """How often each (op, implementation) ran since the process began. Graph replays do not count."""
    return dict(_calls)


@contextlib.contextmanager
def recording(limit: int = 4 << 30) -> Iterator[Recorder]:
    """Keep the arguments of every kind of op call made inside, in any thread: see `recording.Recorder`.

    Args:
        limit: bytes of arguments that are kept, in host memory.
    """
    global _recorder
    from .recording import Recorder

    before, _recorder = _recorder, Recorder(limit)
    try:
        yield _recorder
    finally:
        _recorder = before


# Self-check ----------------------------------------------------------------------------------------------------

HEAD_DIMS = (64, 128)
"""Those of the models this package knows; checked where nobody says which."""

# (op, implementation, device, dtype, head_dim) -> verdict in this process.
_verdicts: dict[tuple[str, str, torch.device, torch.dtype, int | None], bool] = {}


def trusted(op: Op, impl: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> bool:
    """Whether ``auto`` may run ``impl`` here; makes the self-check if nothing is known yet and now is a time for it."""
    if not verdicts.needs_check(impl) or device.type == "cpu":
        return True
    settled = (op.name, impl, device, dtype, head_dim)
    verdict = _verdicts.get(settled)
    if verdict is not None:
        return verdict
    _require(op, impl, device, dtype, head_dim)
    load(op, impl)  # raises where there is nothing to verify, and imports the compiler whose version the key has
    arch = arch_of(device)
    with _lock:
        verdict = _verdicts.get(settled)
        if verdict is None:
            key = verdicts.key_of(op, impl, arch, dtype, head_dim)
            verdict = verdicts.read().get(key)
        if verdict is None and verdicts.committed(op, impl, arch, dtype, head_dim) is not None:
            verdict = True
        if verdict is None:
            if occasion := _no_time_for_a_check(device):
                warn_once(
                    op.name, impl, f"{op.name}: impl {impl!r} is unverified on {arch} and cannot be checked "
                    f"{occasion}, which goes on without it; accelerate() or warmup() on this device, or one call of "
                    "the op, settles it before"
                )  # fmt: skip
                return False
            try:
                verdict = self_check(op, impl, device, dtype, head_dim)
                verdicts.remember(key, verdict)
            except UnsupportedError:
                # Not built or not installed here: the next implementation serves, and nothing is written, for the
                # next process may have it.
                verdict = False
            except torch.OutOfMemoryError:
                return False  # says nothing about the kernel; checked again at the next call
            except Exception as error:
                # A kernel that does not compile or launch must not take the run down. The driver or an earlier
                # failure may be to blame, so this too holds for this process alone.
                _warn_failed(op, impl, device, error)
                verdict = False
        _verdicts[settled] = verdict
    return verdict


def _no_time_for_a_check(device: torch.device) -> str:
    """Why a check cannot be made now, empty if it can.

    A check allocates and waits for the device. A capture on this thread's stream forbids both. One on another thread
    does too if it was begun in CUDA's global capture mode (``torch.cuda.graph``'s default), and cannot be seen from
    here; any allocation would break it as well, so threads must not race with such a capture anyway.
    """
    if torch.compiler.is_compiling():
        return "while torch.compile traces"
    if device.type == "cuda" and _capturing(device):
        return "during a CUDA graph capture"
    return ""


def _capturing(device: torch.device) -> bool:
    # The current stream is one per device, and the call's device need not be the current one.
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def self_check(op: Op, impl: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> bool:
    """Whether ``impl`` is right on the op's sample inputs, against the float64 oracle; warns where it is not.

    Raises what ``impl`` raises where it cannot be checked at all.
    """
    from .testing.compare import Mismatch, check_op

    try:
        # A library must be right in what it takes; ours must take every sample.
        options: dict[str, Any] = {"partial": True} if impl in verdicts.LIBRARIES else {}
        check_op(op, impl, device, dtype, head_dim=head_dim, **options)
    except Mismatch as error:
        _warn_failed(op, impl, device, error)
        return False
    return True


def _warn_failed(op: Op, impl: str, device: torch.device, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}"
    warn_once(
        op.name, impl, f"{op.name}: impl {impl!r} failed its self-check on {arch_of(device)}, and `auto` goes on to "
        f"the next implementation: {reason}"
    )  # fmt: skip


def settle(op: Op, impl: str, device: torch.device, dtype: torch.dtype, head_dim: int | None, verdict: bool) -> None:
    """Take a verdict reached elsewhere for this process."""
    _verdicts[op.name, impl, device, dtype, head_dim] = verdict


def forget() -> None:
    """Drop what this process knows of verdicts and has warned of; the records on disk stay."""
    with _lock:
        _verdicts.clear()
        _warned.clear()


def warn_once(op: str, impl: str, message: str) -> None:
    if (op, impl, message) not in _warned:
        _warned.add((op, impl, message))
        warnings.warn(message, RuntimeWarning, stacklevel=3)
