"""From settings to a film: check, plan, load once, sample, write. torch is imported when loading starts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..error_types import UsageError
from .modeldir import Model, describe_pipeline, read_model
from .models import resolve
from .plan import Plan, make_plan
from .progress import Reporter
from .settings import Settings, lora_file
from .video import check_output, read_image

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


@dataclass
class Result:
    """A sampled film.

    Args:
        frames: ``[T, H, W, 3]``, uint8, or fp32 in [0, 1] if that was asked for; not upscaled.
        fps: frames per second.
        stats: times per phase, op calls, memory, versions; what ``--stats`` writes.
        path: the file that was written, or None.
    """

    frames: np.ndarray
    fps: float
    stats: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None


class Sampler:
    """A model that samples films: checked on creation, loaded on first need, kept for the next film.

    Args:
        settings: everything but the film itself (model, ops, dtype, device, ...) is taken from here.
        pipe: an already loaded pipeline to use instead of ``settings.model``; it stays on its device, and is
            accelerated for as long as this object is open unless it already was, or ``settings.eager``.
        reporter: who hears of plans, phases and warnings.
    Raises:
        UsageError, ModelError: before anything is loaded.
    """

    def __init__(self, settings: Settings, pipe: Any = None, reporter: Reporter | None = None) -> None:
        self.settings = settings
        self.reporter = reporter or Reporter()
        self.pipe, self._given = pipe, pipe is not None
        if pipe is not None:
            for name, default in (("dtype", "auto"), ("device", "auto"), ("offload", "none"), ("lora", None)):
                if getattr(settings, name) != default:
                    raise UsageError(f"the pipeline is loaded already: choose its {name} where you load it")
            self.model: Model = describe_pipeline(pipe)
        else:
            self.model = read_model(resolve(settings.model, self.reporter.note), settings.model)
        self.report: Any = None
        self.device: torch.device
        self.dtype: torch.dtype
        self.dtype_why: str | None = None
        """Why this one, where a CPU chose."""
        self._ready = self._undo = False
        self.seconds: dict[str, float] = {}
        """Starting (imports, mostly torch's) and loading; the first film's stats take them."""
        self._projection: Any = None
        self._warned: set[str] = set()

    # Before anything heavy ---------------------------------------------------------------------------------------

    def plan(self, settings: Settings) -> Plan:
        """Check one film against the model; torch-free.

        Raises:
            UsageError, OutputError: one sentence and the remedy.
        """
        settings.check()
        size = None
        if settings.image is not None and self.model.takes_image:
            size = read_image(settings.image).size
        plan = make_plan(settings, self.model, size)
        if settings.output is not None:
            check_output(settings.output)
        elif settings.preview:
            raise UsageError("--preview is written beside the film: give an --output too")
        if self.model.embedded:
            from ..tiny.grammar import parse

            if settings.prompt not in self._warned and parse(settings.prompt) is None:
                self._warned.add(settings.prompt)
                self.reporter.warn(
                    f"{self.model.name} only knows sentences like 'a small red ball moves left on a black background'; "
                    f"{settings.prompt!r} is not one, so expect something else"
                )
        return plan

    # Loading -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Choose device and dtype and check what depends on them; imports torch, loads nothing."""
        if self._ready:
            return
        started = time.perf_counter()
        from . import cpu_dtype, kernels, loading

        s = self.settings
        if self._given:
            self.device = self.pipe._execution_device
            transformer = self.pipe.transformer if self.pipe.transformer is not None else self.pipe.transformer_2
            self.dtype = transformer.dtype
        else:
            self.device = loading.pick_device(s.device)
            width = loading.transformer_width(self.model.transformer)
            self.dtype = loading.pick_dtype(s.dtype, self.device, width)
            if s.dtype == "auto" and self.device.type == "cpu":
                self.dtype_why = cpu_dtype.choose(width).why
            if s.dtype == "fp16" and self.device.type == "cpu":
                self.reporter.note("--dtype fp16 is slow on a CPU: bf16 takes as little memory, fp32 is more exact")
            if s.offload != "none" and self.device.type != "cuda":
                self.reporter.note(
                    f"--offload {s.offload} does nothing on {self.device}: the weights are already there"
                )
        if not s.eager:
            kernels.check(kernels.op_names(s.ops), s.attention, s.impl, self.device)
        if s.lora is not None and not self._given:
            from .lora import check

            check(self.model, lora_file(s.lora)[0])
        self._ready = True
        self.seconds["start"] = time.perf_counter() - started

    def describe(self, plan: Plan) -> str:
        """The plan line."""
        from . import kernels, loading
        from .evaluation import planned

        self.prepare()
        if self.settings.eager:
            text = "diffusers' own modules"
        else:
            text = kernels.summary(self.settings, self.device, self.dtype)
        how = planned(self.settings, plan, self.device, self.dtype.itemsize)
        return plan.line(loading.dtype_name(self.dtype), str(self.device), text, how.words())

    def load(self) -> Any:
        """The pipeline, loaded and accelerated; the same one afterwards."""
        if self.pipe is not None and (self.report is not None or not self._given):
            return self.pipe
        self.prepare()
        from . import kernels, loading

        s = self.settings
        started = time.perf_counter()
        with self.reporter.phase("load"), loading.memory_remedy("loading", self.device, s.offload):
            if not self._given:
                loading.check_fits(self.model, self.dtype, self.device, s.offload)
                image = s.image is not None or self.model.wants_image
                pipe = loading.load_pipeline(self.model, self.dtype, image=image)
                if s.lora is not None:
                    from .lora import fold

                    # Before offloading: its hooks keep copies of the weights.
                    fold(pipe, *lora_file(s.lora))
                loading.place(pipe, self.device, s.offload)
                self.pipe = pipe
            swapped = self._given and kernels.is_accelerated(self.pipe)
            if s.eager and swapped:
                raise UsageError("eager was asked for and the pipeline is accelerated: restore(pipe) first")
            if not s.eager and not swapped:
                from ..integrations import accelerate

                self.report = accelerate(self.pipe, ops=kernels.op_names(s.ops), attention=s.attention, impl=s.impl)
                self._undo = self._given
        self.seconds["load"] = time.perf_counter() - started
        return self.pipe

    def close(self) -> None:
        """Give a pipeline that was passed in back as it was."""
        if self._undo:
            from ..integrations import restore

            restore(self.pipe)
            self._undo, self.report = False, None

    # Sampling ----------------------------------------------------------------------------------------------------

    def run(
        self,
        settings: Settings,
        *,
        callback: Callable[[int, int, Tensor], None] | None = None,
        latents: Tensor | None = None,
        as_float: bool = False,
    ) -> Result:
        """Sample one film, and write it if ``settings.output`` says where.

        Args:
            callback: called after each step with its index, the number of steps and the latents.
            latents: initial noise instead of the seed's.
            as_float: frames as fp32 in [0, 1].
        Raises:
            Interrupted: Ctrl-C; says what was kept.
            PyVideoError: one sentence and the remedy.
        """
        from .film import Film

        film = Film(self, settings, self.plan(settings))
        frames, stats, path = film.run(callback, latents, as_float)
        return Result(frames, film.plan.fps, stats, path)


def sample(
    prompt: str,
    *,
    model: Any = "tiny",
    output: str | Path | None = None,
    reporter: Reporter | None = None,
    callback: Callable[[int, int, Tensor], None] | None = None,
    latents: Tensor | None = None,
    as_float: bool = False,
    **options: Any,
) -> Result:
    """Sample a film from a prompt; what ``pyvideo sample`` runs.

        result = sample("a red ball moves left on a black background", seed=1, output="film.mp4")

    Args:
        prompt: what the film shows.
        model: ``tiny``, a diffusers directory, a hub id, or a loaded ``WanPipeline``/``WanImageToVideoPipeline``.
        output: where to write it (``.mp4``, ``.webm``, ``.gif``, a folder for PNGs); None: frames only.
        reporter: hears of plan, phases and warnings; silent by default.
        callback: called after each step with its index, the number of steps and the latents.
        latents: initial noise instead of the seed's.
        as_float: frames as fp32 in [0, 1] instead of uint8.
        options: any other field of ``Settings``: ``height``, ``steps``, ``seed``, ``eager``, ...
    Returns:
        Result: frames ``[T, H, W, 3]``, fps, stats and the path.
    Raises:
        UsageError, ModelError, OutOfMemoryError, OutputError: one sentence and the remedy, before minutes are spent.
        Interrupted: Ctrl-C; names what was kept.
    """
    known = {f.name for f in dataclasses.fields(Settings)}
    for name in options:
        if name not in known:
            raise UsageError(f"sample() has no option {name!r}; there are {', '.join(sorted(known))}")
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    name = str(model) if isinstance(model, (str, Path)) else ""
    settings = Settings(prompt=prompt, model=name, output=None if output is None else str(output), **options).check()
    sampler = Sampler(settings, None if name else model, reporter)
    try:
        return sampler.run(settings, callback=callback, latents=latents, as_float=as_float)
    finally:
        sampler.close()
