"""Modules of true size, filled with random weights on the device they will run on."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pyvideo_kernels.error_types import ModelError

from .architecture import Part

# Numbers drawn at a time, in float32: 4 MiB beside the weights, which stay in a cache.
_CHUNK = 1 << 20
# A normal cut at two standard deviations has this much of one left.
_CUT, _CUT_STD = 2.0, 0.8796256610342398

# Standard deviations. With norms before every layer, weights of 1/sqrt(fan in) keep each branch at O(1); gates of
# about 0.4 let sixty blocks add up to a residual stream of a few units, as in trained models.
_BIAS = 0.02
_NORM = 0.02
_TABLE = 0.2
_MODULATION_GAIN = 0.5
# Scores of a standard deviation of three: attention that looks somewhere, as trained heads do. At one, it averages
# tens of thousands of tokens to nothing, and an error in it would not be seen in the video.
_QK_NORM = 1.7
# The last convolution of a decoder: pixels of about 0.5, seldom clipped.
_PIXEL_GAIN = 0.8
# The norms of CogVideoX's decoder are scaled by a convolution of the latents instead of a weight of one.
_SPATIAL_NORM_GAIN = 0.3

# Modules whose linear layer makes shifts, scales and gates.
_MODULATIONS = ("AdaLayerNorm", "CogVideoXLayerNormZero", "HunyuanVideoAdaNorm", "HunyuanVideoTokenReplaceAdaLayerNorm")


def diffusers_class(name: str) -> Any:
    """A class of diffusers by name, or a sentence on what is missing."""
    try:
        import diffusers
        import transformers  # noqa: F401  (the pipelines name its classes)
    except ImportError as error:
        raise ModelError(f"video models need {error.name}: pip install 'pyvideo-kernels[sampler]'") from None
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ModelError(f"diffusers {diffusers.__version__} has no {name}: pip install 'pyvideo-kernels[sampler]'")
    return kind


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters take no memory while a module is made; buffers, which hold tables that nothing refills, are real."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    replacing: Any = to_meta  # torch annotates hooks that return nothing, and documents those that do
    hook = register_module_parameter_registration_hook(replacing)
    try:
        yield
    finally:
        hook.remove()


def skeleton(part: Part, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module with its parameters on the meta device, each in the dtype that ``from_pretrained`` would give it."""
    kind = diffusers_class(part.kind)
    before = torch.get_default_dtype()
    # from_pretrained makes modules under the target dtype: a buffer of a default dtype gets it too.
    torch.set_default_dtype(dtype)
    try:
        with _parameters_on_meta():
            module: nn.Module = kind.from_config(dict(part.config))
    finally:
        torch.set_default_dtype(before)
    kept = set(getattr(kind, "_keep_in_fp32_modules", None) or ())
    for path, owner, name, parameter in _parameters(module):
        wanted = torch.float32 if kept & set(path.split(".")) else dtype
        if parameter.dtype != wanted:
            owner.register_parameter(name, nn.Parameter(parameter.to(wanted), requires_grad=parameter.requires_grad))
    return module.eval()


def weight_bytes(modules: Mapping[str, nn.Module]) -> int:
    """What the parameters take, from their shapes and dtypes."""
    return sum(p.numel() * p.itemsize for module in modules.values() for p in module.parameters())


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for prefix, owner in list(module.named_modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            yield f"{prefix}.{name}" if prefix else name, owner, name, parameter


@torch.no_grad()
def fill(module: nn.Module, name: str, device: torch.device, seed: int) -> nn.Module:
    """Allocate every parameter on ``device`` and fill it there.

    Each has a generator of its own, from the seed and its name: the same numbers on one kind of device and torch
    version, whatever the dtype (the float32 model rounds to the bf16 one); CPU and GPU draw different ones.
    """
    modules = dict(module.named_modules())
    for path, owner, leaf, parameter in _parameters(module):
        above = modules[path.rpartition(".")[0].rpartition(".")[0]]
        mean, std = _distribution(path.split("."), owner, above, parameter)
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        _draw(value, mean, std, seed, f"{name}.{path}")
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))
    for path, owner in modules.items():
        for leaf, buffer in list(owner.named_buffers(recurse=False)):
            # The statistics of latents that LTX keeps with its weights: any that are not the trivial ones.
            if leaf in ("latents_mean", "latents_std"):
                _draw(buffer, float(leaf == "latents_std"), 0.1, seed, f"{name}.{path}.{leaf}")
            setattr(owner, leaf, buffer.to(device))
    return module


def _distribution(path: list[str], owner: nn.Module, above: nn.Module, parameter: Tensor) -> tuple[float, float]:
    """Mean and standard deviation for a parameter, by the module that owns it and the one above."""
    leaf, kind = path[-1], type(owner).__name__
    if leaf == "timestep_scale_multiplier":
        return 1000.0, 0.0
    if leaf == "scale_shift_table" or leaf.startswith("per_channel_scale"):
        return 0.0, _TABLE
    if leaf == "weight" and isinstance(owner, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        gain = 1.0
        if type(above).__name__.startswith(_MODULATIONS) or path[-2] == "time_proj":
            gain = _MODULATION_GAIN
        elif "conv_out" in path:
            gain = _PIXEL_GAIN
        elif "conv_y" in path or "conv_b" in path:
            gain = _SPATIAL_NORM_GAIN
        return 0.0, gain / math.sqrt(parameter[0].numel())
    if "norm" in kind.lower() and leaf != "bias":
        return _QK_NORM if path[-2].startswith(("norm_q", "norm_k", "norm_added")) else 1.0, _NORM
    return float("conv_y" in path), _BIAS


def _draw(out: Tensor, mean: float, std: float, seed: int, name: str) -> None:
    """Fill with a normal cut at two standard deviations, scaled to ``std``; drawn in float32, rounded once."""
    # A generator on the CPU reads no more than 32 bits of its seed.
    generator = torch.Generator(out.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    # By inverting its distribution: a tenth of the time that nn.init.trunc_normal_ takes on a CPU.
    edge = math.erf(_CUT / math.sqrt(2))
    for piece in out.view(-1).split(_CHUNK):
        draw = torch.empty(piece.shape, dtype=torch.float32, device=out.device)
        draw.uniform_(-edge, edge, generator=generator).erfinv_().mul_(math.sqrt(2) * std / _CUT_STD).add_(mean)
        piece.copy_(draw)
