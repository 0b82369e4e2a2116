"""torch's own attention as peers: SDPA with its backend pinned, and flex_attention compiled.

They take ``[B, heads, S, head_dim]``, which a transposed view of our ``[B, S, heads, head_dim]`` gives without a copy.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyvideo_kernels.collect_env import cudnn_version
from pyvideo_kernels.reference.spacetime_attention import axis_window

from .package import HALF, Inputs, Peer, needs_dtype, skipped


def qkv(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs["q"], inputs["k"], inputs["v"]


def windowed(inputs: Inputs) -> bool:
    return inputs.get("window") is not None or bool(inputs.get("causal_time"))


def beyond(inputs: Inputs) -> str | None:
    """What no peer has."""
    if inputs.get("kv_lens") is not None:
        return "takes no `kv_lens`, the number of valid text tokens of each sample"
    if inputs.get("return_lse"):
        return "is compared by its output alone, without `return_lse`"
    if inputs.get("precision", "native") != "native":
        return f"has no counterpart of precision {inputs['precision']!r}"
    return None


def dense_only(inputs: Inputs) -> str | None:
    return beyond(inputs) or ("attends to every token: no window on a grid" if windowed(inputs) else None)


# SDPA ---------------------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend, inputs: Inputs) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv(inputs))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, scale=inputs.get("scale"), enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


_SCORES_GIB = 4.0


def _math_refuses(inputs: Inputs) -> str | None:
    q, k = inputs["q"], inputs["k"]
    gib = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] * q.element_size() / 2**30
    return dense_only(inputs) or (None if gib <= _SCORES_GIB else f"would hold {gib:.0f} GiB of scores at once")


# torch's own account of what a fused backend takes; it warns the reasons.
_CAN_USE: dict[str, Callable[..., bool]] = {
    "sdpa-flash": torch.backends.cuda.can_use_flash_attention,
    "sdpa-cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "sdpa-efficient": torch.backends.cuda.can_use_efficient_attention,
}


def _sdpa_refuses(name: str, inputs: Inputs) -> str | None:
    if why := dense_only(inputs):
        return why
    q, k, v = (x.transpose(1, 2) for x in qkv(inputs))
    if q.device.type != "cuda":
        return None
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, q.shape[1] != k.shape[1])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if _CAN_USE[name](params, True):
            return None
    reasons = [re.sub(r"\s*\(Triggered internally.*", "", str(one.message), flags=re.DOTALL) for one in said]
    return "; ".join(reasons) or "torch says that this backend cannot take these inputs"


def sdpa(device: torch.device, dtype: torch.dtype) -> list[Peer]:
    torch_version = f"torch {torch.__version__}"
    cudnn = cudnn_version()
    on_cuda = "needs a CUDA GPU" if device.type != "cuda" else None
    half_on_cuda = needs_dtype(dtype, *HALF) if device.type == "cuda" else None
    rows = (
        ("sdpa-flash", SDPBackend.FLASH_ATTENTION, torch_version, half_on_cuda),
        (
            "sdpa-cudnn", SDPBackend.CUDNN_ATTENTION, f"{torch_version}, cuDNN {cudnn}" if cudnn else torch_version,
            on_cuda or half_on_cuda or (None if cudnn else "torch was built without cuDNN"),
        ),
        ("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION, torch_version, on_cuda),
        ("sdpa-math", SDPBackend.MATH, torch_version, None),
    )  # fmt: skip
    return [
        skipped(name, version, why)
        if why
        else Peer(
            name,
            version,
            None,
            functools.partial(_sdpa, backend),
            refuses=_math_refuses if backend is SDPBackend.MATH else functools.partial(_sdpa_refuses, name),
        )
        for name, backend, version, why in rows
    ]


# flex_attention -----------------------------------------------------------------------------------------------------


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # One graph a shape, as a model would have it. Without fullgraph the limit on recompilations would end in eager
    # code that holds every score.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex(inputs: Inputs) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv(inputs))
    mask = inputs["block_mask"] if "block_mask" in inputs else _block_mask(inputs)
    out = _compiled_flex()(q, k, v, block_mask=mask, scale=inputs.get("scale"), enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _flex_prepare(inputs: Inputs) -> Inputs:
    """Build the block mask, and compile for these shapes."""
    import torch._dynamo

    prepared = {**inputs, "block_mask": _block_mask(inputs)}
    with torch._dynamo.config.patch(recompile_limit=64):  # every shape of a table is one recompilation
        _flex(prepared)
    return prepared


def _block_mask(inputs: Inputs) -> Any:
    """flex_attention's mask for our window on a grid; None for dense attention."""
    if not windowed(inputs):
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    q, grid = inputs["q"], tuple(inputs["grid"])
    _, h, w = grid
    text_len = inputs.get("text_len", 0)
    start = text_len if inputs.get("text_side", "suffix") == "prefix" else 0
    window = inputs.get("window") or grid
    rows = [window] if isinstance(window[0], int) else list(window)
    bounds = []
    for axis, length in enumerate(grid):
        causal = axis == 0 and bool(inputs.get("causal_time"))
        stride = inputs.get("stride", (1, 1, 1))[axis]
        pairs = [axis_window(length, row[axis], stride, causal, q.device) for row in rows]
        bounds.append(torch.stack([torch.stack(pair) for pair in pairs]))  # [rows, 2, length]
    video = prod(grid)

    def seen(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i, j = i - start, j - start
        text = (i < 0) | (i >= video) | (j < 0) | (j >= video)
        row = head if len(rows) > 1 else head * 0
        inside = row >= 0
        ci, cj = i.clamp(0, video - 1), j.clamp(0, video - 1)
        for axis, (at, to) in enumerate(
            zip((ci // (h * w), ci // w % h, ci % w), (cj // (h * w), cj // w % h, cj % w), strict=True)
        ):
            inside = inside & (to >= bounds[axis][row, 0, at]) & (to <= bounds[axis][row, 1, at])
        return text | inside

    heads = q.shape[2] if len(rows) > 1 else None
    return create_block_mask(seen, None, heads, q.shape[1], q.shape[1], q.device, _compile=q.device.type == "cuda")


def peers(device: torch.device, dtype: torch.dtype) -> list[Peer]:
    """SDPA's backends and flex_attention."""
    flex = Peer("flex", f"torch {torch.__version__}", None, _flex, prepare=_flex_prepare, refuses=beyond)
    return [*sdpa(device, dtype), flex]
