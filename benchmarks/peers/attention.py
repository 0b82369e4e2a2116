"""External kernels for spacetime_attention.

Ours is ``[B, S, heads, head_dim]`` (others write BSHD, BMHK or "NHD"). Interfaces were read in each project's own
source, at the versions that `Package.read` names.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import torch_attention
from .package import HALF, Inputs, Package, Peer, needs_dtype, needs_nvidia, skipped
from .torch_attention import beyond, dense_only, qkv, windowed

FLASH4 = Package(
    "flash-attn-4", "flash-attn-4", ("flash_attn.cute",), "flash_attn_func",
    "pip install --pre 'flash-attn-4[cu13]' (without the extra for CUDA 12)", ("4.0.0b0", "4.0.0b27"),
)  # fmt: skip
FLASH3 = Package(
    "flash-attn-3", "flash_attn_3", ("flash_attn_interface", "flash_attn_3.flash_attn_interface"), "flash_attn_func",
    "pip install flash-attn-3 from PyTorch's index, or build hopper/ of Dao-AILab/flash-attention",
    ("3.0.0b1", "3.0.0"),
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


def _head_dim(allowed: Callable[[int], bool], text: str) -> Callable[[Inputs], str | None]:
    def refuses(inputs: Inputs) -> str | None:
        head_dim = inputs["q"].shape[-1]
        return dense_only(inputs) or (None if allowed(head_dim) else f"takes head_dim {text}; this is {head_dim}")

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
    # The card first: where it does not do, installing the package would not help.
    if why_not or found.function is None:
        return skipped(package.name, found.version, why_not or found.why_not or "")
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
    return _first(function(*qkv(inputs), softmax_scale=inputs.get("scale"), causal=False))


def _sage2(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    return function(*qkv(inputs), tensor_layout="NHD", is_causal=False, sm_scale=inputs.get("scale"))


def _sage1(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    q, k, v = qkv(inputs)
    # Release 1 subtracts the mean of the keys in place, from the caller's own tensor. Here it is done on the way to a
    # new one, which moves the same bytes; softmax is the same with and without.
    k = k - k.mean(dim=1, keepdim=True)
    return function(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=inputs.get("scale"), smooth_k=False)


def _xformers(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    return function(*qkv(inputs), scale=inputs.get("scale"))


def _xformers_refuses(inputs: Inputs) -> str | None:
    same = inputs["q"].shape[2] == inputs["k"].shape[2]
    return dense_only(inputs) or (None if same else "takes as many KV heads as query heads")


# NATTEN, FastVideo: windows on a grid -------------------------------------------------------------------------------


def _natten(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    q, k, v = qkv(inputs)
    if not windowed(inputs):
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
    if why := beyond(inputs):
        return why
    if windowed(inputs) and inputs.get("text_len", 0):
        return "has no text tokens that see every token, beside a window"
    window = inputs.get("window")
    if window is not None and not isinstance(window[0], int):
        return "takes one window for all heads"
    return None


# What FastVideo's sliding tile attention is built for: canvases with a suffix of at most 256 text tokens, and without.
_STA_TILE = (6, 8, 8)
_STA_WITH_TEXT = ((30, 48, 80),)
_STA_PLAIN = ((36, 48, 48), (18, 48, 80))


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
    grid, text = tuple(inputs["grid"]), inputs.get("text_len", 0)
    heads, video = inputs["q"].shape[2], prod(grid)
    tiles = [[n // size for n, size in zip(row, _STA_TILE, strict=True)] for row in _windows(inputs, heads)]
    # Its tokens come tile by tile: the way there and back belongs to what a user pays.
    q, k, v = (torch.cat([_tiles(x[:, :video], grid), x[:, video:].transpose(1, 2)], 2) for x in qkv(inputs))
    out = function(q, k, v, tiles, text, text > 0, "x".join(map(str, grid)))
    return torch.cat([_untile(out[:, :, :video], grid), out[:, :, video:].transpose(1, 2)], 1)


def _windows(inputs: Inputs, heads: int = 1) -> Sequence[Sequence[int]]:
    window = inputs["window"]
    return [window] * heads if isinstance(window[0], int) else window


def _fastvideo_refuses(inputs: Inputs) -> str | None:
    if why := beyond(inputs):
        return why
    if inputs.get("window") is None:
        return "sliding tile attention has no dense form; video_sparse_attn adds block means, which is another function"
    if inputs.get("causal_time") or inputs.get("scale") is not None:
        return "has no causal time, and the default scale alone"
    if inputs["q"].shape[-1] != 128 or inputs["q"].shape[2] != inputs["k"].shape[2]:
        # With another head_dim its sm_90 kernel is not launched, and the output stays uninitialised.
        return "takes head_dim 128, and as many KV heads as query heads"
    grid, text = tuple(inputs["grid"]), inputs.get("text_len", 0)
    canvases = _STA_WITH_TEXT if text else _STA_PLAIN
    if grid not in canvases or text > 256 or (text and inputs.get("text_side", "suffix") != "suffix"):
        names = " or ".join("x".join(map(str, canvas)) for canvas in canvases)
        return f"takes grid {names} {'with a suffix of at most 256 text tokens' if text else 'without text'}"
    whole = [
        n % size == 0 and n <= length and (n // size % 2 or n == length)
        for row in _windows(inputs)
        for n, size, length in zip(row, _STA_TILE, grid, strict=True)
    ]
    if tuple(inputs.get("stride", (1, 1, 1))) != _STA_TILE or not all(whole):
        tile = "x".join(map(str, _STA_TILE))
        return f"takes windows of an odd number of {tile} tiles (or all of them) with a stride of one tile"
    return None


def peers(device: torch.device, dtype: torch.dtype) -> list[Peer]:
    """Every external kernel for spacetime_attention, with why not where one cannot run here."""
    half = needs_dtype(dtype, *HALF)
    sage_version = SAGE.find().version or "1"
    sage1 = sage_version.startswith("1.")
    return [
        *torch_attention.peers(device, dtype),
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
