"""Which implementation of an op runs, and why.

``impl="auto"`` walks a fixed order per device and takes the first implementation that can run the request; an
explicit ``impl`` runs or raises, it never falls back. A compiled kernel that nobody has run on an architecture is
unverified there: ``auto`` runs it only after a small self-check against the float64 oracle passed on this card.
No environment variable chooses a kernel.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib
import json
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import DeviceError, UnsupportedError, ValueOptionError

if TYPE_CHECKING:
    from .schemas import Op

IMPLS = ("auto", "reference", "triton", "cuda", "cpu", "sdpa")
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda", "triton", "reference"),
    "cpu": ("cpu", "reference"),
}

# (op, implementation) -> how often it ran; read by Report.calls().
_calls: collections.Counter[tuple[str, str]] = collections.Counter()
_functions: dict[tuple[str, str], Callable[..., Any]] = {}
_lock = threading.Lock()
_warned: set[tuple[str, str]] = set()


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


def _first_tensor(args: Iterable[Any]) -> Tensor:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, (list, tuple)):
            for item in arg:
                if isinstance(item, Tensor):
                    return item
    raise TypeError("an op was called without a tensor")


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


def run(op: Op, args: tuple[Any, ...]) -> Any:
    """Execute ``op`` on schema-ordered ``args``, the last of which is ``impl``."""
    *inputs, impl = args
    if impl not in IMPLS:
        raise ValueOptionError(f"{op.name}: `impl` must be one of {', '.join(IMPLS)}; got {impl!r}")
    tensor = _first_tensor(inputs)
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind):
        # An op computes in the dtypes it is given. Autocast would reach the matrix products inside the oracle and the
        # library calls, and change even the dtype that the fake has promised.
        with torch.autocast(kind, enabled=False):
            return _run(op, inputs, impl, tensor)
    return _run(op, inputs, impl, tensor)


def _run(op: Op, inputs: list[Any], impl: str, tensor: Tensor) -> Any:
    if impl != "auto":
        check_runs_on(op, impl, tensor.device)
        result = load(op, impl)(*inputs)
        _calls[op.name, impl] += 1
        return result
    reasons = []
    for candidate in order(op, tensor.device):
        try:
            if not trusted(op, candidate, tensor):
                reasons.append(f"{candidate}: not verified on this device")
                continue
            result = load(op, candidate)(*inputs)
        except UnsupportedError as error:
            reasons.append(f"{candidate}: {error}")
            continue
        _calls[op.name, candidate] += 1
        return result
    raise UnsupportedError(f"{op.name}: no implementation can run this call; " + "; ".join(reasons))


def order(op: Op, device: torch.device) -> tuple[str, ...]:
    """Implementations ``auto`` tries on ``device``, first choice first."""
    choices = op.auto.get(device.type) or AUTO_ORDER.get(device.type, ("reference",))
    return tuple(impl for impl in choices if impl in op.impls)


_WHAT = {
    "reference": "eager PyTorch",
    "sdpa": "PyTorch's scaled_dot_product_attention",
    "cpu": "C++, in the compiled extension",
}


def explain(op: Op, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[tuple[str, bool, str]]:
    """For each implementation in ``auto``'s order: would it be bound on ``device``, and why or why not."""
    rows = []
    for impl in order(op, device):
        try:
            load(op, impl)
        except UnsupportedError as error:
            rows.append((impl, False, str(error)))
            continue
        if not _needs_check(impl):
            rows.append((impl, True, _WHAT.get(impl, "built")))
        elif device.type == "cpu":
            rows.append((impl, True, "tested on this architecture"))
        else:
            key = _check_key(op, impl, device, dtype)
            verdict = _read_record().get(key)
            text = {None: "unverified: self-check on first use", True: "self-check passed on this card"}
            rows.append((impl, verdict is not False, text.get(verdict, "self-check failed on this card")))
    return rows


# Calls ---------------------------------------------------------------------------------------------------------


def calls() -> dict[tuple[str, str], int]:
    """How often each (op, implementation) ran since the process began. Graph replays do not count."""
    return dict(_calls)


# Self-check ----------------------------------------------------------------------------------------------------

_verdicts: dict[str, bool] = {}


def _needs_check(impl: str) -> bool:
    # The oracle and the library's own attention are not ours to verify; CPU code is covered by the test suite.
    return impl in ("triton", "cuda")


def _check_key(op: Op, impl: str, device: torch.device, dtype: torch.dtype) -> str:
    from . import __version__

    build = f"{__version__} {_code()} torch {torch.__version__} {arch_of(device)}"
    if impl == "triton" and (triton := sys.modules.get("triton")) is not None:
        build += f" triton {triton.__version__}"
    return f"{build} {op.name} {impl} {str(dtype).removeprefix('torch.')}"


@functools.cache
def _code() -> str:
    """Digest of the kernels and their configurations: a verdict is about this code and no other."""
    package = Path(__file__).parent
    # In a checkout the sources of ``pyvideo_kernels.kernels`` lie beside the package.
    places = [package / "kernels", package / "configs"]
    if (package.parent / "csrc" / "module.cpp").is_file():
        places.append(package.parent / "kernels")
    files = sorted(file for place in places for file in place.glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def record_path() -> Path:
    """Where self-check verdicts are kept between processes."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "pyvideo-kernels" / "self_check.json"


def _read_record() -> dict[str, bool]:
    try:
        return dict(json.loads(record_path().read_text()))
    except (OSError, ValueError):
        return {}


def _write_record(key: str, verdict: bool) -> None:
    path = record_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = _read_record() | {key: verdict}
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
        with os.fdopen(handle, "w") as file:
            json.dump(record, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except OSError:
        pass  # a read-only home only costs a repeated check


def trusted(op: Op, impl: str, tensor: Tensor) -> bool:
    """Whether ``auto`` may run ``impl`` here; runs the self-check once per (op, impl, architecture, dtype)."""
    if not _needs_check(impl) or tensor.device.type == "cpu":
        return True
    load(op, impl)  # raises where there is nothing to verify, and imports the compiler whose version the key has
    key = _check_key(op, impl, tensor.device, tensor.dtype)
    verdict = _verdicts.get(key)
    if verdict is None:
        if torch.cuda.is_current_stream_capturing():
            # A check synchronises, which a capture forbids: one eager call before it settles the verdict.
            warn_once(
                op.name, impl, f"{op.name}: impl {impl!r} is unverified on {arch_of(tensor.device)} and cannot be "
                "checked during a CUDA graph capture, which goes on without it; call the op once before capturing"
            )  # fmt: skip
            return False
        with _lock:
            verdict = _verdicts.get(key)
            if verdict is None:
                verdict = _read_record().get(key)
                if verdict is None:
                    try:
                        verdict = self_check(op, impl, tensor.device, tensor.dtype)
                        _write_record(key, verdict)
                    except UnsupportedError:
                        # Not built or not installed here: the next implementation serves, and nothing is written,
                        # for the next process may have it.
                        verdict = False
                    except torch.OutOfMemoryError:
                        return False  # says nothing about the kernel; checked again at the next call
                    except Exception as error:
                        # A kernel that does not compile or launch must not take the run down. The driver or an
                        # earlier failure may be to blame, so this too holds for this process alone.
                        _warn_failed(op, impl, tensor.device, error)
                        verdict = False
                _verdicts[key] = verdict
    return verdict


def self_check(op: Op, impl: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``impl`` is right on the op's sample inputs, against the float64 oracle; warns where it is not.

    Raises what ``impl`` raises where it cannot be checked at all.
    """
    from .testing.compare import Mismatch, check_op

    try:
        check_op(op, impl, device, dtype)
    except Mismatch as error:
        _warn_failed(op, impl, device, error)
        return False
    return True


def _warn_failed(op: Op, impl: str, device: torch.device, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}"
    warn_once(op.name, impl, f"{op.name}: impl {impl!r} failed its self-check on {arch_of(device)}: {reason}")


def warn_once(op: str, impl: str, message: str) -> None:
    if (op, impl) not in _warned:
        _warned.add((op, impl))
        warnings.warn(message, RuntimeWarning, stacklevel=3)
