"""One film: the phases of a run, their times, and what is kept when it is interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .plan import Plan
from .problems import Interrupted
from .settings import Settings
from .video import destination, read_image
from .writer import FilmWriter

if TYPE_CHECKING:
    from torch import Tensor

    from .run import Sampler

_OnStep = Callable[[int, int, "Tensor"], None]


class Reel:
    """The frames of a film as they arrive: kept for the caller, in bytes or floats, and handed on in bytes.

    Args:
        plan: says how many frames there will be.
        as_float: keep them as fp32 in [0, 1].
        hand_on: takes ``[t, H, W, 3]`` uint8.
    """

    def __init__(self, plan: Plan, as_float: bool, hand_on: Callable[[Any], None]) -> None:
        self.plan, self.as_float, self.hand_on = plan, as_float, hand_on
        self.count = 0
        self.frames: Any = None

    def add(self, frames: Any) -> None:
        """Frames ``[t, H, W, 3]``: uint8, or floats in [0, 1]."""
        import numpy as np

        if not len(frames):
            return
        if self.frames is None:
            shape = (self.plan.frames, *frames.shape[1:])
            self.frames = np.empty(shape, np.float32 if self.as_float else np.uint8)
        start, self.count = self.count, self.count + len(frames)
        into = self.frames[start : self.count]
        in_bytes = frames if frames.dtype == np.uint8 else np.rint(frames * 255).astype(np.uint8)
        into[:] = frames if self.as_float else in_bytes
        # What is kept does not change any more, so the encoder may read it when it gets there.
        self.hand_on(in_bytes if self.as_float else into)


class Film:
    """One run of the loop."""

    def __init__(self, sampler: Sampler, settings: Settings, plan: Plan) -> None:
        self.sampler, self.settings, self.plan = sampler, settings, plan
        self.reporter = sampler.reporter
        self.seconds: dict[str, float] = {}
        self.phase = "load"
        self.writer: FilmWriter | None = None
        self.path: Path | None = None
        self.preview_path: Path | None = None
        self.previewed = False

    def run(
        self, callback: _OnStep | None, latents: Tensor | None, as_float: bool
    ) -> tuple[Any, dict[str, Any], Path | None]:
        """Frames, stats and the path that was written."""
        sampler = self.sampler
        try:
            pipe = sampler.load()
            self.seconds = {"start": 0.0, "load": 0.0} | sampler.seconds
            sampler.seconds = {}
            clean = self._sample(pipe, callback, latents)
            with self._written() as add:
                reel = self._decode(pipe, clean, Reel(self.plan, as_float, add))
        except KeyboardInterrupt:
            raise Interrupted(self.phase, self._keep()) from None
        finally:
            if self.writer is not None:
                self.writer.discard()
        return reel.frames[: reel.count], self.stats(), self.path

    @contextmanager
    def _written(self) -> Iterator[Callable[[Any], None]]:
        """What takes frames to the file while this is open; at the end the file is whole. No output: nowhere."""
        if self.settings.output is None:
            yield lambda frames: None
            return
        with self.reporter.phase("write", self.plan.frames) as advance:
            writer = self.writer = FilmWriter(
                self.settings.output, self.plan.fps, self.metadata(), upscale=self.plan.upscale,
                note=self.reporter.note, on_frame=lambda index: advance(),
            )  # fmt: skip
            yield writer.add
            self.phase = "write"
            started = time.perf_counter()
            self.path = writer.finish()
            # What it took beside the decoding is in the decoding's time.
            self.seconds["write"] = time.perf_counter() - started

    @contextmanager
    def _phase(self, name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        from .loading import memory_remedy

        self.phase = name
        started = time.perf_counter()
        with (
            self.reporter.phase(name, total) as advance,
            memory_remedy(name, self.sampler.device, self.sampler.settings.offload),
        ):
            yield advance
            self._wait()
        self.seconds[name] = time.perf_counter() - started

    def _wait(self) -> None:
        """Finish what the GPU was given, so that times are those of the work."""
        if self.sampler.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.sampler.device)

    def _sample(self, pipe: Any, callback: _OnStep | None, latents: Tensor | None) -> Tensor:
        """Clean latents."""
        import torch

        from .. import dispatch
        from .evaluation import planned, settle
        from .loading import unknown_words
        from .loop import denoise, encode_text, prepare_latents
        from .steps import build_scheduler, prepare_steps

        s, plan, device = self.settings, self.plan, self.sampler.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.calls_before = dispatch.calls()
        if not self.sampler.model.embedded and (words := unknown_words(pipe.tokenizer, s.prompt)):
            self.reporter.warn(f"the model's tokenizer does not know {', '.join(words)}")
        with self._phase("text"):
            conditions = encode_text(pipe, s.prompt, s.negative, plan.guided, device)
            image = None if s.image is None else read_image(s.image)
            noise = prepare_latents(pipe, plan, s.seed, device, conditions, image)
            if latents is not None:
                noise = latents.to(device, torch.float32)
        scheduler = build_scheduler(pipe.scheduler, plan.scheduler)
        own = self.sampler.settings
        from .kernels import op_names

        stepper, timesteps, why = prepare_steps(
            scheduler, plan.steps, device, eager=own.eager, ops=op_names(own.ops), impl=own.impl
        )
        if why and not own.eager:
            self.reporter.note(f"diffusers takes the steps: {why}")
        self.stepped_by = stepper.kind
        wanted = planned(own, plan, device, self.sampler.dtype.itemsize)
        how = self.evaluation = settle(wanted, pipe, own)
        if how != wanted:
            self.reporter.note(f"guidance in {how.guidance_batch.why}")
        show = self._preview_writer(pipe)
        with self._phase("denoise", total=len(timesteps)) as advance:

            def on_step(i: int, x: Tensor) -> None:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                advance()
                if show is not None:
                    show(i, len(timesteps), stepper.x0 if stepper.x0 is not None else x)
                if callback is not None:
                    callback(i, len(timesteps), x)

            clean = denoise(pipe, plan, noise, conditions, stepper, timesteps, scheduler.sigmas, on_step, how=how)
        self.steps_taken = len(timesteps)
        return clean

    def _decode(self, pipe: Any, clean: Tensor, reel: Reel) -> Reel:
        from .loop import streams

        with self._phase("decode", total=int(clean.shape[2])) as advance:
            if not self.sampler.settings.eager and streams(pipe.vae):
                self._decode_as_stream(pipe, clean, reel, advance)
            else:
                self._decode_at_once(pipe, clean, reel, advance)
        # With model offload, the last module goes back too.
        pipe.maybe_free_model_hooks()
        return reel

    def _decode_as_stream(self, pipe: Any, clean: Tensor, reel: Reel, advance: Callable[[], None]) -> None:
        import torch

        from .loop import arrive, decode_stream

        # Bytes are made where the frames are decoded, a quarter of what floats would weigh on their way.
        dtype = None if reel.as_float else torch.uint8
        for frames in arrive(decode_stream(pipe, clean, dtype=dtype, say=self.reporter.note)):
            reel.add(frames)
            advance()

    def _decode_at_once(self, pipe: Any, clean: Tensor, reel: Reel, advance: Callable[[], None]) -> None:
        """The VAE's own ``decode``, with a look at what its decoder gives on the way."""
        from .loading import is_out_of_memory
        from .loop import decode

        def on_frames(pixels: Tensor) -> None:
            reel.add(pixels.cpu().numpy())
            advance()

        try:
            video = decode(pipe, clean, on_frames)
        except (RuntimeError, MemoryError) as error:
            # The minutes of denoising are worth a second try in tiles.
            if not is_out_of_memory(error) or pipe.vae.use_tiling:
                raise
            video = None
        if video is None:
            from ..nn.memory import release

            release(self.sampler.device)
            self.reporter.note("not enough memory to decode whole frames: decoding in tiles")
            pipe.vae.enable_tiling()
            try:
                video = decode(pipe, clean)
            finally:
                pipe.vae.disable_tiling()
        reel.add(video[reel.count :].cpu().numpy())

    def _preview_writer(self, pipe: Any) -> Callable[[int, int, Tensor], None] | None:
        s = self.settings
        if not s.preview or s.output is None:
            return None
        from .preview import Projection, write_strip

        target = destination(s.output)
        path = self.preview_path = target.with_name(f"{target.stem}.preview.png")
        if self.sampler._projection is None:
            self.sampler._projection = Projection(pipe.vae, self.sampler.device)
        projection = self.sampler._projection
        # With model offload the VAE would push the transformer off the GPU each time.
        refine = self.sampler.settings.offload != "model"
        self.reporter.note(f"preview: {path}")

        def show(i: int, total: int, x: Tensor) -> None:
            # About ten pictures a film.
            if (i + 1) % max(1, total // 10) == 0 or i == total - 1:
                if refine:
                    projection.refine(x)
                write_strip(path, x, projection)
                self.previewed = True

        return show

    def _keep(self) -> list[Path]:
        """After Ctrl-C: what was decoded becomes a shorter film of its own; a preview stays."""
        kept = []
        if self.writer is not None and self.phase in ("decode", "write") and self.settings.output is not None:
            whole = destination(self.settings.output)
            partial = self.writer.keep(whole.with_name(f"{whole.stem}.partial{whole.suffix}"))
            if partial is not None:
                kept.append(partial)
        if self.previewed and self.preview_path is not None:
            kept.append(self.preview_path)
        return kept

    def metadata(self) -> dict[str, Any]:
        """What the film's file says of its making; no times and no paths, so that the same run gives the same file."""
        from .kernels import attention_of
        from .loading import dtype_name

        s, own = self.settings, self.sampler.settings
        choice = attention_of(self.sampler.pipe)  # of a pipeline that came accelerated, its own
        return {
            "generator": f"pyvideo-kernels {__version__}",
            "prompt": s.prompt,
            "negative": s.negative or "",
            "seed": s.seed,
            "model": self.plan.model,
            "image": Path(s.image).name if s.image else None,
            "lora": Path(own.lora).name if own.lora else None,
            "height": self.plan.height,
            "width": self.plan.width,
            "frames": self.plan.frames,
            "fps": self.plan.fps,
            "steps": self.plan.steps,
            "guidance": self.plan.guidance,
            "scheduler": self.plan.scheduler,
            "dtype": dtype_name(self.sampler.dtype),
            "kernels": "diffusers" if own.eager else "pyvideo",
            "attention": None if choice is None else choice.to_dict(),
        }

    def stats(self) -> dict[str, Any]:
        """Everything ``--stats`` keeps of this film."""
        from .. import dispatch
        from ..collect_env import versions
        from .stats import peak_memory

        calls: dict[str, dict[str, int]] = {}
        for (op, impl), count in sorted(dispatch.calls().items()):
            if new := count - self.calls_before.get((op, impl), 0):
                calls.setdefault(op, {})[impl] = new
        report = self.sampler.report
        return {
            **self.metadata(),
            "plan": self.plan.as_dict(),
            "device": str(self.sampler.device),
            "dtype_why": self.sampler.dtype_why,
            "steps_by": self.stepped_by,
            "evaluation": self.evaluation.as_dict(),
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()}
            | {"total": round(sum(self.seconds.values()), 4)},
            "seconds_per_step": round(self.seconds["denoise"] / max(1, self.steps_taken), 5),
            "calls": calls,
            "accelerate": None if report is None else report.to_dict(),
            "peak_memory_bytes": peak_memory(self.sampler.device),
            "versions": versions(),
        }
