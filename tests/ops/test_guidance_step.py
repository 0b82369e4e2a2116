import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

NAME = "guidance_step"
OPTIONS = {"guidance_scale": 5.0, "sigma": 0.9, "sigma_next": 0.8}


def _inputs(shape=(1, 4, 3, 5, 7), latent=torch.float32, prediction=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g).to(dtype) for dtype in (latent, prediction, prediction)]


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_contract():
    helpers.check_op_contract(NAME)


def test_fullgraph():
    helpers.check_fullgraph(pv.guidance_step, *_inputs(), **OPTIONS)


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("step", [0, 3, 7])
def test_matches_the_diffusers_scheduler(impl, step):
    """Guidance as WanPipeline writes it, then FlowMatchEulerDiscreteScheduler.step, in float64 and float32."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    latent, cond, uncond = _inputs(prediction=torch.float32)

    def stock(dtype):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(8)
        x, c, u = (t.to(dtype) for t in (latent, cond, uncond))
        prediction = u + OPTIONS["guidance_scale"] * (c - u)
        scheduler.set_begin_index(step)
        sigma, sigma_next = (float(s) for s in scheduler.sigmas[step : step + 2])
        if dtype == torch.float64:
            # step() rounds the latent to float32: the same formula without that.
            return x + (sigma_next - sigma) * prediction, sigma, sigma_next
        return scheduler.step(prediction, scheduler.timesteps[step], x, return_dict=False)[0], sigma, sigma_next

    exact, sigma, sigma_next = stock(torch.float64)
    eager, *_ = stock(torch.float32)
    inputs = [t.to(helpers.DEVICE) for t in (latent, cond, uncond)]
    options = {"guidance_scale": 5.0, "sigma": sigma, "sigma_next": sigma_next, "impl": impl}
    assert_close(pv.guidance_step(*inputs, **options).cpu(), exact, eager)


def test_low_precision_predictions_are_combined_in_fp32():
    """The pipeline rounds the guided prediction to bf16; that is most of its error, and not repeated here."""
    latent, cond, uncond = _inputs()
    exact = pv.guidance_step(*(t.double() for t in (latent, cond, uncond)), **OPTIONS)
    ours = pv.guidance_step(latent, cond, uncond, **OPTIONS)
    rounded = latent + (0.8 - 0.9) * (uncond + 5.0 * (cond - uncond))
    assert float((ours - exact).abs().max()) < 1e-6 < float((rounded - exact).abs().max())


def test_the_rule_sees_wrong_arguments():
    latent, cond, uncond = _inputs()
    right = pv.guidance_step(latent, cond, uncond, **OPTIONS)
    exact = pv.guidance_step(*(t.double() for t in (latent, cond, uncond)), **OPTIONS)
    assert_close(right, exact, right)
    backwards = {**OPTIONS, "sigma": 0.8, "sigma_next": 0.9}
    for wrong in (
        pv.guidance_step(latent, uncond, cond, **OPTIONS),
        pv.guidance_step(latent, cond, **OPTIONS),
        pv.guidance_step(latent, cond, uncond, **backwards),
        pv.guidance_step(latent, cond, uncond, **{**OPTIONS, "guidance_scale": 5.01}),
    ):
        with pytest.raises(Mismatch):
            assert_close(wrong, exact, right)


def test_guidance_of_one_is_the_conditional_prediction():
    latent, cond, uncond = _inputs(prediction=torch.float32)
    options = {**OPTIONS, "guidance_scale": 1.0}
    a, b = pv.guidance_step(latent, cond, uncond, **options), pv.guidance_step(latent, cond, **options)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_runs_are_bitwise_equal(impl):
    inputs = [t.to(helpers.DEVICE) for t in _inputs()]
    first, second = (pv.guidance_step(*inputs, **OPTIONS, impl=impl) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_inputs_are_left_alone(impl):
    inputs = [t.to(helpers.DEVICE) for t in _inputs()]
    before = [t.clone() for t in inputs]
    out = pv.guidance_step(*inputs, **OPTIONS, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert out.data_ptr() != inputs[0].data_ptr()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"latent": [1.0]}, DTypeError, "`latent` must be a tensor; got list"),
        ({"cond": torch.zeros(2, 4)}, ShapeError, r"`cond` must be \[2, 3\] like `latent`"),
        ({"uncond": torch.zeros(3)}, ShapeError, r"`uncond` must be \[2, 3\] like `latent`"),
        ({"cond": torch.zeros(2, 3, dtype=torch.int32)}, DTypeError, "`cond` must be float32"),
        ({"uncond": torch.zeros(2, 3, device="meta")}, DeviceError, "`uncond` must be on cpu"),
        ({"latent": torch.zeros(2, 3, requires_grad=True)}, UnsupportedError, "`latent` requires grad"),
        ({"cond": torch.zeros(2, 3, requires_grad=True)}, UnsupportedError, "`cond` requires grad"),
        ({"uncond": torch.zeros(2, 3, requires_grad=True)}, UnsupportedError, "`uncond` requires grad"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    arguments = {name: torch.zeros(2, 3) for name in ("latent", "cond", "uncond")}
    with pytest.raises(error, match=words):
        pv.guidance_step(**{**arguments, **OPTIONS, **change})


def test_requires_grad_is_fine_without_gradients():
    x = torch.zeros(2, 3, requires_grad=True)
    with torch.no_grad():
        assert not pv.guidance_step(x, x, x, **OPTIONS).requires_grad
