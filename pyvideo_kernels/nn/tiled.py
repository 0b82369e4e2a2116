"""Running a decode in tiles, and going on in tiles where memory ran out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.blend_tile_ import blend_tile_
from .memory import free_memory, is_out_of_memory, release
from .tiling import Cost, Span, TilePlan, measure, plan_tiles
from .vae_stream import OP, VaeStream

Runs = list[tuple[int, int]]


@dataclass
class _Tile:
    """One tile of a clip: where it lies, and what its decode keeps."""

    row: Span
    column: Span
    state: Any


class Tiled:
    """A clip decoded in the tiles of a plan.

    Args:
        dtype: of the frames; None is that of the tiles.
        out: the clip's frames, to be written; None: tensors of their own.
    """

    def __init__(
        self,
        stream: VaeStream,
        latents: Tensor,
        runs: Runs,
        plan: TilePlan,
        dtype: torch.dtype | None = None,
        given: dict[str, Any] | None = None,
        out: Tensor | None = None,
    ) -> None:
        self.stream, self.latents, self.runs, self.plan = stream, latents, runs, plan
        self.dtype, self.given, self.out = dtype, given or {}, out
        height, width = stream.size(1, 1)
        self.rows = plan.spans(0, latents.shape[3], height, stream.grain)
        self.columns = plan.spans(1, latents.shape[4], width, stream.grain)
        self.size = plan.size(stream, *latents.shape[3:])

    def frames(self) -> Iterator[Tensor]:
        """``[B, C, t, H, W]``, run by run."""
        yield from self._run_by_run() if self.plan.streams else self._tile_by_tile()

    def _decode(self, tile: _Tile, run: tuple[int, int]) -> Tensor:
        z = self.latents[:, :, run[0] : run[1], tile.row.start : tile.row.stop, tile.column.start : tile.column.stop]
        with torch.no_grad():
            return self.stream.tile_step(z, tile.state, first=run[0] == 0, last=run == self.runs[-1])

    def _canvas(self, tile: Tensor, frames: int) -> Tensor:
        shape = (tile.shape[0], tile.shape[1], frames, *self.size)
        return tile.new_empty(shape, dtype=self.dtype or tile.dtype)

    def _tile(self, row: Span, column: Span) -> _Tile:
        return _Tile(row, column, self.stream.new_state(**self.given))

    def _blend(self, pixels: Tensor, tile: _Tile, out: Tensor, **strips: Any) -> None:
        row, column = tile.row, tile.column
        own = out[:, :, :, row.place : row.place + row.own, column.place : column.place + column.own]
        with torch.no_grad():
            blend_tile_(own, pixels, grain=self.stream.grain, clamp=self.stream.clamps, **strips)

    def _run_by_run(self) -> Iterator[Tensor]:
        tiles = [[self._tile(row, column) for column in self.columns] for row in self.rows]
        done = 0
        for run in self.runs:
            canvas: Tensor | None = None
            above: list[Tensor | None] = [None] * len(self.columns)
            for i, row in enumerate(tiles):
                left: Tensor | None = None
                for j, tile in enumerate(row):
                    pixels = self._decode(tile, run)
                    t = pixels.shape[2]
                    if not t:
                        continue
                    if canvas is None:
                        canvas = self._canvas(pixels, t) if self._apart(pixels) else self._slice(done, t)
                    below, right = self._strips(pixels, i, j, t)
                    self._blend(pixels, tile, canvas, above=above[j], left=left, below=below, right=right)
                    above[j], left = below, right
            if canvas is None:
                continue
            t = canvas.shape[2]
            if self.out is not None and canvas.device != self.out.device:
                canvas = self._slice(done, t).copy_(canvas)
            done += t
            yield canvas

    def _apart(self, pixels: Tensor) -> bool:
        """Whether frames cannot be written where they belong: nobody said where, or it is on another device."""
        return self.out is None or self.out.device != pixels.device

    def _slice(self, done: int, frames: int) -> Tensor:
        assert self.out is not None
        return self.out[:, :, done : done + frames]

    def _strips(self, pixels: Tensor, i: int, j: int, frames: int) -> tuple[Tensor | None, Tensor | None]:
        """Room for what the tiles below and to the right will fade from."""
        h, w = pixels.shape[3:]
        below = self.rows[i + 1].seam if i + 1 < len(self.rows) else 0
        right = self.columns[j + 1].seam if j + 1 < len(self.columns) else 0
        return (
            _like(pixels, frames, min(below, h), w) if below else None,
            _like(pixels, frames, h, min(right, w)) if right else None,
        )

    def _tile_by_tile(self) -> Iterator[Tensor]:
        clip: Tensor | None = None
        above: list[Tensor | None] = [None] * len(self.columns)
        total = self.stream.frames(self.latents.shape[2])
        counts: list[int] = []
        for i, row in enumerate(self.rows):
            left: Tensor | None = None
            for j, column in enumerate(self.columns):
                tile, counts, done = self._tile(row, column), [], 0
                below = right = None
                for run in self.runs:
                    pixels = self._decode(tile, run)
                    t = pixels.shape[2]
                    counts.append(t)
                    if not t:
                        continue
                    if clip is None:
                        clip = self._canvas(pixels, total) if self._apart(pixels) else self._slice(0, total)
                    if not done:
                        below, right = self._strips(pixels, i, j, total)
                    at = slice(done, done + t)
                    strips = {"above": above[j], "left": left, "below": below, "right": right}
                    cut = {name: None if strip is None else strip[:, :, at] for name, strip in strips.items()}
                    self._blend(pixels, tile, clip[:, :, at], **cut)
                    done += t
                above[j], left = below, right
        if clip is None:
            return
        if self.out is not None and clip.device != self.out.device:
            clip = self.out.copy_(clip)
        done = 0
        for t in counts:
            if t:
                yield clip[:, :, done : done + t]
            done += t


def _like(pixels: Tensor, frames: int, height: int, width: int) -> Tensor:
    """An uninitialised strip whose channels lie as those of ``pixels``."""
    b, c = pixels.shape[:2]
    if pixels.stride(1) == 1:
        return pixels.new_empty((b, frames, height, width, c)).permute(0, 4, 1, 2, 3)
    return pixels.new_empty((b, c, frames, height, width))


def tell(message: str) -> None:
    """Say something to whoever reads warnings."""
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def decoded(
    stream: VaeStream,
    latents: Tensor,
    chunk: int,
    tiling: Any,
    whole: Callable[[int], Iterator[Tensor]],
    *,
    dtype: torch.dtype | None = None,
    given: dict[str, Any] | None = None,
    out: Tensor | None = None,
    say: Callable[[str], None] = tell,
) -> Iterator[Tensor]:
    """The frames of a clip, piece by piece: whole while they fit, in tiles where they are asked for or do not.

    Steps of several latents are cut to one before frames are cut: that costs no FLOPs, and the frames are the same.
    Where memory runs out the clip is decoded again so, from its first latent, since a step that was cut short leaves
    caches of which some are of this step and some of the last. Frames that were delivered are not delivered again;
    with ``out`` all of them are written again, so that the clip is of one kind.

    Args:
        tiling: None, ``"auto"`` or a `TilePlan`; memory that runs out with a plan of the caller's is the caller's.
        whole: a fresh decode of whole frames in steps of so many latents, into ``out`` if that is given.
        say: told when tiles are taken because of memory.
    """
    given = given or {}
    device, joined = _device(stream, latents), out is not None
    plan = tiling if isinstance(tiling, TilePlan) else None
    if plan is not None and joined:
        plan = replace(plan, streams=False)
    if tiling == "auto":
        wanted = chunk
        plan, chunk = _fitting(stream, latents, chunk, given, joined)
        if plan is not None or chunk < wanted:
            say(f"{OP}: {_steps(wanted)} would not fit in memory: decoding {_way(stream, plan)}")
    delivered = 0
    while True:
        if plan is None:
            source = whole(chunk)
        else:
            source = Tiled(stream, latents, stream.steps(latents.shape[2], chunk), plan, dtype, given, out).frames()
        seen, failure = 0, None
        while True:
            try:
                piece = next(source, None)
            except (RuntimeError, MemoryError) as error:
                if isinstance(tiling, TilePlan) or not is_out_of_memory(error):
                    raise
                # Its traceback would keep the tensors of the step alive.
                failure, piece = error.with_traceback(None), None
            if piece is None:
                break
            seen += piece.shape[2]
            new, piece = piece[:, :, max(0, piece.shape[2] - max(0, seen - delivered)) :], None
            if new.shape[2]:
                delivered = seen
                yield new
            # Nor may the last piece count against the next step.
            del new
        if failure is None:
            return
        del source
        release(device)
        if plan is None and _cuttable(stream, latents, chunk):
            plan, chunk = _fitting(stream, latents, 1, given, joined)
        else:
            plan, chunk = _smaller(stream, latents, given, plan, joined), 1
            if plan is None:
                raise failure
        after = f" after {delivered} frames" if delivered else ""
        say(f"{OP}: not enough memory{after}: decoding again {_way(stream, plan)}")


def _steps(chunk: int) -> str:
    return "whole frames" if chunk == 1 else f"whole frames of {chunk} latents at once"


def _way(stream: VaeStream, plan: TilePlan | None) -> str:
    return "a latent at a time" if plan is None else f"in {plan.describe(stream)}"


def _cuttable(stream: VaeStream, latents: Tensor, chunk: int) -> bool:
    """Whether steps of one latent are other steps: some models leave no choice."""
    count = latents.shape[2]
    return chunk > 1 and stream.steps(count, 1) != stream.steps(count, chunk)


def _device(stream: VaeStream, latents: Tensor) -> torch.device:
    """Where the work is done: hooks may take the latents elsewhere."""
    from ..integrations.upfront import execution_device

    return execution_device(stream.vae) or latents.device


def _fitting(
    stream: VaeStream, latents: Tensor, chunk: int, given: dict[str, Any], joined: bool
) -> tuple[TilePlan | None, int]:
    """The cheapest way that fits in what is free now: whole frames, in smaller steps, then in tiles."""
    height, width = latents.shape[3:]
    free = free_memory(_device(stream, latents))
    plan = plan_tiles(stream, height, width, _cost(stream, latents, chunk, given), free, joined=joined)
    if plan is not None and _cuttable(stream, latents, chunk):
        chunk = 1
        plan = plan_tiles(stream, height, width, _cost(stream, latents, chunk, given), free, joined=joined)
    return plan, chunk


def _smaller(
    stream: VaeStream, latents: Tensor, given: dict[str, Any], plan: TilePlan | None, joined: bool
) -> TilePlan | None:
    """The cheapest tiles that fit in what is free now, half of what failed or less; None if there are none smaller."""
    height, width = latents.shape[3:]
    free, cost = free_memory(_device(stream, latents)), _cost(stream, latents, 1, given)
    rows, columns = (height, width) if plan is None else plan.tile
    found = None
    for most in (rows * columns // 2, rows * columns - 1):
        found = found or plan_tiles(stream, height, width, cost, free, most=most, joined=joined)
    return found


def _cost(stream: VaeStream, latents: Tensor, chunk: int, given: dict[str, Any]) -> Cost:
    try:
        return measure(stream, latents, chunk, given)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Cost(1, 1, 1, 1)  # not even that: the order of the tilings is all that is known
