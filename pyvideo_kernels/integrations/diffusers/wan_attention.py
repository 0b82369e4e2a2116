"""Wan's attention: the forwards of its q and k norms and of WanAttention itself (``wan.py`` says where)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    _get_added_kv_projections,
    _get_qkv_projections,
)
from torch import Tensor, nn

from ...attention_choice import LayerAttention
from ...ops.int8_attention import fp8_attention, int8_attention
from ...ops.qk_norm_rope import qk_norm_rope
from ...ops.qk_norm_rope_int8 import qk_norm_rope_int8
from ...ops.qk_norm_rope_means import qk_norm_rope_means
from ...ops.rms_norm import rms_norm
from ...ops.spacetime_attention import spacetime_attention
from ...ops.video_sparse_attention import video_sparse_attention
from ...schemas import OPS
from ..swap import Settings, fall_back, ours, why_not
from ..text_cache import once, shortened

# The text encoder's context length, which the stock processor hardcodes to tell image tokens from text tokens.
_TEXT_TOKENS = 512


def rms_forward(
    self: nn.RMSNorm,
    settings: Settings,
    inputs: Tensor,
    rotate: Callable[..., Any] | None = None,
    query: Tensor | None = None,
    query_weight: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
    heads: int = 0,
    prologue: functools.partial[Any] | None = None,
) -> Any:
    """RMSNorm; with ``rotate`` or ``query``, the two halves of a joint norm and rotation of q and k.

    The op reads two weights that two modules own, and hooks may hold each in memory only during its owner's forward.
    So norm_q hands its weight on to norm_k from within its own forward, and norm_k runs the op. A ``prologue``
    is the op in place of ``qk_norm_rope``: the one which writes codes and scales, or means of tiles too.
    """
    if rotate is not None:
        return rotate(inputs, self.weight)
    if query is not None and rotary_emb is not None:
        out: Any = (prologue or qk_norm_rope)(
            query.unflatten(2, (heads, -1)),
            inputs.unflatten(2, (heads, -1)),
            query_weight,
            self.weight,
            *rotary_emb,
            eps=_eps(self, inputs),
            impl=settings.impl,
        )
        return out
    if "rms_norm" in settings.ops:
        reason = why_not(inputs, self.weight)
        if reason is None:
            return rms_norm(inputs, self.weight, eps=_eps(self, inputs), impl=settings.impl)
        fall_back(settings, "rms_norm", reason)
    return nn.RMSNorm.forward(self, inputs)


def _eps(norm: nn.RMSNorm, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps


# Attention ------------------------------------------------------------------------------------------------------


def attention_forward(
    self: WanAttention,
    settings: Settings,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
    grid: tuple[int, int, int] | None = None,
    layer: LayerAttention | None = None,
    **kwargs: Any,
) -> Tensor:
    """WanAttention with the stock processor's arithmetic; any other processor is called as it is."""
    processor = self.processor
    if type(processor) is not WanAttnProcessor or kwargs:
        what = f"processor {type(processor).__name__}" if not kwargs else "extra keyword arguments"
        fall_back(settings, "qk_norm_rope", what)
        out: Tensor = WanAttention.forward(
            self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs
        )
        return out
    if encoder_hidden_states is not None:
        return cross_attention_forward(self, settings, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
    query, key, value = _get_qkv_projections(self, hidden_states, None)
    value = value.unflatten(2, (self.heads, -1))
    if layer is not None and layer.prologue is not None:
        attended = _by_prologue(self, settings, layer, query, key, value, attention_mask, rotary_emb, grid)
        if attended is not None:
            return self.to_out[1](self.to_out[0](attended))  # type: ignore[no-any-return]
    query, key = _normed(self, settings, query, key, rotary_emb)

    if _serves(settings, layer, query, key, value, attention_mask, grid, processor):
        assert grid is not None and layer is not None
        out = _ours(layer, query, key, value, grid, settings.impl).flatten(2, 3)
    else:
        out = _attend(processor, query, key, value, attention_mask, processor._parallel_config)
    return self.to_out[1](self.to_out[0](out))  # type: ignore[no-any-return]


def cross_attention_forward(
    self: WanAttention,
    settings: Settings,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """WanAttention to a prompt, by the stock processor's arithmetic; `text_cache` may keep its keys and values.

    Anything else goes to the class's own forward.
    """
    text = encoder_hidden_states
    if type(self.processor) is not WanAttnProcessor or text is None or rotary_emb is not None or kwargs:
        out: Tensor = WanAttention.forward(
            self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs
        )
        return out
    # A mask, or another backend, is of this call: it wants every row of the text.
    short = attention_mask is None and _native(self.processor)
    made = once(self, (text,), _text_layers(self), functools.partial(_text_keys, self, text, short), kind=int(short))
    query = self.norm_q(self.to_q(hidden_states)).unflatten(2, (self.heads, -1))
    image_out = None
    if made.image_key is not None and made.image_value is not None:
        image_out = _attend(self.processor, query, made.image_key, made.image_value, None, None)
    out = _attend(self.processor, query, made.key, made.value, attention_mask if made.mask is None else made.mask, None)
    if image_out is not None:
        out = out + image_out
    out = self.to_out[0](out)
    return self.to_out[1](out)  # type: ignore[no-any-return]


class _TextKeys(NamedTuple):
    """Normalised keys and values of a prompt, what to add to its scores, and the same of the picture before it."""

    key: Tensor
    value: Tensor
    mask: Tensor | None
    image_key: Tensor | None = None
    image_value: Tensor | None = None


def _text_keys(attn: WanAttention, text: Tensor, may_shorten: bool) -> _TextKeys:
    start = 0 if attn.add_k_proj is None else text.shape[1] - _TEXT_TOKENS
    rows, mask = shortened(text, start) if may_shorten else (text.shape[1] - start, None)
    own = text[:, start : start + rows]
    key, value = attn.to_kv(own).chunk(2, dim=-1) if attn.fused_projections else (attn.to_k(own), attn.to_v(own))
    heads = (attn.heads, -1)
    out = _TextKeys(attn.norm_k(key).unflatten(2, heads), value.unflatten(2, heads), mask)
    if attn.add_k_proj is None:
        return out
    key, value = _get_added_kv_projections(attn, text[:, :start])
    return out._replace(image_key=attn.norm_added_k(key).unflatten(2, heads), image_value=value.unflatten(2, heads))


def _native(processor: Any) -> bool:
    """Whether attention is torch's own, which takes a mask; others of diffusers' backends drop it."""
    backend = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    return AttentionBackendName(backend) is AttentionBackendName.NATIVE


def _text_layers(attn: WanAttention) -> tuple[Any, ...]:
    """The layers that `_text_keys` calls."""
    fused = attn.fused_projections
    layers = (attn.to_kv, attn.norm_k) if fused else (attn.to_k, attn.to_v, attn.norm_k)
    if attn.add_k_proj is None:
        return layers
    added = (attn.to_added_kv,) if fused else (attn.add_k_proj, attn.add_v_proj)
    return (*layers, *added, attn.norm_added_k)


def _attend(processor: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parallel: Any) -> Tensor:
    out: Tensor = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=0.0,
        is_causal=False,
        backend=processor._attention_backend,
        parallel_config=parallel,
    )
    return out.flatten(2, 3).type_as(query)


def _normed(
    attn: WanAttention, settings: Settings, query: Tensor, key: Tensor, rotary_emb: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Normalised, rotated q and k as ``[B, S, heads, head_dim]``."""
    heads = attn.heads
    if rotary_emb is not None and "qk_norm_rope" in settings.ops:
        reason = _why_not_joint(attn, query, key)
        if reason is None:
            joint = functools.partial(_through_key_norm, attn.norm_k, key, rotary_emb, heads, None)
            q, k = attn.norm_q(query, joint)
            return q, k
        fall_back(settings, "qk_norm_rope", reason)
    query = attn.norm_q(query).unflatten(2, (heads, -1))
    key = attn.norm_k(key).unflatten(2, (heads, -1))
    if rotary_emb is not None:
        query, key = _stock_rotate(query, *rotary_emb), _stock_rotate(key, *rotary_emb)
    return query, key


def _through_key_norm(
    norm_k: Any,
    key: Tensor,
    rotary_emb: tuple[Tensor, Tensor],
    heads: int,
    prologue: Any,
    query: Tensor,
    query_weight: Tensor | None,
) -> Any:
    return norm_k(key, None, query, query_weight, rotary_emb, heads, prologue)


def _by_prologue(
    attn: WanAttention,
    settings: Settings,
    layer: LayerAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rotary_emb: tuple[Tensor, Tensor] | None,
    grid: tuple[int, int, int] | None,
) -> Tensor | None:
    """Attention on what its prologue writes: codes, q and k never stored in their own precision; or means of tiles.

    None where something stands in the way; what it is, the other path counts.
    """
    if rotary_emb is None or layer.prologue not in settings.ops or _why_not_joint(attn, query, key) is not None:
        return None
    if _why_not_ours(layer, query, key, value, mask, grid, attn.processor) is not None:
        return None
    assert grid is not None
    if torch.is_grad_enabled() and any(_trains(norm) for norm in (attn.norm_q, attn.norm_k)):
        return None
    if layer.tiled:
        prologue: Any = functools.partial(qk_norm_rope_means, grid=grid, tile=layer.tile)
    else:
        prologue = functools.partial(qk_norm_rope_int8, precision=layer.precision)
    joint = functools.partial(_through_key_norm, attn.norm_k, key, rotary_emb, attn.heads, prologue)
    if layer.tiled:
        q, k, q_mean, k_mean = attn.norm_q(query, joint)
        return _ours(layer, q, k, value, grid, settings.impl, q_mean=q_mean, k_mean=k_mean).flatten(2, 3)
    q8, k8, q_scale, k_scale, _ = attn.norm_q(query, joint)
    window, stride = layer.window_on(grid)
    attend = int8_attention if layer.precision == "int8" else fp8_attention
    out: Any = attend(q8, k8, value, q_scale, k_scale, grid=grid, window=window, stride=stride, impl=settings.impl)
    attended: Tensor = out.flatten(2, 3)
    return attended


def _trains(norm: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in norm.parameters())


def _why_not_joint(attn: WanAttention, query: Tensor, key: Tensor) -> str | None:
    for norm in (attn.norm_q, attn.norm_k):
        if not ours(norm, nn.RMSNorm):
            return f"norm_q or norm_k is a {type(norm).__name__} that is not swapped"
        # The weights themselves may be offloaded until their owner's forward: only their kind is looked at here.
        if norm.weight is not None and type(norm.weight) is not nn.Parameter:
            return f"weight is a {type(norm.weight).__name__}"
    if attn.norm_q.eps != attn.norm_k.eps:
        return "norm_q and norm_k have different eps"
    if key.dtype != query.dtype:
        return "q and k of different dtypes"
    return why_not(query) or why_not(key)


def _stock_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out.type_as(x)


def _ours(
    layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int, int], impl: str,
    **means: Any,
) -> Tensor:  # fmt: skip
    """The attention of ``layer`` through our ops; ``means`` of the tiles, where something made them."""
    out: Any
    if not layer.tiled:
        window, stride = layer.window_on(grid)
        out = spacetime_attention(
            query, key, value, grid=grid, window=window, stride=stride, precision=layer.precision, impl=impl
        )
    elif layer.share is not None:
        out = video_sparse_attention(
            query, key, value, grid=grid, tile=layer.tile, select="threshold", share=layer.share, impl=impl, **means
        )
    else:
        out = video_sparse_attention(
            query, key, value, grid=grid, tile=layer.tile, top_k=layer.top_k_on(grid), impl=impl, **means
        )
    attended: Tensor = out
    return attended


def _serves(
    settings: Settings,
    layer: LayerAttention | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    grid: tuple[int, int, int] | None,
    processor: Any,
) -> bool:
    """Whether this self-attention runs through our ops."""
    choice = settings.attention
    if choice is None:
        return False
    layer = layer or choice.base
    reason = _why_not_ours(layer, query, key, value, mask, grid, processor)
    if reason is not None:
        fall_back(settings, layer.op, reason)
    return reason is None


def _why_not_ours(
    layer: LayerAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    grid: tuple[int, int, int] | None,
    processor: Any,
) -> str | None:
    if mask is not None:
        return f"{str(mask.dtype).removeprefix('torch.')} attention mask"
    if processor._parallel_config is not None:
        return "context parallelism"
    if grid is None:
        return "called outside the accelerated transformer, which knows the grid"
    if grid[0] * grid[1] * grid[2] != query.shape[1]:
        return "the sequence is not the whole grid"
    if value.dtype != query.dtype or key.dtype != query.dtype:
        return "q, k and v of different dtypes"
    if (
        not OPS[layer.op].differentiable
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
    ):
        return "gradients are wanted and the op has no backward"
    return why_not(query) or why_not(value)
