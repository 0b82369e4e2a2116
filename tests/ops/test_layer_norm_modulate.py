import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError
from pyvideo_kernels.reference.layer_norm_modulate import layer_norm_modulate_backward
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close, check_op

from . import helpers

NAME = "layer_norm_modulate"


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME + "_backward"))
def test_backward_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME + "_backward", impl, device, dtype)


def test_contract():
    helpers.check_op_contract(NAME)


def test_gradients():
    helpers.check_gradients(NAME)


def test_low_precision_backward_is_no_worse_than_autograd_through_eager():
    g = torch.Generator().manual_seed(3)
    x, scale, shift = (torch.randn(2, n, 24, generator=g) for n in (5, 1, 1))
    grad = torch.randn(2, 5, 24, generator=g)

    def gradients(dtype, function):
        leaves = [t.to(d).requires_grad_() for t, d in ((x, dtype), (scale, dtype), (shift, dtype))]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    def eager(x, scale, shift):
        return torch.nn.functional.layer_norm(x, (24,), eps=1e-6) * (1 + scale) + shift

    exact = gradients(torch.float64, eager)
    for ours, low, ref in zip(gradients(torch.bfloat16, pv.layer_norm_modulate),
                              gradients(torch.bfloat16, eager), exact, strict=True):  # fmt: skip
        assert_close(ours, ref, low)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_gradients_through_an_explicit_implementation(impl):
    """Autograd keeps the implementation asked for; more tokens than one partial sum takes, twice the same bits."""
    g = torch.Generator().manual_seed(5)
    tensors = [torch.randn(*shape, generator=g) for shape in ((2, 11, 24), (2, 1, 24), (1, 11, 24), (24,), (24,))]
    grad = torch.randn(2, 11, 24, generator=g).to(helpers.DEVICE)

    def gradients(dtype, function):
        leaves = [t.to(helpers.DEVICE, dtype).requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    def ours(x, scale, shift, weight, bias):
        return pv.layer_norm_modulate(x, scale, shift, weight=weight, bias=bias, impl=impl)

    def eager(x, scale, shift, weight, bias):
        return torch.nn.functional.layer_norm(x, (24,), weight, bias, 1e-6) * (1 + scale) + shift

    exact, low = gradients(torch.float64, eager), gradients(torch.float32, eager)
    before = dispatch.calls().get(("layer_norm_modulate_backward", impl), 0)
    first, second = gradients(torch.float32, ours), gradients(torch.float32, ours)
    assert dispatch.calls()["layer_norm_modulate_backward", impl] == before + 2
    for a, b, ref, yardstick in zip(first, second, exact, low, strict=True):
        assert_close(a, ref, yardstick)
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_only_the_wanted_gradients_and_an_expanded_one(impl):
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).to(helpers.DEVICE)
    scale = torch.full((2, 1, 24), 0.5, device=helpers.DEVICE, requires_grad=True)
    pv.layer_norm_modulate(x, scale, impl=impl).sum().backward()  # the gradient of a sum has stride 0
    xhat = torch.nn.functional.layer_norm(x, (24,), eps=1e-6)
    torch.testing.assert_close(scale.grad, xhat.sum(1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_the_rule_sees_a_backward_that_forgets_a_term():
    op = OPS[NAME + "_backward"]

    def forgets_scale(grads, x, scale, *rest):
        good = layer_norm_modulate_backward(grads, x, scale, *rest)
        flat = layer_norm_modulate_backward(grads, x, None if scale is None else scale * 0, *rest)
        return [flat[0], *good[1:]]

    with pytest.raises(Mismatch, match="output 0"):
        check_op(op, "reference", "cpu", torch.float32, call=forgets_scale)


def test_fullgraph():
    g = torch.Generator().manual_seed(0)
    x, scale, shift = (torch.randn(2, n, 32, generator=g) for n in (3, 1, 1))
    helpers.check_fullgraph(pv.layer_norm_modulate, x, scale, shift)


def test_the_rule_sees_a_swapped_scale_and_shift():
    g = torch.Generator().manual_seed(0)
    x, scale, shift = (torch.randn(2, n, 32, generator=g) for n in (3, 1, 1))
    right, wrong = pv.layer_norm_modulate(x, scale, shift), pv.layer_norm_modulate(x, shift, scale)
    exact = pv.layer_norm_modulate(x.double(), scale.double(), shift.double())
    assert_close(right, exact, right)
    with pytest.raises(Mismatch):
        assert_close(wrong, exact, right)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(3, 8)}, ShapeError, "`x` must have 3 dimensions"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int32)}, DTypeError, "`x` must be float32"),
        (
            {"x": torch.zeros(2, 8, 3).transpose(1, 2)},
            ShapeError,
            "`x` must have a contiguous last dimension",
        ),
        ({"scale": torch.zeros(2, 2, 8)}, ShapeError, r"`scale` must be \[2, 1, 8\] or \[2, 3, 8\]"),
        ({"shift": [0.0]}, DTypeError, "`shift` must be a tensor; got list"),
        ({"weight": torch.zeros(7)}, ShapeError, r"`weight` must be \[8\]"),
        ({"scale": torch.zeros(2, 1, 8, device="meta")}, DeviceError, "`scale` must be on cpu"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    arguments = {
        "x": torch.zeros(2, 3, 8),
        "scale": torch.zeros(2, 1, 8),
        "shift": torch.zeros(2, 1, 8),
        **change,
    }
    with pytest.raises(error, match=words):
        pv.layer_norm_modulate(**arguments)


def test_empty_sequence():
    assert pv.layer_norm_modulate(torch.zeros(2, 0, 8)).shape == (2, 0, 8)
