"""LTX-Video's VAE: which modules are swapped, by what, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_ltx import (
    AutoencoderKLLTXVideo,
    LTXVideoCausalConv3d,
    LTXVideoDecoder3d,
    LTXVideoDownsampler3d,
    LTXVideoEncoder3d,
    LTXVideoMidBlock3d,
    LTXVideoResnetBlock3d,
    LTXVideoUpBlock3d,
    LTXVideoUpsampler3d,
)
from diffusers.models.normalization import RMSNorm
from torch import nn

from ..planning import add, not_plain, odd_conv
from ..swap import Plan, Settings, Swap, obstacle
from . import ltx_vae_blocks as blocks
from . import ltx_vae_forwards as forwards
from . import ltx_vae_stream as stream

_HOME = "diffusers.models.autoencoders.autoencoder_kl_ltx"
SOURCES = {
    "diffusers.models.normalization:RMSNorm": {"e13e6bd6af1dd914": "0.42.1"},
    f"{_HOME}:LTXVideoCausalConv3d": {"62eac08738edd12a": "0.42.1"},
    f"{_HOME}:LTXVideoResnetBlock3d": {"02fa61a9060ee54d": "0.42.1"},
    f"{_HOME}:LTXVideoDownsampler3d": {"83303626ede7374f": "0.42.1"},
    f"{_HOME}:LTXVideoUpsampler3d": {"57a0a70171204f41": "0.42.1"},
    f"{_HOME}:LTXVideoDownBlock3D": {"928da8f9030b3b75": "0.42.1"},
    f"{_HOME}:LTXVideo095DownBlock3D": {"454812baeba397f6": "0.42.1"},
    f"{_HOME}:LTXVideoMidBlock3d": {"3c69d29a48a71eb1": "0.42.1"},
    f"{_HOME}:LTXVideoUpBlock3d": {"74f9f98a439d8408": "0.42.1"},
    f"{_HOME}:LTXVideoEncoder3d": {"d52e8ef75c750437": "0.42.1"},
    f"{_HOME}:LTXVideoDecoder3d": {"d264b72680f8f46c": "0.42.1"},
    f"{_HOME}:AutoencoderKLLTXVideo": {"6cd149e2c6e7c693": "0.42.1"},
}

_NORM, _CONV, _HEAD = "pixel_norm_silu", "causal_conv3d", "decode_head_"
_ALL = (_NORM, _CONV, _HEAD)
# Class -> (its new forward, ops that run in it, what it does for the ops of its children). The convolution inside an
# LTXVideoCausalConv3d, which owns the weights, is planned with it.
_FORWARDS: dict[type[nn.Module], tuple[Callable[..., Any], tuple[str, ...], str]] = {
    RMSNorm: (forwards.norm_forward, (_NORM,), ""),
    LTXVideoCausalConv3d: (forwards.conv_forward, (), "hands the frames before and after to its convolution"),
    LTXVideoResnetBlock3d: (blocks.resnet_forward, (), "fuses the activations, modulations and its own sum"),
    LTXVideoDownsampler3d: (blocks.downsampler_forward, (), "keeps the layout"),
    LTXVideoUpsampler3d: (blocks.upsampler_forward, (), "fuses the pixel shuffle"),
    LTXVideoMidBlock3d: (blocks.mid_block_forward, (), "hands clips on; embeds the timestep once for each"),
    LTXVideoUpBlock3d: (blocks.up_block_forward, (), "hands clips on; embeds the timestep once for each"),
    LTXVideoEncoder3d: (blocks.encoder_forward, (), "fuses its last activation"),
    LTXVideoDecoder3d: (blocks.decoder_forward, (), "fuses its last activation, convolution and patches"),
}


def plan(model: nn.Module, path: str, settings: Settings) -> Plan:
    """What accelerate() does with an AutoencoderKLLTXVideo that is called ``path`` in its pipeline."""
    result = Plan()
    wanted = [op for op in _ALL if op in settings.ops]
    if not wanted:
        return result
    head = getattr(getattr(model, "decoder", None), "conv_out", None)
    for inner, module in model.named_modules():
        place = ".".join(part for part in (path, inner) if part)
        kind = next((base for base in type(module).__mro__ if base in _FORWARDS), None)
        if module is model:
            methods = {"_decode": stream._decode}
            reason = not_plain(module, AutoencoderKLLTXVideo) or obstacle(module, methods)
            add(result, settings, reason, wanted, Swap(place, module, None, (), "decodes as a stream", methods))
        if kind is None:
            continue
        forward, ops, note = _FORWARDS[kind]
        reason = _unfit(module, kind) or obstacle(module)
        add(result, settings, reason, ops or wanted, Swap(place, module, forward, ops, note))
        if kind is LTXVideoCausalConv3d and reason is None:
            op = _HEAD if module is head and _HEAD in settings.ops else _CONV
            conv: Any = module.conv
            reason = not_plain(conv, nn.Conv3d) or odd_conv(conv, _half(conv)) or obstacle(conv)
            add(result, settings, reason, (op,), Swap(f"{place}.conv", conv, forwards.kernel_forward, (op,)))
    if result.swaps:
        root = f"{path}." if path else ""
        stock = {
            "time_embedder": "runs once a clip",
            "norm3": "the layer norm at a change of width, on channels-last frames",
        }
        present = {inner.rpartition(".")[2] for inner, _ in model.named_modules()}
        result.kept += [(f"{root}*.{name}", why) for name, why in stock.items() if name in present]
    return result


def _unfit(module: Any, kind: type[nn.Module]) -> str | None:
    reason = not_plain(module, kind)
    if reason is None and kind is RMSNorm and (module.weight is not None or module.bias is not None):
        reason = "the norm has a weight"
    if reason is None and kind is LTXVideoCausalConv3d and module.kernel_size[0] not in (1, 3):
        reason = "its kernel is neither 1 nor 3 frames long"
    return reason


def _half(conv: Any) -> tuple[int, ...]:
    _, kh, kw = conv.kernel_size
    return 0, kh // 2, kw // 2
