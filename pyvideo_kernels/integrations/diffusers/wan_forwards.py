"""Wan's transformer: the forwards that replace diffusers' own (``wan.py`` says where).

A block reads and writes the residual stream once per branch:

    n = norm1(x; scale, shift)                                        layer_norm_modulate
    a = attn1(n)            projections are module calls; inside: qk_norm_rope, then the model's attention
    x, n = norm2(x + a * gate)                                        gate_residual_norm_modulate
    x, n = norm3(x + attn2(n); scale, shift)                          gate_residual_norm_modulate
    x = x + ffn(n) * gate                  linear_gelu in its first half; gate_residual

Each function takes ``(module, settings, ...)`` and stands in for the forward of that module's class. Called as the
class is, it returns what the class returns; the extra arguments come from the functions in this file alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanImageEmbedding,
    WanTransformer3DModel,
    WanTransformerBlock,
)
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ...attention_choice import DENSE, LayerAttention
from ...ops.final_layer import final_layer
from ...ops.gate_residual import gate_residual
from ...ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from ...ops.layer_norm_modulate import layer_norm_modulate
from ...ops.linear_gelu import linear_gelu
from ...ops.patch_embed3d import patch_embed3d
from ..packing import watched
from ..swap import MARK, Settings, autocasting, fall_back, ours, saw, why_not
from ..text_cache import by_rows, once

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
    """LayerNorm and, if ``scale`` is given, modulation; with ``branch``, of x = inputs + branch * gate, after x."""
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


def _normalise(norm: Any, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
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
    return x, _normalise(norm, x, scale, shift)


# Feed-forward: the activation asks the projection, which owns the weights, for its result ----------------------


def gelu_forward(self: GELU, settings: Settings, hidden_states: Tensor) -> Tensor:
    """diffusers' GELU, which is a projection and then GELU."""
    proj = self.proj
    reason = None
    if not ours(proj, nn.Linear):
        reason = f"proj is a {type(proj).__name__} that is not swapped"
    elif watched(proj):
        reason = "somebody's hooks look at proj"
    if reason is None:
        out: Tensor = proj(hidden_states, self.approximate)
        return out
    fall_back(settings, "linear_gelu", reason)
    return self.gelu(proj(hidden_states))


def gelu_proj_forward(self: nn.Linear, settings: Settings, inputs: Tensor, approximate: str | None = None) -> Tensor:
    """The projection; with ``approximate``: GELU of it."""
    if approximate is None:
        return nn.Linear.forward(self, inputs)
    reason = _odd_projection(self, inputs)
    if reason is None:
        return linear_gelu(inputs, self.weight, self.bias, approximate=approximate, impl=settings.impl)
    fall_back(settings, "linear_gelu", reason)
    return nn.functional.gelu(nn.Linear.forward(self, inputs), approximate=approximate)


def _odd_projection(module: nn.Linear | nn.Conv3d, inputs: Tensor) -> str | None:
    """Why a projection cannot run in an op of ours, or None."""
    reason = why_not(inputs, module.weight, module.bias)
    if reason is None and autocasting(inputs):
        reason = "autocast chooses the dtype of the projection"
    elif reason is None and inputs.dtype != module.weight.dtype:
        reason = "weight and activation of different dtypes"
    elif reason is None and module.weight.shape[-1] > 1 and module.weight.stride(-1) != 1:
        reason = "weight with a strided last dimension"
    return reason


# Block and transformer ------------------------------------------------------------------------------------------


def block_forward(
    self: WanTransformerBlock,
    settings: Settings,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor],
    grid: tuple[int, int, int] | None = None,
    layer: LayerAttention | None = None,
) -> Tensor:
    """WanTransformerBlock; modulation stays fp32, and each op rounds once to the dtype of the residual stream."""
    if temb.ndim == 4:  # one modulation a token (TI2V): [B, S, 6, D]
        table = self.scale_shift_table.unsqueeze(0) + temb.float()
        shift, scale, gate, c_shift, c_scale, c_gate = (part.squeeze(2) for part in table.chunk(6, dim=2))
    else:
        shift, scale, gate, c_shift, c_scale, c_gate = (self.scale_shift_table + temb.float()).chunk(6, dim=1)

    x = hidden_states
    normed = _normalise(self.norm1, x, scale, shift)
    if ours(self.attn1, WanAttention) and grid is not None:
        branch = self.attn1(normed, None, None, rotary_emb, grid, layer)
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
    reason = _odd_projection(self, inputs)
    if reason is None and any(size % p for size, p in zip(inputs.shape[2:], self.kernel_size, strict=True)):
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
    reason = _odd_projection(self, inputs)
    if reason is None:
        return final_layer(inputs, scale, shift, self.weight, self.bias, grid, patch, eps=eps, impl=settings.impl)
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
        joined = once(self, (image, context), (), functools.partial(torch.concat, [image, context], dim=1))
        context = by_rows(joined, context)

    choice = settings.attention
    dense_step = choice is not None and _in_dense_step(self, settings)
    if choice is not None:
        saw(settings, grid)
    checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
    for index, block in enumerate(self.blocks):
        arguments: tuple[Any, ...] = (x, context, modulation, rotary_emb)
        if choice is not None and ours(block, WanTransformerBlock):
            arguments = (*arguments, grid, DENSE if dense_step else choice.layer(index))
        x = self._gradient_checkpointing_func(block, *arguments) if checkpointing else block(*arguments)

    video = _last(self, settings, x, temb, grid, patch)
    return Transformer2DModelOutput(sample=video) if return_dict else (video,)


def text_forward(self: PixArtAlphaTextProjection, settings: Settings, caption: Tensor) -> Tensor:
    """The projection of the prompt, kept while a loop says that the prompt stays."""
    made = once(self, (caption,), (self,), functools.partial(PixArtAlphaTextProjection.forward, self, caption))
    return by_rows(made, caption)


def image_forward(self: WanImageEmbedding, settings: Settings, encoder_hidden_states_image: Tensor) -> Tensor:
    """The projection of the picture's embedding, kept as the prompt's is."""
    image = encoder_hidden_states_image
    return once(self, (image,), (self,), functools.partial(WanImageEmbedding.forward, self, image))


def _in_dense_step(self: WanTransformer3DModel, settings: Settings) -> bool:
    """Whether every block is dense in this call; if nobody said which step it is, yes: that changes no film."""
    choice = settings.attention
    if choice is None or choice.dense_steps == 0:
        return False
    dense: bool | None = getattr(self, MARK).dense_step
    if dense is None:
        fall_back(settings, choice.base.op, "dense, as no denoising step is known: call the model in its cache_context")
        return True
    return dense


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
    return _unpatchify(self.proj_out(_normalise(norm, x, scale, shift)), grid, patch)
