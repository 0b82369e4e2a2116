import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

NAME = "rms_norm"


def _inputs(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g).to(dtype)
    return x, (torch.randn(shape[-1], generator=g) * 0.3 + 1).to(dtype)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 7, 40), (5, 33), (2, 3, 4, 16)])
def test_matches_torch_rms_norm(shape, dtype):
    x, weight = _inputs(*shape, dtype=dtype)
    module = torch.nn.RMSNorm(shape[-1], eps=1e-6, dtype=dtype)
    module.load_state_dict({"weight": weight})
    with torch.no_grad():
        exact = torch.nn.functional.rms_norm(x.double(), shape[-1:], weight.double(), 1e-6)
        for impl in ("auto", "reference", "triton"):
            out = pv.rms_norm(x.to(helpers.DEVICE), weight.to(helpers.DEVICE), eps=1e-6, impl=impl)
            assert_close(out.cpu(), exact, module(x), impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_is_no_worse_than_autograd_through_torch(dtype):
    x, weight = _inputs(2, 7, 40)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def gradients(dtype, function):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    def eager(x, weight):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)

    exact, low = gradients(torch.float64, eager), gradients(dtype, eager)
    for name, got, own, ref in zip(("x", "weight"), gradients(dtype, pv.rms_norm), low, exact, strict=True):
        assert_close(got, ref, own, name)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(2, 11, 24), (3, 5, 2, 16)])
def test_gradients_through_an_explicit_implementation(impl, shape):
    """A view that is read in place, more rows than one partial sum takes, and the same bits twice."""
    g = torch.Generator().manual_seed(2)
    wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=g)
    weight, grad = torch.randn(shape[-1], generator=g), torch.randn(*shape, generator=g)

    def gradients(dtype, function):
        leaves = [t.to(helpers.DEVICE, dtype).requires_grad_() for t in (wide, weight)]
        rows = leaves[0][..., : shape[-1]].transpose(0, 1)
        out = function(rows, leaves[1]).transpose(0, 1)
        return torch.autograd.grad(out, leaves, grad.to(helpers.DEVICE, dtype))

    def eager(x, weight):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)

    def ours(x, weight):
        return pv.rms_norm(x, weight, impl=impl)

    exact, low = gradients(torch.float64, eager), gradients(torch.float32, eager)
    before = dispatch.calls().get(("rms_norm_backward", impl), 0)
    first, second = gradients(torch.float32, ours), gradients(torch.float32, ours)
    assert dispatch.calls()["rms_norm_backward", impl] == before + 2
    for a, b, ref, yardstick in zip(first, second, exact, low, strict=True):
        assert_close(a, ref, yardstick)
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_gradient_of_a_sum(impl):
    x, weight = (t.to(helpers.DEVICE).requires_grad_() for t in _inputs(5, 24))
    pv.rms_norm(x, weight, impl=impl).sum().backward()  # its gradient has stride 0
    xhat = torch.nn.functional.rms_norm(x.detach(), (24,), eps=1e-6)
    torch.testing.assert_close(weight.grad, xhat.sum(0), rtol=1e-5, atol=1e-5)


def test_fullgraph():
    helpers.check_fullgraph(pv.rms_norm, *_inputs(2, 3, 32))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, 1],  # k of a packed projection
        lambda x: x[:, ::2],
        lambda x: x.permute(3, 2, 1, 0, 4),
        lambda x: x[0, :, 0].transpose(0, 1),
        lambda x: x[1, 2],
        lambda x: x[:1, :, :1],
        lambda x: x[0, 0, 0, 0].expand(3, 2, 8),
    ],
)
def test_any_strides(view):
    x, weight = _inputs(2, 5, 3, 4, 8)
    rows = view(x).to(helpers.DEVICE)
    weight = weight.to(helpers.DEVICE)
    out = pv.rms_norm(rows, weight, impl="triton")
    assert out.is_contiguous()
    assert torch.equal(out, pv.rms_norm(rows.contiguous(), weight, impl="triton"))
    assert_close(out, pv.rms_norm(rows.double(), weight.double()), pv.rms_norm(rows, weight, impl="reference"))


def test_the_rule_sees_a_layer_norm_and_a_forgotten_weight():
    x, weight = _inputs(3, 40)
    x = x + 0.5
    right, exact = pv.rms_norm(x, weight), pv.rms_norm(x.double(), weight.double())
    assert_close(right, exact, right)
    for wrong in (torch.nn.functional.layer_norm(x, (40,), weight), pv.rms_norm(x), pv.rms_norm(x, weight, eps=1e-2)):
        with pytest.raises(Mismatch):
            assert_close(wrong, exact, right)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_runs_are_bitwise_equal(impl):
    x, weight = (t.to(helpers.DEVICE) for t in _inputs(3, 67))
    assert torch.equal(pv.rms_norm(x, weight, impl=impl), pv.rms_norm(x, weight, impl=impl))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(())}, ShapeError, "`x` must have"),
        ({"x": torch.zeros(1, 1, 1, 1, 1, 8)}, ShapeError, "`x` must have"),
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, DTypeError, "`x` must be float32"),
        ({"x": torch.zeros(8, 3).mT}, ShapeError, "`x` must have a contiguous last dimension"),
        ({"weight": torch.zeros(7)}, ShapeError, r"`weight` must be \[8\]"),
        ({"weight": torch.zeros(1, 8)}, ShapeError, "`weight` must have 1 dimensions"),
        ({"weight": torch.zeros(8, device="meta")}, DeviceError, "`weight` must be on cpu"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        pv.rms_norm(**{"x": torch.zeros(3, 8), "weight": torch.zeros(8), **change})


@pytest.mark.parametrize(("width", "dtype", "words"), [(8, torch.float64, "float64"), (16385, None, "exceed 16384")])
def test_triton_refuses_what_it_has_not(width, dtype, words):
    with pytest.raises(UnsupportedError, match=words):
        pv.rms_norm(torch.zeros(3, width, dtype=dtype, device=helpers.DEVICE), impl="triton")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_rows(impl):
    assert pv.rms_norm(torch.zeros(2, 0, 8, device=helpers.DEVICE), impl=impl).shape == (2, 0, 8)
