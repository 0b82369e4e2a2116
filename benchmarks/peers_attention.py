"""External kernels for spacetime_attention.

Ours is ``[B, S, heads, head_dim]`` (others write BSHD, BMHK or "NHD"); SDPA and flex_attention take ``[B, heads, S,
head_dim]``, which a transposed view gives without a copy.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyvideo_kernels.collect_env import cudnn_version
from pyvideo_kernels.reference.spacetime_attention import axis_window

from .peer import HALF, Inputs, Package, Peer, needs_dtype, needs_nvidia, skipped

FLASH4 = Package(
    "flash-attn-4", "flash-attn-4", ("flash_attn.cute",), "flash_attn_func",
    "pip install --pre 'flash-attn-4[cu13]' (without the extra for CUDA 12)", ("4.0.0b0", "4.0.0b27"),
)  # fmt: skip
FLASH3 = Package(
    "flash-attn-3", "flash_attn_3", ("flash_attn_interface", "flash_attn_3.flash_attn_interface"), "flash_attn_func",
    "pip install flash-attn-3 from PyTorch's index, or build hopper/ of Dao-AILab/flash-attention", ("3.0.0", "3.0.0"),
)  # fmt: skip
FLASH2 = Package(
    "flash-attn-2", "flash-attn", ("flash_attn",), "flash_attn_func",
    "pip install flash-attn --no-build-isolation", ("2.5.0", "2.8.4"),
)  # fmt: skip
SAGE = Package(
    "sageattention", "sageattention", ("sageattention",), "sageattn",
    "pip install sageattention==1.0.6", ("1.0.6", "2.2.0"),
)  # fmt: skip
XFORMERS = Package(
    "xformers", "xformers", ("xformers.ops",), "memory_efficient_attention",
    "pip install xformers, the release for this torch", ("0.0.22", "0.0.35"),
)  # fmt: skip
NATTEN = Package(
    "natten", "natten", ("natten",), "attention",
    "pip install natten==0.21.6 as https://natten.org/install says (the wheel for this torch)", ("0.20.0", "0.21.6"),
)  # fmt: skip
FASTVIDEO = Package(
    "fastvideo-kernel", "fastvideo-kernel", ("fastvideo_kernel",), "sliding_tile_attention",
    "pip install fastvideo-kernel", ("0.3.0", "0.3.2"),
)  # fmt: skip
PACKAGES = (FLASH4, FLASH3, FLASH2, SAGE, XFORMERS, NATTEN, FASTVIDEO)


def _qkv(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs["q"], inputs["k"], inputs["v"]


def _windowed(inputs: Inputs) -> bool:
    return inputs.get("window") is not None or bool(inputs.get("causal_time"))


def _beyond(inputs: Inputs) -> str | None:
    """What no peer has."""
    for name, what in (("kv_lens", "a number of valid text tokens a sample"), ("return_lse", "an lse to compare")):
        if inputs.get(name) is not None and inputs.get(name) is not False:
            return f"`{name}`: it has not {what}"
    if inputs.get("precision", "native") != "native":
        return f"precision {inputs['precision']!r} is ours alone"
    return None


def _dense_only(inputs: Inputs) -> str | None:
    return _beyond(inputs) or ("attends to every token: no window on a grid" if _windowed(inputs) else None)


def _head_dim(allowed: Callable[[int], bool], text: str) -> Callable[[Inputs], str | None]:
    def refuses(inputs: Inputs) -> str | None:
        head_dim = inputs["q"].shape[-1]
        return _dense_only(inputs) or (None if allowed(head_dim) else f"takes head_dim {text}; this is {head_dim}")

    return refuses


def _first(result: Any) -> Tensor:
    """The output, of those that also return an lse."""
    return result[0] if isinstance(result, (tuple, list)) else result


def _external(
    package: Package,
    why_not: str | None,
    call: Callable[[Callable[..., Any], Inputs], Tensor],
    refuses: Callable[[Inputs], str | None],
    note: str | None = None,
) -> Peer:
    found = package.find()
    if found.function is None:
        return skipped(package.name, found.version, found.why_not or "")
    if why_not:
        return skipped(package.name, found.version, why_not)
    notes = "; ".join(text for text in (note, package.note()) if text)
    return Peer(
        package.name,
        found.version,
        None,
        functools.partial(call, found.function),
        refuses=refuses,
        note=notes or None,
    )


# FlashAttention, SageAttention, xformers: all take our layout ------------------------------------------------------


def _flash(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    # FlashAttention-4 and the first releases of 3 return (out, lse), whatever was asked for.
    return _first(function(*_qkv(inputs), softmax_scale=inputs.get("scale"), causal=False))


def _sage2(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    return function(*_qkv(inputs), tensor_layout="NHD", is_causal=False, sm_scale=inputs.get("scale"))


def _sage1(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    q, k, v = _qkv(inputs)
    # Release 1 subtracts the mean of the keys in place, from the caller's own tensor. Here it is done on the way to a
    # new one, which moves the same bytes; softmax is the same with and without.
    k = k - k.mean(dim=1, keepdim=True)
    return function(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=inputs.get("scale"), smooth_k=False)


def _xformers(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    return function(*_qkv(inputs), scale=inputs.get("scale"))


def _xformers_refuses(inputs: Inputs) -> str | None:
    same = inputs["q"].shape[2] == inputs["k"].shape[2]
    return _dense_only(inputs) or (None if same else "takes as many KV heads as query heads")


# NATTEN, FastVideo: windows on a grid -------------------------------------------------------------------------------


def _natten(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    q, k, v = _qkv(inputs)
    if not _windowed(inputs):
        return _first(function(q, k, v, scale=inputs.get("scale")))
    na3d = importlib.import_module("natten").na3d
    grid = tuple(inputs["grid"])
    window = inputs.get("window") or grid
    out = na3d(
        *(x.unflatten(1, grid) for x in (q, k, v)),
        kernel_size=tuple(min(size, length) for size, length in zip(window, grid, strict=True)),
        stride=tuple(inputs.get("stride", (1, 1, 1))),
        is_causal=(bool(inputs.get("causal_time")), False, False),
        scale=inputs.get("scale"),
    )
    return _first(out).flatten(1, 3)


def _natten_refuses(inputs: Inputs) -> str | None:
    if why := _beyond(inputs):
        return why
    if _windowed(inputs) and inputs.get("text_len", 0):
        return "has no text tokens that see every token, beside a window"
    window = inputs.get("window")
    if window is not None and not isinstance(window[0], int):
        return "takes one window for all heads"
    return None


_STA_CANVASES = ((30, 48, 80), (36, 48, 48), (18, 48, 80))
_STA_TILE = (6, 8, 8)


def _tiles(x: Tensor, grid: Sequence[int]) -> Tensor:
    """``[B, S, heads, head_dim]`` in (T, H, W) order -> ``[B, heads, S, head_dim]``, one 6×8×8 tile after another."""
    (t, h, w), (a, b, c) = grid, _STA_TILE
    x = x.unflatten(1, (t // a, a, h // b, b, w // c, c)).permute(0, 7, 1, 3, 5, 2, 4, 6, 8)
    return x.flatten(2, 7).contiguous()


def _untile(x: Tensor, grid: Sequence[int]) -> Tensor:
    (t, h, w), (a, b, c) = grid, _STA_TILE
    x = x.unflatten(2, (t // a, h // b, w // c, a, b, c)).permute(0, 2, 5, 3, 6, 4, 7, 1, 8)
    return x.flatten(1, 6)


def _fastvideo(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    grid = tuple(inputs["grid"])
    heads = inputs["q"].shape[2]
    window = inputs["window"]
    rows = [window] * heads if isinstance(window[0], int) else window
    tiles = [[n // size for n, size in zip(row, _STA_TILE, strict=True)] for row in rows]
    # Its tokens come tile by tile: the way there and back belongs to what a user pays.
    q, k, v = (_tiles(x, grid) for x in _qkv(inputs))
    return _untile(function(q, k, v, tiles, 0, False, "x".join(map(str, grid))), grid)


def _fastvideo_refuses(inputs: Inputs) -> str | None:
    if why := _beyond(inputs):
        return why
    if inputs.get("window") is None:
        return "sliding tile attention has no dense form; video_sparse_attn adds block means, which is another function"
    if inputs.get("causal_time") or inputs.get("text_len", 0):
        return "is used without causal time and without text"
    if inputs.get("scale") is not None or inputs["q"].shape[2] != inputs["k"].shape[2]:
        return "takes the default scale, and as many KV heads as query heads"
    if tuple(inputs["grid"]) not in _STA_CANVASES:
        return f"takes grids {', '.join('x'.join(map(str, c)) for c in _STA_CANVASES)}; this is {tuple(inputs['grid'])}"
    window = inputs["window"]
    rows = [window] if isinstance(window[0], int) else window
    odd = all(n % (2 * size) == size for row in rows for n, size in zip(row, _STA_TILE, strict=True))
    if tuple(inputs.get("stride", (1, 1, 1))) != _STA_TILE or not odd:
        return f"windows are an odd number of 6x8x8 tiles at stride {_STA_TILE}"
    return None


# torch's own --------------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend, inputs: Inputs) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in _qkv(inputs))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, scale=inputs.get("scale"), enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


_SCORES_GIB = 4.0


def _math_refuses(inputs: Inputs) -> str | None:
    q, k = inputs["q"], inputs["k"]
    gib = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] * q.element_size() / 2**30
    return _dense_only(inputs) or (None if gib <= _SCORES_GIB else f"would hold {gib:.0f} GiB of scores at once")


def _sdpa_peers(device: torch.device, dtype: torch.dtype) -> list[Peer]:
    torch_version = f"torch {torch.__version__}"
    cudnn = cudnn_version()
    on_cuda = "needs a CUDA GPU" if device.type != "cuda" else None
    half_on_cuda = needs_dtype(dtype, *HALF) if device.type == "cuda" else None
    rows = (
        ("sdpa-flash", SDPBackend.FLASH_ATTENTION, torch_version, half_on_cuda, _dense_only),
        (
            "sdpa-cudnn", SDPBackend.CUDNN_ATTENTION, f"{torch_version}, cuDNN {cudnn}" if cudnn else torch_version,
            on_cuda or half_on_cuda or (None if cudnn else "torch was built without cuDNN"), _dense_only,
        ),
        ("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION, torch_version, on_cuda, _dense_only),
        ("sdpa-math", SDPBackend.MATH, torch_version, None, _math_refuses),
    )  # fmt: skip
    return [
        skipped(name, version, why)
        if why
        else Peer(name, version, None, functools.partial(_sdpa, backend), refuses=refuses)
        for name, backend, version, why, refuses in rows
    ]


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # One graph a shape, as a model would have it. Without fullgraph the limit on recompilations would end in eager
    # code that holds every score.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex(inputs: Inputs) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in _qkv(inputs))
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
    if not _windowed(inputs):
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
    """Every external kernel for spacetime_attention, with why not where one cannot run here."""
    half = needs_dtype(dtype, *HALF)
    sage_version = SAGE.find().version or "1"
    sage1 = sage_version.startswith("1.")
    return [
        *_sdpa_peers(device, dtype),
        Peer(
            "flex", f"torch {torch.__version__}", None, _flex, prepare=_flex_prepare, refuses=_beyond
        ),
        _external(
            FLASH4, needs_nvidia(device) or half, _flash,
            _head_dim(lambda d: d % 8 == 0 and d <= 256, "a multiple of 8, at most 256 (128 on sm_100)"),
        ),
        _external(
            FLASH3, needs_nvidia(device, only=(90,)) or half, _flash,
            _head_dim(lambda d: d % 8 == 0 and d <= 256, "a multiple of 8, at most 256"),
        ),
        _external(
            FLASH2, needs_nvidia(device) or half, _flash,
            _head_dim(lambda d: d % 8 == 0 and d <= 256, "a multiple of 8, at most 256"),
        ),
        _external(
            SAGE, needs_nvidia(device) or half, _sage1 if sage1 else _sage2,
            _head_dim(lambda d: d in (64, 96, 128), "64, 96 or 128")
            if sage1 else _head_dim(lambda d: d <= 128, "at most 128"),
            note="8-bit products of q and k: not exact",
        ),
        _external(
            XFORMERS, needs_nvidia(device) or needs_dtype(dtype, *HALF, torch.float32), _xformers, _xformers_refuses
        ),
        _external(
            NATTEN, needs_nvidia(device) or needs_dtype(dtype, *HALF, torch.float32), _natten, _natten_refuses
        ),
        _external(
            FASTVIDEO, needs_nvidia(device) or needs_dtype(dtype, torch.bfloat16), _fastvideo, _fastvideo_refuses
        ),
    ]  # fmt: skip
