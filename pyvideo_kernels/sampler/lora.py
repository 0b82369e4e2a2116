"""LoRA files folded into the transformer's weights: no PEFT, no wrapped modules, so every fused op stays in use.

    W += scale * (alpha / rank) * up @ down

Reads diffusers and PEFT names (``transformer.blocks.0.attn1.to_q.lora_A.weight``), Wan's own
(``diffusion_model.blocks.0.self_attn.q.lora_down.weight``) and the flat names of kohya's scripts
(``lora_unet_blocks_0_self_attn_q.lora_down.weight``); ``.diff`` and ``.diff_b`` are added to weight and bias.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..error_types import ModelError
from .modeldir import Model, shapes_in, weight_names

_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "model.", "lora_unet_", "lora_transformer_")
_KINDS = {
    "lora_A.weight": "down", "lora_A.default.weight": "down", "lora_down.weight": "down", "lora.down.weight": "down",
    "lora_B.weight": "up", "lora_B.default.weight": "up", "lora_up.weight": "up", "lora.up.weight": "up",
    "lora_B.bias": "up_bias", "alpha": "alpha", "diff": "diff", "diff_b": "diff_b",
}  # fmt: skip
# diffusers' module names -> Wan's own.
_ORIGINAL = (
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.add_k_proj", ".cross_attn.k_img"),
    (r"\.attn2\.add_v_proj", ".cross_attn.v_img"),
    (r"\.attn2\.norm_added_k", ".cross_attn.norm_k_img"),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0", ".o"),
    (r"\.to_([qkv])$", r".\1"),
    (r"\.ffn\.net\.0\.proj", ".ffn.0"),
    (r"\.ffn\.net\.2", ".ffn.2"),
    (r"\.norm2$", ".norm3"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"^proj_out$", "head.head"),
)


def names_of(module: str) -> list[str]:
    """Every name a LoRA file may use for a module of a diffusers Wan transformer."""
    original = module
    for pattern, replacement in _ORIGINAL:
        original = re.sub(pattern, replacement, original)
    dotted = dict.fromkeys((module, original))
    return list(dict.fromkeys([*dotted, *(name.replace(".", "_") for name in dotted)]))


def check(model: Model, path: Path) -> None:
    """Refuse a torn file and keys that ``model`` has no place for, before any weight is read.

    Raises:
        ModelError: what has no place; ``fold`` says the same of what only the loaded weights show.
    """
    try:
        keys = list(shapes_in(path))
    except (OSError, ValueError) as error:
        raise _torn(path, error) from None
    tables: dict[str, dict[str, str]] = {"": {}, "transformer_2.": {}}
    for prefix, component in (("", "transformer"), ("transformer_2.", "transformer_2")):
        if component in model.parameters:
            weights = (key for key in weight_names(model, component) if key.endswith(".weight"))
            modules = (key.removesuffix(".weight") for key in weights)
            tables[prefix] = {alias: name for name in modules for alias in names_of(name)}
    _check_places(path, [key for key in keys if _place(key, tables) is None], empty=not keys)


def _torn(path: Path, error: Exception) -> ModelError:
    return ModelError(f"--lora {path} is not a whole safetensors file ({error}); download it again")


def _check_places(path: Path, unknown: list[str], *, empty: bool) -> None:
    if unknown or empty:
        some = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        why = f"it has no place for {some}" if unknown else "the file is empty"
        raise ModelError(f"--lora {path} does not fit this model: {why}; use a LoRA that was made for it")


@torch.no_grad()
def fold(pipe: Any, path: Path, scale: float) -> int:
    """Fold a LoRA file into ``pipe.transformer`` (``transformer_2.`` keys into the second); the modules it changed.

    Raises:
        ModelError: keys or shapes that this model has no place for; nothing is changed then.
    """
    from safetensors import SafetensorError, safe_open

    tables = {"": _table(pipe.transformer), "transformer_2.": _table(pipe.transformer_2)}
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    unknown = []
    try:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():
                place = _place(key, tables)
                if place is None:
                    unknown.append(key)
                else:
                    found.setdefault(place[:2], {})[place[2]] = file.get_tensor(key)
    except SafetensorError as error:
        raise _torn(path, error) from None
    _check_places(path, unknown, empty=not found)
    changes: list[tuple[Any, Tensor | None, Tensor | None]] = []
    for (which, name), parts in found.items():
        target = tables[which][name]
        changes.append((target, *_deltas(path, name, target, parts)))
    for module, delta, bias in changes:
        _add(module.weight, delta, scale)
        if bias is not None:
            _add(module.bias, bias, scale)
    return len(changes)


def _table(transformer: nn.Module | None) -> dict[str, nn.Module]:
    """Every alias of every module that has a weight."""
    table: dict[str, nn.Module] = {}
    if transformer is not None:
        for name, module in transformer.named_modules():
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                for alias in names_of(name):
                    table.setdefault(alias, module)
    return table


def _place(key: str, tables: Mapping[str, Mapping[str, Any]]) -> tuple[str, str, str] | None:
    suffix = next((suffix for suffix in _KINDS if key.endswith("." + suffix)), None)
    if suffix is None:
        return None
    stem = key[: -len(suffix) - 1]
    which = "transformer_2." if stem.startswith("transformer_2.") else ""
    stem = stem.removeprefix("transformer_2.")
    for name in _stripped(stem):
        if name in tables[which]:
            return which, name, _KINDS[suffix]
    return None


def _stripped(stem: str) -> Iterable[str]:
    yield stem
    again = True
    while again:
        again = False
        for prefix in _PREFIXES:
            if stem.startswith(prefix):
                stem = stem.removeprefix(prefix)
                again = True
                yield stem


def _deltas(path: Path, name: str, module: Any, parts: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    weight = module.weight
    delta = bias = None
    if ("down" in parts) != ("up" in parts):
        raise ModelError(f"--lora {path}: {name} has one half of a pair only; download the file again")
    if "down" in parts:
        down, up = parts["down"].float().flatten(1), parts["up"].float().flatten(1)
        rank = down.shape[0]
        if up.shape[1] != rank or up.shape[0] * down.shape[1] != weight.numel() or up.shape[0] != weight.shape[0]:
            raise ModelError(
                f"--lora {path}: {name} is {list(up.shape)} × {list(down.shape)} and the model's weight is "
                f"{list(weight.shape)}; use a LoRA that was made for this model"
            )
        alpha = float(parts["alpha"]) if "alpha" in parts else float(rank)
        delta = (up @ down * (alpha / rank)).view(weight.shape)
    if "diff" in parts:
        extra = parts["diff"].float()
        if extra.shape != weight.shape:
            raise ModelError(f"--lora {path}: {name}.diff is {list(extra.shape)}; the weight is {list(weight.shape)}")
        delta = extra if delta is None else delta + extra
    bias_part = parts.get("diff_b", parts.get("up_bias"))
    if bias_part is not None:
        if module.bias is None or module.bias.shape != bias_part.shape:
            raise ModelError(f"--lora {path}: {name} has a bias change and the model has no such bias")
        bias = bias_part.float()
    return delta, bias


def _add(parameter: Tensor, delta: Tensor | None, scale: float) -> None:
    if delta is not None:
        total = parameter.float() + scale * delta.to(parameter.device)
        parameter.copy_(total.to(parameter.dtype))
