"""Calls of every op with a compiled CPU kernel: the op's own samples, and rows enough for several threads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from pyvideo_kernels import _native, dispatch
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import samples

DTYPES = (torch.float32, torch.bfloat16)


# Those that a kernel of csrc/ serves alone. Where a product of torch's follows, as in patch_embed3d, the bits are the
# BLAS's, which may sum in another order for another number of threads or at another address.
NAMES = [name for name, devices in _native._KERNELS.items() if "cpu" in devices] + ["patchify"]


@dataclasses.dataclass
class Call:
    name: str
    label: str
    function: Callable[..., Any]
    args: tuple[Any, ...]

    @property
    def in_place(self):
        return self.name.endswith("_")

    def __call__(self, args=None):
        """Its results: what it returns, or what it leaves in copies of its arguments."""
        if not self.in_place:
            return flat(self.function(*(self.args if args is None else args)))
        args = self.copies() if args is None else args
        self.function(*args)
        return flat(args)

    def copies(self):
        """The arguments, every tensor of them copied."""
        return tuple(changed(arg, torch.clone) for arg in self.args)


def changed(value, change):
    """``value`` with ``change`` made to every tensor in it."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(changed(item, change) for item in value) if isinstance(value, (list, tuple)) else value


def flat(value):
    """The tensors of an op's results."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in flat(item)] if isinstance(value, (list, tuple)) else []


def same(first, second):
    """Whether results are equal bit for bit."""
    return len(first) == len(second) and all(
        a.shape == b.shape and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(first, second)
    )  # fmt: skip


def calls(name, dtype):
    """The op's samples in ``dtype`` that its CPU implementation takes."""
    if name == "patchify":
        return [patchify(dtype)]
    op = OPS[name]
    function = dispatch.load(op, "cpu")
    found = []
    for i, kwargs in enumerate(samples(op, dtype)):
        call = Call(name, f"{name} {dtype} sample {i}", function, op.bind(**kwargs))
        try:
            call()
        except UnsupportedError:
            continue
        found.append(call)
    assert found, f"{name} takes none of its samples in {dtype}"
    return found


def patchify(dtype):
    """The compiled part of patch_embed3d."""
    video = torch.randn(2, 3, 5, 34, 38, generator=torch.Generator().manual_seed(2)).to(dtype)
    args = (video[:, :, 1:, :, 2:], (1, 2, 2))
    return Call("patchify", f"patchify {dtype}", _native.part("patchify"), args)


def large(name, dtype, shape=(2, 331, 515)):
    """A call on ``[batch, tokens, width]`` of an op on rows; None for other ops.

    torch shares rows among threads only if there are some thousands of values to a thread, more than samples have.
    """
    from tests.build import test_native

    if name.startswith("qk_norm_rope"):
        heads = max(shape[2] // 64, 1)
        args = test_native.rope_inputs(*shape[:2], heads, 64, dtype, "across_heads", "interleaved")
    elif name in test_native.ROW_OPS:
        args = test_native.inputs(name, shape, dtype)
    else:
        return None
    return Call(name, f"{name} {dtype} large", dispatch.load(OPS[name], "cpu"), args)
