"""What the plans of several models have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .swap import Left, Plan, Settings, Swap


def not_plain(module: Any, kind: type[nn.Module]) -> str | None:
    """Why ``module`` is not a ``kind`` that a forward of ours can stand in for, or None."""
    if type(module) is not kind:
        home = type(module).__module__.partition(".")[0]
        return f"it is a {home} {type(module).__name__}, not a plain {kind.__name__}"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
    return None


def odd_conv(conv: Any, padding: tuple[int, ...]) -> str | None:
    """Why no op can be this convolution, or None: it pads with zeros by ``padding``, and does nothing uncommon."""
    if conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros":
        return "it has groups, dilation or a padding other than zeros"
    if any(size % 2 == 0 for size in conv.kernel_size[-2:]) or tuple(conv.padding) != padding:
        return "its padding is not half of an odd kernel"
    return None


def add(result: Plan, settings: Settings, reason: str | None, ops: Iterable[str], swap: Swap) -> None:
    """Plan ``swap``, for those of ``ops`` that were asked for; or say that it is left for ``reason``."""
    wanted = [op for op in ops if op in settings.ops]
    if reason is not None:
        result.left += [Left(swap.path, op, reason) for op in wanted]
    elif wanted:
        result.swaps.append(swap)
