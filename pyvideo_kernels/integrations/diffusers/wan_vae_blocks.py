"""Wan's VAE: the forwards of blocks, which own no weights and hand each other what their ops share.

    conv_in -> z        mid: block, attention, block -> z       up: block -> z, block -> z, block, upsampler
                        ...                                     last up: block -> z, block -> z, block -> z -> conv_out

``-> z``: the convolution before it also wrote ``silu(norm(.))`` for the one after it, which travels in a `Relay` beside
the clip, so that hooks on a block see the clip alone. Where somebody watches a module in between, the norm is its own
pass again.
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
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    WanUpBlock,
    WanUpsample,
)
from torch import Tensor, nn

from ...ops.causal_conv3d import next_cache
from ...ops.vae_attention import vae_attention
from ..clips import as_clip, as_images, attention_impl, channels_first, channels_last, unservable
from ..packing import unhooked, watched
from ..swap import Settings, fall_back, ours
from .wan_vae_forwards import Frames, finished, fusable, interleaved

_ROWS = (WanMidBlock, WanUpBlock, WanResidualUpBlock, WanResidualDownBlock)


class Relay:
    """What a block is handed beside its clip, and hands on.

    ``normed``: ``silu(norm(x))`` of the norm it begins with, or None; afterwards that of ``norm``, which is what the
    next block begins with (None: nothing that could be handed over).
    """

    def __init__(self, normed: Tensor | None = None, norm: Any = None) -> None:
        self.normed = normed
        self.norm = norm


def _first_norm(block: Any) -> Any:
    """The norm that ``block`` begins with, if it can be handed that norm's result; else None."""
    for kind in _ROWS:
        if ours(block, kind):
            return _first_norm(block.resnets[0]) if unhooked(block) else None
    if ours(block, WanResidualBlock) and unhooked(block) and type(block.nonlinearity) is nn.SiLU:
        return block.norm1
    return None


def _run(block: Any, x: Tensor, cache: Any, index: Any, relay: Relay, norm: Any = None, **more: Any) -> Tensor:
    """``block(x)``, with ``relay`` handed to it if it takes one; ``norm`` is what the next one begins with."""
    if any(ours(block, kind) for kind in (WanResidualBlock, *_ROWS)) and unhooked(block):
        relay.norm = norm
        out: Tensor = block(x, feat_cache=cache, feat_idx=index, relay=relay, **more)
        return out
    relay.normed = None
    if cache is not None or more or type(block) in _ROWS:
        more |= {"feat_cache": cache, "feat_idx": index}
    out = block(x, **more)
    return out


def _run_row(blocks: Any, x: Tensor, cache: Any, index: Any, relay: Relay, norm: Any = None) -> Tensor:
    """Blocks one after another; ``norm`` follows the last."""
    following = [*blocks[1:], None]
    for block, after in zip(blocks, following, strict=True):
        x = _run(block, x, cache, index, relay, norm if after is None else _first_norm(after))
    return x


def _activated(norm: Any, activation: Any, x: Tensor) -> Tensor:
    """``activation(norm(x))`` in one op where both can be."""
    if ours(norm, WanRMS_norm) and type(activation) is nn.SiLU and not watched(norm):
        y: Tensor = norm(x, silu=True)
        return y
    y = activation(norm(x))
    return y


def _next_cache(x: Tensor, previous: Tensor | None) -> Tensor:
    """What the convolution of the next chunk looks back at: the last two frames of ``previous`` and ``x``."""
    before = None if previous is None else channels_last(previous.to(x.device))
    kept = next_cache(channels_last(x), before, CACHE_T)
    assert kept is not None
    return channels_first(kept)


def _cached(conv: Any, x: Tensor, cache: Any, index: Any) -> Tensor | None:
    """The stock cache protocol: read this convolution's slot, fill it, step on."""
    if cache is None:
        return None
    slot = index[0]
    previous: Tensor | None = cache[slot]
    cache[slot] = _next_cache(x, previous)
    index[0] += 1
    return previous


def _convolved(conv: Any, x: Tensor, cache: Any, index: Any, residual: Tensor | None = None) -> Tensor:
    """``conv(x) + residual``."""
    previous = _cached(conv, x, cache, index)
    if residual is None:
        out: Tensor = conv(x, previous)
    elif ours(conv, WanCausalConv3d):
        out = conv(x, previous, residual)
    else:
        out = conv(x, previous) + residual
    return out


def _convolved_and_normed(
    conv: Any, x: Tensor, cache: Any, index: Any, norm: Any, residual: Tensor | None = None, keep: bool = True
) -> tuple[Any, Tensor | None]:
    """``conv(x) + residual``, and its ``silu(norm(.))`` if the convolution can make it; else None."""
    if norm is None or not fusable(conv, norm):
        return _convolved(conv, x, cache, index, residual), None
    previous = _cached(conv, x, cache, index)
    y, z = conv(x, previous, residual, norm=norm, keep=keep)
    return y, z


def residual_forward(
    self: WanResidualBlock,
    settings: Settings,
    x: Tensor,
    feat_cache: Any = None,
    feat_idx: Any = None,
    relay: Relay | None = None,
) -> Tensor:
    """WanResidualBlock; the block's own sum and the norms are epilogues of its convolutions."""
    relay = Relay() if relay is None else relay
    shortcut = self.conv_shortcut(x)
    z = relay.normed
    if z is None:
        z = _activated(self.norm1, self.nonlinearity, x)
    norm2 = self.norm2 if type(self.nonlinearity) is nn.SiLU else None
    y, z = _convolved_and_normed(self.conv1, z, feat_cache, feat_idx, norm2, keep=False)
    if z is None:
        z = _activated(self.norm2, self.nonlinearity, y)
    z = self.dropout(z)
    y, relay.normed = _convolved_and_normed(self.conv2, z, feat_cache, feat_idx, relay.norm, shortcut)
    out: Tensor = y
    return out


def attention_forward(self: WanAttentionBlock, settings: Settings, x: Tensor) -> Tensor:
    """WanAttentionBlock; pixels are tokens in this layout, so nothing is transposed."""
    batch = x.shape[0]
    frames = as_images(x)
    height, width = frames.shape[2:]
    qkv = channels_last(self.to_qkv(self.norm(frames))).flatten(1, 2).unflatten(0, (batch, -1))
    query, key, value = qkv.chunk(3, dim=-1)  # [B, T, H * W, C]
    attended = _attended(settings, query, key, value).flatten(0, 1).unflatten(1, (height, width))
    out: Tensor = as_clip(self.proj(channels_first(attended)) + frames, batch)
    return out


def _attended(settings: Settings, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if "vae_attention" in settings.ops:
        reason = unservable(query)
        if reason is None:
            return vae_attention(query, key, value, impl=attention_impl(settings, query))
        fall_back(settings, "vae_attention", reason)
    return nn.functional.scaled_dot_product_attention(query, key, value)


def upsample_forward(self: WanUpsample, settings: Settings, x: Tensor) -> Tensor:
    """WanUpsample without its trip through float32: nearest neighbours are copies in any dtype."""
    if self.mode not in ("nearest", "nearest-exact"):
        out: Tensor = WanUpsample.forward(self, x)
    else:
        out = nn.Upsample.forward(self, x)
    return out


def resample_forward(
    self: WanResample,
    settings: Settings,
    x: Tensor,
    feat_cache: Any = None,
    feat_idx: Any = None,
    residual: Tensor | None = None,
) -> Tensor:
    """WanResample: time upsampling, then every frame resampled (plus ``residual``), then time downsampling."""
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
            if ours(self.time_conv, WanCausalConv3d) and not watched(self.time_conv):
                x = self.time_conv(x, previous, interleave=True)
            else:
                x = interleaved(self.time_conv(x, previous))
        feat_idx[0] += 1
    if _doubles(self.resample):
        x = self.resample[1](x, double=True, residual=residual)
        residual = None
    else:
        x = as_clip(self.resample(as_images(x)), batch)
    if self.mode == "downsample3d" and feat_cache is not None:
        index = feat_idx[0]
        previous = feat_cache[index]
        feat_cache[index] = channels_first(channels_last(x)[:, -1:].clone(memory_format=torch.contiguous_format))
        if previous is not None:
            previous = previous[:, :, -1:]
            if ours(self.time_conv, WanCausalConv3d):
                x = self.time_conv(x, lead=previous)
            else:
                frames = torch.cat([channels_last(previous.to(x.device)), channels_last(x)], 1)
                x = self.time_conv(channels_first(frames))
        feat_idx[0] += 1
    return x if residual is None else x + residual


def _doubles(resample: Any) -> bool:
    """Whether this is nearest 2× and a convolution that takes the small image."""
    if type(resample) is not nn.Sequential or len(resample) != 2 or not unhooked(resample):
        return False
    up, conv = resample[0], resample[1]
    return (
        type(up) is WanUpsample
        and up.mode in ("nearest", "nearest-exact")
        and up.size is None
        and up.scale_factor in (2.0, (2.0, 2.0))
        and unhooked(up)
        and ours(conv, nn.Conv2d)
        and not watched(conv)
    )


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
    """DupUp3D: channels repeated and unfolded into time and space, in one pass."""
    clip = channels_last(x)
    b, t, h, w, _ = clip.shape
    step, side, out = self.factor_t, self.factor_s, self.out_channels
    digits = None if self.factor % self.repeats else _digits(self.factor // self.repeats, (step, side, side))
    if digits is None:
        cells = clip.repeat_interleave(self.repeats, dim=-1).view(b, t, h, w, out, step, side, side)
        cells = cells.permute(0, 1, 5, 2, 6, 3, 7, 4)
    else:
        (i, p), (j, q), (k, r) = digits
        cells = clip.reshape(b, t, h, w, out, i, 1, j, 1, k, 1).expand(b, t, h, w, out, i, p, j, q, k, r)
        cells = cells.permute(0, 1, 5, 6, 2, 7, 8, 3, 9, 10, 4)
    unfolded = cells.reshape(b, t * step, h * side, w * side, out)
    return channels_first(unfolded[:, step - 1 :] if first_chunk else unfolded)


def _digits(channels: int, sizes: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """``(own, repeated)`` of each size: so many channels tell the first ones apart; None: they do not divide them."""
    out = []
    for size in sizes:
        own = min(channels, size)
        if channels % own or size % own:
            return None
        out.append((own, size // own))
        channels //= own
    return out if channels == 1 else None


def mid_forward(
    self: WanMidBlock,
    settings: Settings,
    x: Tensor,
    feat_cache: Any = None,
    feat_idx: Any = None,
    relay: Relay | None = None,
) -> Tensor:
    """WanMidBlock: block, then attention and block."""
    relay = Relay() if relay is None else relay
    after, resnets = relay.norm, list(self.resnets)
    x = _run(resnets[0], x, feat_cache, feat_idx, relay, after if len(resnets) == 1 else None)
    for attention, resnet in zip(self.attentions, resnets[1:], strict=True):
        if attention is not None:
            x = attention(x)
            relay.normed = None
        x = _run(resnet, x, feat_cache, feat_idx, relay, after if resnet is resnets[-1] else None)
    return x


def up_forward(
    self: WanUpBlock,
    settings: Settings,
    x: Tensor,
    feat_cache: Any = None,
    feat_idx: Any = None,
    first_chunk: Any = None,
    relay: Relay | None = None,
) -> Tensor:
    """WanUpBlock: blocks, then the upsampler."""
    relay = Relay() if relay is None else relay
    after = relay.norm if self.upsamplers is None else None
    x = _run_row(list(self.resnets), x, feat_cache, feat_idx, relay, after)
    if self.upsamplers is not None:
        relay.normed = None
        x = self.upsamplers[0](x, feat_cache=feat_cache, feat_idx=feat_idx)
    return x


def residual_up_forward(
    self: WanResidualUpBlock,
    settings: Settings,
    x: Tensor,
    feat_cache: Any = None,
    feat_idx: Any = None,
    first_chunk: bool = False,
    relay: Relay | None = None,
) -> Tensor:
    """WanResidualUpBlock: blocks, then the upsampler, whose convolution adds the repeated input."""
    relay = Relay() if relay is None else relay
    before = x
    after = relay.norm if self.upsampler is None and self.avg_shortcut is None else None
    x = _run_row(list(self.resnets), x, feat_cache, feat_idx, relay, after)
    if after is None:
        relay.normed = None
    shortcut = None if self.avg_shortcut is None else self.avg_shortcut(before, first_chunk=first_chunk)
    if self.upsampler is not None:
        if shortcut is not None and ours(self.upsampler, WanResample) and not watched(self.upsampler):
            out: Tensor = self.upsampler(x, feat_cache=feat_cache, feat_idx=feat_idx, residual=shortcut)
            return out
        x = self.upsampler(x, feat_cache=feat_cache, feat_idx=feat_idx)
    return x if shortcut is None else x + shortcut


def residual_down_forward(
    self: WanResidualDownBlock,
    settings: Settings,
    x: Tensor,
    feat_cache: Any = None,
    feat_idx: Any = None,
    relay: Relay | None = None,
) -> Tensor:
    """WanResidualDownBlock: blocks, then the downsampler, plus the averaged input."""
    relay = Relay() if relay is None else relay
    before = x
    x = _run_row(list(self.resnets), x, feat_cache, feat_idx, relay)
    relay.normed = None
    if self.downsampler is not None:
        x = self.downsampler(x, feat_cache=feat_cache, feat_idx=feat_idx)
    return x + self.avg_shortcut(before)


def _into_blocks(self: Any, x: Tensor, cache: Any, index: Any, first: Any) -> tuple[Tensor, Relay]:
    """``conv_in``, and what ``first`` begins with."""
    x = channels_first(channels_last(x))
    x, normed = _convolved_and_normed(self.conv_in, x, cache, index, _first_norm(first))
    return x, Relay(normed)


def _out_of_blocks(self: Any, x: Tensor, relay: Relay) -> Tensor:
    """What ``conv_out`` convolves."""
    return _activated(self.norm_out, self.nonlinearity, x) if relay.normed is None else relay.normed


def _last_norm(self: Any) -> Any:
    return self.norm_out if ours(self.norm_out, WanRMS_norm) and type(self.nonlinearity) is nn.SiLU else None


def encoder_forward(
    self: WanEncoder3d, settings: Settings, x: Tensor, feat_cache: Any = None, feat_idx: Any = None
) -> Tensor:
    """WanEncoder3d; leaves with the stock layout."""
    layers = list(self.down_blocks)
    x, relay = _into_blocks(self, x, feat_cache, feat_idx, [*layers, self.mid_block][0])
    x = _run_row(layers, x, feat_cache, feat_idx, relay, _first_norm(self.mid_block))
    x = _run(self.mid_block, x, feat_cache, feat_idx, relay, _last_norm(self))
    x = _out_of_blocks(self, x, relay)
    return _convolved(self.conv_out, x, feat_cache, feat_idx).contiguous()


def decoder_forward(
    self: WanDecoder3d,
    settings: Settings,
    x: Tensor,
    feat_cache: Any = None,
    feat_idx: Any = None,
    first_chunk: bool = False,
    frames: Frames | None = None,
) -> Tensor:
    """WanDecoder3d; leaves with the stock layout, or as the finished ``frames``."""
    x, relay = _into_blocks(self, x, feat_cache, feat_idx, self.mid_block)
    blocks = list(self.up_blocks)
    x = _run(self.mid_block, x, feat_cache, feat_idx, relay, _first_norm(blocks[0]))
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        norm = _last_norm(self) if after is None else _first_norm(after)
        x = _run(block, x, feat_cache, feat_idx, relay, norm, first_chunk=first_chunk)
    x = _out_of_blocks(self, x, relay)
    if frames is None:
        return _convolved(self.conv_out, x, feat_cache, feat_idx).contiguous()
    previous = _cached(self.conv_out, x, feat_cache, feat_idx)
    if ours(self.conv_out, WanCausalConv3d) and not watched(self.conv_out):
        out: Tensor = self.conv_out(x, previous, frames=frames)
        return out
    return finished(self.conv_out(x, previous), frames)
