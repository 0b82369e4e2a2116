"""Measure how well generated clips follow their sentences.

    python -m pyvideo_kernels.tiny.evaluate --prompts 120 --json evaluation.json
    python -m pyvideo_kernels.tiny.evaluate --prompts 120 --ops on
    python -m pyvideo_kernels.tiny.evaluate --run runs/tiny --prompts 48     # a training run, no decoder needed

Prompts are drawn from the whole grammar; every third one is a combination never seen in training.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import FRAMES, GUIDANCE_SCALE, HEIGHT, MODEL_DIR, STEPS, WIDTH
from .checker import Reading, read
from .clips import HELD_OUT_SCENES, TRAINING_SCENES, draw_scenes, render
from .grammar import Scene

GATE = {"color": 0.95, "motion": 0.95, "background": 0.95, "shape": 0.80}


def choose_scenes(count: int, seed: int) -> list[Scene]:
    """``count`` scenes, every third of them held out from training."""
    generator = torch.Generator().manual_seed(seed)
    unseen = draw_scenes(math.ceil(count / 3), generator, HELD_OUT_SCENES)
    seen = draw_scenes(count - len(unseen), generator, TRAINING_SCENES)
    return [unseen.pop() if i % 3 == 0 else seen.pop() for i in range(count)]


def score(scenes: list[Scene], readings: list[Reading]) -> dict[str, Any]:
    """Accuracy of every attribute, over all scenes, over the held-out and over the seen ones."""
    groups: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for scene, reading in zip(scenes, readings, strict=True):
        agrees = reading.agrees(scene)
        for group in ("all", "held_out" if scene.held_out else "seen"):
            for name, right in agrees.items():
                groups[group][name].append(right)
            groups[group]["everything"].append(all(agrees.values()))
    return {
        group: {name: round(sum(hits) / len(hits), 4) for name, hits in sorted(table.items())}
        | {"prompts": len(table["everything"])}
        for group, table in groups.items()
    }


def passes(result: dict[str, Any]) -> bool:
    """Whether the accuracies over all prompts reach the gate."""
    return all(result["all"][name] >= bound for name, bound in GATE.items())


def generate(
    pipeline: Any, scenes: list[Scene], *, batch: int, steps: int, guidance: float, seed: int
) -> Iterator[torch.Tensor]:
    """Clips ``[T, H, W, 3]`` in 0..1, one a scene; a clip does not depend on the batch it is made in."""
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 10**6 + start + i) for i in range(len(part))]
        frames = pipeline(
            [scene.prompt for scene in part],
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        ).frames
        yield from frames.float().permute(0, 1, 3, 4, 2)


def draft_run(
    run: Path, name: str, scenes: list[Scene], *, batch: int, steps: int, guidance: float, seed: int
) -> Iterator[torch.Tensor]:
    """The same for a training run, its latents drawn without the decoder."""
    from .build import build_pipeline
    from .latents import LatentSpace

    pipeline = build_pipeline(run, name)
    pipeline.set_progress_bar_config(disable=True)
    space = LatentSpace.for_run(run, pipeline.vae.config.z_dim)
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 10**6 + start + i) for i in range(len(part))]
        latents = pipeline(
            [scene.prompt for scene in part],
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="latent",
        ).frames
        yield from (space.draft(latents.float()).permute(0, 2, 3, 4, 1) + 1) / 2


def load_pipeline(model: Path, ops: str) -> tuple[Any, Any]:
    """The pipeline and, with ``ops`` "on", the report of what was swapped."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if ops == "off":
        return pipeline, None
    from pyvideo_kernels import accelerate

    return pipeline, accelerate(pipeline)


@torch.no_grad()
def reconstruction_psnr(pipeline: Any, clips: int = 12, seed: int = 0) -> float:
    """Peak signal-to-noise ratio in dB of new clips that went through encoder and decoder."""
    generator = torch.Generator().manual_seed(seed)
    video = render(draw_scenes(clips, generator), generator).video()
    back = pipeline.vae.decode(pipeline.vae.encode(video).latent_dist.mode()).sample
    return float(10 * torch.log10(4 / (back - video).square().mean()))


def contact_sheet(clips: list[torch.Tensor], path: Path, columns: int = 4) -> None:
    """First, middle and last frame of every clip, as one picture."""
    from PIL import Image

    strips = [torch.cat([clip[0], clip[len(clip) // 2], clip[-1]], 1) for clip in clips]
    strips += [torch.zeros_like(strips[0])] * (-len(strips) % columns)
    rows = [torch.cat(strips[i : i + columns], 1) for i in range(0, len(strips), columns)]
    sheet = (torch.cat(rows).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(sheet).save(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--run", type=Path, help="judge this training run instead of a model")
    parser.add_argument("--name", default="dit", help="which transformer of the run")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", choices=("on", "off"), default="off", help="run through our ops")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first 32 clips here (PNG)")
    parser.add_argument("--misses", action="store_true", help="print what was read from each wrong clip")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    scenes = choose_scenes(args.prompts, args.seed)
    pipeline, report = None, None
    options = {"batch": args.batch, "steps": args.steps, "guidance": args.guidance, "seed": args.seed}
    if args.run:
        source = draft_run(args.run, args.name, scenes, **options)
    else:
        pipeline, report = load_pipeline(args.model, args.ops)
        source = generate(pipeline, scenes, **options)
    started = time.monotonic()
    clips: list[torch.Tensor] = []
    readings: list[Reading] = []
    for scene, clip in zip(scenes, source, strict=True):
        readings.append(read(clip))
        if len(clips) < 32:
            clips.append(clip)
        if args.misses and not all(readings[-1].agrees(scene).values()):
            print(f"{scene.prompt}: {readings[-1]}")
    result = score(scenes, readings) | {
        "gate": GATE,
        "passed": False,
        "settings": {"ops": args.ops, "steps": args.steps, "guidance": args.guidance, "seed": args.seed},
        "mean_overlap": round(sum(r.overlap for r in readings) / len(readings), 4),
        "seconds_per_clip": round((time.monotonic() - started) / len(scenes), 3),
    }
    result["passed"] = passes(result)
    if pipeline is not None:
        result["reconstruction_psnr_db"] = round(reconstruction_psnr(pipeline), 2)
    if report is not None:
        result["calls"] = report.calls()
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.sheet:
        contact_sheet(clips, args.sheet)


if __name__ == "__main__":
    main()
