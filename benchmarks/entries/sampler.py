"""Scheduler steps."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from .. import eager, shapes
from .entry import FP32, Entry, rand


def _guidance_inputs(shape: Any, dtype: Any, device: Any) -> dict[str, Any]:
    return {
        "latent": rand(*shape, dtype=torch.float32, device=device),
        "cond": rand(*shape, dtype=dtype, device=device),
        "uncond": rand(*shape, dtype=dtype, device=device),
        "guidance_scale": 5.0,
        "sigma": 0.8,
        "sigma_next": 0.7,
    }


def _guidance_bytes(shape: Any, dtype: torch.dtype) -> int:
    return prod(shape) * 2 * (FP32 + dtype.itemsize)


def _unipc_inputs(shape: Any, dtype: Any, device: Any) -> dict[str, Any]:
    sample, last, m0 = (rand(*shape, dtype=torch.float32, device=device) for _ in range(3))
    cond, uncond = (rand(*shape, dtype=dtype, device=device) for _ in range(2))
    return {
        "sample": sample,
        "cond": cond,
        "uncond": uncond,
        "last_sample": last,
        "history": [m0],
        "guidance_scale": 5.0,
        "sigma": 0.8,
        # A second-order step in the middle of a schedule.
        "corrector": (0.97, 0.04, -0.01),
        "predictor": (0.96, 0.09, -0.05),
    }


def _unipc_bytes(shape: Any, dtype: torch.dtype) -> int:
    return prod(shape) * (6 * FP32 + 2 * dtype.itemsize)


ENTRIES = (
    Entry("guidance_step", shapes.EULER_GPU, shapes.LATENT_CPU, _guidance_inputs, eager.guidance_step, _guidance_bytes),
    Entry("unipc_step", shapes.LATENT_GPU, shapes.LATENT_CPU, _unipc_inputs, eager.unipc_step, _unipc_bytes),
)  # fmt: skip
