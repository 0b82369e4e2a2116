"""Wan's transformer: which modules are swapped, by what, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanImageEmbedding,
    WanTransformer3DModel,
    WanTransformerBlock,
)
from torch import nn

from ...attention_choice import PREPARES, LayerAttention
from ...errors import ValueOptionError
from ..swap import Left, Plan, Settings, Swap, obstacle
from . import steps
from . import wan_attention as attention
from . import wan_forwards as forwards

_HOME = "diffusers.models.transformers.transformer_wan"
SOURCES = {
    f"{_HOME}:_get_qkv_projections": {"657bbdb508a6c612": "0.42.1"},
    f"{_HOME}:_get_added_kv_projections": {"93d1cc08f37ffd7a": "0.42.1"},
    f"{_HOME}:WanAttnProcessor": {"422e95da65cbd7b4": "0.42.1"},
    f"{_HOME}:WanAttention": {"6f04ae64178b6c43": "0.42.1"},
    f"{_HOME}:WanRotaryPosEmbed": {"6977dbee4ff117d4": "0.42.1"},
    f"{_HOME}:WanTransformerBlock": {"699a27c6d2f6e75e": "0.42.1"},
    f"{_HOME}:WanTransformer3DModel": {"f68ae8c75725eab8": "0.42.1"},
    "diffusers.models.activations:GELU": {"532b42315ab1bf38": "0.42.1"},
    "diffusers.models.normalization:FP32LayerNorm": {"9cb0de44bf6c460a": "0.42.1"},
}


def plan(model: nn.Module, path: str, settings: Settings) -> Plan:
    """What accelerate() does with a WanTransformer3DModel that is called ``path`` in its pipeline."""
    planner = _Planner(path, settings)
    planner.transformer(model)
    return planner.result


class _Planner:
    def __init__(self, root: str, settings: Settings) -> None:
        self.root = root
        self.settings = settings
        self.result = Plan()
        self.remembers = False

    def _path(self, inner: str) -> str:
        return ".".join(part for part in (self.root, inner) if part)

    def swap(
        self,
        inner: str,
        module: nn.Module,
        kind: type,
        forward: Callable[..., Any],
        ops: tuple[str, ...],
        *,
        serves: tuple[str, ...] = (),
        note: str = "",
        unfit: str | None = None,
        **more: Any,
    ) -> bool:
        """Plan a swap for those of ``ops`` (run in it) and ``serves`` (run in its children) that were asked for."""
        asked = self.settings.ops
        runs = tuple(op for op in ops if op in asked)
        wanted = runs + tuple(op for op in serves if op in asked)
        if not wanted:
            return False
        reason = unfit
        if type(module) is not kind:
            home = type(module).__module__.partition(".")[0]
            reason = f"it is a {home} {type(module).__name__}, not a plain {kind.__name__}"
        reason = reason or _odd_weight(module) or obstacle(module)
        if reason is not None:
            self.result.left += [Left(self._path(inner), op, reason) for op in wanted]
            return False
        self.result.swaps.append(Swap(self._path(inner), module, forward, runs, note, **more))
        return True

    def keep(self, inner: str, reason: str) -> None:
        self.result.kept.append((self._path(inner), reason))

    def transformer(self, model: Any) -> None:
        self.check_attention(model)
        serves = ("patch_embed3d", "final_layer", *self.attention_ops)
        note = "asks patch_embedding for tokens and proj_out for a video"
        choice = self.settings.attention
        methods = {"cache_context": steps.cache_context} if choice is not None and choice.dense_steps != 0 else {}
        kind, forward = WanTransformer3DModel, forwards.transformer_forward
        self.remembers = self.swap("", model, kind, forward, (), serves=serves, note=note, methods=methods)
        if self.remembers:
            conv = model.patch_embedding
            unfit = _odd_conv(conv)
            self.swap("patch_embedding", conv, nn.Conv3d, forwards.patch_forward, ("patch_embed3d",), unfit=unfit)
            unfit = None if model.norm_out.weight is None else "norm_out has weights of its own"
            note = "norm_out runs inside it"
            self.swap(
                "proj_out", model.proj_out, nn.Linear, forwards.proj_forward, ("final_layer",), unfit=unfit, note=note
            )
        self.norm("norm_out", model.norm_out, "layer_norm_modulate", note="where proj_out cannot run final_layer")
        for index, block in enumerate(model.blocks):
            self.block(f"blocks.{index}", block, None if choice is None else choice.layer(index))
        embedder = model.condition_embedder
        self.remember("condition_embedder.text_embedder", embedder.text_embedder, PixArtAlphaTextProjection,
                      forwards.text_forward)  # fmt: skip
        image = embedder.image_embedder
        if image is not None:
            self.remember("condition_embedder.image_embedder", image, WanImageEmbedding, forwards.image_forward)
            self.feed_forward("condition_embedder.image_embedder.ff", image.ff)
            for name in ("norm1", "norm2"):
                self.norm(f"condition_embedder.image_embedder.{name}", getattr(image, name), "layer_norm_modulate")
        self.keep("blocks.*.ffn", "its second GEMM and the attention's projections stay module calls")
        if choice is None:
            self.keep("blocks.*.attn1", "the attention itself runs on the model's own backend (attention=None)")
        self.keep("blocks.*.attn2", "the cross-attention itself runs on the model's own backend")

    def remember(self, inner: str, module: Any, kind: Any, forward: Callable[..., Any]) -> None:
        """Swap a module that runs no op of ours for one that `text_cache` serves; where it cannot be, nothing is lost.

        Only below a transformer that is swapped: it hands the kept tensors on.
        """
        fits = type(module) is kind and _odd_weight(module) is None and obstacle(module) is None
        if self.remembers and fits:
            self.result.swaps.append(Swap(self._path(inner), module, forward, (), "keeps what it makes of a prompt"))

    def check_attention(self, model: Any) -> None:
        """Refuse exceptions for blocks that are not there, and windows for another number of heads."""
        choice = self.settings.attention
        if choice is None:
            return
        where = f"accelerate: `attention`{self.root and f' of {self.root}'}"
        reason = choice.unfit(len(model.blocks), model.config.num_attention_heads)
        if reason is not None:
            raise ValueOptionError(f"{where}: {reason}")

    @property
    def attention_ops(self) -> tuple[str, ...]:
        return () if self.settings.attention is None else self.settings.attention.ops()

    def norm(self, inner: str, module: nn.Module, *ops: str, note: str = "") -> None:
        self.swap(inner, module, FP32LayerNorm, forwards.norm_forward, ops, note=note)

    def block(self, inner: str, block: Any, layer: LayerAttention | None) -> None:
        fused = "gate_residual_norm_modulate"
        ops = () if layer is None or self.settings.attention is None else self.settings.attention.ops_of(layer)
        serves = ("layer_norm_modulate", fused, *ops)
        note = "hands modulation, branch and gate to its norms"
        kind, forward = WanTransformerBlock, forwards.block_forward
        if self.swap(inner, block, kind, forward, ("gate_residual",), serves=serves, note=note):
            self.norm(f"{inner}.norm1", block.norm1, "layer_norm_modulate")
            # Two separate ops where the fused one was not asked for.
            norms = (fused,) if fused in self.settings.ops else ("gate_residual", "layer_norm_modulate")
            for name in ("norm2", "norm3"):
                module = getattr(block, name)
                if type(module) is not nn.Identity:
                    self.norm(f"{inner}.{name}", module, *norms)
        self.feed_forward(f"{inner}.ffn", block.ffn)
        self.attention(f"{inner}.attn1", block.attn1, ops, layer, rotated=True)
        self.attention(f"{inner}.attn2", block.attn2, rotated=False)

    def feed_forward(self, inner: str, ffn: Any) -> None:
        """The first half: the GELU module, and the projection in it, which owns the weights."""
        plain = type(ffn) is FeedForward
        act, path = (ffn.net[0], f"{inner}.net.0") if plain else (ffn, inner)
        ops = ("linear_gelu",)
        if self.swap(path, act, GELU, forwards.gelu_forward, (), serves=ops, note="hands GELU to its proj"):
            self.swap(f"{path}.proj", act.proj, nn.Linear, forwards.gelu_proj_forward, ops)

    def attention(
        self, inner: str, attn: Any, ops: tuple[str, ...] = (), layer: LayerAttention | None = None, *, rotated: bool
    ) -> None:
        norms = ("qk_norm_rope",) if rotated else ("rms_norm",)
        prologue = None if layer is None else layer.prologue
        if prologue in self.settings.ops and all(type(norm) is nn.RMSNorm for norm in (attn.norm_q, attn.norm_k)):
            # It quantises, or takes means, too, so nothing else does; in dense steps q and k are what they are.
            ops = tuple(op for op in ops if op != PREPARES[str(prologue)])
            norms = (str(prologue), *(norms if "spacetime_attention" in ops else ()))
        if rotated:
            processor = getattr(attn, "processor", None)
            unfit = None
            if type(processor) is not WanAttnProcessor:
                unfit = f"its processor is a {type(processor).__name__}, not the stock WanAttnProcessor"
            note = "hands the rotary tables to norm_q and norm_k"
            kind, forward = WanAttention, attention.attention_forward
            serves = ("qk_norm_rope",)
            self.swap(inner, attn, kind, forward, ops, serves=serves, note=note, unfit=unfit, attention=layer)
        elif type(getattr(attn, "processor", None)) is WanAttnProcessor:
            self.remember(inner, attn, WanAttention, attention.cross_attention_forward)
        for name in ("norm_q", "norm_k", "norm_added_k"):
            if hasattr(attn, name):
                runs = norms if name != "norm_added_k" else ("rms_norm",)
                self.swap(f"{inner}.{name}", getattr(attn, name), nn.RMSNorm, attention.rms_forward, runs)


def _odd_weight(module: nn.Module) -> str | None:
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
    return None


def _odd_conv(conv: Any) -> str | None:
    if not isinstance(conv, nn.Conv3d):
        return None
    if conv.kernel_size != conv.stride or any(conv.padding) or set(conv.dilation) != {1} or conv.groups != 1:
        return "it is not a patch embedding: kernel and stride differ, or it pads, dilates or groups"
    return None
