"""How a run evaluates its transformers: guidance in one batch or two, what is kept of the text, inference mode.

Each is decided by a rule that ``pyvideo sample`` prints and ``--stats`` keeps, and the first two can be forced. The
rules are about the film and the model (torch-free, ``plan``), then about what is installed on the model (``settle``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .plan import Plan
from .settings import Settings

if TYPE_CHECKING:
    import torch

ONE_BATCH_TOKENS = 512
"""Up to here, a batch of both predictions takes less time than two calls; see docs/sampler.md for what was measured."""
TEXT_SHARE = 0.01
"""From this share of a call's products on, keeping what is made of the text alone is worth its memory."""
TEXT_MEMORY = 0.1
"""At most this share of the memory that is free."""


@dataclass(frozen=True)
class Choice:
    """Whether, and why."""

    on: bool
    why: str

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """What `loop.denoise` does; the default is what a pipeline of diffusers does.

    Args:
        guidance_batch: the predictions with and without the prompt come from one call, on a batch of two.
        text_kv_cache: the text's projection, keys and values are computed in the first step alone.
    """

    guidance_batch: Choice = Choice(False, "as diffusers")
    text_kv_cache: Choice = Choice(False, "as diffusers")

    def words(self) -> str:
        """What is on, for the plan line; empty if nothing is."""
        return ", ".join(
            text
            for text, choice in (
                ("guidance in one batch", self.guidance_batch),
                ("text K/V computed once", self.text_kv_cache),
            )
            if choice.on
        )

    def as_dict(self) -> dict[str, Any]:
        return {"guidance_batch": self.guidance_batch.as_dict(), "text_kv_cache": self.text_kv_cache.as_dict()}


def planned(settings: Settings, plan: Plan, device: torch.device, itemsize: int) -> Evaluation:
    """By the rules for this film; ``itemsize`` is that of the transformer's dtype."""
    if settings.eager:
        return Evaluation(*[Choice(False, "--eager")] * 2)
    return Evaluation(_batch(settings, plan), _cache(settings, plan, device, itemsize))


def _batch(settings: Settings, plan: Plan) -> Choice:
    if not plan.guided:
        return Choice(False, "no guidance")
    if settings.guidance_batch != "auto":
        return Choice(settings.guidance_batch == "on", "as asked")
    few = plan.tokens <= ONE_BATCH_TOKENS
    return Choice(few, f"{plan.tokens:,} tokens, {'at most' if few else 'more than'} {ONE_BATCH_TOKENS}")


def _cache(settings: Settings, plan: Plan, device: torch.device, itemsize: int) -> Choice:
    if settings.text_kv_cache != "auto":
        return Choice(settings.text_kv_cache == "on", "as asked")
    # On a CPU the attention to a prompt's padding goes with it.
    saved = plan.text_share + (plan.cross_share if device.type == "cpu" else 0.0)
    share = f"{saved:.2%} of a call's products"
    if saved < TEXT_SHARE:
        return Choice(False, f"{share}, less than {TEXT_SHARE:.0%}")
    need = plan.text_kv_bytes(itemsize)
    free = _free_memory(device)
    if free is not None and need > TEXT_MEMORY * free:
        return Choice(False, f"{need / 1e9:.3g} GB of {free / 1e9:.3g} GB that are free, more than {TEXT_MEMORY:.0%}")
    return Choice(True, f"{share} for {need / 1e6:.3g} MB")


def _free_memory(device: torch.device) -> int | None:
    from .loading import host_memory

    if device.type != "cuda":
        return host_memory()
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def settle(wanted: Evaluation, pipe: Any, settings: Settings) -> Evaluation:
    """What of ``wanted`` the loaded models take; a batch that was asked for is made whatever hooks are there."""
    batch = wanted.guidance_batch
    reason = _watched(_transformers(pipe))
    if batch.on and reason is not None and settings.guidance_batch == "auto":
        return dataclasses.replace(wanted, guidance_batch=Choice(False, f"two calls: {reason}"))
    return wanted


def _transformers(pipe: Any) -> list[Any]:
    models = [pipe.transformer, getattr(pipe, "transformer_2", None)]
    return [model for model in models if model is not None]


def _watched(models: Iterable[Any]) -> str | None:
    """What stands against a call on both predictions at once, or None.

    A cache of steps keeps one state for each prediction, a hook counts calls, somebody's processor knows one prompt,
    and a compiled model would be compiled anew for another size.
    """
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    from ..integrations.packing import managed, watched

    for model in models:
        if getattr(model, "is_cache_enabled", False):
            return "a cache of steps is enabled"
        if is_compiled(model):
            return "the model is compiled"
        for path, module in model.named_modules():
            if managed(module) or watched(module):
                return f"{path or type(module).__name__} has a hook"
            processor = getattr(module, "processor", None)
            if processor is not None and type(processor) is not WanAttnProcessor:
                return f"{path} has a {type(processor).__name__}"
    return None


def is_compiled(model: Any) -> bool:
    """Whether torch.compile is on a model or on a part of it."""
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in model.modules())


def evaluating(pipe: Any) -> Any:
    """A context: ``torch.inference_mode``, or ``torch.no_grad`` where somebody moves, packs or compiles the weights.

    In inference mode tensors carry no versions, and a call skips autograd altogether. But weights that a hook moves
    meanwhile would become such tensors and stay so, kinds of weights that are no plain parameters may not know the
    mode, and what was compiled outside it would be compiled again.
    """
    return mode_of(pipe)()


def mode_of(pipe: Any) -> Callable[[], Any]:
    """What `evaluating` enters."""
    import torch

    return torch.inference_mode if _plain(pipe) else torch.no_grad


def _plain(pipe: Any) -> bool:
    import torch
    from torch import nn

    from ..integrations.packing import managed

    for model in getattr(pipe, "components", {}).values():
        if not isinstance(model, nn.Module):
            continue
        if is_compiled(model):
            return False
        for module in model.modules():
            if managed(module):
                return False
            for parameter in module._parameters.values():
                if parameter is not None and type(parameter) not in (nn.Parameter, torch.Tensor):
                    return False
    return True
