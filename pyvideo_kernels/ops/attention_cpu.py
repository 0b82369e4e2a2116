"""When the compiled attention goes before PyTorch's on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .spacetime_attention import sees_all


@functools.cache
def multiplies_bf16() -> bool:
    """Whether the compiled kernel has bf16 products here, and PyTorch's none that are faster.

    With AMX, which the compiled kernel does not use, PyTorch multiplies tiles.
    """
    level = _native.part("attention_level")
    if level is None or level(torch.empty(0, dtype=torch.bfloat16, device="cpu")) != "avx512_bf16":
        return False
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return has_amx is not None and not has_amx()


def in_order(choices: tuple[str, ...], args: Sequence[Any]) -> tuple[tuple[str, ...], str]:
    """`spacetime_attention`'s order for a call's arguments, and why where it is another than usual.

    Dense attention without padding is PyTorch's, but for bf16 where the CPU multiplies that.
    """
    q, grid, window, causal_time, kv_lens = args[0], args[3], args[4], args[6], args[9]
    if kv_lens is not None or not sees_all(grid, window, causal_time):
        return choices, ""
    return _dense(choices, q)


def vae_in_order(choices: tuple[str, ...], args: Sequence[Any]) -> tuple[tuple[str, ...], str]:
    """The same for `vae_attention`, which is dense."""
    return _dense(choices, args[0])


def _dense(choices: tuple[str, ...], q: Tensor) -> tuple[tuple[str, ...], str]:
    if q.dtype == torch.bfloat16 and multiplies_bf16():
        return choices, ""
    first = ("sdpa", *(impl for impl in choices if impl != "sdpa"))
    return first, "PyTorch's first for dense attention"
