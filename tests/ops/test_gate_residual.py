import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

NAME = "gate_residual"


def _inputs(dtype=torch.float32, b=2, s=5, d=24, gate_rows=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(b, s, d, generator=g).to(dtype) for _ in range(2))
    return x, y, torch.randn(b, gate_rows, d, generator=g)


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_contract():
    helpers.check_op_contract(NAME)


def test_gradients():
    helpers.check_gradients(NAME)


@pytest.mark.parametrize("gate_rows", [1, 5])
def test_low_precision_backward_is_no_worse_than_autograd_through_eager(gate_rows):
    x, y, gate = _inputs(gate_rows=gate_rows)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def gradients(dtype, function):
        leaves = [t.to(dtype).requires_grad_() for t in (x, y, gate)]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    exact = gradients(torch.float64, lambda x, y, gate: x + y * gate)
    low = gradients(torch.bfloat16, lambda x, y, gate: x + y * gate)
    for ours, eager, ref in zip(gradients(torch.bfloat16, pv.gate_residual), low, exact, strict=True):
        assert_close(ours, ref, eager)


def test_gradients_of_different_dtypes_keep_them():
    x, y, gate = _inputs(torch.bfloat16)
    leaves = [x.requires_grad_(), y.float().requires_grad_(), gate.requires_grad_()]
    pv.gate_residual(*leaves).sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.float32, torch.float32]


def test_fullgraph():
    helpers.check_fullgraph(pv.gate_residual, *_inputs())


def test_rounds_once_like_the_wan_block():
    x, y, gate = _inputs(torch.bfloat16)
    block = (x.float() + y * gate).type_as(x)  # WanTransformerBlock.forward; y * gate promotes to fp32
    assert torch.equal(pv.gate_residual(x, y, gate, impl="reference"), block)
    # A gate that is rounded first, or a product that is, gives other numbers: the samples can tell.
    assert not torch.equal((x + y * gate.bfloat16()), block)


def test_the_rule_sees_a_dropped_and_a_flipped_gate():
    x, y, gate = _inputs()
    right, exact = pv.gate_residual(x, y, gate), pv.gate_residual(x.double(), y.double(), gate.double())
    assert_close(right, exact, right)
    for wrong in (pv.gate_residual(x, y), pv.gate_residual(x, y, -gate), pv.gate_residual(y, x, gate)):
        with pytest.raises(Mismatch):
            assert_close(wrong, exact, right)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_runs_are_bitwise_equal(impl):
    inputs = [t.to(helpers.DEVICE) for t in _inputs(d=67)]
    assert torch.equal(pv.gate_residual(*inputs, impl=impl), pv.gate_residual(*inputs, impl=impl))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(3, 8)}, ShapeError, "`x` must have 3 dimensions"),
        ({"y": torch.zeros(2, 3, 9)}, ShapeError, r"`y` must be \[2, 3, 8\] like `x`"),
        ({"y": torch.zeros(2, 3, 8, dtype=torch.int8)}, DTypeError, "`y` must be float32"),
        ({"y": torch.zeros(2, 8, 3).transpose(1, 2)}, ShapeError, "`y` must have a contiguous last dimension"),
        ({"gate": torch.zeros(2, 2, 8)}, ShapeError, r"`gate` must be \[2, 1, 8\] or \[2, 3, 8\]"),
        ({"gate": torch.zeros(8)}, ShapeError, "`gate` must have 3 dimensions"),
        ({"gate": 1.0}, DTypeError, "`gate` must be a tensor; got float"),
        ({"y": torch.zeros(2, 3, 8, device="meta")}, DeviceError, "`y` must be on cpu"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    arguments = {"x": torch.zeros(2, 3, 8), "y": torch.zeros(2, 3, 8), "gate": torch.zeros(2, 1, 8), **change}
    with pytest.raises(error, match=words):
        pv.gate_residual(**arguments)


def test_triton_refuses_float64():
    x = torch.zeros(1, 2, 8, dtype=torch.float64, device=helpers.DEVICE)
    with pytest.raises(UnsupportedError, match="refuses float64"):
        pv.gate_residual(x, x, impl="triton")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_empty_sequence(impl):
    x = torch.zeros(2, 0, 8, device=helpers.DEVICE)
    assert pv.gate_residual(x, x, impl=impl).shape == (2, 0, 8)
