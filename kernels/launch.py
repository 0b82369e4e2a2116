"""What launchers share: the device guard and the strides of broadcast arguments."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from pyvideo_kernels.errors import UnsupportedError


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU current: Triton launches on the current device."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def bs_strides(tensor: Tensor | None) -> tuple[int, int]:
    """Batch and token strides of a ``[B or 1, S or 1, D]`` tensor; 0 along a broadcast dimension or for None."""
    if tensor is None:
        return 0, 0
    return (
        tensor.stride(0) if tensor.shape[0] > 1 else 0,
        tensor.stride(1) if tensor.shape[1] > 1 else 0,
    )


def refuse_float64(op: str, *tensors: Tensor | None) -> None:
    """These kernels compute in fp32: fp64 inputs would silently lose half their digits."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        raise UnsupportedError(f"{op}: impl 'triton' computes in fp32 and refuses float64; use impl='reference'")


def unit_stride(tensor: Tensor) -> Tensor:
    """A gradient with a contiguous last dimension: autograd hands over expanded ones (that of a sum, say)."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def collapse_rows(tensor: Tensor) -> list[tuple[int, int]]:
    """The leading dimensions of ``[..., D]`` as few ``(size, stride)`` pairs, outermost first; one at least."""
    out: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if out and out[-1][1] == size * stride:
            out[-1] = (out[-1][0] * size, stride)
        else:
            out.append((size, stride))
    return out or [(1, 0)]


cdiv = triton.cdiv


def merged_rows(x: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of the (at most four) row dimensions of ``x [..., C]``, merged where memory allows.

    Padded with trailing dimensions of 1: a plain tensor is one dimension and its kernel divides by nothing.
    """
    dims = collapse_rows(x)
    dims += [(1, 0)] * (4 - len(dims))
    return [size for size, _ in dims], [stride for _, stride in dims]
