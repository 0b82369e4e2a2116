"""HunyuanVideo's VAE: the forwards that replace diffusers' own (``hunyuan_video_vae.py`` says where).

Between modules a clip keeps its ``[B, C, T, H, W]`` shape and lies channels-last in memory, ``[B, T, H, W, C]``, so
that stock modules in between still work and the ops take a view of it:

    h = conv_shortcut(x)
    y = conv1(norm1(x, silu))                                         group_norm_silu, causal_conv3d
    x = conv2(norm2(y, silu), residual=h)                             group_norm_silu, causal_conv3d
    x = upsampler.conv(x, factor=(2, 2, 2))                           upsample_conv2d
    x = attention(tokens, grid=(T, H, W))                             group_norm_silu, vae_attention

Weights of a convolution belong to the ``nn.Conv3d`` inside HunyuanVideoCausalConv3d, so the op runs in the forward of
that one: the outer module hands it the unpadded clip and says what lies outside. Nothing is padded, no enlarged image
and no attention mask is made.

Each function takes ``(module, settings, ...)`` and stands in for the forward of that module's class. Called as the
class is, it returns what the class returns; the extra arguments come from the functions in this file alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoCausalConv3d,
    HunyuanVideoDecoder3D,
    HunyuanVideoEncoder3D,
    HunyuanVideoMidBlock3D,
    HunyuanVideoResnetBlockCausal3D,
    HunyuanVideoUpsampleCausal3D,
    prepare_causal_attention_mask,
)
from torch import Tensor, nn

from ...ops.causal_conv3d import causal_conv3d
from ...ops.decode_head import decode_head
from ...ops.group_norm_silu import group_norm_silu
from ...ops.upsample_conv2d import upsample_conv2d
from ...ops.vae_attention import vae_attention
from ..clips import attention_impl, channels_first, channels_last, checkpointed, unservable, unservable_conv
from ..packing import conv_weight, upsample_weight, watched
from ..swap import Settings, fall_back, ours, why_not

# F.pad's name of what lies outside -> the op's.
PAD_MODES = {"replicate": "replicate", "constant": "zeros"}
UPSAMPLE_FACTORS = ((1, 2, 2), (2, 2, 2))


def _upsampled(x: Tensor, factor: Sequence[float]) -> Tensor:
    """Nearest neighbours of a clip, channels-last; the first frame stays one frame."""
    clip = channels_last(x)
    for axis, times in zip((2, 3), factor[1:], strict=True):
        clip = clip.repeat_interleave(int(times), axis)
    if int(factor[0]) > 1 and clip.shape[1] > 1:
        clip = torch.cat([clip[:, :1], clip[:, 1:].repeat_interleave(int(factor[0]), 1)], 1)
    return channels_first(clip)


# Ops ------------------------------------------------------------------------------------------------------------


def norm_forward(self: nn.GroupNorm, settings: Settings, input: Tensor, silu: bool = False) -> Tensor:
    """The group norm of a clip, or of ``[B, C, N]`` tokens; with ``silu`` the activation after it."""
    pixels = channels_last(input)
    reason = unservable(pixels, self.weight, self.bias)
    if reason is None and pixels.dim() not in (3, 5):
        reason = "neither a clip nor tokens"
    if reason is None:
        y = group_norm_silu(
            pixels, self.weight, self.bias, groups=self.num_groups, eps=self.eps, silu=silu, impl=settings.impl
        )
        return channels_first(y)
    fall_back(settings, "group_norm_silu", reason)
    y = nn.GroupNorm.forward(self, input)
    return nn.functional.silu(y) if silu else y


def conv_forward(
    self: nn.Conv3d,
    settings: Settings,
    input: Tensor,
    pad_mode: str | None = None,
    residual: Tensor | None = None,
    factor: tuple[int, int, int] | None = None,
    head: bool = False,
) -> Tensor:
    """The convolution of a clip with what lies outside given by ``pad_mode``; None: a 1×1×1 kernel, called as it is.

    ``residual`` is added before the result is rounded. ``factor``: of the clip enlarged so much, the first frame apart.
    ``head``: the result is frames, in the stock layout.
    """
    clip = channels_last(input)
    wanted = "causal_conv3d"
    if head and "decode_head_" in settings.ops:
        wanted = "decode_head_"
    elif factor is not None and "upsample_conv2d" in settings.ops and not _unfit_upsample(self, pad_mode, factor):
        wanted = "upsample_conv2d"
    reason = unservable_conv(clip, self.weight, self.bias)
    if reason is None and pad_mode is None and set(self.kernel_size) != {1}:
        reason = "called with a padded clip"
    made, times = None, 1 if factor is None else int(factor[0])
    if reason is None and wanted == "upsample_conv2d":
        made, pays = upsample_weight(self, settings, times)
        wanted = wanted if pays else "causal_conv3d"
    if reason is None and wanted in settings.ops:
        other = None if residual is None else channels_last(residual)
        mode = "zeros" if pad_mode is None else PAD_MODES[pad_mode]
        if wanted == "decode_head_":
            frames = decode_head(clip, conv_weight(self), self.bias, pad_mode=mode, clamp=False, impl=settings.impl)
            assert isinstance(frames, Tensor)
            return frames
        if wanted == "upsample_conv2d":
            y = upsample_conv2d(
                clip,
                self.weight,
                self.bias,
                packed=made,
                time_factor=times,
                pad_mode=mode,
                residual=other,
                impl=settings.impl,
            )
        else:
            if factor is not None:
                clip = channels_last(_upsampled(input, factor))
            y = causal_conv3d(
                clip,
                conv_weight(self),
                self.bias,
                stride=self.stride,
                pad_mode=mode,
                residual=other,
                impl=settings.impl,
            )
        y = channels_first(y)
        # Who hands over the stock layout (callers of quant_conv) gets it back.
        return y if pad_mode is not None or input.stride(1) == 1 else y.contiguous()
    if reason is not None:
        fall_back(settings, wanted, reason)
    x = input if factor is None else _upsampled(input, factor)
    if pad_mode is not None:
        kt, kh, kw = self.kernel_size
        x = nn.functional.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0), mode=pad_mode)
    y = nn.Conv3d.forward(self, x)
    return y if residual is None else y + residual


def _unfit_upsample(conv: nn.Conv3d, pad_mode: str | None, factor: Sequence[float]) -> str | None:
    if tuple(factor) not in UPSAMPLE_FACTORS or set(conv.kernel_size) != {3} or set(conv.stride) != {1}:
        return "not a nearest 2× before a 3×3×3 convolution"
    return None if pad_mode in PAD_MODES else f"padding {pad_mode}"


def causal_forward(
    self: HunyuanVideoCausalConv3d,
    settings: Settings,
    hidden_states: Tensor,
    residual: Tensor | None = None,
    factor: tuple[int, int, int] | None = None,
    head: bool = False,
) -> Tensor:
    """HunyuanVideoCausalConv3d: the convolution inside is told the padding instead of being given it."""
    if ours(self.conv, nn.Conv3d):
        out: Tensor = self.conv(hidden_states, self.pad_mode, residual, factor, head)
        return out
    x = hidden_states if factor is None else _upsampled(hidden_states, factor)
    y: Tensor = HunyuanVideoCausalConv3d.forward(self, x)
    return y if residual is None else y + residual


def _convolved(conv: Any, x: Tensor, residual: Tensor | None = None, factor: Any = None, head: bool = False) -> Tensor:
    """``conv`` of a clip that is enlarged before or added to after it, all in one op unless somebody watches."""
    if ours(conv, HunyuanVideoCausalConv3d) and not (watched(conv) or watched(conv.conv)):
        out: Tensor = conv(x, residual, factor, head)
        return out
    y: Tensor = conv(x if factor is None else _upsampled(x, factor))
    return y if residual is None else y + residual


def _activated(norm: Any, activation: Any, x: Tensor) -> Tensor:
    """``activation(norm(x))`` in one op where both can be and nobody watches either."""
    if ours(norm, nn.GroupNorm) and type(activation) is nn.SiLU and not (watched(norm) or watched(activation)):
        y: Tensor = norm(x, silu=True)
        return y
    y = activation(norm(x))
    return y


def attention_forward(
    self: Attention,
    settings: Settings,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    grid: tuple[int, int, int] | None = None,
    **kwargs: Any,
) -> Tensor:
    """diffusers' Attention over ``[B, T*H*W, C]``, each frame seeing itself and those before it.

    ``grid``: the clip's (T, H, W), from our mid block, in place of a mask.
    """
    if grid is None:
        out: Tensor = Attention.forward(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        return out
    frames, height, width = grid
    reason = _unfit_attention(self) or why_not(hidden_states)
    if reason is None and torch.is_grad_enabled():
        if hidden_states.requires_grad or any(parameter.requires_grad for parameter in self.parameters()):
            reason = "gradients are wanted and the op has no backward"
    if reason is not None:
        fall_back(settings, "vae_attention", reason)
        mask = prepare_causal_attention_mask(
            frames, height * width, hidden_states.dtype, hidden_states.device, batch_size=hidden_states.shape[0]
        )
        out = Attention.forward(self, hidden_states, attention_mask=mask)
        return out
    tokens = hidden_states
    if self.group_norm is not None:
        tokens = self.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
    query, key, value = (
        project(tokens).unflatten(1, (frames, height * width)) for project in (self.to_q, self.to_k, self.to_v)
    )
    attended = vae_attention(query, key, value, causal=True, impl=attention_impl(settings, query)).flatten(1, 2)
    for layer in self.to_out:
        attended = layer(attended)
    if self.residual_connection:
        attended = attended + hidden_states
    return attended if self.rescale_output_factor == 1.0 else attended / self.rescale_output_factor


def _unfit_attention(attention: Any) -> str | None:
    """Why the arithmetic of this Attention is not the op's, or None."""
    if type(attention.processor) is not AttnProcessor2_0:
        return f"its processor is a {type(attention.processor).__name__}"
    if attention.heads != 1:
        return "it has several heads"
    if any(getattr(attention, name) is not None for name in ("spatial_norm", "norm_q", "norm_k")):
        return "it norms its queries, keys or pixels in another way"
    return None


# Modules --------------------------------------------------------------------------------------------------------


def residual_forward(self: HunyuanVideoResnetBlockCausal3D, settings: Settings, hidden_states: Tensor) -> Tensor:
    """HunyuanVideoResnetBlockCausal3D; the block's own sum is the epilogue of its second convolution."""
    x = hidden_states
    y = self.conv1(_activated(self.norm1, self.nonlinearity, x))
    y = self.dropout(_activated(self.norm2, self.nonlinearity, y))
    shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
    return _convolved(self.conv2, y, residual=shortcut)


def upsample_forward(self: HunyuanVideoUpsampleCausal3D, settings: Settings, hidden_states: Tensor) -> Tensor:
    """HunyuanVideoUpsampleCausal3D; its convolution enlarges what it reads."""
    return _convolved(self.conv, hidden_states, factor=self.upsample_factor)


def mid_forward(self: HunyuanVideoMidBlock3D, settings: Settings, hidden_states: Tensor) -> Tensor:
    """HunyuanVideoMidBlock3D; an attention of ours is told the grid, and no mask is made."""
    if checkpointed(self):
        out: Tensor = HunyuanVideoMidBlock3D.forward(self, hidden_states)
        return out
    x = self.resnets[0](hidden_states)
    for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
        if attention is not None:
            batch, _, *grid = x.shape
            tokens = channels_last(x).flatten(1, 3)
            if ours(attention, Attention):
                tokens = attention(tokens, grid=tuple(grid))
            else:
                mask = prepare_causal_attention_mask(grid[0], grid[1] * grid[2], x.dtype, x.device, batch_size=batch)
                tokens = attention(tokens, attention_mask=mask)
            x = channels_first(tokens.unflatten(1, grid))
        x = resnet(x)
    return x


def encoder_forward(self: HunyuanVideoEncoder3D, settings: Settings, hidden_states: Tensor) -> Tensor:
    """HunyuanVideoEncoder3D; leaves with the stock layout."""
    if checkpointed(self):
        out: Tensor = HunyuanVideoEncoder3D.forward(self, hidden_states)
        return out
    x = self.conv_in(channels_first(channels_last(hidden_states)))
    for block in self.down_blocks:
        x = block(x)
    x = self.mid_block(x)
    x = _activated(self.conv_norm_out, self.conv_act, x)
    return _convolved(self.conv_out, x).contiguous()


def decoder_forward(self: HunyuanVideoDecoder3D, settings: Settings, hidden_states: Tensor) -> Tensor:
    """HunyuanVideoDecoder3D; leaves with the stock layout."""
    if checkpointed(self):
        out: Tensor = HunyuanVideoDecoder3D.forward(self, hidden_states)
        return out
    x = self.conv_in(channels_first(channels_last(hidden_states)))
    x = self.mid_block(x)
    for block in self.up_blocks:
        x = block(x)
    x = _activated(self.conv_norm_out, self.conv_act, x)
    return _convolved(self.conv_out, x, head=True).contiguous()
