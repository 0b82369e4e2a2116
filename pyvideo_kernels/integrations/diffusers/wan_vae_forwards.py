"""Wan's VAE: the forwards of the modules that own weights (``wan_vae.py`` says where; blocks: ``wan_vae_blocks.py``).

A clip lies channels-last between modules (``clips.py``). A residual block, of three passes over memory beside its
convolutions' own:

    h = conv_shortcut(x)
    y = conv1(z, cache, norm=norm2)                 causal_conv3d, its epilogue silu(norm2(.)); z = silu(norm1(x))
    x, z = conv2(y, cache, residual=h, norm=next)   causal_conv3d, and what the next block begins with

The caches are the stock ones (``feat_cache`` and ``feat_idx``: None, "Rep" or the last frames), handed to the
convolution as they are instead of being concatenated and padded, and views of its input where that holds no more than
twice their frames.

Each function takes ``(module, settings, ...)`` and stands in for the forward of that module's class. Called as the
class is, it returns what the class returns; the extra arguments come from the functions of these two files alone, and
where one would change what a module returns, only if nobody watches that module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch import Tensor, nn

from ...nn.vae_stream import as_dtype
from ...ops.causal_conv3d import causal_conv3d
from ...ops.decode_head import decode_head
from ...ops.rms_norm_silu import rms_norm_silu
from ...ops.upsample_conv2d import upsample_conv2d
from ..clips import as_clip, as_images, channels_first, channels_last, unservable, unservable_conv
from ..packing import conv_weight, unhooked, upsample_weight
from ..swap import Settings, fall_back, ours

# The stock norm divides by F.normalize's default smallest norm.
EPS = 1e-12


@dataclass
class Frames:
    """Where the decoder's frames go: into ``out`` ``[B, C, T, H, W]``, or a new tensor; unpatchified, and clamped
    unless they are a tile's, which is blended first."""

    patch: int
    out: Tensor | None = None
    clamp: bool = True


def norm_forward(self: WanRMS_norm, settings: Settings, x: Tensor, silu: bool = False) -> Tensor:
    """The channel norm of a clip or image; with ``silu`` the activation after it."""
    pixels = channels_last(x) if self.channel_first else x
    reason = unservable(pixels, self.gamma)
    if reason is None and isinstance(self.bias, Tensor):
        reason = "the norm has a bias"
    if reason is None:
        y = rms_norm_silu(pixels, self.gamma.flatten(), eps=EPS, silu=silu, impl=settings.impl)
        return channels_first(y) if self.channel_first else y
    fall_back(settings, "rms_norm_silu", reason)
    y = WanRMS_norm.forward(self, x)
    return nn.functional.silu(y) if silu else y


def fusable(conv: Any, norm: Any) -> bool:
    """Whether the result of ``conv`` can be normalised in it: nobody would see either module's own output."""
    return (
        ours(conv, WanCausalConv3d)
        and ours(norm, WanRMS_norm)
        and unhooked(conv)
        and unhooked(norm)
        and not isinstance(norm.bias, Tensor)
        and norm.channel_first
        and norm.gamma.numel() == conv.out_channels
    )


def conv_forward(
    self: WanCausalConv3d,
    settings: Settings,
    x: Tensor,
    cache_x: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    lead: Tensor | None = None,
    interleave: bool = False,
    norm: Any = None,
    keep: bool = True,
    frames: Frames | None = None,
) -> Any:
    """The causal convolution, its past read from ``cache_x``; ``residual`` is added before the result is rounded.

    Args:
        lead: the frame before ``x``, for a convolution without padding in time; without it, ``x`` begins with it.
        interleave: the halves of the channels become the even and the odd frames.
        norm: a norm that is ours: ``(y, silu(norm(y)))`` is returned; without ``keep`` y is not.
        frames: the convolution is the decoder's last: its frames are returned.
    """
    clip = channels_last(x)
    reason = unservable_conv(clip, self.weight, self.bias)
    past = self._padding[4]
    if cache_x is not None and past == 0:
        cache_x = None  # as the stock forward: nothing to pad, nothing to look back at
    if reason is None and cache_x is not None and (cache_x.shape[2] > past or cache_x.dtype != x.dtype):
        reason = "the cache is longer than the kernel looks back, or of another dtype"
    head = frames is not None and "decode_head_" in settings.ops
    if reason is not None or not (head or "causal_conv3d" in settings.ops):
        return _stock_conv(self, settings, reason, x, cache_x, residual, lead, interleave, norm, frames)
    cache = None if cache_x is None else channels_last(cache_x.to(x.device))
    if past == 0 and self.kernel_size[0] > 1:
        cache, clip = _split(clip, lead, self.kernel_size[0] - 1)
    weight = conv_weight(self)
    if head and frames is not None:
        out = frames.out
        direct = out is not None and out.dtype in (x.dtype, torch.uint8) and out.device == x.device
        patch = (1, frames.patch, frames.patch)
        made: Any = decode_head(
            clip, weight, self.bias, cache=cache, patch=patch, clamp=frames.clamp, out=out if direct else None,
            impl=settings.impl,
        )  # fmt: skip
        return made if direct or out is None else out.copy_(as_dtype(made, out.dtype))
    fused = norm is not None and unservable(clip, norm.gamma) is None
    epilogue: Any = "rms_norm_silu" if fused else "interleave" if interleave else None
    made = causal_conv3d(
        clip,
        weight,
        self.bias,
        cache=cache,
        stride=self.stride,
        residual=None if residual is None else channels_last(residual),
        epilogue=epilogue,
        norm_weight=norm.gamma.flatten() if fused else None,
        norm_eps=EPS,
        keep=keep or not fused,
        impl=settings.impl,
    )
    if fused:
        return channels_first(made[0]) if keep else None, channels_first(made[1])
    y = channels_first(made)
    if norm is not None:
        return y, norm(y, silu=True)
    if frames is not None:
        return finished(y, frames)
    # Who hands over the stock layout (callers of quant_conv) gets it back.
    return y if x.stride(1) == 1 else y.contiguous()


def _split(clip: Tensor, lead: Tensor | None, past: int) -> tuple[Tensor, Tensor]:
    """``(cache, clip)`` of a convolution without padding in time: its past is the head of what it is given."""
    if lead is None:
        return clip[:, :past], clip[:, past:]
    before = channels_last(lead.to(clip.device))
    more = past - before.shape[1]
    return torch.cat([before, clip[:, :more]], 1), clip[:, more:]


def _stock_conv(
    self: WanCausalConv3d,
    settings: Settings,
    reason: str | None,
    x: Tensor,
    cache_x: Tensor | None,
    residual: Tensor | None,
    lead: Tensor | None,
    interleave: bool,
    norm: Any,
    frames: Frames | None,
) -> Any:
    """What `conv_forward` returns, by the stock code."""
    if reason is not None:
        fall_back(settings, "causal_conv3d", reason)
    if lead is not None:
        x = torch.cat([lead.to(x.device), x], 2)
    y = WanCausalConv3d.forward(self, x, cache_x)
    if residual is not None:
        y = y + residual
    if interleave:
        y = interleaved(y)
    if norm is not None:
        return y, norm(y, silu=True)
    return y if frames is None else finished(y, frames)


def conv2d_forward(
    self: nn.Conv2d, settings: Settings, input: Tensor, double: bool = False, residual: Tensor | None = None
) -> Tensor:
    """The convolution of images; with ``double`` that of a clip whose pixels are repeated 2×2, plus ``residual``."""
    if not double:
        return nn.Conv2d.forward(self, input)
    clip = channels_last(input)
    reason = unservable_conv(clip, self.weight, self.bias)
    made, pays = (None, False) if reason is not None else upsample_weight(self, settings)
    if pays:
        return channels_first(
            upsample_conv2d(
                clip,
                self.weight,
                self.bias,
                packed=made,
                residual=None if residual is None else channels_last(residual),
                impl=settings.impl,
            )
        )
    if reason is not None:
        fall_back(settings, "upsample_conv2d", reason)
    images = nn.functional.interpolate(as_images(input), scale_factor=2.0, mode="nearest-exact")
    y = as_clip(nn.Conv2d.forward(self, images), input.shape[0])
    return y if residual is None else y + residual


def interleaved(x: Tensor) -> Tensor:
    """``[B, 2C, T, H, W]`` as ``[B, C, 2T, H, W]``: the halves of the channels are the even and the odd frames."""
    halves = channels_last(x).unflatten(-1, (2, -1))  # [B, T, H, W, 2, C]
    return channels_first(halves.permute(0, 1, 4, 2, 3, 5).flatten(1, 2))


def finished(x: Tensor, frames: Frames) -> Tensor:
    """``unpatchify`` and clamp of the decoder's output, in one pass into ``frames.out`` where that can be."""
    patch, out = frames.patch, frames.out
    if patch > 1:
        # [B, c * p * p, T, h, w] -> [B, c, T, h, p, w, p]: the second factor of the channels is the column.
        x = x.unflatten(1, (-1, patch, patch)).permute(0, 1, 4, 5, 3, 6, 2)
    if out is None:
        x = x.clamp(-1, 1) if frames.clamp else x
        return x.flatten(5, 6).flatten(3, 4) if patch > 1 else x.contiguous()
    into = out if patch == 1 else out.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    if out.dtype == x.dtype and out.device == x.device and not torch.compiler.is_compiling():
        torch.clamp(x, -1, 1, out=into)
    else:
        into.copy_(as_dtype(x.clamp(-1, 1), out.dtype))
    return out
