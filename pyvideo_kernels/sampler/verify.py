"""What ``pyvideo verify`` does: each op a model calls, on its real inputs, and a clip eager against accelerated."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import dispatch
from ..attention_text import choose
from ..error_types import UsageError
from ..verify import Row, verify_calls
from .evaluation import planned, settle
from .kernels import is_accelerated, op_names
from .loading import memory_remedy
from .loop import Conditions, decode, denoise, encode_text, prepare_latents
from .modeldir import Model
from .plan import TEXT_TOKENS, Plan
from .progress import Reporter
from .run import Sampler
from .settings import Settings
from .steps import build_scheduler, prepare_steps

_PROMPT = "a small red ball moves left on a black background"
_HIGHER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True)
class Clip:
    """One stage of the clip (``latents`` or ``pixels``), all errors against a run in higher precision.

    Args:
        error, eager_error: relative root mean square, accelerated and eager.
        worst, eager_worst: largest error over the largest value.
        psnr: of the accelerated stage against eager's, in dB (``inf``: equal).
        problem: the broken rule, empty if it holds.
    """

    stage: str
    error: float
    eager_error: float
    worst: float
    eager_worst: float
    psnr: float
    problem: str = ""


@dataclass
class Verification:
    """What verify() found.

    Args:
        plan: the clip.
        rows: a row per check of an op.
        clips: a row per stage of the clip.
        fallbacks: op -> reason -> calls that went to the stock code.
    """

    plan: Plan
    device: torch.device
    dtype: torch.dtype
    rows: list[Row] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    fallbacks: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return bool(self.clips) and not self.problems()

    def problems(self) -> list[str]:
        """What does not hold, each with what to do about it."""
        out = []
        wrong: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.rows:
            if row.failed:
                wrong.setdefault((row.op, row.impl, row.dtype), []).append(row)
        named = {op for op, _, _ in wrong}
        for (op, impl, dtype), rows in wrong.items():
            first = rows[0]
            size = "" if first.head_dim is None else f", head_dim {first.head_dim},"
            more = f" (and in {len(rows) - 1} more checks)" if len(rows) > 1 else ""
            out.append(
                f"{op}: impl {impl!r} in {dtype}{size} is wrong in its {first.check}, {first.what}: {first.error}"
                f"{more}; leave it out (accelerate(ops=...) without {op!r}), and report it with the output of "
                "pyvideo doctor"
            )
        for clip in self.clips:
            if clip.problem:
                blame = f"the ops above ({', '.join(sorted(named))}) are to blame" if named else (
                    "every op held by itself: find the one with ops=[...], and report it with the output of pyvideo "
                    "doctor"
                )  # fmt: skip
                out.append(f"the clip's {clip.stage}: {clip.problem}; {blame}")
        return out


class KeepFloat64(TorchFunctionMode):
    """Leaves float64 as it is where a model casts to fp32 on its own, so that stock code runs in float64 throughout."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if wide and func is Tensor.float:
            return args[0]
        if wide and func is Tensor.to:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if (kwargs or {}).get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def higher_precision(*modules: Any) -> Iterator[None]:
    """Run modules in the next wider dtype: fp16 and bf16 weights in fp32, fp32 weights in float64. Given back exactly.

    A module's weights are widened by its first parameter's dtype, all alike; widening loses nothing, so rounding back
    restores every weight to the bit.
    """
    before: list[tuple[Tensor, torch.dtype]] = []
    try:
        for module in modules:
            wide = _HIGHER[next(module.parameters()).dtype]
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < torch.finfo(wide).bits:
                    before.append((tensor, tensor.dtype))
                    tensor.data = tensor.data.to(wide)
        with KeepFloat64():
            yield
    finally:
        for tensor, dtype in before:
            tensor.data = tensor.data.to(dtype)


def clip_settings(settings: Settings, model: Model) -> Settings:
    """A few frames at a fraction of the model's size, through every stage of the decoder and every order of step."""
    d, m = model.defaults, model.multiple
    height, width = (min(n, max(2 * m, min(256, n // 4 // m * m))) for n in (d.height, d.width))
    if min(d.height, d.width) <= 64:
        height, width = d.height, d.width
    frames = min(d.frames, 2 * model.temporal + 1)
    return dataclasses.replace(
        settings, prompt=_PROMPT, height=height, width=width, frames=frames, steps=min(d.steps, 4)
    )


def verify(settings: Settings, *, pipe: Any = None, reporter: Reporter | None = None) -> Verification:
    """Judge every op that the model calls in one short clip, and the clip.

    The clip is sampled three times from the same noise: through the ops, in diffusers' own modules, and in those again
    in the next wider dtype, which is the truth the other two are held to: the accelerated clip's error is at most
    twice eager's plus one rounding. Each kind of call is repeated on its real arguments and judged by the same rule
    against the float64 oracle, and each implementation must pass its canary in that dtype and head_dim. Verdicts on a
    GPU are written to the record that ``auto`` trusts.

    Args:
        settings: model, device, dtype, ops, attention; everything of the film itself is chosen here.
        pipe: a loaded, plain pipeline instead of ``settings.model``.
        reporter: hears of phases and warnings.
    Raises:
        UsageError, ModelError, OutOfMemoryError: one sentence and the remedy.
    """
    if settings.offload == "group":
        raise UsageError("verify widens the weights where they are: --offload group streams them, use none or model")
    choice = choose(settings.attention, "--attention")
    if choice is not None and not choice.exact:
        raise UsageError(
            f"verify holds a clip to what the model computes, and --attention {choice} is meant to differ: use dense, "
            "or measure what it costs with pyvideo bench e2e"
        )
    if pipe is not None and is_accelerated(pipe):
        raise UsageError("verify accelerates the pipeline itself, and compares: restore(pipe) first")
    sampler = Sampler(settings, pipe, reporter)
    with tempfile.TemporaryDirectory() as folder:
        film = clip_settings(settings, sampler.model)
        if sampler.model.wants_image:
            film = dataclasses.replace(film, image=_picture(Path(folder), film))
        plan = sampler.plan(film)
        sampler.prepare()
        sampler.reporter.plan(sampler.describe(plan))
        try:
            return _verify(sampler, film, plan)
        finally:
            sampler.close()


def _picture(folder: Path, film: Settings) -> str:
    from PIL import Image

    assert film.width is not None and film.height is not None
    path = folder / "first-frame.png"
    Image.linear_gradient("L").resize((film.width, film.height)).convert("RGB").save(path)
    return str(path)


def _verify(sampler: Sampler, film: Settings, plan: Plan) -> Verification:
    from ..integrations import restore

    reporter, own = sampler.reporter, sampler.settings
    pipe = sampler.load()
    found = Verification(plan, sampler.device, sampler.dtype)

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        started = time.perf_counter()
        with memory_remedy(f"verify ({name})", sampler.device, own.offload):
            yield
        found.seconds[name] = time.perf_counter() - started
        reporter.note(f"{name}: {found.seconds[name]:.1f} s")

    text = _conditions(pipe, film, plan, sampler.device)
    with timed("accelerated clip"), dispatch.recording() as recorder:
        ours = _sample(sampler, film, plan, text, eager=False)
    if sampler.report is not None:
        found.fallbacks = sampler.report.fallbacks()
    restore(pipe)
    with timed("eager clip"):
        eager = _sample(sampler, film, plan, text, eager=True)
    modules = [m for m in (pipe.transformer, pipe.transformer_2, pipe.vae) if m is not None]
    with timed("clip in higher precision"), higher_precision(*modules):
        truth = _sample(sampler, film, plan, text, eager=True)
    for stage in ("latents", "pixels"):
        found.clips.append(_compare(stage, ours[stage], eager[stage], truth[stage], sampler.dtype))
    with timed("op checks"), torch.no_grad():
        found.rows = verify_calls(recorder.calls)
    return found


def _conditions(pipe: Any, film: Settings, plan: Plan, device: torch.device) -> Conditions:
    """The prompt as the transformer takes it; random for a pipeline without a text encoder."""
    if pipe.text_encoder is not None:
        return encode_text(pipe, film.prompt, film.negative, plan.guided, device)
    transformer = pipe.transformer if pipe.transformer is not None else pipe.transformer_2
    generator = torch.Generator().manual_seed(film.seed)
    cond, uncond = (
        torch.randn(1, TEXT_TOKENS, transformer.config.text_dim, generator=generator).to(device, transformer.dtype)
        for _ in range(2)
    )
    return Conditions(cond, uncond if plan.guided else None)


def _sample(sampler: Sampler, film: Settings, plan: Plan, text: Any, *, eager: bool) -> dict[str, Tensor]:
    """Clean latents and pixels, on the CPU; nothing is shared between runs but noise and text."""
    from .video import read_image

    pipe, device, own = sampler.pipe, sampler.device, sampler.settings
    dtype = (pipe.transformer if pipe.transformer is not None else pipe.transformer_2).dtype
    conditions = dataclasses.replace(
        text, prompt=text.prompt.to(dtype), negative=None if text.negative is None else text.negative.to(dtype)
    )
    image = None if film.image is None else read_image(film.image)
    noise = prepare_latents(pipe, plan, film.seed, device, conditions, image)
    scheduler = build_scheduler(pipe.scheduler, plan.scheduler)
    stepper, timesteps, _ = prepare_steps(
        scheduler, plan.steps, device, eager=eager, ops=op_names(own.ops), impl=own.impl
    )
    if dtype == torch.float64:
        noise = noise.double()
    how = settle(planned(dataclasses.replace(own, eager=eager), plan, device, dtype.itemsize), pipe, own)
    clean = denoise(pipe, plan, noise, conditions, stepper, timesteps, scheduler.sigmas, how=how)
    return {"latents": clean.cpu(), "pixels": decode(pipe, clean).cpu()}


def _compare(stage: str, ours: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> Clip:
    """The rule of `testing.compare` for a whole clip; the band is one rounding of the model's dtype.

    Mean square, and the error that all but a thousandth of the values stay below, which shows a wrong row or column.
    The largest error is reported but not judged: a norm somewhere in the model divides by nearly nothing at a few
    places and multiplies rounding there by a random number, in any run. Each op's own largest error is judged.
    """
    true, low, got = (x.double().flatten() for x in (truth, eager, ours))

    def rms(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    def most(x: Tensor) -> float:
        return float(x.abs().kthvalue(max(1, round(0.999 * x.numel()))).values)

    problem = ""
    if not bool(torch.isfinite(got).all()):
        problem = f"{int((~torch.isfinite(got)).sum())} values are NaN or infinite"
    eps = torch.finfo(dtype).eps
    for name, reduce, band in (("rms", rms, eps / 4), ("99.9 %", most, eps)):
        error, allowed = reduce(got - true), 2 * reduce(low - true) + band * reduce(true)
        if not problem and not error <= allowed:
            problem = f"{name} error {error:.3e} over the allowed {allowed:.3e}"
    size, largest = max(rms(true), 1e-30), max(float(true.abs().max()), 1e-30)
    difference = rms(got - low)
    peak = 1.0 if stage == "pixels" else float(low.max() - low.min())
    return Clip(
        stage, rms(got - true) / size, rms(low - true) / size, float((got - true).abs().max()) / largest,
        float((low - true).abs().max()) / largest, math.inf if difference == 0 else 20 * math.log10(peak / difference),
        problem,
    )  # fmt: skip
