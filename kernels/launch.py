"""What launchers share: the device guard and the strides of broadcast arguments."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor


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


cdiv = triton.cdiv
