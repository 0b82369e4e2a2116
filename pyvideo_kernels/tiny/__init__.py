"""The embedded text-to-video model: a grammar of moving shapes, its clips, its checker, its training.

The model itself is the directory ``model/`` beside this file, a plain ``WanPipeline`` that
``diffusers`` loads without this package.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).resolve().parent / "model"
"""Directory of the embedded pipeline, for ``WanPipeline.from_pretrained(MODEL_DIR)``."""

HEIGHT = 64
WIDTH = 64
FRAMES = 17
FPS = 8
"""Size and rate of the clips the embedded model was trained on."""

STEPS = 8
GUIDANCE_SCALE = 2.0
"""Sampling defaults the published evaluation was made with."""

__all__ = ["FPS", "FRAMES", "GUIDANCE_SCALE", "HEIGHT", "MODEL_DIR", "STEPS", "WIDTH"]
