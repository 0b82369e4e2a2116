"""Classifier-free guidance and the Euler update: every input read once, the latent written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for, elementwise

from .launch import cdiv, on_device, refuse_float64


@triton.jit
def guided_velocity(cond_ptr, uncond_ptr, at, mask, guidance_scale, HAS_UNCOND: tl.constexpr):
    """uncond + guidance_scale * (cond - uncond) in fp32; cond without ``uncond``."""
    v = tl.load(cond_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_UNCOND:
        base = tl.load(uncond_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v = base + guidance_scale * (v - base)
    return v


@triton.jit
def _guidance_step_fwd_kernel(
    latent_ptr, cond_ptr, uncond_ptr, out_ptr, n, guidance_scale, dt, HAS_UNCOND: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    latent = tl.load(latent_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = guided_velocity(cond_ptr, uncond_ptr, at, mask, guidance_scale, HAS_UNCOND)
    tl.store(out_ptr + at, (latent + dt * v).to(out_ptr.dtype.element_ty), mask=mask)


def launch_fwd(
    latent: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    out: Tensor,
    guidance_scale: float,
    dt: float,
    config: elementwise.FlatConfig,
) -> None:
    """Launch over contiguous tensors."""
    n = out.numel()
    if n == 0:
        return
    with on_device(latent):
        _guidance_step_fwd_kernel[(cdiv(n, config.block),)](
            latent, cond, uncond, out, n, guidance_scale, dt, uncond is not None, config.block,
            num_warps=config.num_warps,
        )  # fmt: skip


def guidance_step(
    latent: Tensor, cond: Tensor, uncond: Tensor | None, guidance_scale: float, sigma: float, sigma_next: float
) -> Tensor:
    """``impl="triton"`` of the op. A permuted latent is small: it is copied, so that one flat kernel serves all."""
    refuse_float64("guidance_step", latent, cond, uncond)
    out = latent.new_empty(latent.shape)
    config = elementwise.select_flat(arch_for(latent), op="guidance_step", itemsize=cond.element_size())
    launch_fwd(
        latent.contiguous(), cond.contiguous(), None if uncond is None else uncond.contiguous(), out,
        guidance_scale, sigma_next - sigma, config,
    )  # fmt: skip
    return out
