"""CogVideoX's VAE: which modules are swapped, by what, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    AutoencoderKLCogVideoX,
    CogVideoXCausalConv3d,
    CogVideoXDecoder3D,
    CogVideoXEncoder3D,
    CogVideoXResnetBlock3D,
    CogVideoXSafeConv3d,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.downsampling import CogVideoXDownsample3D
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import nn

from .. import streams
from ..planning import add, not_plain, odd_conv
from ..swap import Plan, Settings, Swap, obstacle
from . import cogvideox_vae_forwards as forwards

_HOME = "diffusers.models.autoencoders.autoencoder_kl_cogvideox"
SOURCES = {
    "diffusers.models.downsampling:CogVideoXDownsample3D": {"8f49a0bb1e742971": "0.42.1"},
    "diffusers.models.upsampling:CogVideoXUpsample3D": {"7667fe9ce8cdcb6e": "0.42.1"},
    f"{_HOME}:CogVideoXSafeConv3d": {"18c1ef21a9c6e272": "0.42.1"},
    f"{_HOME}:CogVideoXCausalConv3d": {"ae8a222db87f35ca": "0.42.1"},
    f"{_HOME}:CogVideoXSpatialNorm3D": {"197c4e46bdb48896": "0.42.1"},
    f"{_HOME}:CogVideoXResnetBlock3D": {"a0b3fba9e4d59753": "0.42.1"},
    f"{_HOME}:CogVideoXDownBlock3D": {"f497d136e429a767": "0.42.1"},
    f"{_HOME}:CogVideoXMidBlock3D": {"dcb2e6b1693a532d": "0.42.1"},
    f"{_HOME}:CogVideoXUpBlock3D": {"b98bccf283d86e89": "0.42.1"},
    f"{_HOME}:CogVideoXEncoder3D": {"27dc33c7e35b8517": "0.42.1"},
    f"{_HOME}:CogVideoXDecoder3D": {"c605afcc71b672c3": "0.42.1"},
    f"{_HOME}:AutoencoderKLCogVideoX": {"cd63932683fb7d07": "0.42.1"},
}

_NORM, _CONV, _UP, _HEAD = "group_norm_silu", "causal_conv3d", "upsample_conv2d", "decode_head_"
_ALL = (_NORM, _CONV, _UP, _HEAD)
_PADDED = "hands what lies outside to its convolution"
# Class -> (its new forward, ops that run in it, ops of its children that it serves, what it does for them). The
# convolution of an upsampler is planned with it.
_FORWARDS: dict[type[nn.Module], tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...], str]] = {
    nn.GroupNorm: (forwards.norm_forward, (_NORM,), (), ""),
    CogVideoXSafeConv3d: (forwards.kernel_forward, (_CONV,), (), ""),
    CogVideoXCausalConv3d: (forwards.conv_forward, (), (_CONV, _HEAD), _PADDED),
    CogVideoXSpatialNorm3D: (forwards.spatial_norm_forward, (), (_NORM,), "convolves the latents at their size"),
    CogVideoXResnetBlock3D: (forwards.resnet_forward, (), (_NORM, _CONV), "fuses the activations and its own sum"),
    CogVideoXUpsample3D: (forwards.upsample_forward, (), (_UP,), "hands its factor to the convolution"),
    CogVideoXDownsample3D: (forwards.downsample_forward, (), _ALL, "keeps the layout"),
    CogVideoXEncoder3D: (forwards.encoder_forward, (), (_NORM, _CONV), "fuses its last activation"),
    CogVideoXDecoder3D: (forwards.decoder_forward, (), _ALL, "fuses its last activation; writes frames in place"),
}


def plan(model: nn.Module, path: str, settings: Settings) -> Plan:
    """What accelerate() does with an AutoencoderKLCogVideoX that is called ``path`` in its pipeline."""
    result = Plan()
    if not set(_ALL) & settings.ops:
        return result
    methods = {"_decode": streams._decode}
    reason = not_plain(model, AutoencoderKLCogVideoX) or obstacle(model, methods)
    add(result, settings, reason, _ALL, Swap(path, model, None, (), "decodes as a stream", methods))
    head = getattr(getattr(getattr(model, "decoder", None), "conv_out", None), "conv", None)
    for inner, module in model.named_modules():
        place = ".".join(part for part in (path, inner) if part)
        kind = next((base for base in type(module).__mro__ if base in _FORWARDS), None)
        if kind is None:
            continue
        forward, ops, serves, note = _FORWARDS[kind]
        if module is head and _HEAD in settings.ops:
            ops = (_HEAD,)
        reason = not_plain(module, kind) or _odd(module, kind) or obstacle(module)
        add(result, settings, reason, ops or serves, Swap(place, module, forward, ops, note))
        if kind is CogVideoXUpsample3D and reason is None:
            conv: Any = module.conv
            reason = not_plain(conv, nn.Conv2d) or _odd_image_conv(conv) or obstacle(conv)
            add(result, settings, reason, (_UP,), Swap(f"{place}.conv", conv, forwards.image_conv_forward, (_UP,)))
    if any(swap.forward is not None for swap in result.swaps):
        root = f"{path}." if path else ""
        result.kept.append((f"{root}encoder.*.downsamplers.*.conv", "2-D convolutions stay module calls"))
    return result


def _odd(module: Any, kind: type[nn.Module]) -> str | None:
    """Why no op can be this module, or None."""
    if kind is nn.GroupNorm and not module.affine:
        return "the norm has no weights"
    if kind is CogVideoXSpatialNorm3D and {getattr(conv, "time_kernel_size", 0) for conv in _latents(module)} != {1}:
        return "its convolutions of the latents are not 1×1×1"
    if kind is CogVideoXCausalConv3d:
        return _odd_padding(module)
    if kind is CogVideoXSafeConv3d:
        # Padded by the module around it where it pads nothing itself.
        _, kh, kw = module.kernel_size
        return odd_conv(module, (0, 0, 0) if set(module.padding) == {0} else (0, kh // 2, kw // 2))
    return None


def _latents(norm: Any) -> tuple[Any, Any]:
    return norm.conv_y, norm.conv_b


def _odd_padding(causal: Any) -> str | None:
    kt, kh, kw = getattr(causal.conv, "kernel_size", (0, 0, 0))
    half = (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0)
    if tuple(causal.time_causal_padding) != half or causal.time_kernel_size != kt:
        return "its padding is not half of an odd kernel and the whole past"
    return None


def _odd_image_conv(conv: Any) -> str | None:
    if set(conv.kernel_size) != {3} or set(conv.stride) != {1}:
        return "it is not a 3×3 convolution of stride 1"
    return odd_conv(conv, (1, 1))
