"""LTX-Video's VAE: the forwards of norms and convolutions (``ltx_vae.py`` says where; blocks: ``ltx_vae_blocks.py``).

A clip lies channels-last between modules (``clips.py``). A residual block is

    y = conv1(norm1(x, scale, shift, silu)) + noise                   pixel_norm_silu, causal_conv3d
    x = conv2(norm2(y, scale, shift, silu), residual=x)               pixel_norm_silu, causal_conv3d

The decoder's convolutions see one frame ahead, the first and last frame of the clip being repeated. Over a whole clip
that is a causal convolution whose past is the first frame and which gives one frame more at its end; over a clip in
pieces it is a delay line, whose state is a `Clip` (``ltx_vae_clip.py``): a forward that is given one takes the next
frames of that clip and returns those that are ready, possibly none.

Each function takes ``(module, settings, ...)`` and stands in for the forward of that module's class. Called as the
class is, it returns what the class returns; the extra arguments come from the functions of these two files alone, and
where one would change the shape that a module returns, only if nobody watches that module.
"""

from __future__ import annotations

from typing import Any, cast

from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoCausalConv3d
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from ...ops.causal_conv3d import causal_conv3d
from ...ops.decode_head import decode_head
from ...ops.pixel_norm_silu import pixel_norm_silu
from ..clips import channels_first, channels_last, unservable, unservable_conv
from ..packing import conv_weight, watched
from ..swap import Settings, fall_back, ours
from .ltx_vae_clip import Clip, Window

Factor = tuple[int, int, int]
_HEAD = "decode_head_"


def norm_forward(
    self: RMSNorm,
    settings: Settings,
    hidden_states: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """The norm over the last dimension; ``scale`` and ``shift`` ``[B, C]`` and ``silu`` are what follows it."""
    x = hidden_states
    reason = unservable(x, scale, shift)
    if reason is None:
        return pixel_norm_silu(x, scale=scale, shift=shift, eps=self.eps, silu=silu, impl=settings.impl)
    fall_back(settings, "pixel_norm_silu", reason)
    x = modulated(RMSNorm.forward(self, x), scale, shift)
    return nn.functional.silu(x) if silu else x


def modulated(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None or shift is None:
        return x
    return x * (1 + scale[:, None, None, None]) + shift[:, None, None, None]


def kernel_forward(
    self: nn.Conv3d,
    settings: Settings,
    input: Tensor,
    window: Window | None = None,
    residual: Tensor | None = None,
    shuffle: Factor | None = None,
    patch: Factor | None = None,
) -> Tensor:
    """The convolution inside an LTXVideoCausalConv3d.

    Args:
        input: frames ``[B, C, T, H, W]``; without ``window`` they are padded in time already.
        window: the frames before ``input``, and how many frames to look past its end.
        residual: ``[B, T, H, W, O]``, added before the result is rounded.
        shuffle: factors (t, h, w) of a pixel shuffle of the result.
        patch: of the decoder's last convolution: what a position becomes; frames ``[B, c, T, H, W]`` are returned.
    """
    x = channels_last(input)
    op = _HEAD if patch is not None and _HEAD in settings.ops else "causal_conv3d"
    reason = unservable_conv(x, self.weight, self.bias, residual)
    if reason is not None:
        fall_back(settings, op, reason)
        if window is not None:
            x = window.padded(x, self.kernel_size[0] - 1)
        return finished(nn.Conv3d.forward(self, channels_first(x)), residual, shuffle, patch)
    if window is None:
        reach = self.kernel_size[0] - 1  # the past is the head of padded frames
        window, x = Window(x[:, :reach] if reach else None), x[:, reach:]
    options: dict[str, Any] = {"cache": window.cache, "pad_mode": "first_frame", "pad_end": window.pad_end}
    options["impl"] = settings.impl
    weight = conv_weight(self)
    if op == _HEAD:
        frames: Any = decode_head(x, weight, self.bias, patch=patch or (1, 1, 1), clamp=False, **options)
        return cast(Tensor, frames)
    if shuffle is not None:
        options |= {"epilogue": "pixel_shuffle", "factor": shuffle}
    y = causal_conv3d(x, weight, self.bias, stride=self.stride, residual=residual, **options)
    return channels_first(y) if patch is None else _unpatched(channels_first(y), patch)


def finished(
    y: Tensor, residual: Tensor | None = None, shuffle: Factor | None = None, patch: Factor | None = None
) -> Tensor:
    """What a convolution of ours does after the products, to the result of another one."""
    if shuffle is not None:
        y = channels_first(shuffled(channels_last(y), shuffle))
    if residual is not None:
        y = y + channels_first(residual)
    return y if patch is None else _unpatched(y, patch)


def conv_forward(
    self: LTXVideoCausalConv3d,
    settings: Settings,
    hidden_states: Tensor,
    clip: Clip | None = None,
    residual: Tensor | None = None,
    shuffle: Factor | None = None,
    patch: Factor | None = None,
) -> Tensor:
    """The convolution over a whole clip, or over its next frames.

    ``residual`` may be longer than the result: the frames that are ready take its first ones.
    """
    x = channels_last(hidden_states)
    conv: Any = self.conv
    ahead = 0 if self.is_causal else (self.kernel_size[0] - 1) // 2
    if self.kernel_size[0] == 1:
        window = Window()
    elif clip is None:
        window, x = Window.whole(x, ahead)
    else:
        window, x = clip.window(self, x, ahead)
    ready = x.shape[1] + window.pad_end
    if ready == 0:
        b, _, h, w, _ = x.shape
        ft, fh, fw = shuffle or patch or (1, 1, 1)
        return channels_first(x.new_empty(b, 0, h * fh, w * fw, self.out_channels // (ft * fh * fw)))
    if residual is not None:
        residual = residual[:, :ready]
    if ours(conv, nn.Conv3d) and not (watched(conv) and (shuffle or patch)):
        y: Tensor = conv(channels_first(x), window, residual, shuffle, patch)
        return y
    x = window.padded(x, self.kernel_size[0] - 1)
    return finished(conv(channels_first(x)), residual, shuffle, patch)


def shuffled(y: Tensor, factor: Factor) -> Tensor:
    """Channels ``((c*ft + i)*fh + j)*fw + k`` of a channels-last clip as sub-pixels (i, j, k)."""
    cells = y.unflatten(-1, (-1, *factor))  # [B, T, H, W, C, ft, fh, fw]
    return cells.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def _unpatched(y: Tensor, patch: Factor) -> Tensor:
    """The end of LTXVideoDecoder3d: channels ``((c*pt + i)*pw + k)*ph + j`` as sub-pixels (i, j, k)."""
    pt, ph, pw = patch
    cells = y.unflatten(1, (-1, pt, pw, ph))  # [B, C, pt, pw, ph, T, H, W]
    return cells.permute(0, 1, 5, 2, 6, 4, 7, 3).flatten(6, 7).flatten(4, 5).flatten(2, 3)
