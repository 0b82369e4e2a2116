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
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    WanUpBlock,
    WanUpsample,
)
from torch import nn

from .. import streams
from ..planning import not_plain
from ..swap import Left, Plan, Settings, Swap, obstacle
from . import wan_vae_blocks as blocks
from . import wan_vae_forwards as forwards
from . import wan_vae_stream

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
    f"{_HOME}:WanMidBlock": {"627839b068b4ac95": "0.42.1"},
    f"{_HOME}:WanResidualDownBlock": {"e4dafbf5c77b4527": "0.42.1"},
    f"{_HOME}:WanResidualUpBlock": {"9936481266187f16": "0.42.1"},
    f"{_HOME}:WanUpBlock": {"1bb1d53b6e283882": "0.42.1"},
    f"{_HOME}:WanEncoder3d": {"cabae14e6442bf10": "0.42.1"},
    f"{_HOME}:WanDecoder3d": {"8beff040b23d82b2": "0.42.1"},
    f"{_HOME}:AutoencoderKLWan": {"6e2c96d9519ef145": "0.42.1"},
}

_NORM, _CONV, _UP, _ATTENTION, _HEAD = (
    "rms_norm_silu", "causal_conv3d", "upsample_conv2d", "vae_attention", "decode_head_",
)  # fmt: skip
_ALL = (_NORM, _CONV, _UP, _ATTENTION, _HEAD)
# Class -> (its new forward, ops that run in it, ops of its children that it serves, what it does for them).
_FORWARDS: dict[type[nn.Module], tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...], str]] = {
    WanRMS_norm: (forwards.norm_forward, (_NORM,), (), ""),
    WanCausalConv3d: (forwards.conv_forward, (_CONV,), (), ""),
    WanResidualBlock: (blocks.residual_forward, (), (_NORM, _CONV), "norms and its own sum run in its convolutions"),
    WanAttentionBlock: (blocks.attention_forward, (_ATTENTION,), (_NORM, _CONV), "keeps the layout"),
    WanResample: (blocks.resample_forward, (), (_NORM, _CONV, _UP), "keeps the layout; hands caches to time_conv"),
    WanUpsample: (blocks.upsample_forward, (), (_NORM, _CONV), "keeps layout and dtype"),
    AvgDown3D: (blocks.average_forward, (), (_NORM, _CONV), "keeps the layout"),
    DupUp3D: (blocks.repeat_forward, (), (_NORM, _CONV), "keeps the layout"),
    WanMidBlock: (blocks.mid_forward, (), (_NORM, _CONV), "hands norms to the convolutions before them"),
    WanUpBlock: (blocks.up_forward, (), (_NORM, _CONV), "hands norms to the convolutions before them"),
    WanResidualUpBlock: (blocks.residual_up_forward, (), (_NORM, _CONV, _UP), "hands on norms and its shortcut"),
    WanResidualDownBlock: (blocks.residual_down_forward, (), (_NORM, _CONV), "hands on norms"),
    WanEncoder3d: (blocks.encoder_forward, (), (_NORM, _CONV), "hands on norms"),
    WanDecoder3d: (blocks.decoder_forward, (), (_NORM, _CONV, _HEAD), "hands on norms, finishes frames"),
}
_NOTHING: tuple[Any, tuple[str, ...], tuple[str, ...], str] = (None, (), (), "")


def plan(model: nn.Module, path: str, settings: Settings) -> Plan:
    """What accelerate() does with an AutoencoderKLWan that is called ``path`` in its pipeline."""
    result = Plan()
    _stream(result, model, path, settings)
    doubled, last = _special(model)
    for inner, module in model.named_modules():
        place = ".".join(part for part in (path, inner) if part)
        kind = next((base for base in type(module).__mro__ if base in _FORWARDS), None)
        forward, ops, serves, note = _FORWARDS.get(kind, _NOTHING) if kind is not None else _NOTHING
        if id(module) in doubled:
            kind, forward, ops, note = nn.Conv2d, forwards.conv2d_forward, (_UP,), "of the small image"
        if id(module) in last:
            ops, note = (_CONV, _HEAD), "finishes the frames"
        wanted = [op for op in (*ops, *serves) if op in settings.ops]
        if kind is None or not wanted:
            continue
        reason = _unfit(module, kind) or obstacle(module)
        if reason is not None:
            result.left += [Left(place, op, reason) for op in wanted]
            continue
        result.swaps.append(Swap(place, module, forward, tuple(op for op in ops if op in settings.ops), note))
    if any(swap.forward is not None for swap in result.swaps):
        root = f"{path}." if path else ""
        result.kept += [
            (f"{root}encoder.*.resample.1", "convolutions with stride stay module calls, on channels-last frames"),
            (f"{root}*.attentions.*.to_qkv, .proj", "1×1 convolutions stay module calls, on channels-last frames"),
        ]
    return result


def _special(model: Any) -> tuple[set[int], set[int]]:
    """The convolutions behind a nearest 2×, and the decoder's last one, by identity."""
    doubled = set()
    for module in model.modules():
        if isinstance(module, WanResample) and module.mode.startswith("upsample"):
            doubled.add(id(module.resample[-1]))
    decoder = getattr(model, "decoder", None)
    return doubled, {id(decoder.conv_out)} if isinstance(decoder, WanDecoder3d) else set()


def _stream(result: Plan, model: nn.Module, path: str, settings: Settings) -> None:
    """Plan the methods of the VAE itself: it decodes as a stream."""
    wanted = [op for op in _ALL if op in settings.ops]
    if not wanted:
        return
    methods: dict[str, Callable[..., Any]] = {"_decode": streams._decode, "_encode": wan_vae_stream._encode}
    reason = _unfit(model, AutoencoderKLWan) or obstacle(model, methods)
    if reason is not None:
        result.left += [Left(path, op, reason) for op in wanted]
    else:
        result.swaps.append(Swap(path, model, None, (), "decodes as a stream; encodes without joining twice", methods))


def _unfit(module: Any, kind: type[nn.Module]) -> str | None:
    reason = not_plain(module, kind)
    if reason is not None:
        return reason
    if kind is WanRMS_norm and not isinstance(module.bias, float):
        return "the norm has a bias"
    if kind is nn.Conv2d:
        return None if _plain_3x3(module) else "it is not a 3×3 convolution that keeps the size"
    return _odd_conv(module) if kind is WanCausalConv3d else None


def _plain_3x3(conv: Any) -> bool:
    sizes = tuple(conv.kernel_size), tuple(conv.stride), conv.padding, tuple(conv.dilation)
    return sizes == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.groups == 1 and conv.padding_mode == "zeros"


def _odd_conv(conv: Any) -> str | None:
    """Why the op cannot be this convolution, or None: it pads odd kernels by half, and time by all or nothing."""
    kt, kh, kw = conv.kernel_size
    left, _, top, _, past, _ = conv._padding
    if conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros":
        return "it has groups, dilation or a padding other than zeros"
    if kh % 2 == 0 or kw % 2 == 0 or (top, left) != (kh // 2, kw // 2) or past not in (0, kt - 1):
        return "its padding is not half of an odd kernel, or not the whole past"
    return None
