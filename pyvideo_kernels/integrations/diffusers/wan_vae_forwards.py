"""Wan's VAE: the forwards that replace diffusers' own (``wan_vae.py`` says where).

Between modules a clip keeps its ``[B, C, T, H, W]`` shape and lies channels-last in memory, ``[B, T, H, W, C]``, so
that stock modules in between still work and the ops take a view of it:

    h = conv_shortcut(x)
    y = conv1(norm1(x, silu), cache)                                  rms_norm_silu, causal_conv3d
    x = conv2(norm2(y, silu), cache, residual=h)                      rms_norm_silu, causal_conv3d

The caches are the stock ones (``feat_cache`` and ``feat_idx``: None, "Rep" or the last frames), handed to the
convolution as they are instead of being concatenated and padded. The stock code clones the last two frames of every
convolution's input; here a cache is a view of that input where it is no longer than two frames.

Each function takes ``(module, settings, ...)`` and stands in for the forward of that module's class. Called as the
class is, it returns what the class returns; the extra arguments come from the functions in this file alone.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    CACHE_T,
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
from torch import Tensor, nn

from ...ops.causal_conv3d import causal_conv3d
from ...ops.rms_norm_silu import rms_norm_silu
from ..swap import Settings, autocasting, fall_back, ours, why_not

# The stock norm divides by F.normalize's default smallest norm.
_EPS = 1e-12


# Layout ---------------------------------------------------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    """``[B, C, (T,) H, W]`` as ``[B, (T,) H, W, C]`` with contiguous channels: a view where memory is so already."""
    view = x.movedim(1, -1)
    return view if view.stride(-1) == 1 or view.shape[-1] == 1 else view.contiguous()


def channels_first(y: Tensor) -> Tensor:
    """The view ``[B, C, (T,) H, W]`` of a channels-last tensor."""
    return y.movedim(-1, 1)


def _frames(x: Tensor) -> Tensor:
    """A clip ``[B, C, T, H, W]`` as images ``[B*T, C, H, W]`` that lie channels-last."""
    return channels_first(channels_last(x).flatten(0, 1))


def _clip(x: Tensor, batch: int) -> Tensor:
    """Images ``[B*T, C, H, W]`` as a clip ``[B, C, T, H, W]`` that lies channels-last."""
    return channels_first(channels_last(x).unflatten(0, (batch, -1)))


# Ops ------------------------------------------------------------------------------------------------------------


def _why_not(x: Tensor, *parameters: Tensor | None) -> str | None:
    """The per-call guard of both ops; they have no backward and take one dtype."""
    reason = why_not(x, *parameters)
    if reason is not None:
        return reason
    if any(p is not None and p.dtype != x.dtype for p in parameters):
        return "weight and activation of different dtypes"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        return "gradients are wanted and the op has no backward"
    return None


def norm_forward(self: WanRMS_norm, settings: Settings, x: Tensor, silu: bool = False) -> Tensor:
    """The channel norm of a clip or image; with ``silu`` the activation after it."""
    pixels = channels_last(x) if self.channel_first else x
    reason = _why_not(pixels, self.gamma)
    if reason is None and isinstance(self.bias, Tensor):
        reason = "the norm has a bias"
    if reason is None:
        y = rms_norm_silu(pixels, self.gamma.flatten(), eps=_EPS, silu=silu, impl=settings.impl)
        return channels_first(y) if self.channel_first else y
    fall_back(settings, "rms_norm_silu", reason)
    y = WanRMS_norm.forward(self, x)
    return nn.functional.silu(y) if silu else y


def conv_forward(
    self: WanCausalConv3d,
    settings: Settings,
    x: Tensor,
    cache_x: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The causal convolution, its past read from ``cache_x``; ``residual`` is added before the result is rounded."""
    clip = channels_last(x)
    autocast = "autocast chooses the dtype of the convolution" if autocasting(x) else None
    reason = autocast or _why_not(clip, self.weight, self.bias)
    past = self._padding[4]
    if cache_x is not None and past == 0:
        cache_x = None  # as the stock forward: nothing to pad, nothing to look back at
    if reason is None and cache_x is not None and (cache_x.shape[2] > past or cache_x.dtype != x.dtype):
        reason = "the cache is longer than the kernel looks back, or of another dtype"
    if reason is None:
        cache = None if cache_x is None else channels_last(cache_x.to(x.device))
        if past == 0 and self.kernel_size[0] > 1:
            # A convolution without padding in time takes its past from the head of its input.
            cache, clip = clip[:, : self.kernel_size[0] - 1], clip[:, self.kernel_size[0] - 1 :]
        y = causal_conv3d(
            clip,
            self.weight,
            self.bias,
            cache=cache,
            stride=self.stride,
            residual=None if residual is None else channels_last(residual),
            impl=settings.impl,
        )
        y = channels_first(y)
        # Who hands over the stock layout (callers of quant_conv) gets it back.
        return y if x.stride(1) == 1 else y.contiguous()
    fall_back(settings, "causal_conv3d", reason)
    y = WanCausalConv3d.forward(self, x, cache_x)
    return y if residual is None else y + residual


def _activated(norm: Any, activation: Any, x: Tensor) -> Tensor:
    """``activation(norm(x))`` in one op where both can be."""
    if ours(norm, WanRMS_norm) and type(activation) is nn.SiLU:
        y: Tensor = norm(x, silu=True)
        return y
    y = activation(norm(x))
    return y


def _next_cache(x: Tensor, previous: Tensor | None) -> Tensor:
    """What the convolution of the next chunk looks back at: the last two frames of ``previous`` and ``x``."""
    frames = x.shape[2]
    if frames > CACHE_T:
        # A view would keep every frame of the chunk alive until the next one.
        return channels_first(channels_last(x)[:, -CACHE_T:].clone(memory_format=torch.contiguous_format))
    if frames == CACHE_T or previous is None:
        return x
    last = channels_last(previous[:, :, -1:].to(x.device))
    return channels_first(torch.cat([last, channels_last(x)], 1))


def _convolved(conv: Any, x: Tensor, feat_cache: Any, feat_idx: Any, residual: Tensor | None = None) -> Tensor:
    """``conv(x) + residual`` by the stock cache protocol: read this convolution's slot, fill it, step on."""
    previous = None
    if feat_cache is not None:
        index = feat_idx[0]
        previous = feat_cache[index]
        feat_cache[index] = _next_cache(x, previous)
        feat_idx[0] += 1
    if residual is None:
        out: Tensor = conv(x, previous)
    elif ours(conv, WanCausalConv3d):
        out = conv(x, previous, residual)
    else:
        out = conv(x, previous) + residual
    return out


# Modules --------------------------------------------------------------------------------------------------------


def residual_forward(
    self: WanResidualBlock, settings: Settings, x: Tensor, feat_cache: Any = None, feat_idx: Any = None
) -> Tensor:
    """WanResidualBlock; the block's own sum is the epilogue of its second convolution."""
    shortcut = self.conv_shortcut(x)
    y = _activated(self.norm1, self.nonlinearity, x)
    y = _convolved(self.conv1, y, feat_cache, feat_idx)
    y = _activated(self.norm2, self.nonlinearity, y)
    y = self.dropout(y)
    return _convolved(self.conv2, y, feat_cache, feat_idx, shortcut)


def attention_forward(self: WanAttentionBlock, settings: Settings, x: Tensor) -> Tensor:
    """WanAttentionBlock; pixels are tokens in this layout, so nothing is transposed."""
    batch = x.shape[0]
    frames = _frames(x)
    height, width = frames.shape[2:]
    qkv = channels_last(self.to_qkv(self.norm(frames))).flatten(1, 2).unsqueeze(1)
    query, key, value = qkv.chunk(3, dim=-1)
    attended = nn.functional.scaled_dot_product_attention(query, key, value)
    attended = attended.squeeze(1).unflatten(1, (height, width))
    out: Tensor = _clip(self.proj(channels_first(attended)) + frames, batch)
    return out


def upsample_forward(self: WanUpsample, settings: Settings, x: Tensor) -> Tensor:
    """WanUpsample without its trip through float32: nearest neighbours are copies in any dtype."""
    if self.mode not in ("nearest", "nearest-exact"):
        out: Tensor = WanUpsample.forward(self, x)
    else:
        out = nn.Upsample.forward(self, x)
    return out


def resample_forward(
    self: WanResample, settings: Settings, x: Tensor, feat_cache: Any = None, feat_idx: Any = None
) -> Tensor:
    """WanResample: time upsampling, then the 2-D resampling of every frame, then time downsampling."""
    batch = x.shape[0]
    if self.mode == "upsample3d" and feat_cache is not None:
        index = feat_idx[0]
        previous = feat_cache[index]
        if previous is None:
            # The first latent becomes one frame; "Rep" tells the next call that there is no past yet.
            feat_cache[index] = "Rep"
        else:
            if isinstance(previous, str):
                previous = None
            feat_cache[index] = _next_cache(x, previous)
            x = _interleaved(self.time_conv(x, previous))
        feat_idx[0] += 1
    x = _clip(self.resample(_frames(x)), batch)
    if self.mode == "downsample3d" and feat_cache is not None:
        index = feat_idx[0]
        previous = feat_cache[index]
        feat_cache[index] = channels_first(channels_last(x)[:, -1:].clone(memory_format=torch.contiguous_format))
        if previous is not None:
            frames = torch.cat([channels_last(previous[:, :, -1:].to(x.device)), channels_last(x)], 1)
            x = self.time_conv(channels_first(frames))
        feat_idx[0] += 1
    return x


def _interleaved(x: Tensor) -> Tensor:
    """``[B, 2C, T, H, W]`` as ``[B, C, 2T, H, W]``: the halves of the channels are the even and the odd frames."""
    halves = channels_last(x).unflatten(-1, (2, -1))  # [B, T, H, W, 2, C]
    return channels_first(halves.permute(0, 1, 4, 2, 3, 5).flatten(1, 2))


def average_forward(self: AvgDown3D, settings: Settings, x: Tensor) -> Tensor:
    """AvgDown3D: space and time folded into channels, then the mean over groups of them."""
    clip = channels_last(x)
    missing = -clip.shape[1] % self.factor_t
    if missing:
        clip = nn.functional.pad(clip, (0, 0, 0, 0, 0, 0, missing, 0))
    b, t, h, w, c = clip.shape
    step, side = self.factor_t, self.factor_s
    cells = clip.reshape(b, t // step, step, h // side, side, w // side, side, c)
    folded = cells.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(
        b, t // step, h // side, w // side, self.out_channels, self.group_size
    )
    return channels_first(folded.mean(-1))


def repeat_forward(self: DupUp3D, settings: Settings, x: Tensor, first_chunk: bool = False) -> Tensor:
    """DupUp3D: channels repeated, then unfolded into time and space."""
    clip = channels_last(x).repeat_interleave(self.repeats, dim=-1)
    b, t, h, w, _ = clip.shape
    step, side = self.factor_t, self.factor_s
    cells = clip.view(b, t, h, w, self.out_channels, step, side, side).permute(0, 1, 5, 2, 6, 3, 7, 4)
    unfolded = cells.reshape(b, t * step, h * side, w * side, self.out_channels)
    return channels_first(unfolded[:, step - 1 :] if first_chunk else unfolded)


def encoder_forward(
    self: WanEncoder3d, settings: Settings, x: Tensor, feat_cache: Any = None, feat_idx: Any = None
) -> Tensor:
    """WanEncoder3d; leaves with the stock layout."""
    x = _convolved(self.conv_in, channels_first(channels_last(x)), feat_cache, feat_idx)
    for layer in self.down_blocks:
        x = layer(x, feat_cache=feat_cache, feat_idx=feat_idx) if feat_cache is not None else layer(x)
    x = self.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    x = _activated(self.norm_out, self.nonlinearity, x)
    return _convolved(self.conv_out, x, feat_cache, feat_idx).contiguous()


def decoder_forward(
    self: WanDecoder3d,
    settings: Settings,
    x: Tensor,
    feat_cache: Any = None,
    feat_idx: Any = None,
    first_chunk: bool = False,
) -> Tensor:
    """WanDecoder3d; leaves with the stock layout."""
    x = _convolved(self.conv_in, channels_first(channels_last(x)), feat_cache, feat_idx)
    x = self.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    for block in self.up_blocks:
        x = block(x, feat_cache=feat_cache, feat_idx=feat_idx, first_chunk=first_chunk)
    x = _activated(self.norm_out, self.nonlinearity, x)
    return _convolved(self.conv_out, x, feat_cache, feat_idx).contiguous()
