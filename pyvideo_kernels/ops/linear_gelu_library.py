"""linear_gelu by a library's matrix product with GELU as its epilogue: oneDNN on the CPU, cuBLASLt on CUDA."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ._checks import require_onednn

# oneDNN's product with an epilogue, which torch.compile's CPU backend calls too. It is private to torch: any other
# schema than the one it was written against is taken for its absence.
_POINTWISE = (
    ("X", "Tensor"),
    ("W", "Tensor"),
    ("B", "Optional[Tensor]"),
    ("attr", "str"),
    ("scalars", "List[Optional[number]]"),
    ("algorithm", "Optional[str]"),
)


@functools.cache
def _linear_pointwise() -> Callable[..., Tensor] | None:
    """``mkldnn::_linear_pointwise``; None in a torch that has none, or another one."""
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    function = getattr(packet, "default", None)
    if function is None or [(a.name, str(a.type)) for a in function._schema.arguments] != list(_POINTWISE):
        return None
    found: Callable[..., Tensor] = function
    return found


def _same_dtype(impl: str, x: Tensor, bias: Tensor | None) -> None:
    if bias is not None and bias.dtype != x.dtype:
        raise UnsupportedError(
            f"linear_gelu: impl {impl!r} takes `bias` in the dtype of `x`, {x.dtype}; got {bias.dtype}; "
            "use impl='reference'"
        )


def linear_gelu_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """``impl="cpu"``: oneDNN's product, GELU on each tile before it is rounded and written.

    Without oneDNN (macOS) or its entry point: BLAS, in fp32, and GELU in place.
    """
    _same_dtype("cpu", x, bias)
    fused = _linear_pointwise()
    rows = x.reshape(-1, x.shape[-1])
    shape = (*x.shape[:-1], weight.shape[0])
    if fused is not None and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        require_onednn("linear_gelu", x)
        if 0 in shape:
            return x.new_empty(shape)
        return fused(rows, weight, bias, "gelu", [], approximate).view(shape)
    if x.dtype != torch.float32:
        raise UnsupportedError(
            f"linear_gelu: impl 'cpu' takes {x.dtype} only by oneDNN's product with an epilogue, which this torch does "
            "not have; use impl='reference'"
        )
    out = x.new_empty((rows.shape[0], weight.shape[0]))
    if bias is None:
        torch.mm(rows, weight.T, out=out)
    else:
        torch.addmm(bias, rows, weight.T, out=out)
    return torch.ops.aten.gelu_(out, approximate=approximate).view(shape)


# cuBLASLt -------------------------------------------------------------------------------------------------------------


def cublas_version() -> str | None:
    """Version of the cuBLAS that torch was installed with, else of its CUDA; None without one."""
    if not torch.version.cuda:
        return None
    for name in (f"nvidia-cublas-cu{torch.version.cuda.partition('.')[0]}", "nvidia-cublas"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"of CUDA {torch.version.cuda}"


def cublas_label() -> str:
    """``cuBLASLt 13.1.0.3``; raises UnsupportedError where torch has none to call."""
    version = cublas_version()
    if version is None:
        raise UnsupportedError("linear_gelu: impl 'cublas' needs a torch that is built with CUDA; use impl='triton'")
    return f"cuBLASLt {version}"


def cublas_for_auto() -> str:
    """What `dispatch.explain` says of the library; raises UnsupportedError where there is none."""
    return f"{cublas_label()}, first with a bias and the tanh form"


def _refusal(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> str:
    """What cuBLASLt's epilogue has not; empty where it serves."""
    if approximate != "tanh":
        return "its GELU is the tanh form"
    if bias is None:
        return "its GELU comes with a bias"
    if x.dtype == torch.float64:
        return "it is not for float64"
    if bias.dtype != x.dtype:
        return "its bias is in the dtype of `x`"
    return ""


def in_order(choices: tuple[str, ...], args: Sequence[object]) -> tuple[tuple[str, ...], str]:
    """``auto``'s order for a call's arguments: without cuBLASLt where its epilogue is not what was asked for."""
    reason = _refusal(*args) if "cublas" in choices else ""  # type: ignore[arg-type]
    if not reason:
        return choices, ""
    return tuple(impl for impl in choices if impl != "cublas"), f"cuBLASLt is left out: {reason}"


def linear_gelu_cublas(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """``impl="cublas"``: the product that torch hands to cuBLASLt with bias and GELU as its epilogue.

    torch itself takes a product and a GELU in place for operands that cuBLASLt does not (one row of weights, odd
    leading dimensions).
    """
    cublas_label()
    reason = _refusal(x, weight, bias, approximate)
    if reason:
        raise UnsupportedError(f"linear_gelu: impl 'cublas' cannot: {reason}; use impl='triton'")
    assert bias is not None
    shape = (*x.shape[:-1], weight.shape[0])
    if 0 in shape:
        return x.new_empty(shape)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = torch._addmm_activation(bias, rows, weight.T, use_gelu=True)  # type: ignore[attr-defined]
    return y.view(shape)
