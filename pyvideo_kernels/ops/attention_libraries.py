"""Dense attention by somebody else's kernel: cuDNN through PyTorch, FlashAttention-3 and -4 where installed.

``impl="sdpa"`` is PyTorch's ``scaled_dot_product_attention``, with cuDNN's kernel first on the cards where it is the
faster one. ``impl="flash"`` is an installed FlashAttention; its binary is none that our tests cover, so ``auto`` runs
it only after the same check on the card as our own kernels, for that version of it. Which library served a call is
logged once a card, dtype and head_dim (logger ``pyvideo_kernels``, level INFO), and `served` has it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import known_bad
from ..errors import UnsupportedError
from .spacetime_attention import refuse_precision, sees_all

_OP = "spacetime_attention"
HALF = (torch.float16, torch.bfloat16)
_LOG = logging.getLogger("pyvideo_kernels")


# Which comes first --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What ``auto`` tries first for dense attention, by measurement.

    Args:
        first: the implementation that was fastest.
        source: the committed result file and the revision that it was measured at.
    """

    first: str
    source: str


MEASURED: dict[tuple[str, str, int], Measured] = {}
"""(architecture, dtype, head_dim) -> the fastest, for instance ``("sm_90", "bfloat16", 128)``.

Only from a row of ``benchmarks/results/`` that compares all of them in one run. Where there is none, the order of the
op's table stands: FlashAttention, then PyTorch (cuDNN first), then ours.
"""


def in_order(choices: tuple[str, ...], arch: str, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """``choices`` with the one that `MEASURED` names moved to the front."""
    measured = MEASURED.get((arch, _name(dtype), head_dim))
    if measured is None or measured.first not in choices:
        return choices
    return (measured.first, *(impl for impl in choices if impl != measured.first))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# FlashAttention -----------------------------------------------------------------------------------------------------


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
LIBRARIES = (FLASH4, FLASH3)
"""First choice first."""


@functools.cache
def find(library: Library) -> Found:
    """Import an installed library; once a process."""
    try:
        version: str | None = importlib.metadata.version(library.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = None  # a build from source may have left no metadata
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


# cuDNN --------------------------------------------------------------------------------------------------------------

CUDNN_FIRST = ("sm_90", "sm_100", "sm_103")
"""Where cuDNN's kernel is published to be faster than PyTorch's own (FlashAttention-2). PyTorch tries it first there
since some release and with some cuDNN; here it does not depend on that."""

_CUDNN_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, float dropout_p=0., "
    "bool is_causal=False, bool return_debug_mask=False, *, float? scale=None) -> "
)
# Calls that cuDNN had no plan for, though PyTorch said that it takes them.
_unplanned: set[tuple[Any, ...]] = set()


def _cudnn_version() -> str | None:
    from ..collect_env import cudnn_version

    return cudnn_version()


@functools.cache
def _cudnn_op() -> Callable[..., Any] | None:
    """PyTorch's operator around cuDNN, None if it is not the one that is known here.

    ``sdpa_kernel`` would do too. It sets flags of the whole process, which another thread's attention then runs under,
    costs some 50 µs a call, and may leave PyTorch's own order of kernels changed behind it.
    """
    packet = getattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", None)
    op: Any = getattr(packet, "default", None)
    if op is None or _CUDNN_SCHEMA not in str(op._schema):
        return None
    found: Callable[..., Any] = op
    return found


@functools.cache
def why_not_cudnn(device: torch.device) -> str:
    """Why cuDNN's kernel is not tried first on this card; empty if it is."""
    from ..dispatch import arch_of

    arch, version = arch_of(device), _cudnn_version()
    if arch not in CUDNN_FIRST:
        return f"cuDNN is faster on {', '.join(CUDNN_FIRST)}; this is {arch}"
    if version is None:
        return "PyTorch was built without cuDNN"
    if _cudnn_op() is None:
        return "this PyTorch's cuDNN operator is another than the known one"
    here = known_bad.Setup({"torch": torch.__version__, "cudnn": version}, (arch,))
    for problem in known_bad.PROBLEMS:
        # Gradients are no matter: the backward is this package's own.
        wrong = problem.effect in (known_bad.WRONG, known_bad.BROKEN)
        if wrong and problem.name.startswith("sdpa-cudnn") and problem.applies(here):
            return f"known problem {problem.name} ({problem.affected()})"
    return ""


def _cudnn_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if q.dtype not in HALF or why_not_cudnn(q.device) or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    if _unplanned and _shape_key(q, k) in _unplanned:
        return False
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, q.shape[1] != k.shape[1])
    return bool(torch.backends.cuda.can_use_cudnn_attention(params, False))


def _shape_key(q: Tensor, k: Tensor) -> tuple[Any, ...]:
    return (q.device, q.dtype, q.shape, k.shape)


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``scaled_dot_product_attention`` without a mask on a GPU; ``[B, heads, S, head_dim]``, as PyTorch has it.

    cuDNN's kernel first where `why_not_cudnn` has nothing against it, then what PyTorch chooses. A user's
    ``torch.backends.cuda.enable_cudnn_sdp(False)`` or ``sdpa_kernel`` holds here too.
    """
    gqa = q.shape[1] != k.shape[1]
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=scale, enable_gqa=gqa)
    if not _cudnn_takes(q, k, v):
        if _unplanned and _shape_key(q, k) in _unplanned:
            # PyTorch might choose cuDNN once more.
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
                return attend(q, k, v)
        say("sdpa", q.device, q.dtype, q.shape[-1], functools.partial(_own_choice, q, k, v, scale, gqa))
        return attend(q, k, v)
    op = _cudnn_op()
    assert op is not None  # `why_not_cudnn` said otherwise
    try:
        out: Tensor = op(q, k, v, None, False, 0.0, False, False, scale=scale)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "cudnn" not in str(error).lower():
            raise
        _unplanned.add(_shape_key(q, k))
        _LOG.warning("%s: cuDNN has no plan for q %s, and PyTorch's kernels serve it: %s", _OP, list(q.shape), error)
        return dense_sdpa(q, k, v, scale)
    say("sdpa", q.device, q.dtype, q.shape[-1], f"cuDNN {_cudnn_version()}, by PyTorch's operator")
    return out


_BACKENDS = {
    SDPBackend.FLASH_ATTENTION: "FlashAttention-2",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient attention",
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.MATH: "unfused products, every score in memory",
}


def _own_choice(q: Tensor, k: Tensor, v: Tensor, scale: float, gqa: bool) -> str:
    """PyTorch's own choice, by name if it says."""
    ask = getattr(torch, "_fused_sdp_choice", None)
    try:
        number = None if ask is None else ask(q, k, v, None, 0.0, False, scale=scale, enable_gqa=gqa)
    except (RuntimeError, TypeError):
        number = None
    for backend, name in _BACKENDS.items():
        if number == int(backend.value):
            return f"PyTorch's choice, {name}"
    return "PyTorch's choice"


def describe_sdpa(device: torch.device, dtype: torch.dtype, head_dim: int = 128) -> str:
    """What ``impl="sdpa"`` would run for dense attention, and why; nothing is computed."""
    if device.type != "cuda":
        return "PyTorch's scaled_dot_product_attention"
    why = f"cuDNN takes bf16 and fp16; this is {_name(dtype)}" if dtype not in HALF else why_not_cudnn(device)
    if not why and not torch.backends.cuda.cudnn_sdp_enabled():
        why = "cuDNN is switched off in torch.backends.cuda"
    if torch.cuda.is_available():
        x = torch.empty((1, 1, 256, head_dim), dtype=dtype, device=device)
        if not why and not _cudnn_takes(x, x, x):
            why = f"PyTorch says that cuDNN {_cudnn_version()} does not take head_dim {head_dim}"
        if why:
            return f"{_own_choice(x, x, x, head_dim**-0.5, False)} ({why})"
    elif why:
        return f"PyTorch's choice ({why})"
    return f"cuDNN {_cudnn_version()}, published as faster than PyTorch's own kernels here"


# Which served -------------------------------------------------------------------------------------------------------

_served: dict[tuple[str, torch.device, torch.dtype, int], str] = {}


def say(impl: str, device: torch.device, dtype: torch.dtype, head_dim: int, kernel: str | Callable[[], str]) -> None:
    """Log which library serves, once a card, dtype and head_dim, and again when it is another one.

    ``kernel``: its name; or what finds it out, once.
    """
    key = (impl, device, dtype, head_dim)
    before = _served.get(key)
    if before is not None and (callable(kernel) or before == kernel):
        return
    name = kernel if isinstance(kernel, str) else kernel()
    _served[key] = name
    _LOG.info("%s on %s, %s, head_dim %d: %s (impl %r)", _OP, device, _name(dtype), head_dim, name, impl)


def served(impls: Sequence[str] = ("flash", "sdpa")) -> list[str]:
    """The libraries that served dense attention in this process: ``cuDNN 9.15.1 (bfloat16, head_dim 128, cuda:0)``."""
    return [
        f"{name} ({_name(dtype)}, head_dim {head_dim}, {device})"
        for (impl, device, dtype, head_dim), name in _served.items()
        if impl in impls
    ]


def forget() -> None:
    """Drop what was found, refused and said; for tests, and after an installation in a running process."""
    find.cache_clear()
    digest.cache_clear()
    why_not_cudnn.cache_clear()
    _unplanned.clear()
    _served.clear()
