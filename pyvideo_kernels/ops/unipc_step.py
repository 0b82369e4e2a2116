"""Classifier-free guidance and one corrector-predictor step of UniPC in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import bad_option
from .guidance_step import check_predictions


def unipc_step(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    last_sample: Tensor | None = None,
    history: Sequence[Tensor] = (),
    *,
    guidance_scale: float,
    sigma: float,
    corrector: Sequence[float],
    predictor: Sequence[float],
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """One UniPC step for a flow-matching model: guidance, data prediction, corrector and predictor at once.

        v           = uncond + guidance_scale * (cond - uncond)     (v = cond where ``uncond`` is None)
        x0          = sample - sigma * v
        corrected   = corrector · (last_sample, x0, *history)       (sample where ``corrector`` is empty)
        prev_sample = predictor · (corrected, x0, *history)

    `pyvideo_kernels.schedule` computes the coefficients and keeps the history.

    Args:
        sample: noisy latent at ``sigma``, any shape and strides, fp32/bf16/fp16 (fp64 by the reference).
        cond, uncond: velocity predictions of that shape, any of these dtypes; ``uncond`` None: no guidance.
        last_sample: ``corrected`` of the previous step; None where ``corrector`` is empty.
        history: ``x0`` of earlier steps, the latest first; at most three for ``triton``.
        guidance_scale: 1 is the conditional prediction; unused where ``uncond`` is None.
        sigma: noise level of ``sample`` in [0, 1].
        corrector: empty on the first step, else ``2 + len(history)`` coefficients.
        predictor: ``2 + len(history)`` coefficients.
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        ``(prev_sample, x0, corrected)``: shape and dtype of ``sample``, contiguous; fp32 inside, each rounded once.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: an input requires grad (there is no backward), or this implementation cannot be had here.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs (the coefficients are baked in), dynamic shapes.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
        arXiv:2302.04867, algorithms 1 and 2.
    """
    op = "unipc_step"
    past = {f"history[{i}]": h for i, h in enumerate(history)}
    check_predictions(op, "sample", sample, cond=cond, uncond=uncond, last_sample=last_sample, **past)
    count = 2 + len(history)
    if len(predictor) != count:
        bad_option(op, "predictor", f"{count} coefficients for {len(history)} of `history`", list(predictor))
    if len(corrector) != (0 if last_sample is None else count):
        expected = "empty without `last_sample`" if last_sample is None else f"{count} coefficients"
        bad_option(op, "corrector", expected, list(corrector))
    for name, coefficients in (("corrector", corrector), ("predictor", predictor)):
        if not all(math.isfinite(c) for c in coefficients):
            bad_option(op, name, "finite", list(coefficients))
    return torch.ops.pyvideo.unipc_step(
        sample, cond, uncond, last_sample, list(history), guidance_scale, sigma, list(corrector), list(predictor), impl
    )
