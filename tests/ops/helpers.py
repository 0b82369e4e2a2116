"""What every op's test file runs: the rule on all samples, opcheck, fullgraph, gradcheck."""

import pytest
import torch

from pyvideo_kernels import _native, dispatch
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import check_op, samples

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter's tl.dot multiplies the raw words of bf16: interpret fp16 and fp32, run bf16 on the card.
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16)
CPU_DTYPES = (torch.float32, torch.bfloat16)
# What runs on DEVICE is selected by `-m gpu` where that is a card, and runs without one where it is not.
ON_DEVICE = (pytest.mark.gpu,) if GPU else ()
# ``impl="cpu"`` as a parameter of a test beside others.
CPU = pytest.param(
    "cpu", marks=pytest.mark.skipif(not _native.available(), reason=f"extension not built: {_native.why_not()}")
)


def device_of(impl):
    return "cpu" if impl == "cpu" else DEVICE


def implementations(name):
    """(impl, device, dtype) combinations to hold against float64."""
    op = OPS[name]
    rows = []
    for impl in op.impls:
        if impl in ("reference", "flash", "cudnn", "cublas"):
            continue  # the oracle itself; libraries, which have test files of their own
        if impl == "triton":
            rows += [
                pytest.param(impl, DEVICE, dtype, id=f"triton-{DEVICE}-{dtype}", marks=ON_DEVICE)
                for dtype in TRITON_DTYPES
            ]
        elif impl == "cuda":
            rows += [
                pytest.param(impl, "cuda", dtype, id=f"cuda-{dtype}", marks=pytest.mark.gpu)
                for dtype in (torch.float32, torch.float16, torch.bfloat16)
            ]
        elif impl == "cpu":
            rows += [pytest.param(impl, "cpu", dtype, id=f"cpu-{dtype}") for dtype in CPU_DTYPES]
        else:
            rows += [pytest.param(impl, DEVICE, dtype, id=f"{impl}-{dtype}", marks=ON_DEVICE) for dtype in CPU_DTYPES]
    return rows


def check_implementation(name, impl, device, dtype):
    """The numeric rule on every sample; the extension may be absent, and that is said."""
    op = OPS[name]
    if impl in ("cpu", "cuda"):
        try:
            dispatch.load(op, impl)
        except UnsupportedError as error:
            pytest.skip(f"extension not built: {error}")
    assert check_op(op, impl, device, dtype) > 0


def check_op_contract(name, dtype=torch.float32, grad=None, impl="reference"):
    """opcheck on every sample (compact and strided inputs): schema, autograd registration, fake, AOT dispatch."""
    op = OPS[name]
    for kwargs in samples(op, dtype):
        args = op.bind(**kwargs)
        if grad if grad is not None else op.differentiable:
            args = tuple(
                a.clone().requires_grad_() if isinstance(a, torch.Tensor) and n in op.differentiable else a
                for n, a in zip(op.arguments[:-1], args, strict=True)
            )
        torch.library.opcheck(getattr(torch.ops.pyvideo, name), (*args, impl))


def check_gradients(name):
    """gradcheck in float64 of every differentiable argument on every sample."""
    op = OPS[name]
    for kwargs in samples(op, torch.float64):
        args = [
            a.clone().requires_grad_() if isinstance(a, torch.Tensor) and n in op.differentiable else a
            for n, a in zip(op.arguments[:-1], op.bind(**kwargs), strict=True)
        ]
        assert torch.autograd.gradcheck(
            lambda *inputs: getattr(torch.ops.pyvideo, name)(*inputs, "reference"), args, fast_mode=True
        )


def check_fullgraph(function, *args, **kwargs):
    """The public function traces into one graph and gives eager's result."""
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: function(*a, **kwargs), fullgraph=True, backend="aot_eager")
    expected, got = function(*args, **kwargs), compiled(*args)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
