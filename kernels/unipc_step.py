"""Guidance and UniPC's corrector and predictor: every tensor read once, each of three results written once."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for, elementwise
from pyvideo_kernels.errors import UnsupportedError

from .guidance_step import guided_velocity
from .launch import cdiv, on_device, refuse_float64

# A third-order solver corrects over three earlier predictions.
MAX_HISTORY = 3


@triton.jit
def _unipc_step_fwd_kernel(
    sample_ptr, cond_ptr, uncond_ptr, last_ptr, h0_ptr, h1_ptr, h2_ptr,
    prev_ptr, x0_ptr, corrected_ptr,
    n, guidance_scale, sigma,
    c_last, c_x0, c_h0, c_h1, c_h2,
    p_corrected, p_x0, p_h0, p_h1, p_h2,
    HAS_UNCOND: tl.constexpr, HAS_CORRECTOR: tl.constexpr, HISTORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    sample = tl.load(sample_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = guided_velocity(cond_ptr, uncond_ptr, at, mask, guidance_scale, HAS_UNCOND)
    x0 = sample - sigma * v
    tl.store(x0_ptr + at, x0.to(x0_ptr.dtype.element_ty), mask=mask)
    if HAS_CORRECTOR:
        corrected = c_last * tl.load(last_ptr + at, mask=mask, other=0.0).to(tl.float32) + c_x0 * x0
    else:
        corrected = sample
    past = tl.zeros_like(x0)
    if HISTORY > 0:
        h = tl.load(h0_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_CORRECTOR:
            corrected += c_h0 * h
        past += p_h0 * h
    if HISTORY > 1:
        h = tl.load(h1_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_CORRECTOR:
            corrected += c_h1 * h
        past += p_h1 * h
    if HISTORY > 2:
        h = tl.load(h2_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_CORRECTOR:
            corrected += c_h2 * h
        past += p_h2 * h
    tl.store(corrected_ptr + at, corrected.to(corrected_ptr.dtype.element_ty), mask=mask)
    prev = p_corrected * corrected + p_x0 * x0 + past
    tl.store(prev_ptr + at, prev.to(prev_ptr.dtype.element_ty), mask=mask)


def launch_fwd(
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    guidance_scale: float,
    sigma: float,
    corrector: Sequence[float],
    predictor: Sequence[float],
    config: elementwise.FlatConfig,
) -> None:
    """Launch over contiguous ``inputs`` (sample, cond, uncond, last_sample, three of history) and ``outputs``."""
    n = outputs[0].numel()
    if n == 0:
        return
    _, _, uncond, last, *history = inputs

    def padded(coefficients: Sequence[float]) -> list[float]:
        return [*coefficients, *[0.0] * (2 + MAX_HISTORY - len(coefficients))]

    with on_device(outputs[0]):
        _unipc_step_fwd_kernel[(cdiv(n, config.block),)](
            *inputs, *outputs, n, guidance_scale, sigma, *padded(corrector), *padded(predictor),
            uncond is not None, last is not None, sum(h is not None for h in history), config.block,
            num_warps=config.num_warps,
        )  # fmt: skip


def unipc_step(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    last_sample: Tensor | None,
    history: Sequence[Tensor],
    guidance_scale: float,
    sigma: float,
    corrector: Sequence[float],
    predictor: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """``impl="triton"`` of the op. A permuted latent is small: it is copied, so that one flat kernel serves all."""
    if len(history) > MAX_HISTORY:
        raise UnsupportedError(
            f"unipc_step: impl 'triton' takes at most {MAX_HISTORY} of `history`, got {len(history)}; use 'reference'"
        )
    refuse_float64("unipc_step", sample, cond, uncond, last_sample, *history)
    inputs: list[Tensor | None] = [sample, cond, uncond, last_sample, *history, *[None] * (MAX_HISTORY - len(history))]
    outputs = tuple(sample.new_empty(sample.shape) for _ in range(3))
    config = elementwise.select_flat(arch_for(sample), op="unipc_step", itemsize=cond.element_size())
    launch_fwd(
        [None if t is None else t.contiguous() for t in inputs], outputs,
        guidance_scale, sigma, corrector, predictor, config,
    )  # fmt: skip
    return outputs
