"""Wan's VAE: which modules are swapped, by what, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    AvgDown3D,
    DupUp3D,
    WanAttentionBlock,
    WanCausalConv3d,
    WanDecoder3d,
    WanEncoder3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
    WanUpsample,
)
from torch import nn

from .. import streams
from ..swap import Left, Plan, Settings, Swap, obstacle
from . import wan_vae_forwards as forwards

_HOME = "diffusers.models.autoencoders.autoencoder_kl_wan"
SOURCES = {
    f"{_HOME}:AvgDown3D": {"f3ba138d894144bf": "0.42.1"},
    f"{_HOME}:DupUp3D": {"4c0a95dccfe2bb30": "0.42.1"},
    f"{_HOME}:WanCausalConv3d": {"14c69720a12eab6e": "0.42.1"},
    f"{_HOME}:WanRMS_norm": {"446c7fff13ff8f03": "0.42.1"},
    f"{_HOME}:WanUpsample": {"335a50067dd55e45": "0.42.1"},
    f"{_HOME}:WanResample": {"6cd4a858068ad870": "0.42.1"},
    f"{_HOME}:WanResidualBlock": {"07cbd8a0815a8799": "0.42.1"},
    f"{_HOME}:WanAttentionBlock": {"ce0e452495a2b730": "0.42.1"},
    f"{_HOME}:WanEncoder3d": {"cabae14e6442bf10": "0.42.1"},
    f"{_HOME}:WanDecoder3d": {"8beff040b23d82b2": "0.42.1"},
    f"{_HOME}:AutoencoderKLWan": {"6e2c96d9519ef145": "0.42.1"},
}

_NORM, _CONV = "rms_norm_silu", "causal_conv3d"
# Class -> (its new forward, ops that run in it, ops of its children that it serves, what it does for them).
_FORWARDS: dict[type[nn.Module], tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...], str]] = {
    WanRMS_norm: (forwards.norm_forward, (_NORM,), (), ""),
    WanCausalConv3d: (forwards.conv_forward, (_CONV,), (), ""),
    WanResidualBlock: (forwards.residual_forward, (), (_NORM, _CONV), "fuses the activations and its own sum"),
    WanAttentionBlock: (forwards.attention_forward, (), (_NORM, _CONV), "keeps the layout"),
    WanResample: (forwards.resample_forward, (), (_NORM, _CONV), "keeps the layout; hands caches to time_conv"),
    WanUpsample: (forwards.upsample_forward, (), (_NORM, _CONV), "keeps layout and dtype"),
    AvgDown3D: (forwards.average_forward, (), (_NORM, _CONV), "keeps the layout"),
    DupUp3D: (forwards.repeat_forward, (), (_NORM, _CONV), "keeps the layout"),
    WanEncoder3d: (forwards.encoder_forward, (), (_NORM, _CONV), "fuses its last activation"),
    WanDecoder3d: (forwards.decoder_forward, (), (_NORM, _CONV), "fuses its last activation"),
}


def plan(model: nn.Module, path: str, settings: Settings) -> Plan:
    """What accelerate() does with an AutoencoderKLWan that is called ``path`` in its pipeline."""
    result = Plan()
    _stream(result, model, path, settings)
    for inner, module in model.named_modules():
        place = ".".join(part for part in (path, inner) if part)
        kind = next((base for base in type(module).__mro__ if base in _FORWARDS), None)
        if kind is None:
            continue
        forward, ops, serves, note = _FORWARDS[kind]
        wanted = [op for op in (*ops, *serves) if op in settings.ops]
        if not wanted:
            continue
        reason = _unfit(module, kind) or obstacle(module)
        if reason is not None:
            result.left += [Left(place, op, reason) for op in wanted]
            continue
        result.swaps.append(Swap(place, module, forward, tuple(op for op in ops if op in settings.ops), note))
    if any(swap.forward is not None for swap in result.swaps):
        root = f"{path}." if path else ""
        result.kept += [
            (f"{root}*.resample.1", "2-D convolutions stay module calls, on channels-last frames"),
            (f"{root}*.attentions.*", "the attention of a frame's pixels runs on the library's kernel"),
        ]
    return result


def _stream(result: Plan, model: nn.Module, path: str, settings: Settings) -> None:
    """Plan the methods of the VAE itself: it decodes as a stream."""
    wanted = [op for op in (_NORM, _CONV) if op in settings.ops]
    if not wanted:
        return
    methods = {"_decode": streams._decode}
    reason = _unfit(model, AutoencoderKLWan) or obstacle(model, methods)
    if reason is not None:
        result.left += [Left(path, op, reason) for op in wanted]
    else:
        result.swaps.append(Swap(path, model, None, (), "decodes as a stream", methods))


def _unfit(module: Any, kind: type[nn.Module]) -> str | None:
    if type(module) is not kind:
        home = type(module).__module__.partition(".")[0]
        return f"it is a {home} {type(module).__name__}, not a plain {kind.__name__}"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
    if kind is WanRMS_norm and not isinstance(module.bias, float):
        return "the norm has a bias"
    return _odd_conv(module) if kind is WanCausalConv3d else None


def _odd_conv(conv: Any) -> str | None:
    """Why the op cannot be this convolution, or None: it pads odd kernels by half, and time by all or nothing."""
    kt, kh, kw = conv.kernel_size
    left, _, top, _, past, _ = conv._padding
    if conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros":
        return "it has groups, dilation or a padding other than zeros"
    if kh % 2 == 0 or kw % 2 == 0 or (top, left) != (kh // 2, kw // 2) or past not in (0, kt - 1):
        return "its padding is not half of an odd kernel, or not the whole past"
    return None
