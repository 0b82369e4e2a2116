"""What a model will run, checked before it runs: self-checks up front, and a first call that compiles everything.

Inside a compiled graph or a CUDA-graph capture no check can be made, and an unverified kernel is left out there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch, verdicts
from ..errors import DTypeError, UnsupportedError, ValueOptionError
from ..schemas import OPS
from .swap import mark_of

_TEXT_TOKENS, _IMAGE_TOKENS = 512, 257
# More than one token along each axis, and an odd number of latent frames with their cache.
_SMALL_CLIP = (64, 64, 9)


@dataclass(frozen=True)
class Checked:
    """One verdict: may ``auto`` run ``impl`` of ``op`` for this dtype and head_dim on this device, and why (not)."""

    op: str
    impl: str
    dtype: torch.dtype
    head_dim: int | None
    device: torch.device
    trusted: bool
    why: str

    def __str__(self) -> str:
        of = verdicts.name_of(self.op, self.impl, self.dtype, self.head_dim)
        return f"{of} on {self.device}: {'trusted' if self.trusted else 'not used'} ({self.why})"


def check(names: Iterable[str], device: torch.device, dtype: torch.dtype, head_dim: int | None) -> list[Checked]:
    """Settle what ``auto`` will run of these ops: each implementation in its order, up to the first that is trusted.

    Of an op whose order depends on the call, all that any call may run.
    On a CPU nothing needs a check; the answer names what runs.
    """
    out = []
    for name in names:
        op = OPS[name]
        size = head_dim if op.heads is not None else None
        order = dispatch.order(op, device, dtype, size)
        for position, impl in enumerate(order):
            out.append(_one(name, impl, device, dtype, size))
            depends = op.in_order and device.type in op.in_order_on
            more = depends and any(verdicts.needs_check(later) for later in order[position + 1 :])
            if out[-1].trusted and not more:
                break
    return out


def _one(name: str, impl: str, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> Checked:
    op = OPS[name]
    if not verdicts.needs_check(impl):
        try:
            dispatch.load(op, impl)
            trusted, why = True, "needs no check"
        except UnsupportedError as error:
            trusted, why = False, str(error)
    else:
        try:
            trusted = dispatch.trusted(op, impl, device, dtype, head_dim)
            why = "self-check passed, or verified before" if trusted else "self-check failed or could not be made"
        except UnsupportedError as error:
            trusted, why = False, str(error)
    return Checked(name, impl, dtype, head_dim, device, trusted, why)


def check_model(model: nn.Module, names: Iterable[str], device: torch.device | None) -> list[Checked]:
    """`check` of the ops that a model runs, in its dtype and head_dim, where it will run them.

    Args:
        device: where the pipeline around the model executes; None: found on the model.
    """
    device = device or execution_device(model)
    dtype = _dtype(model)
    if device is None or device.type != "cuda" or dtype is None:
        return []
    return check(dict.fromkeys(names), device, dtype, head_dim(model))


def head_dim(model: Any) -> int | None:
    """Of a transformer's attention heads; None for a model without."""
    value = getattr(getattr(model, "config", None), "attention_head_dim", None)
    return value if isinstance(value, int) else None


def _dtype(model: nn.Module) -> torch.dtype | None:
    """Of the activations: what diffusers takes for the model's dtype, whatever single weights are kept in."""
    dtype = getattr(model, "dtype", None)
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else None


def execution_device(target: Any) -> torch.device | None:
    """Where a pipeline or model runs, under the hooks that offload it; None if nobody can say yet."""
    if not isinstance(target, nn.Module):
        device = getattr(target, "_execution_device", None)
        return _known(device)
    hook = getattr(target, "_hf_hook", None)
    device = _known(getattr(hook, "execution_device", None))
    if device is None and getattr(target, "_diffusers_hook", None) is not None:
        from diffusers.hooks import group_offloading

        device = _known(group_offloading._get_group_onload_device(target)) if _grouped(target) else None
    if device is None:
        first = next(target.parameters(), None)
        device = None if first is None else _known(first.device)
    return device


def _grouped(model: nn.Module) -> bool:
    from diffusers.hooks import group_offloading

    return bool(group_offloading._is_group_offload_enabled(model))


def _known(device: Any) -> torch.device | None:
    if device is None:
        return None
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "meta":
        return None
    # Verdicts and configurations are a card's: "cuda" is the current one.
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


# Warm-up --------------------------------------------------------------------------------------------------------


def warm_ops(
    names: Collection[str], dtype: torch.dtype | None, device: torch.device | str | None, calls: Any
) -> list[Checked]:
    """`warmup` of ops by name."""
    unknown = sorted(set(names) - set(OPS))
    if unknown:
        raise ValueOptionError(f"warmup: unknown op {', '.join(unknown)}; there are {', '.join(OPS)}")
    given = {} if calls is None else calls
    if not isinstance(given, Mapping) or set(given) - set(names):
        raise ValueOptionError(
            "warmup: `shapes` of ops must map their names to calls (the op's arguments, by name); "
            f"got {type(calls).__name__}"
        )
    where = _known(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = _known(where) or where
    dtype = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise DTypeError(f"warmup: `dtype` must be a floating torch dtype; got {dtype!r}")
    out: list[Checked] = []
    for name in names:
        op = OPS[name]
        bound = [op.bind(**call) for call in given.get(name, ())]
        sizes = sorted({op.head_dim(args) or 0 for args in bound}) if bound else list(dispatch.HEAD_DIMS)
        for size in sizes if op.heads is not None else [None]:
            # Calls of an op by itself may have what the first choice cannot do, so the others are checked too.
            out += [_one(name, impl, where, dtype, size) for impl in dispatch.order(op, where, dtype, size)]
        for args in bound:
            with torch.no_grad():
                getattr(torch.ops.pyvideo, name)(*args, "auto")
    _wait(where)
    return out


def warm_model(
    path: str, model: nn.Module, names: Iterable[str], target: Any, device: torch.device | str | None, clips: Any
) -> list[Checked]:
    """`warmup` of one model of ``target``."""
    where = _known(device) or execution_device(target if target is not None else model) or execution_device(model)
    if where is None:
        raise ValueOptionError(
            f"warmup: `device` must be given: {path or 'the model'} has no weights in memory, and no hook says where "
            "it runs"
        )
    dtype = _dtype(model)
    if dtype is None:
        raise DTypeError(f"warmup: {path or 'the model'} must be float32, bfloat16 or float16; got {model.dtype}")
    out = check(dict.fromkeys(names), where, dtype, head_dim(model))
    own = execution_device(target if target is not None else model) or execution_device(model)
    if own is None or own.type != where.type:
        return out  # the weights are elsewhere: nothing can be run, the verdicts are settled all the same
    with torch.no_grad():
        for clip in _clips(clips):
            _first_call(model, target, clip, where, dtype)
    _wait(where)
    return out


def _clips(clips: Any) -> list[tuple[int, int, int]]:
    if clips is None:
        return [_SMALL_CLIP]
    rows = [clips] if isinstance(clips, Sequence) and all(isinstance(n, int) for n in clips) else clips
    try:
        found = [tuple(int(n) for n in row) for row in rows]
    except (TypeError, ValueError):
        found = []
    if not found or any(len(row) != 3 or min(row) < 1 for row in found):
        raise ValueOptionError(
            f"warmup: `shapes` of a model must be (height, width, frames) in pixels, or several of them; got {clips!r}"
        )
    return found  # type: ignore[return-value]


# As many steps as make the first one a dense step and the last one not, wherever a share of them draws the line.
_STEPS = 10**9


def _contexts(model: Any) -> list[Any]:
    """Where to call a transformer: in its first and its last step if these run different attention."""
    mark = mark_of(model)
    if mark is None or "cache_context" not in mark.methods:
        return [contextlib.nullcontext()]
    steps = (0, _STEPS - 1)
    return [model.cache_context("warmup", step_index=step, num_inference_steps=_STEPS) for step in steps]


def _first_call(model: Any, target: Any, clip: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
    """One forward of a transformer in each kind of step, or one decoding of a VAE, on a clip of zeros."""
    config = model.config
    height, width, frames = clip
    spatial, temporal = (
        getattr(target, f"vae_scale_factor_{axis}", None)
        or getattr(config, f"scale_factor_{axis}", None)
        or getattr(config, f"{axis}_compression_ratio", None)
        or getattr(model, f"{axis}_compression_ratio", None)
        or default
        for axis, default in (("spatial", 8), ("temporal", 4))
    )
    patch = getattr(config, "patch_size", None)
    pt, ph, pw = patch if isinstance(patch, (list, tuple)) else (1, 1, 1)
    t = -(-((frames - 1) // temporal + 1) // pt) * pt
    h, w = (max(1, n // spatial // p) * p for n, p in ((height, ph), (width, pw)))

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    channels = getattr(config, "z_dim", None) or getattr(config, "latent_channels", None)
    if channels is not None:
        timestep = {"temb": zeros(1)} if getattr(config, "timestep_conditioning", False) else {}
        # A decoder may draw noise (LTX-Video's); nobody else's draws are to change for it.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.decode(zeros(1, channels, t, h, w), return_dict=False, **timestep)
        return
    tokens = (t // pt) * (h // ph) * (w // pw)
    per_token = bool(getattr(getattr(target, "config", None), "expand_timesteps", False))
    image = getattr(config, "image_dim", None)
    for context in _contexts(model):
        with context:
            model(
                hidden_states=zeros(1, config.in_channels, t, h, w),
                timestep=zeros(1, tokens, dtype=torch.float32) if per_token else zeros(1, dtype=torch.float32),
                encoder_hidden_states=zeros(1, _TEXT_TOKENS, config.text_dim),
                encoder_hidden_states_image=None if image is None else zeros(1, _IMAGE_TOKENS, image),
                return_dict=False,
            )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
