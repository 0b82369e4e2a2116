"""Lazy door to the compiled extension ``pyvideo_kernels._C`` and its private ops ``torch.ops.pyvideo_native``.

Importing this module imports torch alone; the extension is loaded on the first question about it. The public ops of
namespace ``pyvideo`` reach the compiled kernels through the functions here (``_native.layer_norm_modulate``, ...),
which raise ``UnsupportedError`` with the remedy where a kernel cannot serve a call.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError

# Op -> devices that csrc/ has a kernel for, and the dtypes each takes.
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_KERNELS: dict[str, tuple[str, ...]] = {
    "layer_norm_modulate": ("cpu",),
    "gate_residual": ("cpu",),
    "gate_residual_norm_modulate": ("cpu",),
    "rms_norm": ("cpu",),
    "qk_norm_rope": ("cpu",),
    "qk_norm_rope_": ("cpu",),
    "rms_norm_silu": ("cpu",),
    "group_norm_silu": ("cpu",),
    "pixel_norm_silu": ("cpu",),
    "guidance_step": ("cpu", "cuda"),
    "unipc_step": ("cpu",),
    "spacetime_attention": ("cpu",),
    "block_sparse_attention": ("cpu",),
    "vae_attention": ("cpu",),
}
# Arguments (by position) that a kernel takes in one dtype only, where the op takes two.
_ALIKE: dict[str, tuple[int, int]] = {"guidance_step": (1, 2)}
# The one (by position) of which a kernel takes a single value.
_FIXED: dict[str, tuple[int, str]] = {"spacetime_attention": (12, "native")}


@functools.cache
def _load() -> tuple[Any, str]:
    """The extension module, or None and one line that says why."""
    try:
        return importlib.import_module("pyvideo_kernels._C"), ""
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "pyvideo_kernels._C":
            recorded = build_record().get("why_not")
            return None, str(recorded or "the extension was not built (pip install --no-build-isolation -e .)")
        return None, f"the extension does not load: {error}"


def build_record() -> dict[str, Any]:
    """What ``setup.py`` recorded when this copy was installed: compiler, CUDA architectures, why not more.

    Empty for a plain checkout that nobody installed.
    """
    try:
        return dict(json.loads((Path(__file__).parent / "_build_info.json").read_text()))
    except (OSError, ValueError):
        return {}


def build_info() -> dict[str, str]:
    """Compiler, torch headers, CUDA architectures of the loaded binary and the CPU level it uses; empty without it."""
    module, _ = _load()
    return dict(module.build_info()) if module is not None else {}


def cuda_archs() -> tuple[str, ...]:
    """Architectures with compiled CUDA kernels, e.g. ``("80", "90a")``."""
    return tuple(arch for arch in build_info().get("cuda_archs", "").split(";") if arch)


def available(device: str = "cpu") -> bool:
    """Whether compiled kernels for ``"cpu"`` or ``"cuda"`` can be had."""
    return not why_not(device)


def why_not(device: str = "cpu") -> str:
    """Why there are no compiled kernels for ``device``; empty if there are."""
    module, reason = _load()
    if module is None:
        return reason
    if device == "cuda" and not cuda_archs():
        recorded = build_record().get("cuda_why_not")
        return f"built without CUDA: {recorded or 'no architecture was asked for'}"
    return ""


def _serves(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for ``arch`` ("80", "90a") runs on a card of this capability."""
    major, minor = divmod(int(arch.rstrip("af")), 10)
    exact = arch.endswith("a")  # features of one chip: runs nowhere else
    return (major, minor) == capability if exact else major == capability[0] and minor <= capability[1]


@functools.cache
def _check_card(index: int) -> str:
    """Why the CUDA kernels of this binary do not run on card ``index``; empty if they do."""
    capability = torch.cuda.get_device_capability(index)
    if any(_serves(arch, capability) for arch in cuda_archs()):
        return ""
    return f"built for sm_{', sm_'.join(cuda_archs())}, this card is sm_{capability[0]}{capability[1]}"


def op(name: str, device: str = "cpu") -> Callable[..., Any]:
    """The private op behind ``name``, or UnsupportedError with the remedy."""
    if device not in _KERNELS.get(name, ()):
        have = [n for n, devices in _KERNELS.items() if device in devices]
        raise UnsupportedError(f"{name}: no compiled {device} kernel; there are {', '.join(have) or 'none'}")
    reason = why_not(device)
    if reason:
        remedy = "make cuda" if device == "cuda" else "install a C++ compiler and reinstall pyvideo-kernels"
        raise UnsupportedError(f"{name}: the compiled {device} kernel is missing: {reason}; {remedy}")
    packet = getattr(torch.ops.pyvideo_native, name, None)
    if packet is None:
        raise UnsupportedError(f"{name}: the extension is older than this source; reinstall pyvideo-kernels")
    function: Callable[..., Any] = packet.default
    return function


def part(name: str) -> Callable[..., Any] | None:
    """A private CPU op that is a part of some implementation; None where it was not built, and torch code serves."""
    if why_not("cpu"):
        return None
    packet = getattr(torch.ops.pyvideo_native, name, None)
    return None if packet is None else packet.default


def _check_takes(name: str, device: str, tensor: Tensor) -> None:
    """Raise unless the compiled kernels take this tensor's dtype, and run on its card."""
    dtypes = _DTYPES[device]
    # Integers are lengths and lists, whose dtypes the op has checked.
    if tensor.dtype not in dtypes and (tensor.is_floating_point() or tensor.is_complex()):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UnsupportedError(f"{name}: the compiled {device} kernel takes {names}; got {tensor.dtype}")
    if device == "cuda" and (reason := _check_card(tensor.device.index or 0)):
        raise UnsupportedError(f"{name}: {reason}; make cuda CUDA_ARCHS=...")


def _call(name: str, device: str, function: Callable[..., Any], *args: Any) -> Any:
    dtypes = _DTYPES[device]
    for arg in args:  # on every call, so without generators
        if isinstance(arg, Tensor):
            if arg.dtype not in dtypes or device == "cuda":
                _check_takes(name, device, arg)
        elif isinstance(arg, (list, tuple)):
            for item in arg:
                if isinstance(item, Tensor):
                    _check_takes(name, device, item)
    if name in _ALIKE:
        first, second = (args[i] for i in _ALIKE[name])
        if isinstance(second, Tensor) and second.dtype != first.dtype:
            raise UnsupportedError(
                f"{name}: the compiled {device} kernel takes both predictions in one dtype; "
                f"got {first.dtype} and {second.dtype}"
            )
    if name in _FIXED:
        at, value = _FIXED[name]
        if args[at] != value:
            raise UnsupportedError(f"{name}: {args[at]!r} is not built in impl {device!r}; only {value!r} is")
    return function(*args)


def __getattr__(name: str) -> Any:
    """``_native.<op>`` and ``_native.<op>_cuda``: an op's compiled kernel, with its schema's arguments but ``impl``.

    UnsupportedError where that kernel was not built.
    """
    base, device = (name.removesuffix("_cuda"), "cuda") if name.endswith("_cuda") else (name, "cpu")
    if base not in _KERNELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = functools.partial(_call, base, device, op(base, device))
    globals()[name] = function
    return function
