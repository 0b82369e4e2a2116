"""LTX-Video's VAE: the forwards of blocks, encoder and decoder, which hand clips on (``ltx_vae_forwards.py``)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import (
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
from torch import Tensor, nn

from ..clips import channels_first, channels_last, checkpointed
from ..packing import watched
from ..swap import Settings, autocasting, ours
from .ltx_vae_clip import Clip
from .ltx_vae_forwards import Factor, finished, modulated, shuffled


def _activated(
    norm: Any, activation: Any, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """``activation(norm(x) * (1 + scale) + shift)`` of a channels-last clip, in one op where it can be."""
    if x.shape[1] == 0:
        return x
    fused = type(activation) is nn.SiLU
    y: Tensor = norm(x, scale, shift, fused) if ours(norm, RMSNorm) else modulated(norm(x), scale, shift)
    if not (fused and ours(norm, RMSNorm)):
        y = activation(y)
    return y


def _convolved(conv: Any, x: Tensor, clip: Clip | None, **extra: Any) -> Tensor:
    """An LTXVideoCausalConv3d of ours on a channels-last clip."""
    return channels_last(conv(channels_first(x), clip, **extra))


def _noise(scale: Tensor, x: Tensor, clip: Clip | None, key: Any) -> Tensor | None:
    """Noise ``[H, W, C]``: one image for all frames of a clip, drawn when the first of them are here; None before.

    Layers get their first frames in the order in which the stock code draws.
    """

    def draw() -> Tensor:
        # As the stock code, which draws in the dtype that its convolution gave.
        dtype = torch.get_autocast_dtype(x.device.type) if autocasting(x) else x.dtype
        return torch.randn(x.shape[2:4], device=x.device, dtype=dtype)[..., None] * scale.flatten()

    if x.shape[1] == 0 and not (clip is not None and clip.knows(key)):
        return None
    return draw() if clip is None else clip.once(key, draw)


def resnet_forward(
    self: LTXVideoResnetBlock3d,
    settings: Settings,
    inputs: Tensor,
    temb: Tensor | None = None,
    generator: torch.Generator | None = None,
    clip: Clip | None = None,
) -> Tensor:
    """LTXVideoResnetBlock3d; in a stream its skip path waits for the two convolutions."""
    convs = [self.conv1, self.conv2, *([] if self.conv_shortcut is None else [self.conv_shortcut])]
    if generator is not None or not all(ours(conv, LTXVideoCausalConv3d) for conv in convs):
        out: Tensor = LTXVideoResnetBlock3d.forward(self, inputs, temb, generator)
        return out
    shift_1 = scale_1 = shift_2 = scale_2 = None
    if self.scale_shift_table is not None:
        assert temb is not None
        shift_1, scale_1, shift_2, scale_2 = _rows(temb, self.scale_shift_table)
    skip = channels_last(inputs)
    noise = None
    x = _activated(self.norm1, self.nonlinearity, skip, scale_1, shift_1)
    if self.per_channel_scale1 is not None:
        noise = _noise(self.per_channel_scale1, x, clip, (self, 1))
        if noise is not None:  # a sum inside the convolution, which may give a frame more than it gets
            noise = noise.expand(x.shape[0], x.shape[1] + 1, -1, -1, -1)
    x = _convolved(self.conv1, x, clip, residual=noise)
    x = _activated(self.norm2, self.nonlinearity, x, scale_2, shift_2)
    x = channels_last(self.dropout(channels_first(x)))
    if self.norm3 is not None and skip.shape[1]:
        skip = self.norm3(skip)
    if self.conv_shortcut is not None:
        skip = _convolved(self.conv_shortcut, skip, clip)
    if clip is not None:
        skip = clip.delayed(self, skip)
    x = _convolved(self.conv2, x, clip, residual=skip)
    if clip is not None:
        clip.hold(self, skip, x.shape[1])
    if self.per_channel_scale2 is not None:
        noise = _noise(self.per_channel_scale2, x, clip, (self, 2))
        x = x if noise is None else x.add_(noise)
    return channels_first(x)


def _rows(temb: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    """The rows ``[B, C]`` of a modulation: those of the timestep and of the layer's table."""
    return (temb.flatten(1).unflatten(1, (table.shape[0], -1)) + table[None]).unbind(1)


def downsampler_forward(self: LTXVideoDownsampler3d, settings: Settings, hidden_states: Tensor) -> Tensor:
    """LTXVideoDownsampler3d: a convolution and the mean of what it folds, both folded into channels."""
    x = channels_last(hidden_states)
    x = torch.cat([x[:, : self.stride[0] - 1], x], 1)
    mean = _folded(x, self.stride).unflatten(-1, (-1, self.group_size)).mean(-1)
    return channels_first(_folded(channels_last(self.conv(channels_first(x))), self.stride) + mean)


def _folded(x: Tensor, stride: Factor) -> Tensor:
    """The inverse of `shuffled`."""
    st, sh, sw = stride
    cells = x.unflatten(3, (-1, sw)).unflatten(2, (-1, sh)).unflatten(1, (-1, st))
    return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)


def upsampler_forward(
    self: LTXVideoUpsampler3d, settings: Settings, hidden_states: Tensor, clip: Clip | None = None
) -> Tensor:
    """LTXVideoUpsampler3d: a convolution and pixel shuffle, and the shuffled input where the model adds it."""
    if not ours(self.conv, LTXVideoCausalConv3d):
        out: Tensor = LTXVideoUpsampler3d.forward(self, hidden_states)
        return out
    x = channels_last(hidden_states)
    y = _convolved(self.conv, x, clip, **({} if watched(self.conv) else {"shuffle": self.stride}))
    if watched(self.conv):
        y = shuffled(y, self.stride)
    ready = y.shape[1] // self.stride[0]
    if self.residual:
        held = x if clip is None else clip.delayed(self, x)
        if clip is not None:
            clip.hold(self, held, ready)
        if ready:
            # Copies of the shuffled input side by side in the channels: it is added to each of them.
            added = shuffled(held[:, :ready], self.stride)
            y = y.unflatten(-1, (-1, added.shape[-1])).add_(added.unsqueeze(-2)).flatten(-2)
    if ready and (clip is None or clip.first(self)):
        # The first frame of the clip comes out once; its earlier copies are dropped.
        y = y[:, self.stride[0] - 1 :]
    if clip is not None:
        clip.rate *= self.stride[0]
    return channels_first(y)


def _embedded(embedder: Any, temb: Tensor, x: Tensor, clip: Clip | None) -> Tensor:
    """What a time embedder makes of the timestep, ``[B, n]``; once a clip."""

    def embed() -> Tensor:
        rows: Tensor = embedder(
            timestep=temb.flatten(),
            resolution=None,
            aspect_ratio=None,
            batch_size=x.shape[0],
            hidden_dtype=x.dtype,
        )
        return rows.view(x.shape[0], -1)

    return embed() if clip is None else clip.once(embedder, embed)


def _through(layer: Any, x: Tensor, clip: Clip | None, *given: Any) -> Tensor:
    """A layer of ours on the next frames; any layer on a whole clip."""
    y: Tensor = layer(x, *given) if clip is None else layer(x, *given, clip=clip)
    return y


def mid_block_forward(
    self: LTXVideoMidBlock3d,
    settings: Settings,
    hidden_states: Tensor,
    temb: Tensor | None = None,
    generator: torch.Generator | None = None,
    clip: Clip | None = None,
) -> Tensor:
    """LTXVideoMidBlock3d, handing on the clip."""
    x = hidden_states
    if checkpointed(self):
        out: Tensor = LTXVideoMidBlock3d.forward(self, x, temb, generator)
        return out
    if self.time_embedder is not None:
        assert temb is not None
        temb = _embedded(self.time_embedder, temb, x, clip)[..., None, None, None]
    for resnet in self.resnets:
        x = _through(resnet, x, clip, temb, generator)
    return x


def up_block_forward(
    self: LTXVideoUpBlock3d,
    settings: Settings,
    hidden_states: Tensor,
    temb: Tensor | None = None,
    generator: torch.Generator | None = None,
    clip: Clip | None = None,
) -> Tensor:
    """LTXVideoUpBlock3d, handing on the clip."""
    x = hidden_states
    if checkpointed(self):
        out: Tensor = LTXVideoUpBlock3d.forward(self, x, temb, generator)
        return out
    if self.conv_in is not None:
        x = _through(self.conv_in, x, clip, temb, generator)
    if self.time_embedder is not None:
        assert temb is not None
        temb = _embedded(self.time_embedder, temb, x, clip)[..., None, None, None]
    for upsampler in self.upsamplers or ():
        x = _through(upsampler, x, clip)
    for resnet in self.resnets:
        x = _through(resnet, x, clip, temb, generator)
    return x


def encoder_forward(self: LTXVideoEncoder3d, settings: Settings, hidden_states: Tensor) -> Tensor:
    """LTXVideoEncoder3d; leaves with the stock layout."""
    if checkpointed(self) or not ours(self.conv_out, LTXVideoCausalConv3d):
        out: Tensor = LTXVideoEncoder3d.forward(self, hidden_states)
        return out
    pt, p = self.patch_size_t, self.patch_size
    cells = hidden_states.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, pt))
    # [B, C, T, pt, H, ph, W, pw]: the column inside a patch comes before the row.
    x = channels_first(cells.permute(0, 2, 4, 6, 1, 3, 7, 5).flatten(4))
    x = self.conv_in(x)
    for block in self.down_blocks:
        x = block(x)
    x = self.mid_block(x)
    y = _activated(self.norm_out, self.conv_act, channels_last(x))
    x = self.conv_out(channels_first(y))
    # The last channel is the log variance of all the others.
    return torch.cat([x, x[:, -1:].expand(-1, x.shape[1] - 2, -1, -1, -1)], 1).contiguous()


def decoder_forward(
    self: LTXVideoDecoder3d,
    settings: Settings,
    hidden_states: Tensor,
    temb: Tensor | None = None,
    clip: Clip | None = None,
) -> Tensor:
    """LTXVideoDecoder3d over a whole clip, or over its next latents; leaves with the stock layout."""
    if checkpointed(self) or not ours(self.conv_out, LTXVideoCausalConv3d):
        out: Tensor = LTXVideoDecoder3d.forward(self, hidden_states, temb)
        return out
    x = _through(self.conv_in, channels_first(channels_last(hidden_states)), clip)
    if self.timestep_scale_multiplier is not None:
        assert temb is not None
        temb = temb * self.timestep_scale_multiplier
    x = _through(self.mid_block, x, clip, temb)
    for block in self.up_blocks:
        x = _through(block, x, clip, temb)
    y, scale, shift = channels_last(x), None, None
    if self.time_embedder is not None:
        assert temb is not None and self.scale_shift_table is not None
        shift, scale = _rows(_embedded(self.time_embedder, temb, y, clip), self.scale_shift_table)
    y = _activated(self.norm_out, self.conv_act, y, scale, shift)
    patch = (self.patch_size_t, self.patch_size, self.patch_size)
    x = channels_first(y)
    frames: Tensor
    if watched(self.conv_out):
        frames = finished(self.conv_out(x, clip), patch=patch)
    else:
        frames = self.conv_out(x, clip, patch=patch)
    return frames.contiguous()
