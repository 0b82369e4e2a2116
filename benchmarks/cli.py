"""``pyvideo bench``: options alone; each command imports what it runs. Torch-free until then."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyvideo_kernels.sampler.problems import finish

app = typer.Typer(help="How fast, why, and whether it is still right.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def ops(
    op: Annotated[list[str] | None, typer.Option(help="An op to measure, once or more; default: all.")] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="auto: the first GPU.")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="bf16|fp16|fp32")] = "bf16",
    impl: Annotated[str, typer.Option(help="Implementation to measure; auto: what a call would bind.")] = "auto",
    baseline: Annotated[
        list[str] | None, typer.Option(help="eager, compile, or a peer, once or more; default: all that are here.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds a median is taken over.")] = 7,
    quick: Annotated[bool, typer.Option("--quick", help="One shape an op, eager alone, few rounds.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the result file here.")] = None,
) -> None:
    """Single ops against eager PyTorch, torch.compile and the external kernels that are installed."""
    from .ops import command

    finish(lambda: command(op or [], device, dtype, impl, baseline, rounds, quick, json))


@app.command()
def e2e(
    model: Annotated[
        str, typer.Option(help="tiny, a diffusers directory, a hub id, or with --random-weights a known architecture.")
    ] = "tiny",
    ab: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="A variant, once or more: eager, compile, ours, compile+ours. Keys: attention=none, dense, int8, "
            "window=TxHxW, top_k=N or share=P, each with its own keys (dense_steps=4, dense_layers=2, ...), impl, "
            "ops=a+b, strict (accelerate's); scope=model|blocks, mode, dynamic, vae (torch.compile's); backend "
            "(diffusers' attention backend, of any). Default: eager and ours.",
        ),
    ] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="True size, no download.")] = False,
    layers: Annotated[
        int | None, typer.Option(help="With --random-weights: so many of the transformer's blocks, not all.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels; sizes, steps and guidance default to the model's own.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of each timed clip.")] = None,
    guidance: Annotated[float | None, typer.Option(help="1 switches classifier-free guidance off.")] = None,
    prompt: Annotated[
        str, typer.Option(help="Read once, before; random weights read none.")
    ] = "a red ball moves left on a black background",
    seed: Annotated[int, typer.Option(help="Of noise, and of random weights.")] = 0,
    rounds: Annotated[int, typer.Option(min=3, help="Clips a variant, in turns.")] = 3,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="auto|bf16|fp16|fp32")] = "auto",
    float32: Annotated[bool, typer.Option("--float32/--no-float32", help="Measure errors against float32.")] = True,
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Decode to pixels.")] = True,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, markdown and plots.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Whole clips through each variant, in turns, in one process: seconds, memory, breakdown, quality.

    Exit 1 if a video came out broken, or eager or everything that was asked for could not run.
    """
    from .e2e import Request, command

    request = Request(
        model=model, variants=tuple(ab or ("eager", "ours")), random_weights=random_weights, layers=layers,
        height=height, width=width, frames=frames, steps=steps, guidance=guidance, prompt=prompt, seed=seed,
        rounds=rounds, device=device, dtype=dtype, float32=float32, decode=decode,
    )  # fmt: skip
    finish(lambda: command(request, output))


@app.command()
def vae(
    model: Annotated[str, typer.Option(help="A known architecture; its VAE gets random weights.")] = "wan2.1-1.3b",
    ab: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A variant, once or more: eager, channels_last, compile, ours, compile+ours. Default: eager, "
            "channels_last and ours.",
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; sizes default to the model's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the clip.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Decodes a variant, in turns.")] = 3,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="auto|bf16|fp16|fp32")] = "auto",
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Also time layer by layer.")] = True,
    float32: Annotated[bool, typer.Option("--float32/--no-float32", help="Hold frames to the float32 decoder.")] = True,
    seed: Annotated[int, typer.Option(help="Of weights and latents.")] = 0,
    count: Annotated[
        bool, typer.Option("--count", help="Only count kernels, bytes and FLOPs; decode nothing.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON and markdown.")] = Path("runs/bench"),
) -> None:
    """A VAE's decoder alone, whole and layer by layer, against the stock one; what it computes and moves.

    Exit 1 if frames came out wrong, or eager or everything that was asked for could not run.
    """
    from .vae import Request, asked_for, command

    request = Request(
        model=model, variants=tuple(ab or ("eager", "channels_last", "ours")), height=height, width=width,
        frames=frames, rounds=rounds, device=device, dtype=dtype, layers=layers, float32=float32, seed=seed,
    )  # fmt: skip
    finish(lambda: typer.echo(asked_for(request)) if count else command(request, output))


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="The result file to hold against.")],
    new: Annotated[Path, typer.Argument(help="The result file to judge.")],
) -> None:
    """Exit 1 if NEW is slower than OLD beyond both runs' own spread, or lost a row, or went wrong."""
    from .compare import command

    finish(lambda: command(old, new))
