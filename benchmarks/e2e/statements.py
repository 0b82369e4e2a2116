"""What an end-to-end result says, in sentences that can be quoted: each names both sides, kernels, clip and machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..compare import FLOOR, WIDTH
from ..report import tables

_WORDS = {"total": "over a clip", "step": "in a denoising step", "decode": "in decoding"}


def speed_statements(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each variant and each baseline that it is held against.

    What runs our ops is held against all that does not; the rest against eager.
    """
    rows = [row for row in result["rows"] if "seconds" in row]
    stock = [row for row in rows if row["accelerate"] is None]
    out = []
    for row in rows:
        against = stock if row["accelerate"] is not None else stock[:1]
        out += [sentence(row, base, result) for base in against if base is not row]
    return out


def sentence(row: Mapping[str, Any], base: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """How much faster ``row`` is than ``base``, and under which circumstances."""
    phases = []
    for phase, words in _WORDS.items():
        a, b = base["seconds"].get(phase), row["seconds"].get(phase)
        if a and b:
            same = "" if differs(a, b) else ", the same within the spread"
            seconds = f"{tables.number(b['median'])} s against {tables.number(a['median'])} s"
            phases.append(f"{tables.ratio(a['median'] / b['median'])} × {words} ({seconds}{same})")
    settings = result["settings"]
    return (
        f"{row['variant']} against {base['variant']}: {', '.join(phases)}; self-attention by {kernel(row)} against "
        f"{kernel(base)}; {tables.clip(settings)}, {settings['tokens']} tokens; {tables.machine(result)}."
    )


def kernel(row: Mapping[str, Any]) -> str:
    """The self-attention kernel that took the most time."""
    names = (row.get("attention") or {}).get("self")
    return tables.short_kernel(names[0]) if names else "not known"


def differs(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether two medians are further apart than their spreads explain, by the rule of ``bench compare``."""
    noise = math.hypot(a["spread"] / a["median"], b["spread"] / b["median"])
    return abs(math.log(a["median"] / b["median"])) > max(FLOOR, WIDTH * noise)
