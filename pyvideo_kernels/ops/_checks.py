"""Argument checks that several ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DTypeError, UnsupportedError, bad_option, bad_shape, check_tensor, describe


def check_modulation(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Each given tensor is ``[B, 1, D]`` per batch or ``[B, S, D]`` per token for ``x [B, S, D]``; B may be 1."""
    b, s, d = x.shape
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(op, name, tensor, ndim=3)
        if tensor.shape[2] != d or tensor.shape[1] not in (1, s) or tensor.shape[0] not in (1, b):
            bad_shape(op, name, f"[{b}, 1, {d}] or [{b}, {s}, {d}] for `x` {list(x.shape)}", tensor)


def check_vector(op: str, length: int, **tensors: Tensor | None) -> None:
    """Each given tensor is ``[length]``."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(op, name, tensor, ndim=1)
            if tensor.shape[0] != length:
                bad_shape(op, name, f"[{length}]", tensor)


def check_cache(op: str, x: Tensor, cache: Tensor | None, most: int, why: str = "") -> None:
    """``[B, n, H, W, C]`` with n at most ``most``: frames of the size and dtype of ``x [B, T, H, W, C]``."""
    if cache is None:
        return
    check_tensor(op, "cache", cache, ndim=5)
    b, _, h, w, c = x.shape
    n = cache.shape[1]
    if cache.shape != (b, n, h, w, c) or n > most:
        bad_shape(op, "cache", f"[{b}, n, {h}, {w}, {c}] with n <= {most}{why}", cache)
    if cache.dtype != x.dtype:
        raise DTypeError(f"{op}: `cache` must be {x.dtype} like `x`; got {describe(cache)}")


def check_no_broadcast(op: str, **tensors: Tensor | None) -> None:
    """Each given tensor is to be written: no two of its elements are one place in memory."""
    for name, tensor in tensors.items():
        if tensor is not None and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            bad_shape(op, name, "a tensor without broadcast dimensions, to be written", tensor)


def check_patch(op: str, patch: Sequence[int], name: str = "patch", least: int = 1) -> list[int]:
    """Three sizes (T, H, W), each at least ``least``; as a list, for the schema."""
    sizes = list(patch) if isinstance(patch, Sequence) and not isinstance(patch, str) else []
    if len(sizes) != 3 or any(isinstance(n, (float, str)) or n < least for n in sizes):
        bad_shape(op, name, f"three sizes (T, H, W) of at least {least}", patch)
    return sizes


def require_onednn(op: str, x: Tensor) -> None:
    """``impl="cpu"`` of a convolution: raise unless oneDNN has one of this dtype here."""
    supported = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and supported):
        raise UnsupportedError(f"{op}: oneDNN does not take {x.dtype} here; use impl='reference'")


def check_triple(op: str, name: str, value: Sequence[int], minimum: int) -> list[int]:
    """Three integers (time, height, width), each at least ``minimum``; as a list, for the schema."""
    items = list(value) if isinstance(value, (list, tuple, torch.Size)) else []
    if len(items) != 3 or any(
        isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) or n < minimum for n in items
    ):
        bad_option(op, name, f"three integers (time, height, width) of at least {minimum}", value)
    return items
