"""accelerate(), restore() and warmup(): our ops inside a diffusers model, in place and reversible.

Importing this imports no diffusers; a call does.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..attention_choice import AttentionChoice
from ..attention_text import choose
from ..dispatch import IMPLS
from ..errors import ModelError, UnsupportedError, ValueOptionError
from ..schemas import OPS
from .precision import refuse_unbuilt
from .report import Report
from .swap import Left, Plan, Settings, install, mark_of, remove, swapped
from .upfront import Checked, check_model, execution_device, warm_model, warm_ops

__all__ = ["Checked", "Report", "accelerate", "restore", "warmup"]

# diffusers model class -> the file that knows it. Each has SOURCES (what it was read in), OPS (what it can use) and
# plan(model, path, settings) -> Plan.
_MODELS = {
    "WanTransformer3DModel": "pyvideo_kernels.integrations.diffusers.wan",
    "AutoencoderKLWan": "pyvideo_kernels.integrations.diffusers.wan_vae",
    "AutoencoderKLHunyuanVideo": "pyvideo_kernels.integrations.diffusers.hunyuan_video_vae",
    "AutoencoderKLLTXVideo": "pyvideo_kernels.integrations.diffusers.ltx_vae",
    "AutoencoderKLCogVideoX": "pyvideo_kernels.integrations.diffusers.cogvideox_vae",
}
# diffusers pipeline class -> its components that are models of this table.
_PIPELINES = {
    "WanPipeline": ("transformer", "transformer_2", "vae"),
    "WanImageToVideoPipeline": ("transformer", "transformer_2", "vae"),
    "HunyuanVideoPipeline": ("vae",),
    "HunyuanVideoImageToVideoPipeline": ("vae",),
    "LTXPipeline": ("vae",),
    "LTXImageToVideoPipeline": ("vae",),
    "LTXConditionPipeline": ("vae",),
    "LTXI2VLongMultiPromptPipeline": ("vae",),
    "LTXLatentUpsamplePipeline": ("vae",),
    "CogVideoXPipeline": ("vae",),
    "CogVideoXImageToVideoPipeline": ("vae",),
    "CogVideoXVideoToVideoPipeline": ("vae",),
    "CogVideoXFunControlPipeline": ("vae",),
}
_PIPELINE_KEPT = [
    ("scheduler", "guidance and update fuse only in a sampling loop: pyvideo_kernels.sampler has one"),
    ("text_encoder", "runs once a prompt"),
]


def accelerate(
    target: Any,
    *,
    ops: str | Collection[str] = "all",
    attention: str | Mapping[str, Any] | AttentionChoice | None = None,
    impl: str = "auto",
    strict: bool = False,
) -> Report:
    """Run a diffusers model through this package's ops, in place.

    Modules keep their types, parameters, names and hooks; only their innermost forward changes, and every call checks
    that the op can serve it and otherwise runs the stock code and counts why. Calling again reconfigures; calling
    again with the same arguments changes nothing but the counters. ``restore(target)`` undoes it.

    A kernel that nobody has verified on this card is checked here, in the model's dtype and head_dim and where the
    model executes, so that no first call inside a compiled graph or a CUDA graph has to do without it. A model that is
    not on its GPU yet is checked at its first call: call ``warmup(target)`` once it is there.

    Args:
        target: ``WanPipeline``, ``WanImageToVideoPipeline``, ``WanTransformer3DModel``, ``AutoencoderKLWan``,
            ``AutoencoderKLHunyuanVideo``, ``AutoencoderKLLTXVideo`` or ``AutoencoderKLCogVideoX``; of the pipelines of
            the last three, the VAE.
        ops: ``"all"``, or the names of the ops to use.
        attention: None keeps the model's own attention (its backend, context parallelism and caches with it);
            ``"dense"`` runs self-attention through ``spacetime_attention``, and so do ``"int8"`` and ``"fp8"`` in that
            precision. A mapping asks for less than all pairs, by one of

            - ``window``: keys along (time, height, width), integers in tokens or floats as shares of the axes, or one
              such row for each head; ``stride``: queries that share a window; ``precision``: ``int8`` or ``fp8``;
            - ``top_k``: as many tiles of keys for each tile of queries, or a float: that share of them;
            - ``share``: as many tiles as hold this share of the estimated attention mass; ``tile``: their size in
              tokens, 64 or 128 in all;

            and names exceptions: ``dense_layers`` (the first so many blocks, or a collection of indices),
            ``dense_steps`` (the first so many denoising steps, or a float: that share of them) and ``layers``
            (``{index, range or "20-29": choice}``). Text as for ``pyvideo sample --attention`` says the same:
            ``"window=0.5x0.5x0.5,dense_steps=4,dense_layers=2"``.
        impl: passed to every op: ``auto``, ``reference``, ``triton``, ``cpu`` or ``cuda``. With anything but ``auto``
            an op that lacks it raises when called.
        strict: raise, with the reasons and before anything is changed, if something that was asked for would be left;
            and raise later where a call would fall back.
    Returns:
        Report: what runs now, what was left and why, and counters of what really ran.
    Raises:
        ModelError: not a model this package knows, or a diffusers whose source it was not written against.
        ValueOptionError: unknown op or implementation; an ``attention`` that is not one, or not one for this model.
        UnsupportedError: a precision that is not built, or ``strict`` and something is left.
    """
    choice = choose(attention, "accelerate: `attention`")
    refuse_unbuilt(choice, "accelerate: attention")
    settings = Settings(_op_names(ops), choice, _impl(impl), strict)
    lacking = [name for name in (() if choice is None else choice.ops()) if name not in settings.ops]
    if lacking:
        raise ValueOptionError(f"accelerate: `attention` {choice} needs {', '.join(lacking)} among `ops`; got {ops!r}")
    plan = Plan()
    models = list(_models(target))
    names: dict[str, list[str]] = {}
    for path, model in models:
        part = _plan(model, path, settings)
        names[path] = [op for swap in part.swaps for op in swap.ops]
        plan.extend(part)
    if not isinstance(target, nn.Module):
        plan.kept += _PIPELINE_KEPT
        plan.extend(_not_integrated(target, choice))
    if strict and plan.left:
        reasons = "; ".join(f"{left.path}: {left.op}: {left.reason}" for left in plan.left[:8])
        more = f"; and {len(plan.left) - 8} more" if len(plan.left) > 8 else ""
        raise UnsupportedError(f"accelerate: strict, and {len(plan.left)} would be left: {reasons}{more}")
    for _, model in models:
        _remove_all(model)
    for swap in plan.swaps:
        install(swap, settings)
    if not isinstance(target, nn.Module):
        for _, model in models:
            if (mark := mark_of(model)) is not None:
                mark.pipeline = weakref.ref(target)
    checked: list[Checked] = []
    if settings.impl == "auto":  # an explicit choice runs as it is
        device = None if isinstance(target, nn.Module) else execution_device(target)
        for path, model in models:
            checked += check_model(model, names[path], device)
    return Report(type(target).__name__, plan, settings, checked)


def warmup(
    target: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    shapes: Any = None,
) -> list[Checked]:
    """Check the kernels that will run, and compile them, so that the first real call does neither.

    A model is called once for each clip, on zeros: the transformer's forward, the VAE's decoder. Nothing of it
    changes. Call it after accelerate() and after the model is on its device; before torch.compile or a capture.

        pv.accelerate(pipe.to("cuda"))
        pv.warmup(pipe, shapes=(480, 832, 81))
        pv.warmup(["rms_norm", "spacetime_attention"], dtype=torch.bfloat16, device="cuda")

    Args:
        target: what accelerate() takes (accelerated or not), the name of an op, or a collection of such names.
        dtype: for ops, what to check them in (default: bf16 on a GPU, fp32 on a CPU); a model has its own.
        device: where the ops will run (default: the current GPU, else the CPU), or where a model will, if its hooks
            cannot say.
        shapes: for a model ``(height, width, frames)`` in pixels, or several: kernels are compiled for them (default:
            one small clip, which leaves out what is compiled for certain sizes). For ops ``{name: [call, ...]}``, a
            call being the op's arguments by name, tensors included; default: the self-check's own samples at head_dim
            64 and 128.
    Returns:
        list[Checked]: op, implementation, dtype, head_dim, device, whether ``auto`` trusts it, and why.
    Raises:
        ValueOptionError: an unknown op, or shapes of another form.
        DTypeError: a dtype the ops do not have.
        ModelError: not a model this package knows.
    """
    if isinstance(target, str):
        return warm_ops([target], dtype, device, shapes)
    if isinstance(target, Collection) and not isinstance(target, nn.Module):
        return warm_ops(list(target), dtype, device, shapes)
    if dtype is not None:
        raise ValueOptionError(f"warmup: `dtype` must be None for a model, which has its own; got {dtype}")
    out: list[Checked] = []
    for path, model in _models(target):
        settings = next((settings for _, _, settings in swapped(model)), None)
        # Of a model that is not accelerated: what accelerate() would install.
        planned = settings or Settings(_op_names("all"))
        names = [op for swap in _plan(model, path, planned).swaps for op in swap.ops] if planned.impl == "auto" else []
        out += warm_model(path, model, names, None if isinstance(target, nn.Module) else target, device, shapes)
    return out


def restore(target: Any) -> None:
    """Undo accelerate(): every module gets back the forward it had, hooks stay.

    Args:
        target: what was given to accelerate(), a copy of it, or a part of it. Nothing to undo is no error.
    """
    if isinstance(target, nn.Module):
        _remove_all(target)
        return
    for _, model in _models(target):
        _remove_all(model)


def _remove_all(model: nn.Module) -> None:
    for _, module, _ in list(swapped(model)):
        remove(module)


def _models(target: Any) -> Iterator[tuple[str, nn.Module]]:
    """``(path, model)`` of each model in ``target`` that accelerate() looks at."""
    target = getattr(target, "_orig_mod", target)  # what torch.compile(model) returns
    if isinstance(target, nn.Module):
        if not _bases(target) & set(_MODELS):
            raise ModelError(_unknown(target))
        yield "", target
        return
    for name in _components(target):
        component = getattr(target, name, None)
        if component is not None:
            yield name, getattr(component, "_orig_mod", component)


def _components(pipe: Any) -> tuple[str, ...]:
    known = _bases(pipe) & set(_PIPELINES)
    if not known:
        raise ModelError(_unknown(pipe))
    return _PIPELINES[known.pop()]


def _not_integrated(pipe: Any, choice: AttentionChoice | None) -> Plan:
    """What there is to say of a pipeline's transformer that this package does not know."""
    transformer = getattr(pipe, "transformer", None)
    if transformer is None or "transformer" in _components(pipe):
        return Plan()
    reason = f"{type(transformer).__name__} is not integrated yet: it runs as diffusers has it"
    left = [] if choice is None else [Left("transformer", op, reason) for op in choice.ops()]
    return Plan(left=left, kept=[] if left else [("transformer", reason)])


def _bases(value: Any) -> set[str]:
    return {base.__name__ for base in type(value).__mro__ if base.__module__.startswith("diffusers.")}


def _unknown(target: Any) -> str:
    known = ", ".join((*_PIPELINES, *_MODELS))
    kind = target.__name__ if isinstance(target, type) else type(target).__name__
    return f"accelerate: `target` must be one of {known}; got {kind}"


def _plan(model: nn.Module, path: str, settings: Settings) -> Plan:
    name = type(model).__name__
    place = _MODELS.get(name)
    if place is None:
        raise ModelError(f"accelerate: `{path}` must be one of {', '.join(_MODELS)}; got {name}")
    from .diffusers import sources

    module = importlib.import_module(place)
    sources.check(module.SOURCES)
    plan: Plan = module.plan(model, path, settings)
    return plan


def _op_names(ops: str | Collection[str]) -> frozenset[str]:
    known = [name for name in OPS if not name.endswith("_backward")]
    if ops == "all":
        return frozenset(known)
    if isinstance(ops, str) or not all(isinstance(name, str) for name in ops):
        raise ValueOptionError(f"accelerate: `ops` must be 'all' or a collection of op names; got {ops!r}")
    unknown = sorted(set(ops) - set(known))
    if unknown:
        raise ValueOptionError(f"accelerate: unknown op {', '.join(unknown)}; there are {', '.join(known)}")
    return frozenset(ops)


def _impl(impl: str) -> str:
    if impl not in IMPLS:
        raise ValueOptionError(f"accelerate: `impl` must be one of {', '.join(IMPLS)}; got {impl!r}")
    return impl
