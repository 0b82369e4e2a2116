"""Weights in the order that kernels read them, packed once for each module and kept on its mark."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch
from .swap import mark_of


@dataclass(frozen=True)
class Packed:
    """A packed weight, and what tells whether it is still that of its weight."""

    weight: weakref.ref[Tensor]
    state: tuple[Any, ...]
    tensor: Tensor


def packed(module: nn.Module, weight: Tensor, pack: Callable[..., Tensor], *options: Any) -> Tensor | None:
    """``pack(weight, *options)``, made at the first call and again when ``weight`` is another tensor or has changed.

    It goes with the mark, that is with restore(), and is not copied or pickled. None means that the op packs for
    itself: in a compiled graph and a capture, where nothing may be kept, and for tensors that do not say whether they
    changed.
    """
    if torch.compiler.is_compiling():
        return None
    mark = mark_of(module)
    # Fake and quantised tensors are subclasses.
    if mark is None or type(weight) not in (nn.Parameter, Tensor) or weight.is_inference():
        return None
    state = (weight.data_ptr(), weight._version, weight.device, weight.dtype, tuple(weight.stride()), *options)
    kept: Packed | None = mark.packed.get(pack)
    if kept is not None and kept.weight() is weight and kept.state == state:
        return kept.tensor
    if weight.device.type == "meta" or (weight.is_cuda and dispatch._capturing(weight.device)):
        return None
    with torch.inference_mode(False), torch.no_grad():
        tensor = pack(weight.detach(), *options)
    # With the weight goes what was made of it: offloading makes new weights for each call and frees them after it.
    gone = weakref.ref(weight, lambda _, marked=weakref.ref(mark): _forget(marked(), pack))
    mark.packed[pack] = Packed(gone, state, tensor)
    return tensor


def _forget(mark: Any, pack: Callable[..., Tensor]) -> None:
    kept = None if mark is None else mark.packed.get(pack)
    if kept is not None and kept.weight() is None:
        del mark.packed[pack]
