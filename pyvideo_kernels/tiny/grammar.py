"""The sentences the embedded model understands, and their meaning as data.

A sentence is ``a [small|big] COLOR SHAPE MOTION on a BACKGROUND background``.  Nothing here needs torch.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..error_types import ValueOptionError

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 35),
    "green": (35, 175, 60),
    "blue": (40, 70, 230),
    "yellow": (240, 225, 40),
    "purple": (150, 45, 195),
    "cyan": (40, 215, 225),
    "white": (250, 250, 250),
    "orange": (250, 135, 20),
}
SHAPES = ("ball", "square", "triangle", "cross", "ring", "diamond")
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (0, 0, 0), "gray": (110, 110, 110)}
SIZES = ("small", "big")
"""A sentence that names no size means the size between the two."""

ATTRIBUTES = ("color", "shape", "motion", "background", "size")

_HELD_OUT_ONE_IN = 10
_PATTERN = re.compile(
    rf"a (?:(?P<size>{'|'.join(SIZES)}) )?(?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)}) "
    rf"(?P<motion>{'|'.join(MOTIONS)}) on a (?P<background>{'|'.join(BACKGROUNDS)}) background"
)


@dataclass(frozen=True, order=True)
class Scene:
    """What one sentence of the grammar says.

    Args:
        color: a key of ``COLORS``.
        shape: one of ``SHAPES``.
        motion: one of ``MOTIONS``.
        background: a key of ``BACKGROUNDS``.
        size: one of ``SIZES``, or None where the sentence names none.
    Raises:
        ValueOptionError: names the field, what is allowed, and what came.
    """

    color: str
    shape: str
    motion: str
    background: str
    size: str | None = None

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[str | None, ...]] = {
            "color": tuple(COLORS),
            "shape": SHAPES,
            "motion": MOTIONS,
            "background": tuple(BACKGROUNDS),
            "size": (None, *SIZES),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ValueOptionError(f"{field}: expected one of {values}, got {getattr(self, field)!r}")

    @property
    def prompt(self) -> str:
        """The sentence itself."""
        size = f"{self.size} " if self.size else ""
        return f"a {size}{self.color} {self.shape} {self.motion} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether this colour, shape and motion are never seen together in training.

        The rule hashes the three words, so every size and background of a held-out triple is held out too,
        and the split stays the same on every machine and in every version.
        """
        key = f"{self.color}/{self.shape}/{self.motion}".encode()
        return zlib.crc32(key) % _HELD_OUT_ONE_IN == 0


def parse(prompt: str) -> Scene | None:
    """The scene a sentence describes, or None for a sentence outside the grammar.

    Case, repeated blanks and a closing full stop do not matter.
    """
    match = _PATTERN.fullmatch(" ".join(prompt.lower().split()).rstrip(" ."))
    return Scene(**match.groupdict()) if match else None  # type: ignore[arg-type]


def all_scenes() -> Iterator[Scene]:
    """Every scene of the grammar, in a fixed order."""
    for color, shape, motion, background, size in product(COLORS, SHAPES, MOTIONS, BACKGROUNDS, (None, *SIZES)):
        yield Scene(color, shape, motion, background, size)


def vocabulary() -> list[str]:
    """Every word of the grammar, sorted."""
    return sorted({word for scene in all_scenes() for word in scene.prompt.split()})
