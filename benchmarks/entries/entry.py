"""What one op's benchmark is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pyvideo_kernels as pv

from ..shapes import Shapes

FP32 = 4


def _as_they_are(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs


@dataclass(frozen=True)
class Entry:
    """One op's benchmark.

    Args:
        op: public name; the function is ``pyvideo_kernels.<op>``.
        gpu, cpu: name -> sizes; ``gpu`` shapes are the models' own, ``cpu`` ones fit a laptop.
        inputs: sizes, dtype, device -> keyword arguments of the public function, random.
        eager: the reference model's code on the keyword arguments that ``stock`` gives.
        bytes: sizes, dtype -> bytes that must move; None: what inputs and outputs weigh.
        flops: sizes -> floating-point operations; 0: memory-bound, judged by bytes.
        stock: inputs as the reference model holds them, made once and not timed (channels first, say).
        convolves: a convolution of the library is involved, which takes fp32 as TF32 where cuDNN may.
        returns: an argument that is written, not read, and returned: it is moved once.
    """

    op: str
    gpu: Shapes
    cpu: Shapes
    inputs: Callable[..., dict[str, Any]]
    eager: Callable[..., Any]
    bytes: Callable[..., int] | None = None
    flops: Callable[..., float] = lambda **_: 0.0
    stock: Callable[[dict[str, Any]], dict[str, Any]] = _as_they_are
    convolves: bool = False
    returns: str | None = None

    def ours(self, **kwargs: Any) -> Any:
        return getattr(pv, self.op)(**kwargs)

    def shapes(self, device: torch.device) -> Shapes:
        return self.gpu if device.type == "cuda" else self.cpu

    @property
    def in_place(self) -> bool:
        """Whether the op writes over its inputs."""
        return self.op.endswith("_")


def moved_bytes(inputs: Mapping[str, Any], outputs: Any, returns: str | None = None) -> int:
    """Bytes of every input tensor read once plus every output tensor written once; ``returns`` as of an `Entry`."""
    return weight_of([value for name, value in inputs.items() if name != returns]) + weight_of(outputs)


def weight_of(value: Any) -> int:
    """Bytes of the elements of every tensor in ``value``."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(weight_of(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(weight_of(item) for item in value)
    return 0


def rand(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)
