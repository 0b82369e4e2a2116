"""The ``pyvideo`` command. Only what a command needs is imported: ``--help`` and bad arguments cost no torch.

Everything for people goes to stderr; stdout carries the path of each film, the last one last.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..benchmarks.cli import app as bench_app
from ..error_types import PyVideoError, UsageError
from .models import KNOWN, looked_for
from .problems import Exit, finish
from .progress import Reporter, reporter_for
from .settings import AUTO_ON_OFF, DTYPES, IMPLS, OFFLOADS, SCHEDULERS, Settings, read_config, read_prompts

_EXITS = (
    "Exit codes: 0 done, 2 usage, 3 model problem, 4 out of memory, 5 output or codec, 130 interrupted. "
    "Only safetensors is ever loaded."
)
app = typer.Typer(
    name="pyvideo",
    help="Films from sentences, by video diffusion models on fused kernels.",
    epilog=_EXITS,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench_app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pyvideo-kernels {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _one_of(choices: tuple[str, ...]) -> str:
    return "|".join(choices)


@app.command(epilog=_EXITS)
def sample(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the film shows.", metavar="PROMPT")] = None,
    model: Annotated[str, typer.Option(help="tiny, a diffusers directory, or a hub id (see pyvideo models).")] = "tiny",
    image: Annotated[str | None, typer.Option(help="First frame, for image-to-video models.")] = None,
    negative: Annotated[str | None, typer.Option(help="What the film shall not show.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16 (32 for TI2V).")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16 (32 for TI2V).")] = None,
    frames: Annotated[int | None, typer.Option(help="4k + 1.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the file.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 switches it off.")] = None,
    scheduler: Annotated[str | None, typer.Option(metavar=_one_of(SCHEDULERS), help="Default: the model's.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same film.")] = 0,
    ops: Annotated[str, typer.Option(help="all, or the ops to use, with commas.")] = "all",
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="dense|int8|KEY=VALUE,...",
            help="dense runs ours; window=0.5x0.5x0.5 (shares of the grid, or tokens), top_k=0.2 or share=0.9 less "
            "than all of it, with dense_layers=2,dense_steps=4 for exceptions; default: the model's own.",
        ),
    ] = None,
    impl: Annotated[str, typer.Option(metavar=_one_of(IMPLS), help="Which implementation of each op.")] = "auto",
    eager: Annotated[bool, typer.Option("--eager", help="diffusers' own modules and scheduler instead.")] = False,
    guidance_batch: Annotated[
        str,
        typer.Option(
            metavar=_one_of(AUTO_ON_OFF),
            help="Predict with and without the prompt in one batch of two; auto: for films of few tokens.",
        ),
    ] = "auto",
    text_kv_cache: Annotated[
        str,
        typer.Option(
            "--text-kv-cache",
            metavar=_one_of(AUTO_ON_OFF),
            help="Compute keys and values of the text once a film; auto: where it is a share of the work.",
        ),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar=_one_of(DTYPES), help="auto: bf16 on a GPU, the faster on a CPU.")
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="auto: the first GPU.")] = "auto",
    offload: Annotated[
        str, typer.Option(metavar=_one_of(OFFLOADS), help="Keep weights off the GPU until they are used.")
    ] = "none",
    lora: Annotated[str | None, typer.Option(metavar="FILE[:SCALE]", help="A LoRA in safetensors.")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE.jsonl", help="One film a line, one load.")] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help=".mp4, .webm, .gif, or NAME/ for PNGs; with --prompts a folder."),
    ] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Write NAME.preview.png while denoising.")] = False,
    upscale: Annotated[int | None, typer.Option(help="Repeat each pixel N times in the file.")] = None,
    stats: Annotated[str | None, typer.Option(metavar="stats.json", help="Times, op calls, memory, versions.")] = None,
    config: Annotated[str | None, typer.Option(metavar="run.yaml", help="Options as YAML; the line wins.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the path alone.")] = False,
) -> None:
    """Sample a film from PROMPT; its path is the last line on stdout."""
    given = {
        name: value
        for name, value in context.params.items()
        if name not in ("config", "quiet") and _given(context, name)
    }
    reporter = Reporter() if quiet else reporter_for()
    finish(lambda: _sample(given, config, reporter))


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _sample(given: dict[str, Any], config: str | None, reporter: Reporter) -> None:
    from .run import Sampler

    options: dict[str, Any] = read_config(Path(config)) if config else {}
    options |= given
    options = {key: value for key, value in options.items() if value is not None}
    prompts, stats = options.pop("prompts", None), options.pop("stats", None)
    if prompts and options.get("prompt"):
        raise UsageError("give a PROMPT or --prompts FILE.jsonl, not both")
    if not prompts and not options.get("prompt"):
        raise UsageError('say what the film shall show: pyvideo sample "a red ball moves left on a black background"')
    if stats:
        from .stats import check_stats, write_stats

        check_stats(Path(stats))
    films = _films(options, prompts)
    sampler = Sampler(films[0][1], reporter=reporter)
    plans = []
    for where, film in films:
        try:
            plans.append(sampler.plan(film))
        except PyVideoError as error:
            if not where:
                raise
            raise type(error)(f"{where}: {error}") from None
    sampler.prepare()
    for plan in plans[:8]:
        reporter.plan(sampler.describe(plan))
    if len(plans) > 8:
        reporter.note(f"and {len(plans) - 8} more films")
    if sampler.dtype_why is not None:
        from .loading import dtype_name

        reporter.note(f"{dtype_name(sampler.dtype)} on this CPU: {sampler.dtype_why}")
    runs: list[dict[str, Any]] = []
    done: list[Path] = []
    try:
        for _, film in films:
            result = sampler.run(film)
            assert result.path is not None
            runs.append(result.stats | {"path": str(result.path)})
            done.append(result.path)
            if len(done) < len(films):
                typer.echo(str(result.path))
        _summary(reporter, runs)
    except KeyboardInterrupt:
        if done:
            reporter.note(f"finished before the interruption: {', '.join(map(str, done))}")
        raise
    finally:
        if stats and runs:
            write_stats(Path(stats), runs)
    typer.echo(str(done[-1]))


def _films(options: dict[str, Any], prompts: str | None) -> list[tuple[str, Settings]]:
    """Every film of the run with where it was asked for; destinations filled in."""
    if not prompts:
        settings = Settings(**options).check()
        return [("", _named(settings, None))]
    films = []
    shared = {key: value for key, value in options.items() if key != "output"}
    for index, (where, line) in enumerate(read_prompts(Path(prompts))):
        try:
            settings = Settings(**(shared | {k: v for k, v in line.items() if v is not None})).check()
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
        films.append((where, settings if settings.output else _named(settings, index, options.get("output"))))
    taken: dict[str, str] = {}
    for where, film in films:
        if film.output in taken:
            raise UsageError(f"{where} writes {film.output}, and so does {taken[film.output]}: give one another output")
        taken[str(film.output)] = where
    return films


def _named(settings: Settings, index: int | None, output: str | None = None) -> Settings:
    """With a destination: the one asked for, else one made from the prompt that overwrites nothing."""
    slug = "-".join(re.findall(r"[^\W_]+", settings.prompt.lower()))[:60].rstrip("-") or "film"
    if index is None:
        if settings.output is not None:
            return settings
        path, number = Path(f"{slug}.mp4"), 1
        while path.exists():
            number += 1
            path = Path(f"{slug}-{number}.mp4")
    elif output is not None and Path(output).suffix:
        base = Path(output)
        path = base.with_name(f"{base.stem}-{index:03d}{base.suffix}")
    else:
        path = Path(output or "films") / f"{index:03d}-{slug}.mp4"
    return dataclasses.replace(settings, output=str(path))


def _summary(reporter: Reporter, runs: list[dict[str, Any]]) -> None:
    last = runs[-1]
    seconds: dict[str, float] = {}
    for run in runs:
        for name, value in run["seconds"].items():
            seconds[name] = seconds.get(name, 0.0) + value
    calls: dict[str, int] = {}
    for run in runs:
        for impls in run["calls"].values():
            for impl, count in impls.items():
                calls[impl] = calls.get(impl, 0) + count
    rows = [
        ("film" if len(runs) == 1 else "films", last["path"] if len(runs) == 1 else str(len(runs))),
        ("seed", str(last["seed"])),
        ("time", ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())),
        ("step", f"{last['seconds_per_step']:.3g} s"),
        ("op calls", ", ".join(f"{count} {impl}" for impl, count in calls.items()) or "none: diffusers' own modules"),
    ]
    if last["accelerate"] is not None and last["accelerate"]["fallbacks"]:
        rows.append(("fell back", ", ".join(last["accelerate"]["fallbacks"])))
    if last["peak_memory_bytes"]:
        rows.append(("peak memory", f"{last['peak_memory_bytes'] / 1e9:.2f} GB"))
    reporter.table("summary", rows)


@app.command()
def models() -> None:
    """The models known by name, their defaults, and where each is looked for."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "what", "size", "frames", "fps", "steps", "guidance", "here", "looked for in")
    for known in KNOWN.values():
        d = known.defaults
        if known.name == "tiny":
            d = _tiny_defaults(d)
        where, present = looked_for(known.name)
        guidance = f"{d.guidance:g}" + (f"/{d.guidance_2:g}" if d.guidance_2 is not None else "")
        sizes = f"{d.width}×{d.height}"
        table.add_row(known.name, known.what, sizes, str(d.frames), f"{d.fps:g}", str(d.steps), guidance,
                      "yes" if present else "no", str(where))  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(table)


def _tiny_defaults(fallback: Any) -> Any:
    from ..error_types import ModelError
    from .modeldir import read_model
    from .models import TINY

    try:
        return read_model(TINY, "tiny").defaults
    except ModelError:
        return fallback


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="The facts as JSON, to attach to a bug report.")] = False,
) -> None:
    """What is installed, built and known to be bad, which peers are here, and what each op would bind, and why."""
    from .doctor import report

    raise typer.Exit(report(as_json))


_VERIFY_EXITS = (
    "Exit codes: 0 everything holds, 1 a check failed (the op is named), 2 usage, 3 model problem, 4 out of memory."
)


@app.command(epilog=_VERIFY_EXITS)
def verify(
    model: Annotated[
        str, typer.Option(help="tiny, a diffusers directory, a hub id, or with --random-weights a known architecture.")
    ] = "tiny",
    random_weights: Annotated[bool, typer.Option("--random-weights", help="True size, no download.")] = False,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="auto: the first GPU.")] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar=_one_of(DTYPES), help="auto: bf16 on a GPU, the faster on a CPU.")
    ] = "auto",
    attention: Annotated[
        str | None, typer.Option(help="dense checks ours; default: the model's own. Sparse and int8 are refused.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result file here.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Tables alone, no progress.")] = False,
) -> None:
    """Check every op the model will use, on this machine, and one short clip eager against accelerated.

    What passes is what `auto` trusts from then on.
    """
    reporter = Reporter() if quiet else reporter_for()
    options: dict[str, Any] = {"model": model, "device": device, "dtype": dtype, "attention": attention}
    finish(lambda: _verify(Settings(prompt="verify", **options).check(), random_weights, json, reporter))


def _verify(settings: Settings, random_weights: bool, json: Path | None, reporter: Reporter) -> None:
    if json is not None:
        from .stats import check_stats

        check_stats(json)
    from .models import resolve

    if not random_weights:
        resolve(settings.model, reporter.note)  # what is wrong with the name is said before torch is imported
    from .verify_command import command

    if not command(settings, json, reporter, random_weights=random_weights):
        raise typer.Exit(Exit.FAILED)


def _terminated(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of ``pyvideo``."""
    # kill(1) cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, _terminated)
    # The tokenizer is used once; its fork warnings are noise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)


if __name__ == "__main__":
    main()
