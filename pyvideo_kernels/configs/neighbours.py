"""What configurations are made of and how far two of them are apart: the pieces of a ``candidates`` function."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

from ..errors import ValueOptionError

C = TypeVar("C")


def combinations(config: C, **choices: Iterable[Any]) -> Iterator[C]:
    """``config`` with every combination of ``choices`` of its fields that makes a configuration."""
    for values in itertools.product(*map(tuple, choices.values())):
        with contextlib.suppress(ValueOptionError):
            yield replace(config, **dict(zip(choices, values, strict=True)))  # type: ignore[type-var]


def around(value: int, *, steps: int = 1) -> list[int]:
    """``value`` halved and doubled up to ``steps`` times, itself first."""
    out = [value]
    for step in range(1, steps + 1):
        out += [value << step, value >> step]
    return [n for n in out if n >= 1]


def threads(arch: str, num_warps: int) -> int:
    """Threads of a block."""
    return num_warps * (64 if arch.startswith("gfx") else 32)


# fp32 elements a thread can hold in tiles and still have registers for addresses.
MAX_TILE_REGISTERS = 176


def distance(rule: Any, config: Any) -> float:
    """Halvings and doublings between two configurations; changing what a warp holds counts once more.

    A tile twice as large with twice the warps is nearer than either alone, which is how good tiles lie.
    """
    away = 0.0
    for f in fields(rule):
        a, b = getattr(rule, f.name), getattr(config, f.name)
        if isinstance(a, bool):
            away += 2.0 * (a != b)  # another kernel altogether
        elif f.name == "num_stages":
            away += abs(a - b)
        else:
            away += abs(math.log2(a / b)) if a and b else float(a != b)
    return away + abs(math.log2(config.per_warp / rule.per_warp))


def require(config: Any, *, powers: tuple[str, ...], at_least: int = 1, tile: int = 0) -> None:
    """What every configuration must hold: powers of two, a number of warps and stages that exists."""
    name = type(config).__name__
    for field_name in (*powers, "num_warps"):
        value, low = getattr(config, field_name), 1 if field_name == "num_warps" else at_least
        if not isinstance(value, int) or value < low or value & (value - 1):
            raise ValueOptionError(f"{name}: `{field_name}` must be a power of two from {low} on; got {value!r}")
    if config.num_warps > 16:
        raise ValueOptionError(f"{name}: `num_warps` must be at most 16; got {config.num_warps}")
    if not 1 <= getattr(config, "num_stages", 1) <= 8:
        raise ValueOptionError(f"{name}: `num_stages` must be from 1 to 8; got {config.num_stages!r}")
    if tile > 65536:
        raise ValueOptionError(f"{name}: a tile has at most 65536 elements; got {tile}")
