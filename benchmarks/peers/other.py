"""External kernels for the norms, the patch embedding and the decoder's convolution."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvideo_kernels.collect_env import cudnn_version

from .package import HALF, Inputs, Package, Peer, needs_dtype, needs_nvidia, skipped

LIGER = Package(
    "liger-kernel", "liger_kernel", ("liger_kernel.transformers.functional",), "liger_rms_norm",
    "pip install liger-kernel", ("0.5.0", "0.8.2"),
)  # fmt: skip
QUACK = Package("quack", "quack-kernels", ("quack",), "rmsnorm", "pip install quack-kernels", ("0.2.10", "0.6.4"))
FLASHINFER = Package(
    "flashinfer",
    "flashinfer-python",
    ("flashinfer.norm",),
    "rmsnorm",
    "pip install flashinfer-python",
    ("0.2.5", "0.6.18"),
)
PACKAGES = (LIGER, QUACK, FLASHINFER)


def _torch(name: str, call: Callable[[Inputs], Any], **rest: Any) -> Peer:
    return Peer(name, f"torch {torch.__version__}", None, call, **rest)


# Norms --------------------------------------------------------------------------------------------------------------


def _liger(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    # "gemma" is its mode that rounds once, as ours does, with the weight not shifted by an offset.
    return function(inputs["x"], inputs["weight"], inputs.get("eps", 1e-6), 0.0, "gemma", False)


def _quack(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    return function(inputs["x"], inputs.get("weight"), eps=inputs.get("eps", 1e-6))


def _flashinfer(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    x = inputs["x"]
    return function(x.flatten(0, -2), inputs["weight"], eps=inputs.get("eps", 1e-6)).view(x.shape)


def _needs_weight(inputs: Inputs) -> str | None:
    weight = inputs.get("weight")
    if weight is None:
        return "needs a weight"
    return None if weight.dtype == inputs["x"].dtype else "takes a weight of the dtype of x"


def _rms_norm(device: torch.device, dtype: torch.dtype) -> list[Peer]:
    rows = (
        (
            LIGER,
            needs_nvidia(device, lowest=0),
            _liger,
            lambda inputs: None if "weight" in inputs else "needs a weight",
        ),
        (QUACK, needs_nvidia(device, lowest=90), _quack, lambda inputs: None),
        (FLASHINFER, needs_nvidia(device, lowest=75) or needs_dtype(dtype, *HALF), _flashinfer, _needs_weight),
    )
    peers = []
    for package, why_not, call, refuses in rows:
        found = package.find()
        if why_not or found.function is None:
            peers.append(skipped(package.name, found.version, why_not or found.why_not or ""))
        else:
            run = functools.partial(call, found.function)
            peers.append(Peer(package.name, found.version, None, run, refuses=refuses, note=package.note()))
    return peers


def _layer_norm_affine(inputs: Inputs) -> Tensor:
    """The modulation as the affine of torch's fused LayerNorm: one kernel over x."""
    x = inputs["x"]
    # Its affine must have the dtype of x.
    scale, shift = (1 + inputs["scale"]).to(x.dtype), inputs["shift"].to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], scale.flatten(), shift.flatten(), inputs.get("eps", 1e-6))


def _one_modulation(inputs: Inputs) -> str | None:
    for name in ("scale", "shift"):
        if inputs.get(name) is None or inputs[name].numel() != inputs["x"].shape[-1]:
            return f"takes one {name} for all tokens, as an affine"
    return "has one affine" if inputs.get("weight") is not None or inputs.get("bias") is not None else None


def _layer_norm_modulate(device: torch.device, dtype: torch.dtype) -> list[Peer]:
    note = None if dtype == torch.float32 else "modulation rounded to the dtype of x"
    return [_torch("torch-layer-norm", _layer_norm_affine, refuses=_one_modulation, note=note)]


def _norm_silu(inputs: Inputs) -> Tensor:
    x = inputs["x"]
    # Below the smallest norm the two differ; the epsilon only keeps a row of zeros from dividing by zero.
    y = F.rms_norm(x, x.shape[-1:], inputs["weight"].to(x.dtype), 1e-24)
    return F.silu(y) if inputs.get("silu", True) else y


def _rms_norm_silu(device: torch.device, dtype: torch.dtype) -> list[Peer]:
    return [_torch("torch-rms-norm", _norm_silu)]


# Patch embedding and convolution --------------------------------------------------------------------------------------


def _unfold_linear(inputs: Inputs) -> Tensor:
    video, weight = inputs["video"], inputs["weight"]
    pt, ph, pw = weight.shape[2:]
    b, c, t, h, w = video.shape
    patches = video.view(b, c, t // pt, pt, h // ph, ph, w // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return F.linear(patches.flatten(4).flatten(1, 3), weight.flatten(1), inputs.get("bias"))


def _patch_embed3d(device: torch.device, dtype: torch.dtype) -> list[Peer]:
    return [_torch("unfold-linear", _unfold_linear)]


def _conv_prepare(inputs: Inputs) -> Inputs:
    return {**inputs, "weight": inputs["weight"].contiguous(memory_format=torch.channels_last_3d)}


def _conv(inputs: Inputs) -> Tensor:
    """The library's convolution on channels-last clips, spatial padding left to it; the past is concatenated."""
    x, weight, cache = inputs["x"], inputs["weight"], inputs.get("cache")
    past = weight.shape[2] - 1
    held = 0 if cache is None else cache.shape[1]
    frames = [x] if cache is None else [cache, x]
    if held < past:
        frames.insert(0, x.new_zeros(x.shape[0], past - held, *x.shape[2:]))
    clip = torch.cat(frames, 1) if len(frames) > 1 else x
    stride = inputs.get("stride", 1)
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=True, deterministic=cudnn.deterministic, allow_tf32=cudnn.allow_tf32
    ):
        y = F.conv3d(clip.permute(0, 4, 1, 2, 3), weight, inputs.get("bias"), stride, padding)
    y = y.permute(0, 2, 3, 4, 1)
    residual = inputs.get("residual")
    return y if residual is None else (y + residual).to(x.dtype)


def _conv_refuses(inputs: Inputs) -> str | None:
    """Edges other than zeros and epilogues would be passes of their own around it, which no library call has."""
    other = inputs.get("epilogue") is not None or inputs.get("pad_mode", "zeros") != "zeros" or inputs.get("pad_end", 0)
    return "pads with zeros and has no epilogue" if other else None


def _causal_conv3d(device: torch.device, dtype: torch.dtype) -> list[Peer]:
    version = f"torch {torch.__version__}"
    if device.type == "cuda":
        version += f", cuDNN {cudnn_version()}"
    name = "cudnn-channels-last" if device.type == "cuda" else "conv3d-channels-last"
    return [Peer(name, version, None, _conv, prepare=_conv_prepare, refuses=_conv_refuses)]


OPS: dict[str, Callable[[torch.device, torch.dtype], list[Peer]]] = {
    "rms_norm": _rms_norm,
    "layer_norm_modulate": _layer_norm_modulate,
    "rms_norm_silu": _rms_norm_silu,
    "patch_embed3d": _patch_embed3d,
    "causal_conv3d": _causal_conv3d,
}
