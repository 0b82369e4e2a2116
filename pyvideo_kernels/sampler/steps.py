"""The scheduler of a run, and who takes its steps: our one-kernel solvers or diffusers' own step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..error_types import ModelError, UnsupportedError


def build_scheduler(own: Any, name: str) -> Any:
    """A fresh scheduler ``name`` from the configuration of the pipeline's own, which stays untouched.

    ``unipc`` and ``euler`` are flow-matching schedulers with the pipeline's shift; any other name is the class of
    the pipeline's own.
    """
    import diffusers

    config: Mapping[str, Any] = own.config
    shift = config.get("flow_shift") or config.get("shift") or 1.0
    wanted = {"unipc": "UniPCMultistepScheduler", "euler": "FlowMatchEulerDiscreteScheduler"}.get(name, name)
    kind = getattr(diffusers, wanted, None)
    if kind is None:
        raise ModelError(f"diffusers has no scheduler {wanted}; add --scheduler unipc or --scheduler euler")
    if wanted == type(own).__name__:
        return kind.from_config(config)
    train = config.get("num_train_timesteps", 1000)
    if name == "unipc":
        return kind(
            num_train_timesteps=train, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    return kind(num_train_timesteps=train, shift=shift)


class StockStep:
    """diffusers' own guidance arithmetic and ``scheduler.step``."""

    kind = "diffusers"

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        scheduler.set_begin_index(0)
        self._before: Tensor | None = None
        self._v: Tensor | None = None
        self._i = -1

    def step(self, i: int, t: Tensor, latents: Tensor, cond: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
        noise = cond if uncond is None else uncond + guidance * (cond - uncond)
        self._before, self._v, self._i = latents, noise, i
        out: Tensor = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return out

    @property
    def x0(self) -> Tensor | None:
        """The clean latents the last step predicted."""
        if self._before is None or self._v is None:
            return None
        return self._before - float(self.scheduler.sigmas[self._i]) * self._v.to(self._before.dtype)


class FusedStep:
    """Guidance and scheduler update as one kernel."""

    kind = "pyvideo"

    def __init__(self, solver: Any) -> None:
        self.solver = solver

    def step(self, i: int, t: Tensor, latents: Tensor, cond: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
        out: Tensor = self.solver.step(latents, cond, uncond, guidance_scale=guidance)
        return out

    @property
    def x0(self) -> Tensor | None:
        x0: Tensor | None = self.solver.x0
        return x0


def prepare_steps(
    scheduler: Any, steps: int, device: torch.device, *, eager: bool, ops: str | Collection[str], impl: str
) -> tuple[StockStep | FusedStep, Tensor, str]:
    """Who steps, the timesteps, and why it is diffusers where it is (empty otherwise)."""
    scheduler.set_timesteps(steps, device=device)
    timesteps: Tensor = scheduler.timesteps
    name = type(scheduler).__name__
    op = "unipc_step" if name == "UniPCMultistepScheduler" else "guidance_step"
    if eager:
        return StockStep(scheduler), timesteps, "--eager"
    if ops != "all" and op not in ops:
        return StockStep(scheduler), timesteps, f"--ops leaves {op} out"
    from ..schedule import solver_for

    try:
        solver = solver_for(scheduler, impl=impl)
    except UnsupportedError as error:
        return StockStep(scheduler), timesteps, str(error)
    if len(solver) != len(timesteps):
        return StockStep(scheduler), timesteps, f"{name} takes {len(timesteps)} calls for {len(solver)} steps"
    return FusedStep(solver), timesteps, ""
