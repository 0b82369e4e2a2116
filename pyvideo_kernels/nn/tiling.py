"""Spatial tiles of a decode: where they lie, what they cost, and the fewest FLOPs that fit in memory.

Tiles overlap, and what two of them share is decoded twice, so whole frames are the cheapest whenever they fit. Where
they do not, there are two ways through a clip of tiles. Step by step, every tile in turn: frames stream, and every tile
keeps its caches between its turns, which together are a little more than those of whole frames. Tile by tile, each
through the whole clip: one tile's caches, and no frame is whole before the last tile. The first is right where a step
is too large, the second where the caches are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import bad_option
from .memory import Meter
from .vae_stream import OP, VaeStream

_SEAM = 64
"""Pixels that neighbouring tiles share where the VAE has no default of its own."""
_HEADROOM = 0.9
"""Share of the free memory that a plan may fill: libraries' scratch memory and fragments are not counted."""
_PROBE = {"cuda": 4}
"""Edge of the clip that costs are measured on, in latents; 2 on other devices, where it takes time."""


@dataclass(frozen=True)
class Span:
    """A tile along one axis.

    Args:
        start, stop: its latents.
        place, own: where its own pixels begin in the frames, and how many they are.
        seam: pixels at its start that it shares with the tile before.
    """

    start: int
    stop: int
    place: int
    own: int
    seam: int


@dataclass(frozen=True)
class TilePlan:
    """Tiles of a decode, (height, width) each.

        TilePlan((32, 32), (24, 24))        # tiles of 32 × 32 latents, a new one every 24

    Args:
        tile: latents of a tile.
        stride: latents from one tile to the next.
        blend: pixels over which neighbours fade into each other; None is all that they share.
        kept: pixels of a tile that are its own. None is those of the stride, and all that are left of the tile that
            reaches the edge; a number is for all, as diffusers has it, with slivers at the edge where they come out.
        streams: every step decodes all tiles, and frames come as they do without tiles. False decodes one tile of the
            whole clip after the other: one tile's caches in memory, and all frames at the end. ``decode``, which
            gives all frames at the end anyway, always does that.
    Raises:
        ValueOptionError: sizes that no tiling can have.
    """

    tile: tuple[int, int]
    stride: tuple[int, int]
    blend: tuple[int, int] | None = None
    kept: tuple[int, int] | None = None
    streams: bool = True

    def __post_init__(self) -> None:
        for name, least in (("tile", 1), ("stride", 1), ("blend", 0), ("kept", 1)):
            value = getattr(self, name)
            if value is None and name in ("blend", "kept"):
                continue
            whole = isinstance(value, (tuple, list)) and len(value) == 2
            if not whole or any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in value):
                bad_option("TilePlan", name, f"two integers (height, width) of at least {least}", value)
        # Flags of a VAE may leave gaps, which diffusers closes up.
        if self.kept is None and any(step > size for step, size in zip(self.stride, self.tile, strict=True)):
            bad_option("TilePlan", "stride", f"at most the tile, {self.tile}", self.stride)

    def spans(self, axis: int, length: int, ratio: int, grain: int = 1) -> list[Span]:
        """Tiles along height (axis 0) or width (1) of ``length`` latents of ``ratio`` pixels each.

        Seams are whole steps of ``grain`` pixels.
        """
        tile, stride = self.tile[axis], self.stride[axis]
        blend = (tile - stride) * ratio if self.blend is None else self.blend[axis]
        kept = stride * ratio if self.kept is None else self.kept[axis]
        spans: list[Span] = []
        before = place = 0
        for start in range(0, length, stride):
            stop = min(start + tile, length)
            pixels = (stop - start) * ratio
            last = self.kept is None and stop == length
            own = pixels if last else min(pixels, kept, length * ratio - place)
            if own <= 0:
                break
            seam = min(before, pixels, blend) // grain * grain
            spans.append(Span(start, stop, place, own, seam))
            before, place = pixels, place + own
            if last:
                break
        return spans

    def size(self, stream: VaeStream, height: int, width: int) -> tuple[int, int]:
        """Pixels of the frames: whole ones, unless the flags of a VAE cut tiles that do not add up to them."""
        ratio = stream.size(1, 1)
        last = [self.spans(axis, n, ratio[axis])[-1] for axis, n in enumerate((height, width))]
        return last[0].place + last[0].own, last[1].place + last[1].own

    def describe(self, stream: VaeStream) -> str:
        """``tiles of 256×256 pixels``: width, then height."""
        height, width = stream.size(*self.tile)
        return f"tiles of {width}×{height} pixels"


@dataclass(frozen=True)
class Cost:
    """What a decode takes, in bytes for each latent pixel of what is decoded together.

    Args:
        step: while a step is under way, its frames included and the state not.
        state: between steps.
        frames: the pixels of a step; ``clip``: those of the whole clip.
    """

    step: float
    state: float
    frames: float
    clip: float

    def of_whole(self, height: int, width: int) -> float:
        """Bytes of decoding whole frames."""
        return (self.step + self.state) * height * width

    def of_tiles(
        self, plan: TilePlan, height: int, width: int, ratio: tuple[int, int], *, joined: bool = False
    ) -> float:
        """Bytes of decoding so; ``joined``: into frames that are there already."""
        rows, columns = (
            plan.spans(axis, length, r) for axis, (length, r) in enumerate(zip((height, width), ratio, strict=True))
        )
        most = max(s.stop - s.start for s in rows) * max(s.stop - s.start for s in columns)
        everywhere = sum(s.stop - s.start for s in rows) * sum(s.stop - s.start for s in columns)
        # Strips that wait for their neighbours: a row of them and a column, each twice, one being read.
        strips = 2 * (
            max(s.seam for s in rows) / ratio[0] * width + max(s.seam for s in columns) / ratio[1] * rows[0].stop
        )
        room = strips + (0 if joined else height * width)
        if plan.streams:
            return self.step * most + self.state * everywhere + self.frames * room
        return (self.step + self.state) * most + self.clip * room


def tile_of_flags(stream: VaeStream) -> TilePlan:
    """The tiles that the VAE's own flags describe (``enable_tiling``), as diffusers cuts and blends them."""
    vae: Any = stream.vae
    if hasattr(vae, "tile_overlap_factor_height"):  # CogVideoX: shares of a tile
        sizes = (vae.tile_sample_min_height, vae.tile_sample_min_width)
        tile = (vae.tile_latent_min_height, vae.tile_latent_min_width)
        shares = (vae.tile_overlap_factor_height, vae.tile_overlap_factor_width)
        stride = (int(tile[0] * (1 - shares[0])), int(tile[1] * (1 - shares[1])))
        blend = (int(sizes[0] * shares[0]), int(sizes[1] * shares[1]))
        return TilePlan(tile, stride, blend, (sizes[0] - blend[0], sizes[1] - blend[1]))
    grain, ratio = stream.grain, vae.spatial_compression_ratio

    def along(size: int, step: int) -> tuple[int, int, int, int]:
        kept = step // grain * grain
        return size // ratio, step // ratio, max(0, size // grain * grain - kept), kept

    rows = along(int(vae.tile_sample_min_height), int(vae.tile_sample_stride_height))
    columns = along(int(vae.tile_sample_min_width), int(vae.tile_sample_stride_width))
    tile, stride, blend, kept = zip(rows, columns, strict=True)
    return TilePlan(tile, stride, blend, kept)


def overlap(stream: VaeStream) -> tuple[int, int]:
    """Latents that neighbouring tiles share: as many as the VAE's own flags have, whether they are on or not."""
    try:
        own = tile_of_flags(stream)
    except (AttributeError, ValueError):
        height, width = stream.size(1, 1)
        return max(1, _SEAM // height), max(1, _SEAM // width)
    return max(1, own.tile[0] - own.stride[0]), max(1, own.tile[1] - own.stride[1])


def tilings(height: int, width: int, shared: tuple[int, int], most: int | None = None) -> Iterator[TilePlan]:
    """Every even tiling of a latent size, the fewest FLOPs first.

    Args:
        shared: latents that neighbours share; a tile is more than twice as long. Tilings that share less come last.
        most: latents of the largest tile that is wanted.
    """

    def along(length: int, share: int) -> Iterator[tuple[int, int, int]]:
        """(tile, stride, latents decoded in all)"""
        yield length, length, length
        for count in range(2, length + 1):
            tile = math.ceil((length + (count - 1) * share) / count)
            if tile <= 2 * share:
                return
            yield tile, tile - share, length + (count - 1) * share

    while True:
        found = {
            (all_h * all_w, -h * w, (h, w), (step_h, step_w))
            for h, step_h, all_h in along(height, shared[0])
            for w, step_w, all_w in along(width, shared[1])
            if (h < height or w < width) and (most is None or h * w <= most)
        }
        for _, _, tile, stride in sorted(found):
            yield TilePlan(tile, stride)
        if shared == (1, 1):
            return
        shared = (max(1, shared[0] // 2), max(1, shared[1] // 2))


def plan_tiles(
    stream: VaeStream,
    height: int,
    width: int,
    cost: Cost,
    free: float | None,
    *,
    most: int | None = None,
    joined: bool = False,
) -> TilePlan | None:
    """The fewest FLOPs that fit: None, whole frames, where those do; else the tiling with the least decoded twice.

    Of two ways to decode the same tiles the one that streams is taken where it fits, unless nobody waits for frames.
    If nothing fits, the tiling that takes the least memory.

    Args:
        height, width: of the latents.
        free: bytes; None where nobody knows: then whole frames, or the cheapest tiles that ``most`` allows.
        most: latents of the largest tile that is wanted, after whole frames (or larger tiles) have failed.
        joined: the frames are wanted together, in memory that is there already.
    """
    budget = math.inf if free is None else free * _HEADROOM
    if most is None and cost.of_whole(height, width) <= budget:
        return None
    ratio, least, smallest = stream.size(1, 1), math.inf, None
    for tiles in tilings(height, width, overlap(stream), most):
        for streams in (False,) if joined else (True, False):
            plan = TilePlan(tiles.tile, tiles.stride, streams=streams)
            need = cost.of_tiles(plan, height, width, ratio, joined=joined)
            if need <= budget:
                return plan
            if need < least:
                least, smallest = need, plan
    return smallest


@torch.no_grad()
def measure(stream: VaeStream, latents: Tensor, chunk: int, given: dict[str, Any]) -> Cost:
    """What decoding these latents takes, read off the first steps of a clip of a few latents across.

    Nothing of it is guessed from a configuration: the ops that run, what they keep, dtypes and caches are those of this
    model on this device.
    """
    side = _PROBE.get(latents.device.type, 2)
    steps = stream.steps(latents.shape[2], chunk)
    few = latents[:, :, : steps[min(2, len(steps) - 1)][1], :side, :side]
    area = few.shape[3] * few.shape[4]
    steps = stream.steps(few.shape[2], chunk)
    peak = kept = pixels = rate = 0.0

    def run_all(meter: Meter | None) -> None:
        nonlocal peak, kept, pixels, rate
        state = stream.new_state(**given)
        for run in steps:
            frames = stream.tile_step(few[:, :, run[0] : run[1]], state, first=run[0] == 0, last=run == steps[-1])
            if meter is not None:
                size = frames.numel() * frames.element_size()
                pixels, rate = max(pixels, size), max(rate, size / max(1, frames.shape[2]))
                del frames
                peak, kept = max(peak, meter.peak), max(kept, meter.live)
                meter.peak = meter.live

    devices = [latents.device] if latents.device.type == "cuda" else []
    # Decoders that draw noise draw the same with and without this; compiled parts run as they are written, where every
    # operation can be seen.
    with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
        run_all(None)  # what is made once and kept, packed weights say, is no cost of a step
        with Meter() as meter:
            run_all(meter)
    total = rate * stream.frames(latents.shape[2])
    return Cost((peak - kept) / area, kept / area, pixels / area, total / area)


def check_tiling(tiling: Any) -> None:
    """None, ``"auto"``, ``"vae"`` or a plan, or a typed error."""
    if not isinstance(tiling, TilePlan) and tiling not in (None, "auto", "vae"):
        bad_option(OP, "tiling", 'None, "auto", "vae" or a TilePlan', tiling)


def resolve(tiling: Any, stream: VaeStream, latents: Tensor) -> Any:
    """``"vae"`` as what the VAE's flags say of these latents; everything else as it is."""
    if tiling != "vae":
        return tiling
    return tile_of_flags(stream) if stream.tiled(latents) else None
