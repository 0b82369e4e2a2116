"""Put a run's averaged weights together as a ``WanPipeline`` directory.

python -m pyvideo_kernels.tiny.build --run runs/tiny --output runs/tiny/model
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import FPS, FRAMES, GUIDANCE_SCALE, HEIGHT, MODEL_DIR, STEPS, WIDTH
from .architecture import (
    FLOW_SHIFT,
    Z_DIM,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
)
from .latents import LatentSpace

MEBIBYTE = 1024 * 1024
DEFAULTS = {
    "height": HEIGHT,
    "width": WIDTH,
    "frames": FRAMES,
    "fps": FPS,
    "steps": STEPS,
    "guidance": GUIDANCE_SCALE,
    "upscale": 4,
}


def averaged(run: Path, name: str) -> dict[str, Tensor]:
    """Averaged weights of one part of a run."""
    state = torch.load(run / name / "checkpoint.pt", map_location="cpu", weights_only=True)
    average: dict[str, Tensor] = state["average"]
    return average


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}


def build_scheduler() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=FLOW_SHIFT,
    )


def build_pipeline(run: Path, name: str = "dit") -> Any:
    """The pipeline in float32, from what the run folder holds; a part not yet trained stays random."""
    from diffusers import WanPipeline

    space = LatentSpace.for_run(run, Z_DIM)
    weights = averaged(run, name)
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(len(tokenizer))
    text_encoder.load_state_dict(_below(weights, "text_encoder."))
    diffusion = _below(weights, "transformer.")
    transformer = build_transformer(
        num_layers=1 + max(int(key.split(".")[1]) for key in diffusion if key.startswith("blocks.")),
        num_attention_heads=diffusion["proj_out.weight"].shape[1] // 32,
    )
    transformer.load_state_dict(diffusion)
    vae = build_vae(space.latents_mean.tolist(), space.latents_std.tolist())
    for part in ("decoder", "encoder"):
        if (run / part / "checkpoint.pt").exists():
            vae.load_state_dict(averaged(run, part), strict=False)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=build_scheduler(),
        transformer=transformer.eval(),
    )


def save(pipeline: Any, output: Path) -> int:
    """Write the pipeline beside ``output`` and rename it; networks go to disk in bfloat16.

    Returns:
        Bytes written.
    """
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.transformer.to(torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    pipeline.save_pretrained(partial, safe_serialization=True)
    for path in partial.rglob("*.json"):
        text = json.loads(path.read_text())
        text.pop("_name_or_path", None)
        # Older and newer transformers know this name; the one it writes is new.
        if path.name == "model_index.json":
            text["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
        elif path.name == "tokenizer_config.json":
            text["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(text, indent=2) + "\n")
    # What the sampler samples by default, so that a copy under another path is sampled like the embedded one.
    (partial / "pyvideo.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    for kept in ("README.md", "evaluation.json", "evaluation-ops.json"):
        if (output / kept).exists():
            shutil.copy2(output / kept, partial / kept)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    return sum(path.stat().st_size for path in output.rglob("*") if path.is_file())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--name", default="dit", help="which transformer of the run")
    parser.add_argument("--output", type=Path, default=MODEL_DIR)
    args = parser.parse_args(argv)
    size = save(build_pipeline(args.run, args.name), args.output)
    print(f"{args.output}: {size / MEBIBYTE:.2f} MiB")


if __name__ == "__main__":
    main()
