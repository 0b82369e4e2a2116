"""Wan's transformer: the forwards that replace diffusers' own (``wan.py`` says where).

A block reads and writes the residual stream once per branch:

    n = norm1(x; scale, shift)                                        layer_norm_modulate
    a = attn1(n)            projections are module calls; inside: qk_norm_rope, then the model's attention
    x, n = norm2(x + a * gate)                                        gate_residual_norm_modulate
    x, n = norm3(x + attn2(n); scale, shift)                          gate_residual_norm_modulate
    x = x + ffn(n) * gate                                             gate_residual

Each function takes ``(module, settings, ...)`` and stands in for the forward of that module's class. Called as the
class is, it returns what the class returns; the extra arguments come from the functions in this file alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformer3DModel,
    WanTransformerBlock,
    _get_added_kv_projections,
    _get_qkv_projections,
)
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ...ops.final_layer import final_layer
from ...ops.gate_residual import gate_residual
from ...ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from ...ops.layer_norm_modulate import layer_norm_modulate
from ...ops.patch_embed3d import patch_embed3d
from ...ops.qk_norm_rope import qk_norm_rope
from ...ops.rms_norm import rms_norm
from ...ops.spacetime_attention import spacetime_attention
from ..swap import Settings, autocasting, fall_back, ours, why_not

# The text encoder's context length, which the stock processor hardcodes to tell image tokens from text tokens.
_TEXT_TOKENS = 512


# Norms: they own their weights, so the fused ops run in their forwards -----------------------------------------


def norm_forward(
    self: FP32LayerNorm,
    settings: Settings,
    inputs: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
) -> Any:
    """LayerNorm, then modulation if ``scale`` is given; with ``branch``, ``(x, normed)`` of x = inputs + branch * gate."""
    reason = why_not(inputs, self.weight, self.bias)
    if branch is None:
        return _modulated(self, settings, inputs, scale, shift, reason)
    if "gate_residual_norm_modulate" in settings.ops:
        if reason is None:
            return gate_residual_norm_modulate(
                inputs, branch, gate, scale, shift, weight=self.weight, bias=self.bias, eps=self.eps, impl=settings.impl
            )
        fall_back(settings, "gate_residual_norm_modulate", reason)
        x = _stock_residual(inputs, branch, gate)
        return x, _stock_norm(self, x, scale, shift)
    x = _residual(settings, inputs, branch, gate)
    return x, _modulated(self, settings, x, scale, shift, reason)


def _modulated(
    norm: FP32LayerNorm, settings: Settings, x: Tensor, scale: Tensor | None, shift: Tensor | None, reason: str | None
) -> Tensor:
    if "layer_norm_modulate" in settings.ops:
        if reason is None:
            return layer_norm_modulate(
                x, scale, shift, weight=norm.weight, bias=norm.bias, eps=norm.eps, impl=settings.impl
            )
        fall_back(settings, "layer_norm_modulate", reason)
    return _stock_norm(norm, x, scale, shift)


def _stock_norm(norm: FP32LayerNorm, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    y = FP32LayerNorm.forward(norm, x.float())
    if scale is not None:
        y = y * (1 + scale) + shift
    return y.type_as(x)


def _residual(settings: Settings, x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    if "gate_residual" in settings.ops:
        reason = why_not(x)
        if reason is None:
            return gate_residual(x, branch, gate, impl=settings.impl)
        fall_back(settings, "gate_residual", reason)
    return _stock_residual(x, branch, gate)


def _stock_residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + branch if gate is None else (x.float() + branch * gate).type_as(x)


def _normalise(
    norm: Any,
    settings: Settings,
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``norm(x)`` and its modulation, fused where the norm is ours."""
    if ours(norm, FP32LayerNorm):
        out: Tensor = norm(x, scale, shift)
        return out
    y = norm(x.float())
    if scale is not None:
        y = y * (1 + scale) + shift
    return y.type_as(x)


def _add_and_normalise(
    norm: Any,
    settings: Settings,
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``x + branch * gate`` and its norm; the norm may be an Identity or somebody else's module."""
    if ours(norm, FP32LayerNorm):
        x, y = norm(x, scale, shift, branch, gate)
        return x, y
    x = _residual(settings, x, branch, gate)
    return x, _normalise(norm, settings, x, scale, shift)


def rms_forward(
    self: nn.RMSNorm,
    settings: Settings,
    inputs: Tensor,
    rotate: Callable[..., Any] | None = None,
    query: Tensor | None = None,
    query_weight: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
    heads: int = 0,
) -> Any:
    """RMSNorm; with ``rotate`` or ``query``, the two halves of a joint norm and rotation of q and k.

    The op reads two weights that two modules own, and hooks may hold each in memory only during its owner's forward.
    So norm_q hands its weight on to norm_k from within its own forward, and norm_k runs the op.
    """
    if rotate is not None:
        return rotate(inputs, self.weight)
    if query is not None and rotary_emb is not None:
        q, k = qk_norm_rope(
            query.unflatten(2, (heads, -1)),
            inputs.unflatten(2, (heads, -1)),
            query_weight,
            self.weight,
            *rotary_emb,
            eps=_eps(self, inputs),
            impl=settings.impl,
        )
        return q, k
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
    context = encoder_hidden_states
    image = None
    if self.add_k_proj is not None and context is not None:
        image_tokens = context.shape[1] - _TEXT_TOKENS
        image, context = context[:, :image_tokens], context[:, image_tokens:]
    query, key, value = _get_qkv_projections(self, hidden_states, context)
    query, key = _normed(self, settings, query, key, rotary_emb)
    value = value.unflatten(2, (self.heads, -1))

    image_out = None
    if image is not None:
        image_key, image_value = _get_added_kv_projections(self, image)
        image_key = self.norm_added_k(image_key).unflatten(2, (self.heads, -1))
        image_value = image_value.unflatten(2, (self.heads, -1))
        image_out = _attend(processor, query, image_key, image_value, None, None)

    if encoder_hidden_states is None and _dense(settings, query, key, value, attention_mask, grid, processor):
        assert grid is not None
        attended = spacetime_attention(query, key, value, grid=grid, impl=settings.impl)
        out = attended.flatten(2, 3).type_as(query)
    else:
        parallel = processor._parallel_config if encoder_hidden_states is None else None
        out = _attend(processor, query, key, value, attention_mask, parallel)
    if image_out is not None:
        out = out + image_out
    out = self.to_out[0](out)
    out = self.to_out[1](out)
    return out


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
            joint = functools.partial(_through_key_norm, attn.norm_k, key, rotary_emb, heads)
            q, k = attn.norm_q(query, joint)
            return q, k
        fall_back(settings, "qk_norm_rope", reason)
    query = attn.norm_q(query).unflatten(2, (heads, -1))
    key = attn.norm_k(key).unflatten(2, (heads, -1))
    if rotary_emb is not None:
        query, key = _stock_rotate(query, *rotary_emb), _stock_rotate(key, *rotary_emb)
    return query, key


def _through_key_norm(
    norm_k: Any, key: Tensor, rotary_emb: tuple[Tensor, Tensor], heads: int, query: Tensor, query_weight: Tensor | None
) -> Any:
    return norm_k(key, None, query, query_weight, rotary_emb, heads)


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


def _dense(
    settings: Settings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    grid: tuple[int, int, int] | None,
    processor: Any,
) -> bool:
    """Whether this self-attention runs through spacetime_attention."""
    if settings.attention is None or "spacetime_attention" not in settings.ops:
        return False
    reason = why_not(query) or why_not(value)
    if mask is not None:
        reason = f"{str(mask.dtype).removeprefix('torch.')} attention mask"
    elif processor._parallel_config is not None:
        reason = "context parallelism"
    elif grid is None:
        reason = "called outside the accelerated transformer, which knows the grid"
    elif grid[0] * grid[1] * grid[2] != query.shape[1]:
        reason = "the sequence is not the whole grid"
    elif value.dtype != query.dtype or key.dtype != query.dtype:
        reason = "q, k and v of different dtypes"
    elif torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        reason = "gradients are wanted and the op has no backward"
    if reason is not None:
        fall_back(settings, "spacetime_attention", reason)
    return reason is None


# Block and transformer ------------------------------------------------------------------------------------------


def block_forward(
    self: WanTransformerBlock,
    settings: Settings,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor],
    grid: tuple[int, int, int] | None = None,
) -> Tensor:
    """WanTransformerBlock; modulation stays fp32, and each op rounds once to the dtype of the residual stream."""
    if temb.ndim == 4:  # one modulation a token (TI2V): [B, S, 6, D]
        table = self.scale_shift_table.unsqueeze(0) + temb.float()
        shift, scale, gate, c_shift, c_scale, c_gate = (part.squeeze(2) for part in table.chunk(6, dim=2))
    else:
        shift, scale, gate, c_shift, c_scale, c_gate = (self.scale_shift_table + temb.float()).chunk(6, dim=1)

    x = hidden_states
    normed = _normalise(self.norm1, settings, x, scale, shift)
    if ours(self.attn1, WanAttention) and grid is not None:
        branch = self.attn1(normed, None, None, rotary_emb, grid)
    else:
        branch = self.attn1(normed, None, None, rotary_emb)
    x, normed = _add_and_normalise(self.norm2, settings, x, branch, gate)
    branch = self.attn2(normed, encoder_hidden_states, None, None)
    x, normed = _add_and_normalise(self.norm3, settings, x, branch, None, c_scale, c_shift)
    return _residual(settings, x, self.ffn(normed), c_gate)


def patch_forward(self: nn.Conv3d, settings: Settings, inputs: Tensor, tokens: bool = False) -> Tensor:
    """The patch embedding; ``tokens=True`` returns ``[B, S, D]`` instead of a convolution's output."""
    if not tokens:
        return nn.Conv3d.forward(self, inputs)
    reason = why_not(inputs, self.weight, self.bias)
    if reason is None and autocasting(inputs):
        reason = "autocast chooses the dtype of the projection"
    elif reason is None and inputs.dtype != self.weight.dtype:
        reason = "weight and activation of different dtypes"
    elif reason is None and any(size % p for size, p in zip(inputs.shape[2:], self.kernel_size, strict=True)):
        reason = "video is no multiple of the patch"
    if reason is None:
        return patch_embed3d(inputs, self.weight, self.bias, impl=settings.impl)
    fall_back(settings, "patch_embed3d", reason)
    return _as_tokens(nn.Conv3d.forward(self, inputs))


def _as_tokens(video: Tensor) -> Tensor:
    return video.flatten(2).transpose(1, 2).contiguous()


def proj_forward(
    self: nn.Linear,
    settings: Settings,
    inputs: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    grid: tuple[int, int, int] | None = None,
    patch: tuple[int, int, int] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The output projection; with the rest: norm and modulation before it and unpatchify after it, a video."""
    if scale is None or shift is None or grid is None or patch is None:
        return nn.Linear.forward(self, inputs)
    reason = why_not(inputs, self.weight, self.bias)
    if reason is None and autocasting(inputs):
        reason = "autocast chooses the dtype of the projection"
    elif reason is None and inputs.dtype != self.weight.dtype:
        reason = "weight and activation of different dtypes"
    if reason is None:
        return final_layer(
            inputs, scale, shift, self.weight, self.bias, grid, patch, eps=eps, impl=settings.impl
        )
    fall_back(settings, "final_layer", reason)
    normed = nn.functional.layer_norm(inputs.float(), inputs.shape[-1:], None, None, eps)
    normed = (normed * (1 + scale) + shift).type_as(inputs)
    return _unpatchify(nn.Linear.forward(self, normed), grid, patch)


def _unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    video = tokens.reshape(tokens.shape[0], *grid, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return video.flatten(6, 7).flatten(4, 5).flatten(2, 3)


@apply_lora_scale("attention_kwargs")
def transformer_forward(
    self: WanTransformer3DModel,
    settings: Settings,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """WanTransformer3DModel: tokens come from patch_embed3d and become a video again in final_layer."""
    patch = tuple(self.config.patch_size)
    frames, height, width = hidden_states.shape[2:]
    grid = (frames // patch[0], height // patch[1], width // patch[2])
    rotary_emb = self.rope(hidden_states)

    if "patch_embed3d" in settings.ops and ours(self.patch_embedding, nn.Conv3d):
        x = self.patch_embedding(hidden_states, True)
    else:
        x = _as_tokens(self.patch_embedding(hidden_states))

    per_token = timestep.shape[1] if timestep.ndim == 2 else None  # TI2V: one timestep a token
    temb, modulation, context, image = self.condition_embedder(
        timestep.flatten(), encoder_hidden_states, encoder_hidden_states_image, timestep_seq_len=per_token
    )
    modulation = modulation.unflatten(1 if per_token is None else 2, (6, -1))
    if image is not None:
        context = torch.concat([image, context], dim=1)

    wants_grid = settings.attention is not None
    checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
    for block in self.blocks:
        arguments = (x, context, modulation, rotary_emb)
        if wants_grid and ours(block, WanTransformerBlock):
            arguments = (*arguments, grid)
        x = self._gradient_checkpointing_func(block, *arguments) if checkpointing else block(*arguments)

    video = _last(self, settings, x, temb, grid, patch)
    return Transformer2DModelOutput(sample=video) if return_dict else (video,)


def _last(
    self: WanTransformer3DModel,
    settings: Settings,
    x: Tensor,
    temb: Tensor,
    grid: tuple[int, int, int],
    patch: tuple[int, int, int],
) -> Tensor:
    table = self.scale_shift_table.to(temb.device)
    if temb.ndim == 3:
        shift, scale = (part.squeeze(2) for part in (table.unsqueeze(0) + temb.unsqueeze(2)).chunk(2, dim=2))
    else:
        shift, scale = (table + temb.unsqueeze(1)).chunk(2, dim=1)
    # The last block may be on another device than the conditioning, where a device map splits the model.
    shift, scale = shift.to(x.device), scale.to(x.device)
    norm = self.norm_out
    if "final_layer" in settings.ops:
        reason = None
        if not ours(self.proj_out, nn.Linear):
            reason = f"proj_out is a {type(self.proj_out).__name__} that is not swapped"
        elif type(norm) is not FP32LayerNorm or norm.weight is not None:
            reason = "norm_out is not a plain norm"
        elif norm._forward_hooks or norm._forward_pre_hooks or self.proj_out._forward_hooks:
            reason = "somebody's forward hooks look at norm_out or proj_out"
        elif x.shape[1] != grid[0] * grid[1] * grid[2]:
            reason = "the sequence is not the whole grid"  # context parallelism gathers it after proj_out
        if reason is None:
            video: Tensor = self.proj_out(x, scale, shift, grid, patch, norm.eps)
            return video
        fall_back(settings, "final_layer", reason)
    return _unpatchify(self.proj_out(_normalise(norm, settings, x, scale, shift)), grid, patch)
