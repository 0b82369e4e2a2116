"""What ``--ab`` names: a variant's grammar, and its own copy of the models on the one set of weights.

    NAME[:key=value,...]       NAME: eager, compile, ours, or compile+ours (either order)

===========  =========  ==========================================================================================
of           key        value
===========  =========  ==========================================================================================
any          backend    attention backend of diffusers that the model's own attention dispatches to; best: the
                        fastest one that is exact, found by running the model with each (``attention_choice.py``)
ours         attention  accelerate()'s ``attention``, as ``pyvideo sample --attention`` takes it: none, dense, int8,
                        or ``attention=window=0.5x0.5x0.5,dense_steps=4``, whose keys follow it
ours         impl       auto, reference, triton, cuda, cpu, ...: accelerate()'s ``impl``
ours         ops        op names joined by ``+``, or all
ours         strict     true, false
ours         loop       sampler (default): what ``pyvideo sample`` runs, where it runs the model; pipeline:
                        ``pipe.__call__``, as of eager and compile (``loops.py``)
compile      scope      model (default: the whole transformer), blocks (its repeated blocks, in full graphs)
compile      mode       torch.compile's modes
compile      dynamic    true, false: torch.compile's ``dynamic``
compile      compiler   inductor (default), or a debugging backend of torch.compile
compile      vae        true: the VAE's decoder too
===========  =========  ==========================================================================================

``compile`` compiles the whole transformer because that is the faster of the two: the end of a block fuses with the
norm that starts the next, and the ends of the model are compiled too. ``scope=blocks`` compiles in a fraction of the
time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyvideo_kernels.attention_text import KEYS, choose
from pyvideo_kernels.dispatch import IMPLS
from pyvideo_kernels.errors import ModelError, UnsupportedError, ValueOptionError
from pyvideo_kernels.integrations import Report, accelerate
from pyvideo_kernels.sampler.kernels import forward_ops
from pyvideo_kernels.sampler.problems import did_you_mean

from .loops import LOOPS, Sampled, samples

BASE = "eager"
BEST = "best"
_BASES = ("eager", "compile", "ours")
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_COMPILERS = ("inductor", "cudagraphs", "aot_eager", "eager")
_SCOPES = ("model", "blocks")
_TRUTHS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


@dataclass(frozen=True)
class Compile:
    """How a variant is compiled."""

    scope: str = "model"
    mode: str | None = None
    dynamic: bool | None = None
    compiler: str = "inductor"
    vae: bool = False

    @property
    def replays(self) -> bool:
        """Whether it runs as CUDA graphs."""
        return self.compiler == "cudagraphs" or self.mode in ("reduce-overhead", "max-autotune")

    def arguments(self) -> dict[str, Any]:
        """For ``torch.compile``."""
        return {"backend": self.compiler, "mode": self.mode, "dynamic": self.dynamic}


@dataclass(frozen=True)
class Variant:
    """One side of a comparison; ``name`` is what the user wrote, normalised."""

    name: str
    accelerate: Mapping[str, Any] | None = None
    compile: Compile | None = None
    backend: str | None = None
    loop: str | None = None

    @property
    def sampled(self) -> bool:
        """Whether its clips go through the sampler's loop, if the sampler runs the model."""
        return self.accelerate is not None and self.loop != "pipeline"

    @property
    def exact(self) -> bool:
        """Whether it computes what the model defines, up to rounding: no attention that leaves out or quantises, and
        no backend of the user's choice, which may do either."""
        return (self.accelerate or {}).get("attention") in (None, "dense") and self.backend in (None, BEST)


def parse(text: str) -> Variant:
    """One ``--ab``.

    Raises:
        ValueOptionError: unknown name, key or value; says which there are.
    """
    name, colon, tail = text.strip().partition(":")
    bases = [part.strip() for part in name.split("+")]
    for base in bases:
        if base not in _BASES:
            raise ValueOptionError(
                f"--ab {text}: there is no variant {base!r}{did_you_mean(base, _BASES)}; there are "
                f"{', '.join(_BASES)} and compile+ours"
            )
    if len(set(bases)) < len(bases) or ("eager" in bases and len(bases) > 1):
        raise ValueOptionError(f"--ab {text}: {name} does not compose; compile+ours does")
    keys = _keys_of(bases)
    given: dict[str, Any] = {}
    spelled: list[str] = []
    for key, value in _pairs(text, tail) if colon else []:
        if key not in keys:
            raise ValueOptionError(
                f"--ab {text}: {'+'.join(bases)} has no key {key!r}{did_you_mean(key, keys)}; it has {', '.join(keys)}"
            )
        if key in given:
            raise ValueOptionError(f"--ab {text}: {key} is given twice")
        given[key] = keys[key](text, key, value)
        spelled.append(f"{key}={value}")
    return _variant("+".join(sorted(bases)) + (":" + ",".join(spelled) if spelled else ""), bases, given)


def _pairs(text: str, tail: str) -> list[tuple[str, str]]:
    """The keys and values after the colon; those of an attention stay with it."""
    out: list[tuple[str, str]] = []
    for pair in tail.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not value:
            raise ValueOptionError(f"--ab {text}: expected KEY=VALUE after the colon; got {pair!r}")
        if key in KEYS and out and out[-1][0] == "attention":
            out[-1] = ("attention", f"{out[-1][1]},{key}={value}")
        else:
            out.append((key, value))
    return out


def parse_all(texts: Iterable[str]) -> tuple[Variant, ...]:
    """The variants of a run, each once, ``eager`` first: it is what the others are held against."""
    variants = {variant.name: variant for variant in (parse(BASE), *(parse(text) for text in texts))}
    return tuple(variants.values())


def _variant(name: str, bases: list[str], given: dict[str, Any]) -> Variant:
    backend = given.pop("backend", None)
    loop = given.pop("loop", None)
    ours = {key: given.pop(key) for key in tuple(_OURS) if key in given}
    how = Compile(**given)
    if how.mode is not None and how.compiler != "inductor":
        raise ValueOptionError(f"--ab {name}: mode is a setting of inductor, not of compiler={how.compiler}")
    return Variant(
        name,
        accelerate=ours if "ours" in bases else None,
        compile=how if "compile" in bases else None,
        backend=backend,
        loop=loop,
    )


# Keys and values --------------------------------------------------------------------------------------------------

_Reader = Callable[[str, str, str], Any]


def _choice(*known: str) -> _Reader:
    def read(text: str, key: str, value: str) -> str:
        if value not in known:
            raise ValueOptionError(
                f"--ab {text}: {key} must be one of {', '.join(known)}; got {value!r}{did_you_mean(value, known)}"
            )
        return value

    return read


def _truth(text: str, key: str, value: str) -> bool:
    if value.lower() not in _TRUTHS:
        raise ValueOptionError(f"--ab {text}: {key} must be true or false; got {value!r}")
    return _TRUTHS[value.lower()]


def _attention(text: str, key: str, value: str) -> str | None:
    # Only spelling and numbers: accelerate() refuses what is not built when the variant's turn comes, and the others
    # go on.
    choose(value, f"--ab {text}: {key}")
    return None if value == "none" else value


def _ops(text: str, key: str, value: str) -> str | tuple[str, ...]:
    if value == "all":
        return value
    return tuple(_choice(*forward_ops())(text, key, name) for name in value.split("+"))


def _backend(text: str, key: str, value: str) -> str:
    return _choice(BEST, *attention_backends())(text, key, value)


_OURS: dict[str, _Reader] = {
    "attention": _attention,
    "impl": _choice(*IMPLS),
    "ops": _ops,
    "strict": _truth,
    "loop": _choice(*LOOPS),
}
_COMPILE: dict[str, _Reader] = {
    "scope": _choice(*_SCOPES),
    "mode": _choice(*_MODES),
    "dynamic": _truth,
    "compiler": _choice(*_COMPILERS),
    "vae": _truth,
}


def _keys_of(bases: list[str]) -> dict[str, _Reader]:
    keys: dict[str, _Reader] = {"backend": _backend}
    return keys | (_OURS if "ours" in bases else {}) | (_COMPILE if "compile" in bases else {})


def attention_backends() -> list[str]:
    """The attention backends that the installed diffusers knows by name."""
    try:
        from diffusers.models.attention_dispatch import AttentionBackendName
    except ImportError as error:
        raise ModelError(f"an attention backend is diffusers': {error.name or 'diffusers'} is not installed") from None
    return [backend.value for backend in AttentionBackendName]


def default_attention_backend() -> str:
    """What attention that names no backend dispatches to."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    return AttentionBackendName(_AttentionBackendRegistry.get_active_backend()[0]).value


# From a pipeline to a variant of it -------------------------------------------------------------------------------

_MODELS = ("transformer", "transformer_2", "vae")


@dataclass
class Built:
    """A variant ready to run: a pipeline of its own, and what accelerate() says it did."""

    variant: Variant
    pipe: Any
    report: Report | None = None
    notes: tuple[str, ...] = ()


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of a module tree whose parameters and buffers are those of the original, not copies of them."""
    memo: dict[int, Any] = {}
    for tensors in (model.parameters(), model.buffers()):
        memo |= {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, memo)


def build(pipe: Any, variant: Variant) -> Built:
    """``variant`` of ``pipe``: module trees of its own on the same weights; ``pipe`` stays as it is.

    Every variant has its own trees, so nothing is switched on and off between rounds and what torch.compile has
    compiled stays compiled.

    Raises:
        ModelError, UnsupportedError: this model cannot be run so; names what and why.
    """
    own = copy.copy(pipe)
    for name in _MODELS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            setattr(own, name, sharing_copy(getattr(pipe, name)))
    if getattr(pipe, "scheduler", None) is not None:
        own.scheduler = copy.deepcopy(pipe.scheduler)
    built = Built(variant, own)
    if variant.backend is not None:
        built.notes += set_attention_backend(own, variant.backend)
    if variant.accelerate is not None:
        built.report = accelerate(own, **variant.accelerate)
    if variant.compile is not None:
        _compile(own, variant.compile)
    if variant.sampled and samples(own):
        given = variant.accelerate or {}
        built.pipe = Sampled(own, impl=given.get("impl", "auto"), ops=given.get("ops", "all"))
    return built


def set_attention_backend(pipe: Any, name: str) -> tuple[str, ...]:
    """Bind the attention of these transformers, and of no others, to a backend of diffusers; returns warnings.

    diffusers' own ``set_attention_backend`` also changes the default of the whole process, which the other variants
    would then run with.
    """
    from diffusers.models import attention_dispatch as dispatch

    backend = dispatch.AttentionBackendName(name)
    try:
        dispatch._check_attention_backend_requirements(backend)
        dispatch._maybe_download_kernel_for_backend(backend)
    except (RuntimeError, ImportError, OSError) as error:
        raise UnsupportedError(f"backend={name}: {' '.join(str(error).split())}") from None
    if backend not in dispatch._AttentionBackendRegistry._backends:
        raise UnsupportedError(f"backend={name}: diffusers registers no function for it here")
    processors = 0
    for part in ("transformer", "transformer_2"):
        model = getattr(pipe, part, None)
        for module in model.modules() if model is not None else ():
            processor = getattr(module, "processor", None)
            if processor is not None and hasattr(processor, "_attention_backend"):
                processor._attention_backend = backend
                processors += 1
    if not processors:
        kind = type(pipe.transformer).__name__
        raise UnsupportedError(f"backend={name}: the attention of {kind} does not go through diffusers' dispatch")
    if "attn_mask" not in dispatch._AttentionBackendRegistry._supported_arg_names[backend]:
        return (f"backend {name} takes no attention mask and diffusers drops it: see the quality",)
    return ()


def _compile(pipe: Any, how: Compile) -> None:
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        if model is None:
            continue
        if how.scope == "model":
            model.compile(**how.arguments())
            if how.replays:
                _keep_outputs(model)
        else:
            for block in repeated_blocks(model):
                block.compile(fullgraph=True, **how.arguments())
    if how.vae:
        vae = getattr(pipe, "vae", None)
        if vae is None:
            raise UnsupportedError("vae=true: this run has no VAE")
        vae.decoder.compile(**how.arguments())


def _keep_outputs(model: nn.Module) -> None:
    """Copy what a CUDA graph puts out: the pipeline holds on to one prediction while the next replay overwrites it."""
    compiled = model._compiled_call_impl
    assert compiled is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return map_tensors(compiled(*args, **kwargs), Tensor.clone)

    model._compiled_call_impl = call


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``function`` of every tensor in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return type(value)((key, map_tensors(item, function)) for key, item in value.items())
    return value


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a transformer consists of: those that diffusers compiles regionally, else its module lists."""
    names = getattr(model, "_repeated_blocks", None)
    if names:
        return [module for module in model.modules() if type(module).__name__ in names]
    return [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]
