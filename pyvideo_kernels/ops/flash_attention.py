"""FlashAttention-3 and -4, where a user installed them, as ``impl="flash"`` of spacetime_attention.

Their binaries are none that our tests cover: ``auto`` runs one only after the same check on the card as our own
kernels, and a verdict is about the installed version.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .attention_libraries import HALF, say
from .spacetime_attention import refuse_precision, sees_all

_OP = "spacetime_attention"


@dataclass(frozen=True, eq=False)
class Library:
    """A FlashAttention release.

    Args:
        name: as users know it.
        distribution: on the package index.
        modules: where ``flash_attn_func`` may be, first choice first.
        archs: -> the head_dims that it has there, besides being multiples of 8: the largest, and others beyond it.
        install: how a user gets it.
        int32: whether its offsets may be 32 bits wide.
    """

    name: str
    distribution: str
    modules: tuple[str, ...]
    archs: Mapping[str, tuple[int, ...]]
    install: str
    int32: bool = False

    def takes(self, arch: str, head_dim: int) -> bool:
        largest, *beyond = self.archs[arch]
        return head_dim % 8 == 0 and (head_dim <= largest or head_dim in beyond)


@dataclass(frozen=True)
class Found:
    """An installed library: its function, or why it cannot be had; what asks it for the lse, if it must be asked."""

    version: str | None
    function: Callable[..., Any] | None = None
    why_not: str = ""
    lse_option: str | None = None


FLASH4 = Library(
    "FlashAttention-4", "flash-attn-4", ("flash_attn.cute",),
    {"sm_90": (256,), "sm_100": (128, 256), "sm_103": (128, 256)},
    "pip install --pre 'flash-attn-4[cu13]' (without the extra for CUDA 12)", int32=True,
)  # fmt: skip
FLASH3 = Library(
    "FlashAttention-3", "flash_attn_3", ("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
    {"sm_90": (256,)},
    "pip install flash-attn-3 from PyTorch's index, or build hopper/ of Dao-AILab/flash-attention",
)  # fmt: skip
LIBRARIES = (FLASH3, FLASH4)
"""First choice first: on sm_90 the one that was written for it, whose figures there are published."""


@functools.cache
def find(library: Library) -> Found:
    """Import an installed library; once a process."""
    version = _version(library.distribution)
    missing = Found(None, why_not=f"not installed: {library.install}")
    problems = []
    for name in library.modules:
        if not _importable(name):
            continue
        try:
            with contextlib.redirect_stdout(sys.stderr):  # some greet; stdout is for results
                module = importlib.import_module(name)
        except Exception as error:  # a build for another torch or CUDA fails in many ways
            problems.append(f"{name} cannot be imported ({type(error).__name__}: {error})")
            continue
        function = getattr(module, "flash_attn_func", None)
        if function is None:
            continue  # a namespace that another distribution fills
        return Found(version or getattr(module, "__version__", "unknown"), function, "", _lse_option(function))
    return Found(version, why_not="; ".join(problems)) if problems else missing


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None  # a build from source may have left no metadata


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def _lse_option(function: Callable[..., Any]) -> str | None:
    """The early releases of FlashAttention-3 return the lse unasked."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in ("return_lse", "return_attn_probs") if name in parameters), None)


def library_for(device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None) -> Library:
    """The FlashAttention that serves this card, dtype and head_dim; raises UnsupportedError with the remedy."""
    from ..dispatch import arch_of

    if dtype is not None and dtype not in HALF:
        raise UnsupportedError(f"{_OP}: impl 'flash' takes bf16 and fp16; got {dtype}; use impl='triton' or 'sdpa'")
    arch = arch_of(device)
    built = [library for library in LIBRARIES if arch in library.archs]
    if not built:
        raise UnsupportedError(
            f"{_OP}: impl 'flash' is FlashAttention-4 (sm_90, sm_100, sm_103) or -3 (sm_90), none of them for {arch}; "
            "use impl='sdpa' or 'triton'"
        )
    reasons = []
    for library in built:
        if head_dim is not None and not library.takes(arch, head_dim):
            reasons.append(f"{library.name} has no head_dim {head_dim} on {arch}")
        elif find(library).function is None:
            reasons.append(f"{library.name} {find(library).why_not}")
        else:
            return library
    raise UnsupportedError(f"{_OP}: impl 'flash': {'; '.join(reasons)}")


def label(library: Library) -> str:
    """``FlashAttention-3 3.0.0``."""
    return f"{library.name} {find(library).version}"


@functools.cache
def digest() -> str:
    """Of what ``impl="flash"`` is made of: this adapter and the libraries' versions. Verdicts hold for it alone."""
    hashed = hashlib.sha256(Path(__file__).read_bytes())
    for library in LIBRARIES:
        hashed.update(f"{library.name} {find(library).version}\0".encode())
    return hashed.hexdigest()[:12]


def spacetime_attention_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window: Sequence[int] | None,
    stride: Sequence[int],
    causal_time: bool,
    text_len: int,
    text_side: str,
    kv_lens: Tensor | None,
    scale: float,
    return_lse: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """``impl="flash"`` of the op: an installed FlashAttention, whose layout is ours."""
    refuse_precision("flash", precision)
    if not sees_all(grid, window, causal_time):
        raise UnsupportedError(f"{_OP}: impl 'flash' is dense; use impl='triton' for a window or causal time")
    if kv_lens is not None:
        raise UnsupportedError(f"{_OP}: impl 'flash' takes no `kv_lens`; use impl='triton'")
    b, s, heads, head_dim = q.shape
    library = library_for(q.device, q.dtype, head_dim)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_layout(library, name, x)
    lse_shape = (b, heads, s) if return_lse else (0,)
    if q.numel() == 0:
        return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)
    found = find(library)
    assert found.function is not None  # `library_for` raised otherwise
    asked = {found.lse_option: return_lse} if found.lse_option else {}
    # Its autograd function would keep the inputs; ours has the backward. It launches on the current device.
    with torch.no_grad(), _current(q.device):
        result = found.function(q, k, v, softmax_scale=scale, causal=False, **asked)
    out, lse = (result[0], result[1]) if isinstance(result, (tuple, list)) else (result, None)
    if not return_lse:
        lse = q.new_empty((0,), dtype=torch.float32)
    elif lse is None:
        raise UnsupportedError(f"{_OP}: {label(library)} gave no lse; use impl='triton'")
    say("flash", q.device, q.dtype, head_dim, label(library))
    return out.contiguous(), lse.contiguous()


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _check_layout(library: Library, name: str, x: Tensor) -> None:
    """They load by TMA, and check little: bytes that do not lie on 16 are read from somewhere else."""
    strides = x.stride()
    aligned = x.data_ptr() % 16 == 0 and all(
        n == 1 or stride * x.element_size() % 16 == 0 for n, stride in zip(x.shape[:-1], strides[:-1], strict=True)
    )
    if not aligned:
        raise UnsupportedError(
            f"{_OP}: {library.name} needs `{name}` and its strides {strides} on multiples of 16 bytes; use "
            "impl='triton' or 'sdpa', or .contiguous()"
        )
    reach = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    if library.int32 and reach >= 2**31:
        raise UnsupportedError(
            f"{_OP}: `{name}` reaches over {reach} elements, and {library.name} is not known to go past 2³¹; use "
            "impl='triton' or 'sdpa'"
        )


def forget() -> None:
    """Look for the libraries anew; for tests, and after an installation in a running process."""
    find.cache_clear()
    digest.cache_clear()
