"""Which denoising step a model is called in, as its pipeline says.

Pipelines call a model inside ``model.cache_context(name, step_index=..., num_inference_steps=...)``. diffusers tells
the hooks of caches and keeps nothing else, so the instance listens itself. The step is a number of the pipeline's loop:
nothing is read from a device. What is kept is one truth value, so that compiled graphs tell two kinds of steps apart
and not every step.
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
        mark.dense_step = mark.settings.attention.dense_at(kwargs.get("step_index"), kwargs.get("num_inference_steps"))
    try:
        with context:
            yield
    finally:
        if mark is not None:
            mark.dense_step = None
