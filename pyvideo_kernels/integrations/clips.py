"""Clips between the modules of a VAE: how they lie in memory, and when an op can take them.

Between modules a clip keeps its ``[B, C, T, H, W]`` shape and lies channels-last in memory, ``[B, T, H, W, C]``, so
that stock modules in between still work and the ops take a view of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .swap import Settings, autocasting, why_not


def channels_last(x: Tensor) -> Tensor:
    """``[B, C, ...]`` as ``[B, ..., C]`` with contiguous channels: a view where memory is so already."""
    view = x.movedim(1, -1)
    return view if view.stride(-1) == 1 or view.shape[-1] == 1 else view.contiguous()


def channels_first(y: Tensor) -> Tensor:
    """The view ``[B, C, ...]`` of a channels-last tensor."""
    return y.movedim(-1, 1)


def as_images(x: Tensor) -> Tensor:
    """A clip ``[B, C, T, H, W]`` as images ``[B*T, C, H, W]`` that lie channels-last."""
    return channels_first(channels_last(x).flatten(0, 1))


def as_clip(x: Tensor, batch: int) -> Tensor:
    """Images ``[B*T, C, H, W]`` as a clip ``[B, C, T, H, W]`` that lies channels-last."""
    return channels_first(channels_last(x).unflatten(0, (batch, -1)))


def attention_impl(settings: Settings, query: Tensor) -> str:
    """What ``impl`` means to vae_attention: on a CPU, torch's own kernel is the one for it."""
    return "sdpa" if settings.impl == "cpu" and query.device.type == "cpu" else settings.impl


def unservable(x: Tensor, *parameters: Tensor | None) -> str | None:
    """Why an op of a VAE cannot take ``x`` and these weights, or None; none has a backward, each takes one dtype."""
    reason = why_not(x, *parameters)
    if reason is not None:
        return reason
    if any(p is not None and p.dtype != x.dtype for p in parameters):
        return "weight and activation of different dtypes"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        return "gradients are wanted and the op has no backward"
    return None


def unservable_conv(x: Tensor, *parameters: Tensor | None) -> str | None:
    """The same of a convolution, whose dtype autocast would choose."""
    if autocasting(x):
        return "autocast chooses the dtype of the convolution"
    return unservable(x, *parameters)


def checkpointed(module: Any) -> bool:
    """Whether this call is one whose blocks diffusers runs again for their gradients."""
    return bool(module.gradient_checkpointing) and torch.is_grad_enabled()
