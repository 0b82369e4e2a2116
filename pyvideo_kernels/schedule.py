"""Samplers of flow-matching models as host-side coefficients and one kernel a step.

    scheduler.set_timesteps(30)                    # any diffusers UniPC or flow-match Euler scheduler
    solver = solver_for(scheduler)
    for t in scheduler.timesteps:
        cond, uncond = model(latents, t, prompt), model(latents, t, negative)
        latents = solver.step(latents, cond, uncond, guidance_scale=5.0)

The noise levels are read once, when the solver is made; a step launches one kernel, solves nothing on the device and
never waits for it. Coefficients are float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from .errors import UnsupportedError, ValueOptionError
from .ops.guidance_step import guidance_step
from .ops.unipc_step import unipc_step


@dataclass(frozen=True)
class EulerStep:
    """From noise level ``sigma`` to ``sigma_next``."""

    sigma: float
    sigma_next: float


@dataclass(frozen=True)
class UniPCStep:
    """One call of `unipc_step`: ``history`` earlier x0 predictions, and the coefficients over them."""

    sigma: float
    sigma_next: float
    history: int
    corrector: tuple[float, ...]
    predictor: tuple[float, ...]


def euler_steps(sigmas: Sequence[float]) -> list[EulerStep]:
    """The steps between consecutive noise levels, the last of which is where sampling ends (0: clean)."""
    levels = _levels(sigmas)
    return [EulerStep(a, b) for a, b in pairwise(levels)]


def unipc_steps(
    sigmas: Sequence[float],
    *,
    order: int = 2,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
) -> list[UniPCStep]:
    """Coefficients of UniPC for data prediction with alpha = 1 - sigma, in float64.

    Args:
        sigmas: falling noise levels in [0, 1); the last is where sampling ends. Pure noise is written 1 - 1e-6: the
            logarithmic signal-to-noise ratio of 1 is infinite.
        order: of the predictor, at least 1; the corrector adds one.
        solver_type: ``bh2``, or ``bh1``.
        lower_order_final: end with lower orders; the only way to reach sigma 0.
        disable_corrector: steps whose result is not corrected by the step that follows.
    Raises:
        ValueOptionError: names the argument, what was expected, what came.
    Source: Zhao et al., arXiv:2302.04867, algorithms 1 and 2 with B(h) of section 3.3.
    """
    levels = _levels(sigmas)
    if levels[0] >= 1.0:
        raise ValueOptionError(f"unipc_steps: `sigmas` must start below 1 (pure noise is 1 - 1e-6); got {levels[0]}")
    if order < 1:
        raise ValueOptionError(f"unipc_steps: `order` must be at least 1; got {order}")
    if solver_type not in ("bh1", "bh2"):
        raise ValueOptionError(f"unipc_steps: `solver_type` must be 'bh1' or 'bh2'; got {solver_type!r}")
    if levels[-1] == 0.0 and order > 1 and len(levels) > 2 and not lower_order_final:
        raise ValueOptionError("unipc_steps: `lower_order_final` must be True where `sigmas` end at 0; got False")
    count = len(levels) - 1
    steps: list[UniPCStep] = []
    previous_order = 0
    for i in range(count):
        this_order = min(order, i + 1, count - i if lower_order_final else order)
        corrector: dict[int, float] = {}
        if i > 0 and i - 1 not in disable_corrector:
            corrector = _update(levels, i - 1, previous_order, solver_type, corrects=True)
        predictor = _update(levels, i, this_order, solver_type, corrects=False)
        history = max(previous_order if corrector else 0, this_order - 1)
        # Keys are positions among (sample or last_sample, x0 of now, x0 one step ago, ...).
        steps.append(
            UniPCStep(
                levels[i],
                levels[i + 1],
                history,
                tuple(corrector.get(k, 0.0) for k in range(2 + history)) if corrector else (),
                tuple(predictor.get(k, 0.0) for k in range(2 + history)),
            )
        )
        previous_order = this_order
    return steps


def _levels(sigmas: Sequence[float]) -> list[float]:
    levels = [float(s) for s in sigmas]
    falling = all(a > b for a, b in pairwise(levels))
    if len(levels) < 2 or not falling or not 0.0 <= levels[-1] or not levels[0] <= 1.0:
        raise ValueOptionError(f"`sigmas` must be at least two falling noise levels in [0, 1]; got {levels}")
    return levels


def _log_snr(sigma: float) -> float:
    return math.inf if sigma == 0.0 else math.log1p(-sigma) - math.log(sigma)


def _update(levels: list[float], start: int, order: int, solver_type: str, *, corrects: bool) -> dict[int, float]:
    """Coefficients of the update from ``levels[start]`` to the next level, keyed by position.

    Position 0 is the sample at ``levels[start]``, 1 the newest x0 and so on. A corrector also knows the x0 of the
    level it arrives at, so there position 1 is that one and the x0 of ``start`` is position 2.
    """
    sigma_s, sigma_t = levels[start], levels[start + 1]
    alpha_t = 1.0 - sigma_t
    lambda_s = _log_snr(sigma_s)
    h = _log_snr(sigma_t) - lambda_s
    phi_1 = math.expm1(-h)
    b_h = phi_1 if solver_type == "bh2" else -h
    ratios = [(_log_snr(levels[start - k]) - lambda_s) / h for k in range(1, order)]
    if corrects:
        rhos = [0.5] if order == 1 else _solve([*ratios, 1.0], _moments(-h, b_h, order))
    else:
        # The second-order predictor takes 1/2, which is what the solution tends to for small h.
        rhos = [0.5] if order == 2 else _solve(ratios, _moments(-h, b_h, order - 1))
    newest = 2 if corrects else 1
    out = {0: sigma_t / sigma_s, newest: -alpha_t * phi_1}
    differences = [(newest + k, rho / ratio) for k, (rho, ratio) in enumerate(zip(rhos, ratios, strict=False), 1)]
    if corrects:
        differences.append((1, rhos[-1]))
    for position, weight in differences:
        # Each term is a difference of an x0 to that of ``start``.
        out[position] = -alpha_t * b_h * weight
        out[newest] += alpha_t * b_h * weight
    return out


def _moments(hh: float, b_h: float, count: int) -> list[float]:
    """k! * phi_{k+1}(hh) * hh / B(h): the right-hand side that makes the update exact on polynomials."""
    out = []
    phi, factorial = math.expm1(hh) / hh - 1.0, 1
    for k in range(1, count + 1):
        out.append(phi * factorial / b_h)
        factorial *= k + 1
        phi = phi / hh - 1.0 / factorial
    return out


def _solve(ratios: list[float], rhs: list[float]) -> list[float]:
    """Solve sum_j ratios[j]^i * rho[j] = rhs[i] by elimination with pivoting; the systems are 1x1 to 3x3."""
    n = len(ratios)
    rows = [[r**i for r in ratios] + [rhs[i]] for i in range(n)]
    for c in range(n):
        pivot = max(range(c, n), key=lambda r: abs(rows[r][c]))
        rows[c], rows[pivot] = rows[pivot], rows[c]
        for r in range(n):
            if r != c:
                factor = rows[r][c] / rows[c][c]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[c], strict=True)]
    return [rows[i][n] / rows[i][i] for i in range(n)]


class FlowSolver(ABC):
    """A sampler in progress: which step comes next, and the tensors earlier steps left for it."""

    def __init__(self, sigmas: Sequence[float], *, impl: str = "auto") -> None:
        self.sigmas = tuple(float(s) for s in sigmas)
        self.impl = impl
        self.index = 0

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    def reset(self) -> None:
        """Back to the first step, forgetting every tensor."""
        self.index = 0

    def step(
        self, latents: Tensor, cond: Tensor, uncond: Tensor | None = None, *, guidance_scale: float = 1.0
    ) -> Tensor:
        """The latents of the next noise level, from the predictions made at this one.

        Args:
            latents: at ``sigmas[index]``; kept in their dtype, which should be fp32.
            cond, uncond: velocity predictions of that shape; ``uncond`` None: no guidance.
            guidance_scale: 1 is the conditional prediction; may change from step to step.
        Raises:
            ValueOptionError: all steps are done; `reset` starts again.
            UnsupportedError: an input requires grad.
        """
        if self.index >= len(self):
            raise ValueOptionError(f"the schedule has {len(self)} steps and all are done; call reset() to start again")
        out = self._step(latents, cond, uncond, guidance_scale)
        self.index += 1
        return out

    @property
    @abstractmethod
    def x0(self) -> Tensor | None:
        """The clean latents that the last step predicted (a preview), or None before the first step."""

    @abstractmethod
    def _step(self, latents: Tensor, cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor: ...


class EulerSolver(FlowSolver):
    """Euler steps of the flow: `guidance_step` per step."""

    def __init__(self, sigmas: Sequence[float], *, impl: str = "auto") -> None:
        super().__init__(sigmas, impl=impl)
        self.steps = euler_steps(self.sigmas)
        self._ends: tuple[Tensor, Tensor] | None = None

    def reset(self) -> None:
        super().reset()
        self._ends = None

    @property
    def x0(self) -> Tensor | None:
        if self._ends is None:
            return None
        before, after = self._ends
        step = self.steps[self.index - 1]
        # A step is a straight line; follow it to sigma 0.
        return after + (after - before) * (step.sigma_next / (step.sigma - step.sigma_next))

    def _step(self, latents: Tensor, cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
        step = self.steps[self.index]
        out = guidance_step(
            latents, cond, uncond, guidance_scale=guidance_scale, sigma=step.sigma, sigma_next=step.sigma_next,
            impl=self.impl,
        )  # fmt: skip
        self._ends = (latents, out)
        return out


class UniPCSolver(FlowSolver):
    """Multistep UniPC: `unipc_step` per step; arguments as for `unipc_steps`."""

    def __init__(
        self,
        sigmas: Sequence[float],
        *,
        order: int = 2,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector: Collection[int] = (),
        impl: str = "auto",
    ) -> None:
        super().__init__(sigmas, impl=impl)
        self.steps = unipc_steps(
            self.sigmas, order=order, solver_type=solver_type, lower_order_final=lower_order_final,
            disable_corrector=disable_corrector,
        )  # fmt: skip
        self._keep = max(step.history for step in self.steps)
        self._history: list[Tensor] = []
        self._x0: Tensor | None = None
        self._corrected: Tensor | None = None

    def reset(self) -> None:
        super().reset()
        self._history, self._x0, self._corrected = [], None, None

    @property
    def x0(self) -> Tensor | None:
        return self._x0

    def _step(self, latents: Tensor, cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
        step = self.steps[self.index]
        out, x0, corrected = unipc_step(
            latents, cond, uncond, self._corrected if step.corrector else None, self._history[: step.history],
            guidance_scale=guidance_scale, sigma=step.sigma, corrector=step.corrector, predictor=step.predictor,
            impl=self.impl,
        )  # fmt: skip
        self._history = [x0, *self._history][: self._keep]
        self._x0, self._corrected = x0, corrected
        return out


def solver_for(scheduler: Any, *, impl: str = "auto") -> FlowSolver:
    """The solver that takes the steps of a diffusers scheduler whose ``set_timesteps`` has been called.

    Args:
        scheduler: ``FlowMatchEulerDiscreteScheduler``, or ``UniPCMultistepScheduler`` with flow sigmas; its
            ``begin_index`` is respected.
        impl: which implementation of the step runs.
    Raises:
        UnsupportedError: another scheduler, or an option that has no one-kernel form; use ``scheduler.step``.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name not in ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"):
        raise UnsupportedError(f"no one-kernel step for {name}; use its own step()")
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise UnsupportedError(f"{name}: call set_timesteps first")
    sigmas = scheduler.sigmas.tolist()[getattr(scheduler, "begin_index", None) or 0 :]
    if name == "FlowMatchEulerDiscreteScheduler":
        _require(name, config, stochastic_sampling=False, invert_sigmas=False)
        return EulerSolver(sigmas, impl=impl)
    _require(
        name, config, prediction_type="flow_prediction", use_flow_sigmas=True, predict_x0=True, thresholding=False,
        solver_p=None,
    )  # fmt: skip
    return UniPCSolver(
        sigmas, order=config.solver_order, solver_type=config.solver_type,
        lower_order_final=config.lower_order_final, disable_corrector=tuple(config.disable_corrector), impl=impl,
    )  # fmt: skip


def _require(name: str, config: Any, **expected: Any) -> None:
    for key, value in expected.items():
        got = config.get(key, value)
        if got != value:
            raise UnsupportedError(f"{name}: no one-kernel step for {key}={got!r}; use its own step()")
