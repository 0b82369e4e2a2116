"""Dense attention by somebody else's kernel: cuDNN through PyTorch, FlashAttention-3 and -4 where installed.

``impl="sdpa"`` is PyTorch's ``scaled_dot_product_attention``, with cuDNN's kernel first on the cards where it is the
faster one; ``impl="flash"`` is an installed FlashAttention (flash_attention.py). Which of them served a call is logged
once a card, dtype and head_dim (logger ``pyvideo_kernels``, level INFO), and `served` has it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import known_bad

OP = "spacetime_attention"
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
op's table stands: FlashAttention, then PyTorch (cuDNN first), then ours; `CUDNN_BEFORE_FLASH` says where the first two
change places.
"""

CUDNN_BEFORE_FLASH: dict[str, tuple[str, str]] = {
    "sm_100": ("9.19", "github.com/sgl-project/sglang/pull/33655: B200, 11 shapes of diffusion models, against FA4"),
}
"""Architecture -> the cuDNN from which on somebody published it to be faster than FlashAttention there, and where.

On sm_90 FlashAttention-3 is published as the faster one at these lengths (its paper; sglang/pull/30090).
"""


def _fastest(device: torch.device, dtype: torch.dtype, head_dim: int) -> Measured | None:
    from ..dispatch import arch_of

    if device.type != "cuda":
        return None
    arch = arch_of(device)
    if (measured := MEASURED.get((arch, _name(dtype), head_dim))) is not None:
        return measured
    since, where = CUDNN_BEFORE_FLASH.get(arch, (None, ""))
    if since is None or dtype not in HALF or why_not_cudnn(device):
        return None
    recent = known_bad.numbers(_cudnn_version() or "0") >= known_bad.numbers(since)
    return Measured("sdpa", where) if recent and torch.backends.cuda.cudnn_sdp_enabled() else None


def in_order(choices: tuple[str, ...], device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """``choices`` with the one that is known to be the fastest moved to the front."""
    fastest = _fastest(device, dtype, head_dim)
    if fastest is None or fastest.first not in choices:
        return choices
    return (fastest.first, *(impl for impl in choices if impl != fastest.first))


def source(device: torch.device, dtype: torch.dtype, impl: str, head_dim: int = 128) -> str:
    """The measurement by which ``impl`` is first on this card; empty if it is not by one."""
    fastest = _fastest(device, dtype, head_dim)
    return fastest.source if fastest is not None and fastest.first == impl else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# cuDNN --------------------------------------------------------------------------------------------------------------

CUDNN_FIRST = ("sm_90", "sm_100", "sm_103")
"""Where cuDNN's kernel is published to be faster than PyTorch's own (FlashAttention-2). PyTorch tries it first there
since some release and with some cuDNN; here it does not depend on that. Elsewhere the reports differ: slower on sm_80
and sm_120, the same on sm_89 (huggingface/transformers/pull/48163); a little faster on sm_120 (sglang/pull/36494)."""

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
    if q.shape[2] == 1:  # its kernels for one query are wrong on sm_100 from 9.19 on (pytorch/pytorch/issues/193893)
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
        _LOG.warning("%s: cuDNN has no plan for q %s, and PyTorch's kernels serve it: %s", OP, list(q.shape), error)
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


def planned(impl: str, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str:
    """The kernel that ``impl`` would run for dense attention, in the words of `served`."""
    size = head_dim or 128
    if impl == "sdpa":
        kernel = describe_sdpa(device, dtype, size)
    elif impl == "flash":
        from .flash_attention import label, library_for

        kernel = label(library_for(device, dtype, size))
    else:
        kernel = f"this package's {impl} kernel"
    return _line(kernel, device, dtype, size)


def _line(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return f"{kernel} ({_name(dtype)}, head_dim {head_dim}, {device})"


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
    _LOG.info("%s on %s, %s, head_dim %d: %s (impl %r)", OP, device, _name(dtype), head_dim, name, impl)


def served(impls: Sequence[str] = ("flash", "sdpa")) -> list[str]:
    """The libraries that served dense attention in this process: ``cuDNN 9.15.1 (bfloat16, head_dim 128, cuda:0)``."""
    return [
        _line(name, device, dtype, head_dim)
        for (impl, device, dtype, head_dim), name in _served.items()
        if impl in impls
    ]


def forget() -> None:
    """Drop what was decided, refused and said; for tests."""
    why_not_cudnn.cache_clear()
    _unplanned.clear()
    _served.clear()
