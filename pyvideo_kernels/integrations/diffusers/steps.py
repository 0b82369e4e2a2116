"""Which denoising step a model is called in, as its pipeline says.

Pipelines call a model inside ``model.cache_context(name, step_index=..., num_inference_steps=...)``. diffusers tells
the hooks of caches and keeps nothing else, so the instance listens itself. The step is a number of the pipeline's loop:
nothing is read from a device. What is kept is one truth value, so that compiled graphs tell two kinds of steps apart
and not every step.

diffusers' image-to-video pipeline names the context and not the step; there the scheduler of the pipeline that was
accelerated is asked how many steps it has taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..swap import mark_of


@contextmanager
def cache_context(self: nn.Module, name: str, **kwargs: Any) -> Iterator[None]:
    """``CacheMixin.cache_context``, which also says whether the step is one of the dense ones."""
    mark: Any = mark_of(self)
    outer = mark.methods.get("cache_context") if mark is not None else None
    stock: Any = type(self)
    context = outer(name, **kwargs) if outer is not None else stock.cache_context(self, name, **kwargs)
    if mark is not None:
        step, count = kwargs.get("step_index"), kwargs.get("num_inference_steps")
        if step is None:
            step, count = _from_scheduler(self, mark.pipeline)
        told = mark.settings.attention.dense_at(step, count)
        mark.dense_step = told if mark.every_step is None else mark.every_step
    try:
        with context:
            yield
    finally:
        if mark is not None:
            mark.dense_step = mark.every_step


@contextmanager
def past_dense_steps(*models: Any) -> Iterator[None]:
    """Inside, ``models`` run what they run after their dense steps, in whatever step they are; for measurements."""
    marks = [mark for model in models if isinstance(model, nn.Module) and (mark := mark_of(model)) is not None]
    for mark in marks:
        mark.every_step = mark.dense_step = False
    try:
        yield
    finally:
        for mark in marks:
            mark.every_step = mark.dense_step = None


def _from_scheduler(model: nn.Module, pipeline: Any) -> tuple[int | None, int | None]:
    """The step that ``pipeline`` is in and how many it takes, if it is the one that calls ``model``; else None."""
    pipe = None if pipeline is None else pipeline()
    parts = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    if pipe is None or not any(getattr(part, "_orig_mod", part) is model for part in parts):
        return None, None
    count = getattr(pipe, "_num_timesteps", None)
    step = getattr(pipe.scheduler, "_step_index", -1)
    step = 0 if step is None else step  # it counts from its first step on
    # One that has taken all its steps belongs to a film that is done, not to this call.
    if not isinstance(step, int) or not isinstance(count, int) or not 0 <= step < count:
        return None, None
    return step, count
