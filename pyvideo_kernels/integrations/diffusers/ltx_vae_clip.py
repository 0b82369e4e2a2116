"""A clip on its way through LTX-Video's decoder in pieces: what each layer keeps between the pieces.

A convolution that sees one frame ahead is a delay line: with frames up to n it gives frames up to n - 1, and its last
one when it is told that no more will come. Through some fifty of them a frame is under way for a good part of a clip,
so that at the end as many frames are still inside. They are let out a few layers a call, as `Clip.budget` allows: all
at once would be a chunk as long as the delay of the whole decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...ops.causal_conv3d import next_cache

_T = TypeVar("_T")


@dataclass(frozen=True)
class Window:
    """What a convolution over frames ``[B, T, H, W, C]`` sees besides: frames before them, and the last one again."""

    cache: Tensor | None = None
    pad_end: int = 0

    @classmethod
    def whole(cls, x: Tensor, ahead: int) -> tuple[Window, Tensor]:
        """Of a whole clip: the window, and the frames that are left to convolve."""
        if ahead == 0 or x.shape[1] == 1:
            return cls(), x  # of a single frame all three are the same
        return cls(x[:, :ahead], ahead), x[:, ahead:]

    def padded(self, x: Tensor, past: int) -> Tensor:
        """The frames with all that is seen besides, the oldest repeated for a past that is too short."""
        parts = [x] if self.cache is None else [self.cache, x]
        missing = past - (0 if self.cache is None else self.cache.shape[1])
        if missing > 0:
            parts.insert(0, parts[0][:, :1].expand(-1, missing, -1, -1, -1))
        if self.pad_end:
            parts.append(x[:, -1:].expand(-1, self.pad_end, -1, -1, -1))
        return torch.cat(parts, 1) if len(parts) > 1 else x


@dataclass
class _Line:
    """What a convolution has seen last, and whether it gave its last frame."""

    past: Tensor | None = None
    flushed: bool = False


class Clip:
    """The state of one clip, keyed by layer; and where in the clip the present call is.

    Opaque to the hooks that a call passes through, which move and copy lists, dicts and tensors.
    """

    def __init__(self, temb: Tensor | None = None) -> None:
        self.temb = temb
        # Latents a call: the size of the first.
        self.chunk = 0
        # Whether the layer that is running gets the last of its frames in this call, or got it before.
        self.ended = False
        # How many latents' worth of last frames this call may still let out.
        self.budget = 0.0
        # Frames of the layer that is running to one latent.
        self.rate = 1
        self._lines: dict[nn.Module, _Line] = {}
        self._held: dict[nn.Module, Tensor] = {}
        self._known: dict[Hashable, Any] = {}

    def begin(self, frames: int, *, first: bool, last: bool) -> None:
        """A call with ``frames`` more latents; none to let out what is inside."""
        self.chunk = frames if first else self.chunk
        self.rate = 1
        self.ended = last or frames == 0
        self.budget = math.inf if last and frames else float(self.chunk)

    def window(self, conv: Any, x: Tensor, ahead: int) -> tuple[Window, Tensor]:
        """What ``conv`` convolves now, after the next frames ``x`` of its input (maybe none)."""
        line = self._lines.setdefault(conv, _Line())
        reach = conv.kernel_size[0] - 1
        if ahead == 0:
            window = Window(line.past)
            line.past = None if self.ended else next_cache(x, line.past, reach)
            return window, x
        end = 0
        if self.ended and not line.flushed:
            if self.budget < ahead / self.rate:
                self.ended = False  # for the layers after this one
            else:
                self.budget -= ahead / self.rate
                line.flushed = True
                end = ahead
        past, line.past = line.past, None
        if past is None and x.shape[1]:
            past, x = x[:, :ahead], x[:, ahead:]
        if not line.flushed:
            line.past = next_cache(x, past, reach)
        if end and past is not None and x.shape[1] == 0:
            return Window(past), past[:, -1:]
        return Window(past, end), x

    def delayed(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The frames that ``layer`` still holds, and then ``x``."""
        held = self._held.pop(layer, None)
        return x if held is None else torch.cat([held, x], 1)

    def hold(self, layer: nn.Module, frames: Tensor, used: int) -> None:
        """Keep all but the first ``used`` of ``frames`` for the next call."""
        if used < frames.shape[1]:
            # A view would keep the whole chunk alive.
            self._held[layer] = frames[:, used:].clone(memory_format=torch.contiguous_format) if used else frames

    def once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What ``make`` gave the first time in this clip."""
        if key not in self._known:
            self._known[key] = make()
        known: _T = self._known[key]
        return known

    def knows(self, key: Hashable) -> bool:
        """Whether `once` has made this."""
        return key in self._known

    def first(self, layer: nn.Module) -> bool:
        """True the first time in this clip."""
        seen = (layer, "first") in self._known
        self._known[layer, "first"] = True
        return not seen
