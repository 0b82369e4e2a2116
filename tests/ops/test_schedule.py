"""Whole trajectories of the one-kernel solvers against diffusers' schedulers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import pyvideo_kernels as pv
from pyvideo_kernels.errors import UnsupportedError, ValueOptionError
from pyvideo_kernels.schedule import EulerSolver, UniPCSolver, euler_steps, unipc_steps
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

SHAPE = (1, 4, 3, 4, 6)
GUIDANCE = 4.0


def _field(x, sigma, seed):
    """A smooth velocity that depends on the state, so that an error of one step reaches the next."""
    return torch.tanh((1.1 + 0.1 * seed) * x + sigma) - 0.4 * sigma * x + 0.1 * torch.sin(3 * x + seed)


def _noise(dtype):
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def _unipc(steps, shift, **config):
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, **config}
    scheduler = UniPCMultistepScheduler(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def _stock(scheduler, dtype, until=None):
    sigmas = scheduler.sigmas.tolist()
    if dtype == torch.float64:
        scheduler.sigmas = scheduler.sigmas.double()
    x, path = _noise(dtype), []
    for i, t in enumerate(scheduler.timesteps[:until]):
        cond, uncond = _field(x, sigmas[i], 0), _field(x, sigmas[i], 1)
        x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x, return_dict=False)[0]
        path.append(x)
    return path


def _ours(solver, dtype, until=None, device="cpu"):
    x, path = _noise(dtype).to(device), []
    for sigma in solver.sigmas[:-1][:until]:
        x = solver.step(x, _field(x, sigma, 0), _field(x, sigma, 1), guidance_scale=GUIDANCE)
        path.append(x.cpu())
    return path


def _assert_same_path(make, until=None, impl="reference"):
    """Float64 to the last bits; float32 no worse than twice what diffusers' float32 loses over the trajectory."""
    exact = _stock(make(), torch.float64, until)
    for ours, ref in zip(_ours(pv.solver_for(make(), impl=impl), torch.float64, until), exact, strict=True):
        torch.testing.assert_close(ours, ref, rtol=1e-11, atol=1e-11)
    stock = _stock(make(), torch.float32, until)
    ours = _ours(pv.solver_for(make(), impl=impl), torch.float32, until)
    worst = lambda path: max(float((a - b).abs().max()) for a, b in zip(path, exact, strict=True))
    band = torch.finfo(torch.float32).eps * max(float(x.abs().max()) for x in exact)
    assert worst(ours) <= 2 * worst(stock) + band


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
def test_unipc_trajectory_is_that_of_diffusers(steps, shift):
    _assert_same_path(lambda: _unipc(steps, shift))


@pytest.mark.parametrize(
    "config",
    [
        {"solver_order": 1},
        {"solver_order": 3},
        {"disable_corrector": [0, 3]},
        {"solver_order": 3, "disable_corrector": [1]},
        {"final_sigmas_type": "zero", "use_karras_sigmas": True},
        {"shift_terminal": 0.1},
    ],
)
def test_unipc_options(config):
    _assert_same_path(lambda: _unipc(8, 3.0, **config))


@pytest.mark.parametrize("config", [{"solver_type": "bh1"}, {"lower_order_final": False, "solver_order": 3}])
def test_unipc_options_up_to_the_last_step(config):
    """Towards sigma 0 diffusers divides by an infinite step here and returns NaN: compare what comes before."""
    exact = _stock(_unipc(8, 3.0, **config), torch.float64, until=7)
    sigmas = _unipc(8, 3.0, **config).sigmas.tolist()
    order = config.get("solver_order", 2)
    solver = UniPCSolver(
        sigmas if "solver_type" in config else sigmas[:-1], order=order, solver_type=config.get("solver_type", "bh2"),
        lower_order_final=config.get("lower_order_final", True), impl="reference",
    )  # fmt: skip
    for ours, ref in zip(_ours(solver, torch.float64, until=7), exact, strict=True):
        torch.testing.assert_close(ours, ref, rtol=1e-11, atol=1e-11)


def test_bh1_reaches_sigma_zero():
    path = _ours(pv.solver_for(_unipc(8, 3.0, solver_type="bh1")), torch.float32)
    assert all(bool(x.isfinite().all()) for x in path)


def test_starting_in_the_middle():
    def make():
        scheduler = _unipc(8, 3.0)
        scheduler.set_begin_index(3)
        return scheduler

    sigmas = make().sigmas.tolist()[3:]
    scheduler, x = make(), _noise(torch.float64)
    scheduler.sigmas = scheduler.sigmas.double()
    solver, y = pv.solver_for(make()), _noise(torch.float64)
    assert len(solver) == 5
    for t, sigma in zip(scheduler.timesteps[3:], sigmas, strict=False):
        x = scheduler.step(_field(x, sigma, 0), t, x, return_dict=False)[0]
        y = solver.step(y, _field(y, sigma, 0))
    torch.testing.assert_close(y, x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 3, 8, 20])
def test_euler_trajectory_is_that_of_diffusers(steps, shift):
    def make():
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        return scheduler

    solver = pv.solver_for(make(), impl="reference")
    stock = _stock(make(), torch.float32)
    ours = _ours(solver, torch.float32)
    # The scheduler's step() rounds the latent to float32 whatever it is given: float64 by the formula itself.
    x, exact = _noise(torch.float64), []
    for a, b in zip(solver.sigmas[:-1], solver.sigmas[1:], strict=True):
        cond, uncond = _field(x, a, 0), _field(x, a, 1)
        x = x + (b - a) * (uncond + GUIDANCE * (cond - uncond))
        exact.append(x)
    worst = lambda path: max(float((p - q).abs().max()) for p, q in zip(path, exact, strict=True))
    band = torch.finfo(torch.float32).eps * max(float(x.abs().max()) for x in exact)
    assert worst(ours) <= 2 * worst(stock) + band
    for out, ref in zip(_ours(EulerSolver(solver.sigmas), torch.float64), exact, strict=True):
        torch.testing.assert_close(out, ref, rtol=1e-12, atol=1e-12)


def test_the_triton_step_follows_the_same_trajectory():
    make = lambda: _unipc(4, 3.0)
    exact, stock = _stock(make(), torch.float64), _stock(make(), torch.float32)
    ours = _ours(pv.solver_for(make(), impl="triton"), torch.float32, device=helpers.DEVICE)
    assert_close(ours[-1], exact[-1], stock[-1])


@pytest.mark.parametrize("part", ["corrector", "predictor"])
def test_a_wrong_coefficient_is_seen(part):
    make = lambda: _unipc(8, 3.0)
    exact, stock = _stock(make(), torch.float64)[-1], _stock(make(), torch.float32)[-1]
    solver = pv.solver_for(make())
    assert_close(_ours(solver, torch.float32)[-1], exact, stock)
    solver.reset()
    step = solver.steps[4]
    values = list(getattr(step, part))
    values[-1] = -values[-1] if values[-1] else 1e-3
    object.__setattr__(step, part, tuple(values))
    with pytest.raises(Mismatch):
        assert_close(_ours(solver, torch.float32)[-1], exact, stock)


def test_coefficients_preserve_constants():
    """With every x0 equal to c, x = (1 - sigma) * c + sigma * noise is carried exactly along its line."""
    sigmas = _unipc(12, 5.0).sigmas.tolist()
    for order in (1, 2, 3):
        for i, step in enumerate(unipc_steps(sigmas, order=order)):
            line = lambda s: (1 - s, s)
            clean, noise = line(step.sigma)
            assert math.isclose(step.predictor[0] * clean + sum(step.predictor[1:]), 1 - step.sigma_next, abs_tol=1e-12)
            assert math.isclose(step.predictor[0] * noise, step.sigma_next, abs_tol=1e-12)
            if step.corrector:
                before, after = sigmas[i - 1], step.sigma
                total = step.corrector[0] * (1 - before) + sum(step.corrector[1:])
                assert math.isclose(total, 1 - after, abs_tol=1e-12)


@pytest.mark.parametrize("make", [lambda: EulerSolver([0.9, 0.6, 0.2, 0.0]), lambda: UniPCSolver([0.9, 0.6, 0.2, 0.0])])
def test_x0_is_the_clean_prediction_of_the_last_step(make):
    solver, x = make(), _noise(torch.float32)
    assert solver.x0 is None
    for sigma in solver.sigmas[:-1]:
        expected = x - sigma * _field(x, sigma, 0)
        x = solver.step(x, _field(x, sigma, 0))
        torch.testing.assert_close(solver.x0, expected, rtol=1e-5, atol=1e-5)
    solver.reset()
    assert solver.x0 is None
    assert solver.index == 0


def test_a_reset_solver_repeats_itself():
    solver = pv.solver_for(_unipc(5, 3.0))
    first = _ours(solver, torch.float32)
    with pytest.raises(ValueOptionError, match="has 5 steps and all are done"):
        solver.step(first[-1], first[-1])
    solver.reset()
    assert torch.equal(_ours(solver, torch.float32)[-1], first[-1])


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (FlowMatchEulerDiscreteScheduler(), "set_timesteps first"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "set_timesteps first"),
        (UniPCMultistepScheduler(), "prediction_type='epsilon'"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=True"),
        (DDIMScheduler(), "no one-kernel step for DDIMScheduler"),
    ],
)
def test_other_schedulers_are_refused_with_the_reason(scheduler, words):
    if "first" not in words:
        scheduler.set_timesteps(3)
    with pytest.raises(UnsupportedError, match=words):
        pv.solver_for(scheduler)


@pytest.mark.parametrize(
    ("sigmas", "options", "words"),
    [
        ([0.9], {}, "at least two falling noise levels"),
        ([0.9, 0.9, 0.0], {}, "falling"),
        ([0.5, 0.7], {}, "falling"),
        ([1.5, 0.7], {}, "falling"),
        ([0.5, -0.1], {}, "falling"),
        ([1.0, 0.5, 0.0], {}, "must start below 1"),
        ([0.9, 0.5, 0.0], {"order": 0}, "`order` must be at least 1"),
        ([0.9, 0.5, 0.0], {"solver_type": "bh3"}, "`solver_type` must be"),
        ([0.9, 0.5, 0.0], {"lower_order_final": False}, "`lower_order_final` must be True"),
    ],
)
def test_bad_schedules_are_refused(sigmas, options, words):
    with pytest.raises(ValueOptionError, match=words):
        unipc_steps(sigmas, **options)


def test_euler_steps_may_start_at_pure_noise():
    assert [(s.sigma, s.sigma_next) for s in euler_steps([1.0, 0.5, 0.0])] == [(1.0, 0.5), (0.5, 0.0)]
