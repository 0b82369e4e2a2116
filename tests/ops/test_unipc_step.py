import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError, ValueOptionError
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

NAME = "unipc_step"


def _inputs(history=2, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    sample, cond, uncond, last, *past = (torch.randn(2, 67, generator=g).to(dtype) for _ in range(4 + history))
    return {
        "sample": sample, "cond": cond, "uncond": uncond, "last_sample": last, "history": past,
        "guidance_scale": 5.0, "sigma": 0.7,
        "corrector": [0.9, 0.15, -0.06, 0.02][: 2 + history], "predictor": [0.8, 0.3, -0.12, 0.04][: 2 + history],
    }  # fmt: skip


def _to(inputs, *args):
    move = lambda v: [t.to(*args) for t in v] if isinstance(v, list) and v and isinstance(v[0], torch.Tensor) else v
    return {k: v.to(*args) if isinstance(v, torch.Tensor) else move(v) for k, v in inputs.items()}


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_contract():
    helpers.check_op_contract(NAME)


def test_fullgraph():
    inputs = _inputs()
    tensors = [inputs.pop(name) for name in ("sample", "cond", "uncond", "last_sample")]
    helpers.check_fullgraph(pv.unipc_step, *tensors, **inputs)


def test_the_formula_written_out():
    i = _to(_inputs(), torch.float64)
    prev, x0, corrected = pv.unipc_step(**i)
    v = i["uncond"] + 5.0 * (i["cond"] - i["uncond"])
    assert torch.allclose(x0, i["sample"] - 0.7 * v, rtol=0, atol=1e-14)
    terms = torch.stack([i["last_sample"], x0, *i["history"]])
    assert torch.allclose(corrected, torch.einsum("k,kij", terms.new_tensor(i["corrector"]), terms), rtol=0, atol=1e-14)
    terms[0] = corrected
    assert torch.allclose(prev, torch.einsum("k,kij", terms.new_tensor(i["predictor"]), terms), rtol=0, atol=1e-14)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_first_step_returns_a_copy_of_the_sample(impl):
    i = _to(_inputs(history=0), helpers.DEVICE)
    i |= {"last_sample": None, "corrector": []}
    *_, corrected = pv.unipc_step(**i, impl=impl)
    assert torch.equal(corrected, i["sample"])
    assert corrected.data_ptr() != i["sample"].data_ptr()


def test_the_rule_sees_wrong_arguments():
    inputs = _inputs()
    right, exact = pv.unipc_step(**inputs), pv.unipc_step(**_to(inputs, torch.float64))
    for out, ref in zip(right, exact, strict=True):
        assert_close(out, ref, out)
    for change in (
        {"cond": inputs["uncond"], "uncond": inputs["cond"]},
        {"uncond": None},
        {"history": inputs["history"][::-1]},
        {"corrector": inputs["predictor"]},
        {"last_sample": inputs["sample"]},
        {"sigma": 0.701},
    ):
        with pytest.raises(Mismatch):
            assert_close(pv.unipc_step(**{**inputs, **change})[0], exact[0], right[0])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_runs_are_bitwise_equal_and_leave_their_inputs_alone(impl):
    inputs = _to(_inputs(), helpers.DEVICE)
    before = _to(inputs, torch.float64)
    first, second = (pv.unipc_step(**inputs, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for name in ("sample", "cond", "uncond", "last_sample"):
        assert torch.equal(inputs[name].double(), before[name])


def test_triton_refuses_a_long_history_and_the_reference_takes_it():
    x = torch.ones(2, 3, device=helpers.DEVICE)
    options = {"guidance_scale": 1.0, "sigma": 0.5, "corrector": [], "predictor": [0.2] * 6}
    with pytest.raises(UnsupportedError, match="at most 3 of `history`, got 4"):
        pv.unipc_step(x, x, history=[x] * 4, **options, impl="triton")
    prev, *_ = pv.unipc_step(x, x, history=[x] * 4, **options)
    torch.testing.assert_close(prev, torch.full_like(prev, 1.1))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sample": None}, DTypeError, "`sample` must be a tensor"),
        ({"cond": torch.zeros(3)}, ShapeError, r"`cond` must be \[2, 67\] like `sample`"),
        ({"last_sample": torch.zeros(67)}, ShapeError, "`last_sample` must be"),
        ({"history": [torch.zeros(2, 67), torch.zeros(2, 66)]}, ShapeError, r"`history\[1\]` must be"),
        ({"history": [torch.zeros(2, 67)]}, ValueOptionError, "`predictor` must be 3 coefficients"),
        ({"corrector": [1.0]}, ValueOptionError, "`corrector` must be 4 coefficients"),
        ({"last_sample": None}, ValueOptionError, "`corrector` must be empty without `last_sample`"),
        ({"predictor": [1.0, float("nan"), 0.0, 0.0]}, ValueOptionError, "`predictor` must be finite"),
        ({"uncond": torch.zeros(2, 67, device="meta")}, DeviceError, "`uncond` must be on cpu"),
        ({"sample": torch.zeros(2, 67, requires_grad=True)}, UnsupportedError, "`sample` requires grad"),
        ({"history": [torch.zeros(2, 67, requires_grad=True)] * 2}, UnsupportedError, "`history.0.` requires grad"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        pv.unipc_step(**{**_inputs(), **change})
