"""Typed errors: each names the op, the argument, what was expected and what came."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .error_types import DeviceError as DeviceError
from .error_types import DTypeError as DTypeError
from .error_types import ModelError as ModelError
from .error_types import PyVideoError as PyVideoError
from .error_types import ShapeError as ShapeError
from .error_types import UnsupportedError as UnsupportedError
from .error_types import UsageError as UsageError
from .error_types import ValueOptionError as ValueOptionError


def describe(value: object) -> str:
    """Shape, dtype and device of a tensor; ``repr`` of anything else."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return repr(value)


def bad_shape(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ShapeError(f"{op}: `{argument}` must be {expected}; got {describe(got)}")


def bad_option(op: str, argument: str, expected: object, got: object) -> NoReturn:
    raise ValueOptionError(f"{op}: `{argument}` must be {expected}; got {got!r}")


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(op: str, argument: str, value: object, *, ndim: int | tuple[int, ...] | None = None) -> None:
    """A floating tensor of the given rank(s), or a typed error."""
    if not isinstance(value, Tensor):
        raise DTypeError(f"{op}: `{argument}` must be a tensor; got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise DTypeError(f"{op}: `{argument}` must be float32, bfloat16, float16 or float64; got {value.dtype}")
    if ndim is not None and value.dim() not in ((ndim,) if isinstance(ndim, int) else ndim):
        raise ShapeError(f"{op}: `{argument}` must have {ndim} dimensions; got {describe(value)}")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """All given tensors on the device of the first."""
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (name, tensor)
        elif tensor.device != first[1].device:
            raise DeviceError(f"{op}: `{name}` must be on {first[1].device} like `{first[0]}`; got {describe(tensor)}")


def check_last_dim_contiguous(op: str, **tensors: Tensor | None) -> None:
    """Kernels read rows with vector loads: the last dim must have stride 1 (other strides are free)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ShapeError(
                f"{op}: `{name}` must have a contiguous last dimension; got strides {tuple(tensor.stride())}"
            )


def refuse_grad(op: str, **tensors: Tensor | None) -> None:
    """For ops without a backward: refuse inputs that ask for one instead of dropping their gradient."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise UnsupportedError(
                    f"{op}: `{name}` requires grad and this op has no backward; call it under torch.no_grad(), "
                    f"or detach `{name}`"
                )
