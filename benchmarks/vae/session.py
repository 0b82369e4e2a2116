"""The variants of one decoder: made, checked, timed in turns, timed layer by layer, counted."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyvideo_kernels import dispatch
from pyvideo_kernels.integrations import Report, accelerate

from ..e2e import quality
from ..e2e.clips import Clock, turns
from ..e2e.session import describe
from ..e2e.variants import sharing_copy
from ..models.architecture import Clip
from ..models.random_weights import fill, skeleton
from ..timing import Timing
from .layers import LayerTimes
from .traffic import Traffic

VARIANTS = ("eager", "channels_last", "compile", "ours", "compile+ours")
"""Stock; stock with weights and latents channels last; the stock decoder compiled; accelerate(vae); both."""
OnEntry = Callable[[str, str, dict[str, Any]], None]


@dataclass
class Entry:
    """A variant on its way to a row."""

    vae: Any = None
    report: Report | None = None
    first: float | None = None
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Session:
    """A VAE with random weights and latents for ``clip``.

    Args:
        float32: also decode in float32, and hold every variant to twice eager's error against that.
        until: a `time.monotonic` after which no further round is begun; None: no end.
    """

    def __init__(
        self, clip: Clip, device: torch.device, dtype: torch.dtype, *, seed: int, float32: bool, until: float | None
    ) -> None:
        self.clip, self.device, self.dtype, self.seed, self.until = clip, device, dtype, seed, until
        self.clock = Clock(device)
        self.float32 = float32
        self.vae: Any = fill(skeleton(clip.arch.vae, dtype), "vae", device, seed)
        self._settle(self.vae)
        channels = clip.arch.vae.config.get("z_dim") or clip.arch.vae.config["latent_channels"]
        noise = torch.randn((1, channels, *clip.latent), generator=torch.Generator().manual_seed(seed))
        family = clip.arch.family
        self.latents, self.options = family.decode_options(clip, noise.to(device, dtype), seed)
        self.resident = self.clock.allocated() or 0
        self.entries: dict[str, Entry] = {}
        self._eager: Any = None
        self._reference: Tensor | None = None

    def _settle(self, vae: Any) -> None:
        if self.clip.arch.vae_tiling:
            vae.enable_tiling()

    def run(self, variants: tuple[str, ...], rounds: int, layers: bool, on_entry: OnEntry) -> None:
        """Everything, in order; ``eager`` is the first of ``variants``."""
        self.entries = {name: Entry() for name in variants}
        if self.float32:
            self._reference = self._in_float32()
        for name in variants:
            self._guarded(name, self.warm, on_entry, "warm")
        for number in range(rounds):
            for name in turns([name for name, entry in self.entries.items() if entry.vae is not None], number):
                if number and self.until is not None and time.monotonic() > self.until:
                    break
                self._guarded(name, self.time, on_entry, "round")
        for name, entry in self.entries.items():
            # Hooks would break a compiled decoder's graphs.
            if layers and entry.vae is not None and "compile" not in name:
                self._guarded(name, self.time_layers, on_entry, "layers")
            if entry.error is None and name in ("eager", "ours"):
                entry.facts["counts"] = counted(self.clip, self.dtype, ours=name == "ours", options=self.options)

    def _guarded(self, name: str, work: Callable[[str, Entry], None], on_entry: OnEntry, event: str) -> None:
        entry = self.entries[name]
        try:
            work(name, entry)
        except Exception as error:
            entry.error, entry.vae = describe(error), None
            entry.facts["wrong"] = isinstance(error, quality.BrokenVideo)
            event = "failed"
        if entry.error is not None:
            gc.collect()  # outside the except clause, whose traceback holds on to tensors
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        on_entry(event, name, {"entry": entry})

    # One variant ------------------------------------------------------------------------------------------------

    def warm(self, name: str, entry: Entry) -> None:
        """Make a variant, decode once, and check the frames."""
        vae: Any = sharing_copy(self.vae)
        if name == "channels_last":
            _channels_last(vae)
        if "ours" in name:
            entry.report = accelerate(vae)
        if "compile" in name:
            vae.decoder.compile()
        calls = dispatch.calls()  # after accelerate(), which may have checked kernels
        start = time.perf_counter()
        frames = self._decode(vae)
        self.clock.synchronize()
        entry.first = time.perf_counter() - start
        entry.facts["calls"] = {
            f"{op}/{impl}": count - calls.get((op, impl), 0)
            for (op, impl), count in dispatch.calls().items()
            if count > calls.get((op, impl), 0)
        }
        entry.facts["fallbacks"] = entry.report.fallbacks() if entry.report else {}
        entry.facts["quality"] = self._quality(name, frames)
        entry.vae = vae

    def _decode(self, vae: Any, dtype: torch.dtype | None = None) -> Tensor:
        # Some decoders draw noise, from the generator of their device.
        torch.manual_seed(self.seed)
        latents, options = self.latents, self.options
        if dtype is not None:
            latents = latents.to(dtype)
            options = {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in options.items()}
        with torch.no_grad():
            out: Tensor = vae.decode(latents, **options, return_dict=False)[0]
        return out

    def _in_float32(self) -> Tensor | None:
        """The stock decoder's frames in float32, on the host; None where there is no memory for that."""
        try:
            # A copy of the weights too: converting a module changes its parameters where they are.
            return self._decode(copy.deepcopy(self.vae).float(), torch.float32).cpu()
        except (RuntimeError, MemoryError):
            return None

    def _quality(self, name: str, frames: Tensor) -> dict[str, Any]:
        quality.check_finite("frames", frames)
        out: dict[str, Any] = {}
        if self._reference is not None:
            error = out["error"] = quality.relative_error(frames, self._reference)
            if name == "eager":
                self._eager_error = error
            quality.check_error("frames", error, self._eager_error, self.dtype, self.device)
        shown = quality.frames(frames[:1].clamp(-1, 1))
        if name == "eager":
            self._eager = shown
        elif self._eager is not None:
            compared = quality.compare_videos(shown, self._eager)
            out |= {key: compared[key] for key in ("max_error", "identical", "psnr") if key in compared}
        return out

    def time(self, name: str, entry: Entry) -> None:
        """One timed decode."""
        before = self.clock.allocated()
        self.clock.synchronize()
        self.clock.reset_peak()
        start = self.clock.mark()
        frames = self._decode(entry.vae)
        end = self.clock.mark()
        self.clock.synchronize()
        entry.seconds.append(self.clock.seconds(start, end))
        peak = self.clock.peak()
        if peak is not None and before is not None:
            entry.peaks.append(peak - before)
        del frames

    def time_layers(self, name: str, entry: Entry) -> None:
        """Where the time goes, in a decode that is not among the timed ones."""
        with LayerTimes(entry.vae, self.clock) as times:
            self.clock.synchronize()
            start = self.clock.mark()
            self._decode(entry.vae)
            end = self.clock.mark()
        self.clock.synchronize()
        entry.facts["layers"] = times.rows(self.clock.seconds(start, end))

    # Rows ---------------------------------------------------------------------------------------------------------

    def rows(self, ceilings: Mapping[str, float]) -> list[dict[str, Any]]:
        """What is known so far."""
        base = self.entries.get("eager")
        out = []
        for name, entry in self.entries.items():
            row: dict[str, Any] = {"variant": name, **entry.facts}
            if entry.error is not None:
                out.append(row | {"error": entry.error})
                continue
            if entry.seconds:
                timing = Timing.of(entry.seconds)
                row |= {"seconds": timing.median, "spread": timing.spread, "rounds": timing.rounds}
                row["first"] = entry.first
                if base is not None and base.seconds:
                    row["ratio"] = Timing.of(base.seconds).median / timing.median
                if entry.peaks:
                    row["memory"] = self.resident + max(entry.peaks)
            if "counts" in row:
                counts = row["counts"]
                row["floor"] = {
                    "bytes": counts["bytes"] / ceilings["copy"],
                    "flops": counts["flops"] / ceilings["gemm"],
                }
            out.append(row)
        return out


def _channels_last(vae: nn.Module) -> None:
    """Weights of convolutions channels last, by themselves: what a user of the stock decoder can do."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for module in vae.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() in formats:
                data = parameter.detach().contiguous(memory_format=formats[parameter.dim()])
                setattr(module, name, nn.Parameter(data, requires_grad=parameter.requires_grad))


def count(clip: Clip, dtype: torch.dtype, *, ours: bool, options: Mapping[str, Any] | None = None) -> Traffic:
    """What decoding ``clip`` asks for, with the stock forwards or ours; nothing is computed."""
    vae: Any = skeleton(clip.arch.vae, dtype).to("meta")
    channels = clip.arch.vae.config.get("z_dim") or clip.arch.vae.config["latent_channels"]
    if clip.arch.vae_tiling:
        vae.enable_tiling()
    if ours:
        accelerate(vae)
    given = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in (options or {}).items()}
    latents = torch.empty((1, channels, *clip.latent), dtype=dtype, device="meta")
    with torch.device("meta"), torch.no_grad(), Traffic() as traffic:
        vae.decode(latents, **given)
    return traffic


def counted(clip: Clip, dtype: torch.dtype, *, ours: bool, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`count` as a row has it: sums, and by op."""
    traffic = count(clip, dtype, ours=ours, options=options)
    by_op = {op: {"kernels": k, "bytes": b, "flops": f} for op, (k, b, f) in traffic.by_op().items()}
    return {"kernels": traffic.kernels, "bytes": traffic.bytes, "flops": traffic.flops, "ops": by_op}
