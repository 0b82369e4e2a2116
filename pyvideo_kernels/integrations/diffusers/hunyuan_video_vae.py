"""HunyuanVideo's VAE: which modules are swapped, by what, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    AutoencoderKLHunyuanVideo,
    HunyuanVideoCausalConv3d,
    HunyuanVideoDecoder3D,
    HunyuanVideoEncoder3D,
    HunyuanVideoMidBlock3D,
    HunyuanVideoResnetBlockCausal3D,
    HunyuanVideoUpsampleCausal3D,
)
from torch import nn

from .. import streams
from ..planning import add, not_plain
from ..swap import Left, Plan, Settings, Swap, obstacle
from . import hunyuan_video_vae_forwards as forwards

_HOME = "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video"
_ATTENTION = "diffusers.models.attention_processor"
SOURCES = {
    f"{_ATTENTION}:Attention": {"55d681af0697250e": "0.42.1"},
    f"{_ATTENTION}:AttnProcessor2_0": {"7fde69ddb3df91e8": "0.42.1"},
    f"{_HOME}:prepare_causal_attention_mask": {"6923366e09e9dd1c": "0.42.1"},
    f"{_HOME}:HunyuanVideoCausalConv3d": {"93e5158e74846a09": "0.42.1"},
    f"{_HOME}:HunyuanVideoUpsampleCausal3D": {"143d591f179efff3": "0.42.1"},
    f"{_HOME}:HunyuanVideoDownsampleCausal3D": {"f286dbec3c2eb440": "0.42.1"},
    f"{_HOME}:HunyuanVideoResnetBlockCausal3D": {"7bb2b1e6368c857d": "0.42.1"},
    f"{_HOME}:HunyuanVideoMidBlock3D": {"cd89da103b5552be": "0.42.1"},
    f"{_HOME}:HunyuanVideoDownBlock3D": {"8fe82f7b09d903bd": "0.42.1"},
    f"{_HOME}:HunyuanVideoUpBlock3D": {"06f027c61af5a107": "0.42.1"},
    f"{_HOME}:HunyuanVideoEncoder3D": {"5ab42dc27214d196": "0.42.1"},
    f"{_HOME}:HunyuanVideoDecoder3D": {"06a1d4332cfc0efe": "0.42.1"},
    f"{_HOME}:AutoencoderKLHunyuanVideo": {"816b5f47eac273c4": "0.42.1"},
}

_NORM, _CONV, _UP = "group_norm_silu", "causal_conv3d", "upsample_conv2d"
_ATTEND, _HEAD = "vae_attention", "decode_head_"
_LAYERS = (_NORM, _CONV)
# Class -> (its new forward, ops that run in it, ops of its children that it serves, what it does for them).
_FORWARDS: dict[type[nn.Module], tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...], str]] = {
    nn.GroupNorm: (forwards.norm_forward, (_NORM,), (), ""),
    nn.Conv3d: (forwards.conv_forward, (_CONV,), (), ""),
    HunyuanVideoCausalConv3d: (forwards.causal_forward, (), (_CONV, _UP, _HEAD), "leaves the padding to the op"),
    HunyuanVideoUpsampleCausal3D: (forwards.upsample_forward, (), (_CONV, _UP), "leaves the factor to the op"),
    HunyuanVideoResnetBlockCausal3D: (
        forwards.residual_forward, (), _LAYERS, "fuses the activations and its own sum",
    ),
    Attention: (forwards.attention_forward, (_ATTEND,), (), ""),
    HunyuanVideoMidBlock3D: (forwards.mid_forward, (), (*_LAYERS, _ATTEND), "makes no mask; keeps the layout"),
    HunyuanVideoEncoder3D: (forwards.encoder_forward, (), _LAYERS, "fuses its last activation"),
    HunyuanVideoDecoder3D: (forwards.decoder_forward, (), (*_LAYERS, _HEAD), "fuses its last activation"),
}  # fmt: skip


def plan(model: nn.Module, path: str, settings: Settings) -> Plan:
    """What accelerate() does with an AutoencoderKLHunyuanVideo that is called ``path`` in its pipeline."""
    result = Plan()
    _stream(result, model, path, settings)
    modules = dict(model.named_modules())
    for inner, module in modules.items():
        kind = next((base for base in type(module).__mro__ if base in _FORWARDS), None)
        if kind is None:
            continue
        place = ".".join(part for part in (path, inner) if part)
        forward, ops, serves, note = _FORWARDS[kind]
        owner = modules.get(inner.rpartition(".")[0])
        if kind is nn.Conv3d:
            ops = _conv_ops(inner, modules)
        wanted = [op for op in (*ops, *serves) if op in settings.ops]
        if not wanted:
            continue
        reason = _unfit(module, kind, owner) or obstacle(module)
        if reason is not None:
            # A convolution inside a causal one is reported where it is, not once more for what is around it.
            if kind is not HunyuanVideoCausalConv3d or type(module) is not kind:
                result.left += [Left(place, op, reason) for op in wanted]
            continue
        result.swaps.append(Swap(place, module, forward, tuple(op for op in ops if op in settings.ops), note))
    if any(swap.forward is not None for swap in result.swaps):
        root = f"{path}." if path else ""
        result.kept.append((f"{root}*.attentions.*.to_*", "the projections stay module calls"))
    return result


def _stream(result: Plan, model: nn.Module, path: str, settings: Settings) -> None:
    """Plan the method of the VAE itself: it decodes as a stream."""
    methods = {"_decode": streams._decode}
    reason = not_plain(model, AutoencoderKLHunyuanVideo) or obstacle(model, methods)
    ops = (*_LAYERS, _UP, _ATTEND, _HEAD)
    add(result, settings, reason, ops, Swap(path, model, None, (), "decodes as a stream", methods))


def _conv_ops(inner: str, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """What the convolution at ``inner`` runs: that of an upsampler and the decoder's last one have ops of their own."""
    causal = inner.rpartition(".")[0]
    around, _, name = causal.rpartition(".")
    owner = modules.get(around)
    if isinstance(owner, HunyuanVideoUpsampleCausal3D):
        return (_UP, _CONV)
    if isinstance(owner, HunyuanVideoDecoder3D) and name == "conv_out":
        return (_HEAD, _CONV)
    return (_CONV,)


def _unfit(module: Any, kind: type[nn.Module], owner: Any) -> str | None:
    reason = not_plain(module, kind)
    if reason is not None:
        return reason
    if kind is nn.GroupNorm and not module.affine:
        return "the norm has no weights"
    if kind is HunyuanVideoCausalConv3d:
        return _odd_padding(module)
    if kind is nn.Conv3d:
        return _odd_conv(module, owner)
    return forwards._unfit_attention(module) if kind is Attention else None


def _odd_conv(conv: Any, owner: Any) -> str | None:
    """Why the op cannot be this convolution, or None."""
    if conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros" or set(conv.padding) != {0}:
        return "it has groups, dilation or a padding of its own"
    if not isinstance(owner, HunyuanVideoCausalConv3d):
        return None if set(conv.kernel_size) == {1} else "it is a convolution outside of a causal one"
    if type(owner) is not HunyuanVideoCausalConv3d:
        return f"it is padded by a {type(owner).__name__}"
    return _odd_padding(owner)


def _odd_padding(causal: Any) -> str | None:
    """Why the op cannot pad so, or None: odd kernels by half, time by the whole past."""
    kt, kh, kw = causal.conv.kernel_size if hasattr(causal.conv, "kernel_size") else (0, 0, 0)
    half = (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0)
    if causal.pad_mode not in forwards.PAD_MODES:
        return f"its padding is {causal.pad_mode}"
    if kh % 2 == 0 or kw % 2 == 0 or tuple(causal.time_causal_padding) != half:
        return "its padding is not half of an odd kernel and the whole past"
    return None
