"""CogVideoX's VAE: the forwards that replace diffusers' own (``cogvideox_vae.py`` says where).

A clip lies channels-last between modules (``clips.py``). A residual block of the decoder is

    y = conv1(norm1(x, zq, silu), cache)                              group_norm_silu, causal_conv3d
    x = conv2(norm2(y, zq, silu), cache, residual=x)                  group_norm_silu, causal_conv3d

The spatial norm scales and shifts by two 1×1 convolutions of the latents ``zq``, which commute with enlarging those to
the size of ``x``: they run on the latents, and the norm reads the nearest one. An upsampler that doubles frames too
convolves each frame once (upsample_conv2d). Weights belong to the CogVideoXSafeConv3d inside a CogVideoXCausalConv3d,
so the op runs in the forward of that one, which is told what lies outside the clip instead of being given it.

The caches are the stock ones, dicts of the last two frames by layer, read where they lie; a view of the input where
that holds no more than twice as many. A cache of one frame stands for two that are the same. Convolutions of one frame,
for which the stock code copies all of their input, have none.

Each function takes ``(module, settings, ...)`` and stands in for the forward of that module's class. Called as the
class is, it returns what the class returns; the extra arguments come from the functions in this file alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXDecoder3D,
    CogVideoXEncoder3D,
    CogVideoXResnetBlock3D,
    CogVideoXSafeConv3d,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.downsampling import CogVideoXDownsample3D
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import Tensor, nn

from ...nn.vae_stream import as_dtype
from ...ops.causal_conv3d import causal_conv3d, next_cache
from ...ops.decode_head import decode_head
from ...ops.group_norm_silu import group_norm_silu
from ...ops.upsample_conv2d import upsample_conv2d
from ..clips import as_clip, as_images, channels_first, channels_last, checkpointed, unservable, unservable_conv
from ..packing import conv_weight, upsample_weight, watched
from ..swap import Settings, fall_back, ours

Cache = dict[str, Any]
_CONV, _HEAD = "causal_conv3d", "decode_head_"


# Norms ----------------------------------------------------------------------------------------------------------


def norm_forward(
    self: nn.GroupNorm,
    settings: Settings,
    input: Tensor,
    silu: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The group norm of a clip; ``scale`` and ``shift`` ``[B, C, t, h, w]``, of latents, and ``silu`` follow it."""
    clip = channels_last(input)
    if scale is not None and shift is not None:
        scale, shift = channels_last(scale), channels_last(shift)
    reason = unservable(clip, self.weight, self.bias, scale, shift)
    if reason is None:
        y = group_norm_silu(
            clip,
            self.weight,
            self.bias,
            groups=self.num_groups,
            eps=self.eps,
            silu=silu,
            scale=scale,
            shift=shift,
            impl=settings.impl,
        )
        return channels_first(y)
    fall_back(settings, "group_norm_silu", reason)
    y = nn.GroupNorm.forward(self, input)
    if scale is not None and shift is not None:
        y = y * _nearest(channels_first(scale), y) + _nearest(channels_first(shift), y)
    return F.silu(y) if silu else y


def _nearest(z: Tensor, like: Tensor) -> Tensor:
    """Latents enlarged to a clip; an odd number of frames has its first one apart."""
    t, h, w = like.shape[-3:]
    if t == 1 or t % 2 == 0:
        return F.interpolate(z, size=(t, h, w))
    first, rest = F.interpolate(z[:, :, :1], size=(1, h, w)), F.interpolate(z[:, :, 1:], size=(t - 1, h, w))
    return torch.cat([first, rest], 2)


def spatial_norm_forward(
    self: CogVideoXSpatialNorm3D,
    settings: Settings,
    f: Tensor,
    zq: Tensor,
    conv_cache: Cache | None = None,
    silu: bool = False,
) -> tuple[Tensor, Cache]:
    """CogVideoXSpatialNorm3D, its convolutions on the latents; with ``silu`` the activation after it."""
    zq = channels_first(channels_last(zq))
    scale, shift = self.conv_y(zq)[0], self.conv_b(zq)[0]
    if ours(self.norm_layer, nn.GroupNorm):
        y = self.norm_layer(f, silu, scale, shift)
    else:
        y = self.norm_layer(f) * _nearest(scale, f) + _nearest(shift, f)
        y = F.silu(y) if silu else y
    return y, {"conv_y": None, "conv_b": None}


def _activated(norm: Any, activation: Any, x: Tensor, zq: Tensor | None, old: Cache, new: Cache, key: str) -> Tensor:
    """``activation(norm(x))`` in one op where both can be; ``zq`` for a spatial norm."""
    fused = type(activation) is nn.SiLU and (ours(norm, nn.GroupNorm) or ours(norm, CogVideoXSpatialNorm3D))
    silu = {"silu": True} if fused else {}
    if zq is None:
        y: Tensor = norm(x, **silu)
    else:
        y, new[key] = norm(x, zq, conv_cache=old.get(key), **silu)
    if not fused:
        y = activation(y)
    return y


# Convolutions ---------------------------------------------------------------------------------------------------


def kernel_forward(
    self: CogVideoXSafeConv3d,
    settings: Settings,
    input: Tensor,
    pad_mode: str | None = None,
    cache: Tensor | None = None,
    residual: Tensor | None = None,
    head: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The convolution of a clip, in one piece.

    Args:
        pad_mode: what lies outside, ``first_frame`` or ``replicate``; None: nothing that is not in ``input`` already.
        cache: the frames before ``input``, ``[B, C, n, H, W]``.
        residual: added to the result before it is rounded.
        head: the last convolution: frames in the stock layout, written to ``out`` if that is given.
    """
    x = channels_last(input)
    op = _HEAD if head and _HEAD in settings.ops else _CONV
    reason = unservable_conv(x, self.weight, self.bias, cache, residual)
    reach = self.kernel_size[0] - 1
    if pad_mode is None and reason is None and tuple(self.padding) != tuple(k // 2 for k in (1, *self.kernel_size[1:])):
        reason = "called with a padded clip"
    if reason is not None:
        fall_back(settings, op, reason)
        x = input if pad_mode is None else _padded(self, input, pad_mode, cache)
        return _written(_summed(CogVideoXSafeConv3d.forward(self, x), residual), head, out)
    past = None if cache is None else channels_last(cache)
    if pad_mode is None:
        past, x = (x[:, :reach], x[:, reach:]) if reach else (None, x)
    weight = conv_weight(self)
    options: dict[str, Any] = {"cache": past, "pad_mode": pad_mode or "first_frame", "impl": settings.impl}
    if op == _HEAD:
        direct = out is not None and out.dtype in (x.dtype, torch.uint8) and out.device == x.device
        frames = decode_head(x, weight, self.bias, clamp=False, out=out if direct else None, **options)
        assert isinstance(frames, Tensor)
        return frames if direct else _written(frames, True, out)
    other = None if residual is None else channels_last(residual)
    y = channels_first(causal_conv3d(x, weight, self.bias, stride=self.stride, residual=other, **options))
    # Who hands over the stock layout (callers of quant_conv) gets it back.
    return _written(y if pad_mode is not None or input.stride(1) == 1 else y.contiguous(), head, out)


def _padded(conv: nn.Conv3d, x: Tensor, pad_mode: str, cache: Tensor | None) -> Tensor:
    """A clip as the convolution inside a CogVideoXCausalConv3d gets it from the stock code."""
    kt, kh, kw = conv.kernel_size
    if pad_mode == "replicate":
        return F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0), mode="replicate")
    parts = [x] if cache is None else [cache, x]
    missing = kt - 1 - (0 if cache is None else cache.shape[2])
    return torch.cat([*[parts[0][:, :, :1]] * missing, *parts], 2)


def _summed(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else y + residual


def _written(y: Tensor, head: bool, out: Tensor | None) -> Tensor:
    if out is not None:
        return out.copy_(as_dtype(y, out.dtype))
    return y.contiguous() if head else y


def conv_forward(
    self: CogVideoXCausalConv3d,
    settings: Settings,
    inputs: Tensor,
    conv_cache: Tensor | None = None,
    residual: Tensor | None = None,
    head: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """CogVideoXCausalConv3d: ``(result, cache of the next call)``."""
    new = None
    mode = "replicate" if self.pad_mode == "replicate" else "first_frame"
    if mode == "replicate" or self.time_kernel_size == 1:
        conv_cache = None  # as the stock forward: what lies before is made of the clip itself, or is not seen
    else:
        past = None if conv_cache is None else channels_last(conv_cache)
        last = next_cache(channels_last(inputs), past, self.time_kernel_size - 1)
        new = None if last is None else channels_first(last)
    if ours(self.conv, CogVideoXSafeConv3d):
        return self.conv(inputs, mode, conv_cache, residual, head, out), new
    y = self.conv(_padded(self.conv, inputs, mode, conv_cache))
    return _written(_summed(y, residual), head, out), new


def _convolved(conv: Any, x: Tensor, old: Cache, new: Cache, key: str, **extra: Any) -> Tensor:
    """A causal convolution by the protocol of the caches; ``extra`` is for ours."""
    if ours(conv, CogVideoXCausalConv3d):
        y, new[key] = conv(x, old.get(key), **extra)
        return y  # type: ignore[no-any-return]
    y, new[key] = conv(x, conv_cache=old.get(key))
    return _written(_summed(y, extra.get("residual")), extra.get("head", False), extra.get("out"))


def image_conv_forward(self: nn.Conv2d, settings: Settings, input: Tensor, time_factor: int | None = None) -> Tensor:
    """The convolution of an upsampler: of a clip ``[B, C, T, h, w]`` that it enlarges itself, or as it is."""
    if time_factor is None:
        return nn.Conv2d.forward(self, input)
    first = input.shape[2] % 2 == 1
    clip = channels_last(input)
    reason = unservable_conv(clip, self.weight, self.bias)
    made, pays = (None, False) if reason is not None else upsample_weight(self, settings, time_factor)
    if pays:
        y = upsample_conv2d(
            clip,
            self.weight,
            self.bias,
            packed=made,
            time_factor=time_factor,
            first=first,
            impl=settings.impl,
        )
        return channels_first(y)
    if reason is not None:
        fall_back(settings, "upsample_conv2d", reason)
    x = nn.Conv2d.forward(self, F.interpolate(as_images(input), scale_factor=2.0))
    y = as_clip(x, input.shape[0])
    if time_factor == 2:
        y = y.repeat_interleave(2, 2)[:, :, int(first) :]
    return y


def upsample_forward(self: CogVideoXUpsample3D, settings: Settings, inputs: Tensor) -> Tensor:
    """CogVideoXUpsample3D: the convolution enlarges the clip, in time as well where that is compressed."""
    out: Tensor
    if ours(self.conv, nn.Conv2d) and not watched(self.conv):
        out = self.conv(inputs, 2 if self.compress_time else 1)
    else:
        out = CogVideoXUpsample3D.forward(self, inputs)
    return out


def downsample_forward(self: CogVideoXDownsample3D, settings: Settings, x: Tensor) -> Tensor:
    """CogVideoXDownsample3D on channels-last frames."""
    batch, clip = x.shape[0], channels_last(x)
    if self.compress_time:
        odd = clip.shape[1] % 2
        pairs = clip[:, odd:].unflatten(1, (-1, 2)).mean(2)
        clip = torch.cat([clip[:, :odd], pairs], 1) if odd else pairs
    images = F.pad(as_images(channels_first(clip)), (0, 1, 0, 1))
    return as_clip(self.conv(images), batch)


# Blocks ---------------------------------------------------------------------------------------------------------


def resnet_forward(
    self: CogVideoXResnetBlock3D,
    settings: Settings,
    inputs: Tensor,
    temb: Tensor | None = None,
    zq: Tensor | None = None,
    conv_cache: Cache | None = None,
) -> tuple[Tensor, Cache]:
    """CogVideoXResnetBlock3D, its activations in the norms and its sum in the second convolution."""
    old, new = conv_cache or {}, {}  # type: Cache, Cache
    x = _activated(self.norm1, self.nonlinearity, inputs, zq, old, new, "norm1")
    x = _convolved(self.conv1, x, old, new, "conv1")
    if temb is not None:
        x = x + self.temb_proj(self.nonlinearity(temb))[:, :, None, None, None]
    x = self.dropout(_activated(self.norm2, self.nonlinearity, x, zq, old, new, "norm2"))
    skip = inputs
    if self.in_channels != self.out_channels:
        if self.use_conv_shortcut:
            skip = _convolved(self.conv_shortcut, skip, old, new, "conv_shortcut")
        else:
            skip = self.conv_shortcut(skip)
    return _convolved(self.conv2, x, old, new, "conv2", residual=skip), new


def encoder_forward(
    self: CogVideoXEncoder3D,
    settings: Settings,
    sample: Tensor,
    temb: Tensor | None = None,
    conv_cache: Cache | None = None,
) -> tuple[Tensor, Cache]:
    """CogVideoXEncoder3D; leaves with the stock layout."""
    if checkpointed(self):
        out: tuple[Tensor, Cache] = CogVideoXEncoder3D.forward(self, sample, temb, conv_cache)
        return out
    old, new = conv_cache or {}, {}  # type: Cache, Cache
    x = _convolved(self.conv_in, channels_first(channels_last(sample)), old, new, "conv_in")
    for i, block in enumerate(self.down_blocks):
        key = f"down_block_{i}"
        x, new[key] = block(x, temb, None, old.get(key))
    x, new["mid_block"] = self.mid_block(x, temb, None, conv_cache=old.get("mid_block"))
    x = _activated(self.norm_out, self.conv_act, x, None, old, new, "norm_out")
    return _convolved(self.conv_out, x, old, new, "conv_out").contiguous(), new


def decoder_forward(
    self: CogVideoXDecoder3D,
    settings: Settings,
    sample: Tensor,
    temb: Tensor | None = None,
    conv_cache: Cache | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Cache]:
    """CogVideoXDecoder3D; leaves with the stock layout, or in ``out``."""
    if checkpointed(self):
        frames, cache = CogVideoXDecoder3D.forward(self, sample, temb, conv_cache)
        return _written(frames, True, out), cache
    old, new = conv_cache or {}, {}  # type: Cache, Cache
    zq = channels_first(channels_last(sample))
    x = _convolved(self.conv_in, zq, old, new, "conv_in")
    x, new["mid_block"] = self.mid_block(x, temb, zq, conv_cache=old.get("mid_block"))
    for i, block in enumerate(self.up_blocks):
        key = f"up_block_{i}"
        x, new[key] = block(x, temb, zq, conv_cache=old.get(key))
    x = _activated(self.norm_out, self.conv_act, x, zq, old, new, "norm_out")
    return _convolved(self.conv_out, x, old, new, "conv_out", head=True, out=out), new
