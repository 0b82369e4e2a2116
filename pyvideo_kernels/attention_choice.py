"""What ``attention=`` asks for: which attention each layer and each denoising step runs. Torch-free.

``choose`` reads the three spellings (a name, a mapping, the command line's text) and checks every number;
``AttentionChoice`` says what a layer runs at a step, and ``LayerAttention`` turns sizes given as fractions into tokens
once the grid is known. All of it is plain integers, so that a graph compiled for any grid can hold it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Tokens, or (numerator, denominator) of an axis: integer arithmetic rounds a fraction up exactly.
Size = int | tuple[int, int]
Triple = tuple[int, int, int]

# The ops behind each kind of attention, the one that attends last. `spacetime_attention` in a precision of its own and
# `video_sparse_attention` are functions that call several.
_NATIVE = ("spacetime_attention",)
_BY_PRECISION = {"int8": ("quantize_qk", "int8_attention"), "fp8": ("quantize_qk", "fp8_attention")}
_TILES = ("block_mean", "block_sparse_attention")
PROLOGUES = {"int8": "qk_norm_rope_int8", "fp8": "qk_norm_rope_int8", "tiles": "qk_norm_rope_means"}
"""By precision, or for a choice of tiles, the norm and rotation of q and k that writes what the ops after it read."""
PREPARES = {"qk_norm_rope_int8": "quantize_qk", "qk_norm_rope_means": "block_mean"}
"""The op that each of them makes unnecessary."""
ATTENTION_OPS = frozenset((*_NATIVE, *_BY_PRECISION["int8"], *_BY_PRECISION["fp8"], *_TILES, *PROLOGUES.values()))
"""Ops that run only where ``attention=`` asks for them."""


@dataclass(frozen=True)
class LayerAttention:
    """The self-attention of one layer, dense unless one of ``window``, ``top_k`` and ``share`` is given.

    Args:
        window: keys a query sees along (time, height, width): one row, or one a head.
        stride: queries that share a window along each axis.
        top_k: tiles that the queries of a tile see.
        share: of the estimated attention mass, which the tiles that a tile's queries see must hold.
        tile: tokens of a tile along (time, height, width).
        precision: of the products, as ``spacetime_attention`` takes it.
    """

    window: tuple[tuple[Size, Size, Size], ...] = ()
    stride: Triple = (1, 1, 1)
    top_k: Size | None = None
    share: float | None = None
    tile: Triple = (4, 4, 4)
    precision: str = "native"

    @property
    def tiled(self) -> bool:
        """Whether tiles are chosen, by `video_sparse_attention`."""
        return self.top_k is not None or self.share is not None

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that run it."""
        return _TILES if self.tiled else _BY_PRECISION.get(self.precision, _NATIVE)

    @property
    def prologue(self) -> str | None:
        """The op that norms and rotates q and k for it; None: ``qk_norm_rope``, as for any other."""
        return PROLOGUES.get("tiles" if self.tiled else self.precision)

    @property
    def op(self) -> str:
        """The op that attends."""
        return self.ops[-1]

    @property
    def dense(self) -> bool:
        """Whether every query sees every key, in the inputs' own precision."""
        return not self.window and not self.tiled and self.precision == "native"

    def window_on(self, grid: Sequence[int]) -> tuple[list[Any] | None, list[int]]:
        """``window`` in tokens (a row, or one a head) and the stride, for ``spacetime_attention``.

        None where every window is the whole grid: that is dense attention, which has faster kernels.
        """
        rows = [[tokens(size, n) for size, n in zip(row, grid, strict=True)] for row in self.window]
        if all(size >= n for row in rows for size, n in zip(row, grid, strict=True)):
            return None, [1, 1, 1]
        # A fraction of a short axis may come out smaller than the stride.
        stride = [min(s, *(row[axis] for row in rows)) for axis, s in enumerate(self.stride)]
        return (rows if len(rows) > 1 else rows[0]), stride

    def tiles_of(self, grid: Sequence[int]) -> int:
        """Tiles that the grid is cut into; ragged ones count."""
        count = 1
        for n, size in zip(grid, self.tile, strict=True):
            count *= -(-n // size)
        return count

    def top_k_on(self, grid: Sequence[int]) -> int | None:
        """``top_k`` in tiles, at most all of them."""
        if self.top_k is None:
            return None
        count = self.tiles_of(grid)
        return min(tokens(self.top_k, count), count)

    def sparsity(self, grid: Sequence[int]) -> float | None:
        """The share of pairs of query and key that is left out; None where the data decide."""
        if self.share is not None:
            return None if self.share < 1 else 0.0
        top_k = self.top_k_on(grid)
        if top_k is not None:
            return 1 - top_k / self.tiles_of(grid)
        if not self.window:
            return 0.0
        kept = [
            math.prod(min(tokens(size, n), n) / n for size, n in zip(row, grid, strict=True)) for row in self.window
        ]
        return 1 - sum(kept) / len(kept)

    def describe(self, grid: Sequence[int] | None = None) -> str:
        """In words; with the grid, in its tokens."""
        if self.window:
            text = self._describe_window(grid)
        elif self.share is not None:
            text = f"tiles of {_times(self.tile)} holding {_percent(self.share)} of the mass"
        elif self.top_k is not None:
            if grid is not None:
                shown = f"{self.top_k_on(grid)} of {self.tiles_of(grid)}"
            else:
                shown = _shown(self.top_k) + ("" if isinstance(self.top_k, int) else " of the")
            text = f"top {shown} tiles of {_times(self.tile)}"
        else:
            text = "dense"
        if self.precision != "native":
            text += f" {self.precision}" if text == "dense" else f", {self.precision}"
        sparsity = 0.0 if grid is None else self.sparsity(grid)
        return text if not sparsity else f"{text}, {_percent(sparsity)} sparse"

    def _describe_window(self, grid: Sequence[int] | None) -> str:
        rows = self.window
        if grid is not None:
            rows = tuple(
                tuple(min(tokens(size, n), n) for size, n in zip(row, grid, strict=True))  # type: ignore[misc]
                for row in rows
            )
        distinct = list(dict.fromkeys(_times(_shown(size) for size in row) for row in rows))
        if len(distinct) == 1:
            text = f"window {distinct[0]}"
        else:
            more = ", ..." if len(distinct) > 3 else ""
            text = f"windows by head {', '.join(distinct[:3])}{more}"
        if grid is not None:
            text += f" of {_times(grid)}"
        return text if self.stride == (1, 1, 1) else f"{text}, stride {_times(self.stride)}"

    def to_dict(self) -> dict[str, Any] | str:
        """What was asked for, as plain data that ``choose`` takes."""
        if not self.window and not self.tiled:
            return "dense" if self.dense else self.precision
        out: dict[str, Any] = {}
        if self.window:
            rows = [[_number(size) for size in row] for row in self.window]
            out["window"] = rows if len(rows) > 1 else rows[0]
            if self.stride != (1, 1, 1):
                out["stride"] = list(self.stride)
        else:
            if self.top_k is not None:
                out["top_k"] = _number(self.top_k)
            else:
                out["share"] = self.share
            out["tile"] = list(self.tile)
        if self.precision != "native":
            out["precision"] = self.precision
        return out


DENSE = LayerAttention()


@dataclass(frozen=True)
class AttentionChoice:
    """What ``attention=`` asked for.

    Args:
        base: what a layer runs that no exception names.
        layers: exceptions by index of the block.
        dense_steps: this many denoising steps are dense, or this share of them.
    """

    base: LayerAttention
    layers: Mapping[int, LayerAttention] = field(default_factory=dict)
    dense_steps: Size = 0

    def layer(self, index: int) -> LayerAttention:
        """What block ``index`` runs, where the step does not say dense."""
        return self.layers.get(index, self.base)

    @property
    def exact(self) -> bool:
        """Whether every layer attends as the model defines it."""
        return all(layer.dense for layer in (self.base, *self.layers.values()))

    def dense_at(self, step: Any, count: Any) -> bool | None:
        """Whether step ``step`` of ``count`` is one of the dense ones; None if that cannot be told."""
        if self.dense_steps == 0:
            return False
        # Numbers only: a tensor would have to be waited for.
        if not isinstance(step, int):
            return None
        if not isinstance(self.dense_steps, int):
            if not isinstance(count, int):
                return None
            return step < tokens(self.dense_steps, count)
        return step < self.dense_steps

    def unfit(self, blocks: int, heads: int) -> str | None:
        """Why a model with so many blocks and heads cannot run it, or None."""
        beyond = [index for index in self.layers if index >= blocks]
        if beyond:
            return f"names block {min(beyond)}; there are {blocks}, 0 to {blocks - 1}"
        for layer in (self.base, *self.layers.values()):
            if len(layer.window) not in (0, 1, heads):
                return f"`window` must be one row, or one for each of {heads} heads; got {len(layer.window)}"
        return None

    def density(self, grid: Sequence[int], blocks: int, steps: int) -> float:
        """The share of pairs of query and key that a film computes, at most: where the data decide, all of them."""
        kept = [1 - (self.layer(index).sparsity(grid) or 0.0) for index in range(blocks)]
        dense = min(steps, tokens(self.dense_steps, steps))
        return (dense + (steps - dense) * sum(kept) / len(kept)) / steps

    def ops_of(self, layer: LayerAttention) -> tuple[str, ...]:
        """The ops that a layer which runs ``layer`` may call."""
        return layer.ops if self.dense_steps == 0 else tuple(dict.fromkeys((*layer.ops, *DENSE.ops)))

    def ops(self) -> tuple[str, ...]:
        """The ops that any layer may call."""
        found = (op for layer in (self.base, *self.layers.values()) for op in self.ops_of(layer))
        return tuple(dict.fromkeys(found))

    def prologues(self) -> tuple[str, ...]:
        """Ops that make q and k for some layer, with what it reads besides."""
        found = (layer.prologue for layer in (self.base, *self.layers.values()))
        return tuple(dict.fromkeys(name for name in found if name is not None))

    def note(self, layer: LayerAttention, grid: Sequence[int] | None = None) -> str:
        """What a layer runs, with the dense steps."""
        text = layer.describe(grid)
        if self.dense_steps == 0 or layer.dense:
            return text
        return f"{text}; {self._steps} dense"

    @property
    def _steps(self) -> str:
        if isinstance(self.dense_steps, int):
            return "first step" if self.dense_steps == 1 else f"first {self.dense_steps} steps"
        return f"first {_percent(self.dense_steps[0] / self.dense_steps[1])} of the steps"

    def __str__(self) -> str:
        """In words, exceptions included."""
        parts = [self.base.describe()]
        if self.dense_steps != 0:
            parts.append(f"{self._steps} dense")
        by_layer: dict[LayerAttention, list[int]] = {}
        for index, layer in self.layers.items():
            by_layer.setdefault(layer, []).append(index)
        for layer, indices in by_layer.items():
            parts.append(f"block{'s' * (len(indices) > 1)} {ranges(indices)} {layer.describe()}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any] | str:
        """What was asked for, as plain data that ``choose`` takes."""
        base = self.base.to_dict()
        if not self.layers and self.dense_steps == 0:
            return base
        out: dict[str, Any] = dict(base) if isinstance(base, dict) else {}
        if self.base.precision != "native":
            out["precision"] = self.base.precision
        if self.dense_steps != 0:
            out["dense_steps"] = _number(self.dense_steps)
        dense = sorted(index for index, layer in self.layers.items() if layer.dense)
        if dense:
            first = dense == list(range(len(dense)))
            out["dense_layers"] = len(dense) if first else dense
        others: dict[LayerAttention, list[int]] = {}
        for index, layer in self.layers.items():
            if not layer.dense:
                others.setdefault(layer, []).append(index)
        if others:
            out["layers"] = {ranges(indices): layer.to_dict() for layer, indices in others.items()}
        return out


def tokens(size: Size, n: int) -> int:
    """A size in tokens: itself, or its fraction of ``n`` rounded up."""
    return size if isinstance(size, int) else -(-n * size[0] // size[1])


def ranges(indices: Iterable[int]) -> str:
    """``0-3+7`` for 0, 1, 2, 3 and 7."""
    parts: list[list[int]] = []
    for index in sorted(indices):
        if parts and parts[-1][1] == index - 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return "+".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _number(size: Size) -> int | float:
    return size if isinstance(size, int) else size[0] / size[1]


def _shown(size: Size) -> str:
    """As it was written: a fraction keeps its point, so that the whole axis is not taken for one token."""
    return str(size) if isinstance(size, int) else f"{size[0] / size[1]:.4g}" + (".0" if size[0] == size[1] else "")


def _times(sizes: Iterable[object]) -> str:
    return "×".join(str(size) for size in sizes)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
