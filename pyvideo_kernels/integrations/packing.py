"""Weights in the layout of a kernel, made once; and whether anybody watches a module.

A packed weight lives on the swap's mark and is made anew when the parameter has changed, moved, or been replaced. It
goes with ``restore()``, and at the end of a decode where a hook moves the parameters about: a copy would stay behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.causal_conv3d import pack_weight
from ..ops.upsample_conv2d import pack_upsample_weight
from .swap import Settings, mark_of


def packed(module: Any, name: str, make: Callable[..., Tensor], *options: Any) -> Tensor | None:
    """``make(weight, *options)`` of the parameter ``name``, made once; None where the op had better make it itself.

    That is inside a graph, which cannot see that a parameter has changed, and where a hook brings the parameters for
    one forward alone.
    """
    if torch.compiler.is_compiling() or managed(module):
        return None
    weight, mark = getattr(module, name), mark_of(module)
    if mark is None:
        return None
    version = None if weight.is_inference() else weight._version
    key = (weight.data_ptr(), version, weight.device, weight.dtype, weight.shape, *options)
    present = mark.packed.get(name)
    if present is None or present[0] != key:
        # It outlives the call, which may be in inference mode, and the next one may record gradients.
        with torch.inference_mode(False), torch.no_grad():
            present = mark.packed[name] = key, make(weight.detach(), *options)
    made: Tensor = present[1]
    return made


def conv_weight(conv: Any) -> Tensor:
    """The weight as causal_conv3d's kernels read it; oneDNN's own reordering is several times faster from there too."""
    made = packed(conv, "weight", pack_weight)
    weight: Tensor = conv.weight if made is None else made
    return weight


def upsample_weight(conv: Any, settings: Settings, time_factor: int = 1) -> tuple[Tensor | None, bool]:
    """The taps of upsample_conv2d's phases; and whether the op pays.

    Where they cannot be kept it sums them on each call, which on a CPU takes far more time than the phases save.
    """
    made = packed(conv, "weight", pack_upsample_weight, time_factor)
    return made, made is not None or settings.impl != "auto" or conv.weight.device.type != "cpu"


def forget_offloaded(model: nn.Module) -> None:
    """Drop what was packed of a model whose parameters a hook takes elsewhere between calls."""
    if torch.compiler.is_compiling() or not any(managed(module) for module in model.modules()):
        return
    for module in model.modules():
        if (mark := mark_of(module)) is not None:
            mark.packed.clear()


def managed(module: Any) -> bool:
    """Whether a hook of accelerate or diffusers is on this module."""
    registry = getattr(module, "_diffusers_hook", None)
    # diffusers leaves an empty registry on every model that was called in a cache_context.
    return getattr(module, "_hf_hook", None) is not None or (registry is not None and bool(registry.hooks))


def unhooked(module: Any) -> bool:
    """Whether nobody watches this module's calls: what it would take and return may then stay inside a fused op."""
    return not (managed(module) or watched(module))


def watched(module: Any) -> bool:
    """Whether somebody has registered a hook of torch's, which sees what the module takes or returns."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
