"""Whose loop a variant's clip goes through: the pipeline's own ``__call__``, or that of ``pyvideo sample``.

``eager`` and ``compile`` are what a user of diffusers has, so they run ``pipe.__call__``: two calls of the transformer
a step, ``torch.no_grad``, the scheduler's own step. ``ours`` is what ``pyvideo sample`` runs on the same prompt tensors
and noise: its loop with everything that it shares between calls, one kernel for guidance and update, and
``torch.inference_mode``. ``ours:loop=pipeline`` is ``accelerate(pipe)`` alone. Models that the sampler does not run go
through their pipeline in every variant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pyvideo_kernels.sampler import evaluation, loop, modeldir, plan, settings, steps

LOOPS = ("sampler", "pipeline")
# What the sampler's loop knows of the keyword arguments of ``pipe.__call__``; others belong to another model.
_KNOWN = {
    "prompt_embeds", "negative_prompt_embeds", "latents", "height", "width", "num_frames", "num_inference_steps",
    "guidance_scale", "generator", "output_type", "return_dict", "callback_on_step_end",
}  # fmt: skip


def samples(pipe: Any) -> bool:
    """Whether ``pyvideo sample`` runs this pipeline; of image-to-video the inputs are others."""
    return type(pipe).__name__ == "WanPipeline"


class Sampled:
    """A pipeline whose call goes through the sampler's loop; everything else is the pipeline's.

    Args:
        pipe: an accelerated ``WanPipeline``, compiled or not.
        impl, ops: of the steps, as they were given to accelerate().
    """

    def __init__(self, pipe: Any, *, impl: str = "auto", ops: Any = "all") -> None:
        self._pipe, self._impl, self._ops = pipe, impl, ops
        self._plans: dict[Any, plan.Plan] = {}
        self._interrupt = False
        self.evaluation = evaluation.Evaluation()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def __call__(self, **inputs: Any) -> tuple[Tensor]:
        """Clean latents, as ``pipe(..., output_type="latent", return_dict=False)``."""
        unknown = sorted(set(inputs) - _KNOWN)
        if unknown or inputs.get("output_type") != "latent" or inputs.get("return_dict") is not False:
            raise TypeError(f"the sampler's loop gives a tuple of latents and does not know {', '.join(unknown)}")
        pipe, latents = self._pipe, inputs["latents"]
        planned = self._plan(inputs)
        prompt, negative = inputs["prompt_embeds"], inputs["negative_prompt_embeds"] if planned.guided else None
        device, dtype = latents.device, pipe.transformer.dtype
        conditions = loop.Conditions(prompt.to(dtype), None if negative is None else negative.to(dtype))
        if pipe.config.expand_timesteps:
            conditions.mask = latents.new_ones((1, 1, *latents.shape[2:]))
        scheduler = steps.build_scheduler(pipe.scheduler, type(pipe.scheduler).__name__)
        stepper, timesteps, _ = steps.prepare_steps(
            scheduler, planned.steps, device, eager=False, ops=self._ops, impl=self._impl
        )
        asked = settings.Settings(prompt="bench")
        how = evaluation.planned(asked, planned, device, dtype.itemsize)
        self.evaluation = evaluation.settle(how, pipe, asked)
        self._interrupt = False
        callback = inputs.get("callback_on_step_end")

        def on_step(index: int, _latents: Tensor) -> None:
            if callback is not None:
                callback(self, index, timesteps[index], {})
            if self._interrupt:  # as diffusers has it, but nothing is left to be done
                raise _Enough(_latents)

        try:
            clean = loop.denoise(
                pipe, planned, latents, conditions, stepper, timesteps, scheduler.sigmas, on_step, how=self.evaluation
            )
        except _Enough as enough:
            clean = enough.latents
        return (clean,)

    def decode(self, decode: Callable[[Any, Tensor], Tensor], latents: Tensor) -> Tensor:
        """``decode(pipe, latents)`` as the sampler decodes."""
        with evaluation.evaluating(self._pipe):
            return decode(self._pipe, latents)

    def _plan(self, inputs: Mapping[str, Any]) -> plan.Plan:
        size = {name: inputs[name] for name in ("height", "width")}
        options = {**size, "frames": inputs["num_frames"], "steps": inputs["num_inference_steps"],
                   "guidance": float(inputs["guidance_scale"])}  # fmt: skip
        key = tuple(options.items())
        if key not in self._plans:
            asked = settings.Settings(prompt="bench", **options)
            self._plans[key] = plan.make_plan(asked, modeldir.describe_pipeline(self._pipe))
        return self._plans[key]


class _Enough(Exception):
    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


def decoding(pipe: Any, decode: Callable[[Any, Tensor], Tensor] | None) -> Callable[[Any, Tensor], Tensor] | None:
    """How ``decode`` is called for this pipeline."""
    if decode is None or not isinstance(pipe, Sampled):
        return decode
    inner = decode
    return lambda pipe, latents: pipe.decode(inner, latents)


__all__ = ["LOOPS", "Sampled", "decoding", "samples"]
