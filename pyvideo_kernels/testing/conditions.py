"""The conditions every check runs under: poison around the arguments and in every fresh tensor, exact products.

A kernel that leaves a tail unwritten, reads past an edge or writes past one gives the right numbers whenever the memory
there happens to be harmless. Here it is not.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of poison on either side of an argument: more than any kernel's tile is wide, and a multiple of every
# alignment that a kernel tests for.
_MARGIN = 1024
_ALIGNMENT = 256  # bytes


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what ``torch.empty`` and its kin return (outputs, scratch) with NaN, or the largest integer."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Not torch.use_deterministic_algorithms, which also imports and reconfigures the compiler.
    switch = torch._C._set_deterministic_algorithms
    with warnings.catch_warnings():
        # The same switch makes torch complain of library kernels; that is no business of this check.
        warnings.filterwarnings("ignore", message=".*determinis.*", category=UserWarning)
        switch(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            switch(enabled, warn_only=warn_only)


@contextlib.contextmanager
def products(conv: str = "ieee") -> Iterator[None]:
    """fp32 matrix products and convolutions of the libraries in IEEE fp32, whatever the user has allowed.

    The yardstick is the oracle in eager PyTorch: with TF32 products its own error would excuse a thousandfold one of
    an exact kernel. ``conv="tf32"`` allows TF32 convolutions, for the one kernel that follows that switch.
    """
    b: Any = torch.backends
    wanted = [(b.cuda.matmul, "ieee"), (b.cudnn.conv, conv), (b.mkldnn.matmul, "ieee"), (b.mkldnn.conv, "ieee")]
    before = [(place, place.fp32_precision) for place, _ in wanted]
    try:
        for place, value in wanted:
            place.fp32_precision = value
        yield
    finally:
        for place, value in before:
            place.fp32_precision = value


def tf32_convolutions() -> bool:
    """Whether the user lets cuDNN compute convolutions in TF32 (torch's default)."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def truncate_tf32(x: Tensor) -> Tensor:
    """fp32 values as a TF32 product reads them: ten bits of mantissa, the rest dropped."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    bits = _writable(x).contiguous().view(torch.int32) & -(1 << 13)
    _writable(out).copy_(bits.view(torch.float32))
    return out


def _writable(x: Tensor) -> Tensor:
    """``x`` with each expanded dimension cut to the one element that is in memory."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if stride == 0 and size > 1:
            x = x.narrow(dim, 0, 1)
    return x


def copy_layout(x: Tensor, device: torch.device | str) -> Tensor:
    """A copy with the strides and the alignment of ``x``: a strided view is often what a sample is about."""
    start = _misalignment(x)
    buffer = torch.empty(start + extent(x), dtype=x.dtype, device=device)
    out = buffer.as_strided(x.shape, x.stride(), start)
    _writable(out).copy_(_writable(x))
    return out


def extent(x: Tensor) -> int:
    """Elements from the first to the last of a tensor, the gaps of its strides included."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def _misalignment(x: Tensor) -> int:
    """Elements by which the data of ``x`` is off the alignment of a fresh storage."""
    return int(x.storage_offset()) % (_ALIGNMENT // x.element_size())


class Surrounded:
    """A tensor's copy, in its layout and alignment, inside a buffer of poison; the gaps of its strides are poison too.

    Args:
        x: what is copied.
    """

    def __init__(self, x: Tensor) -> None:
        self._shape, self._stride = x.shape, x.stride()
        self._start = _MARGIN + _misalignment(x)
        size = self._start + extent(x) + _MARGIN
        poison = torch.nan if x.is_floating_point() else _most(x.dtype)
        self._buffer = torch.full((size,), poison, dtype=x.dtype, device=x.device)
        self.tensor = self._view(self._buffer)
        """The copy, to be handed to a kernel."""
        _writable(self.tensor).copy_(_writable(x))
        self._before = self._buffer.clone()

    def _view(self, buffer: Tensor) -> Tensor:
        return buffer.as_strided(self._shape, self._stride, self._start)

    def damage(self, *, written: bool = False) -> str:
        """What a kernel did to the buffer that it must not, empty if nothing; ``written``: the tensor is an output."""
        expected = self._before
        if written:
            expected = expected.clone()
            _writable(self._view(expected)).copy_(_writable(self.tensor))
        changed = (_bits(expected) != _bits(self._buffer)).nonzero()
        if not len(changed):
            return ""
        first, inside = int(changed[0]) - self._start, len(self._buffer) - _MARGIN - self._start
        where = f"{-first} elements before" if first < 0 else f"{first - inside + 1} elements past"
        return f"{where} its end" if first >= inside or first < 0 else "an element of it, or a gap of its strides"


def _most(dtype: torch.dtype) -> int | bool:
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def _bits(x: Tensor) -> Tensor:
    """The words behind ``x``: NaN is unequal to itself, its bits are not."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(words[x.element_size()])


def surround(value: Any, found: list[tuple[str, Surrounded]], name: str = "") -> Any:
    """``value`` with each tensor (in lists too) replaced by a surrounded copy, which is added to ``found``."""
    if isinstance(value, Tensor):
        found.append((name, Surrounded(value)))
        return found[-1][1].tensor
    if isinstance(value, (list, tuple)):
        return type(value)(surround(item, found, f"{name}[{i}]") for i, item in enumerate(value))
    return value
