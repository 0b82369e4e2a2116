"""Classifier-free guidance and the flow-match Euler update in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import bad_shape, check_same_device, check_tensor, refuse_grad


def check_predictions(op: str, name: str, latent: Tensor, **tensors: Tensor | None) -> None:
    """Floating tensors of the shape and device of ``latent`` (the argument called ``name``), none asking for grad."""
    check_tensor(op, name, latent)
    for key, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(op, key, tensor)
        if tensor.shape != latent.shape:
            bad_shape(op, key, f"{list(latent.shape)} like `{name}`", tensor)
    check_same_device(op, **{name: latent, **tensors})
    refuse_grad(op, **{name: latent, **tensors})


def guidance_step(
    latent: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    guidance_scale: float,
    sigma: float,
    sigma_next: float,
    impl: str = "auto",
) -> Tensor:
    """Combines the two predictions of classifier-free guidance and takes the Euler step of a flow-match sampler.

        v = uncond + guidance_scale * (cond - uncond)        (v = cond where ``uncond`` is None)
        latent_next = latent + (sigma_next - sigma) * v

    Args:
        latent: noisy latent at ``sigma``, any shape and strides, fp32/bf16/fp16 (fp64 by the reference).
        cond, uncond: velocity predictions of the shape of ``latent``, any of these dtypes (bf16 beside an fp32
            latent is usual). ``uncond`` None: no guidance.
        guidance_scale: 1 is the conditional prediction; unused where ``uncond`` is None.
        sigma, sigma_next: noise levels in [0, 1] before and after the step (1: pure noise).
        impl: ``auto``, ``reference``, ``triton``, ``cuda`` or ``cpu``; an explicit choice never falls back.
    Returns:
        The latent at ``sigma_next``: shape and dtype of ``latent``, contiguous; fp32 inside, one rounding.
    Raises:
        ShapeError, DTypeError, DeviceError: names the argument, what was expected, what came.
        UnsupportedError: an input requires grad (there is no backward), or this implementation cannot be had here.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs (the noise levels are baked in), dynamic shapes.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Ho & Salimans, "Classifier-Free Diffusion Guidance", arXiv:2207.12598, eq. 6 (in the form that is 1 at
        the conditional prediction); Lipman et al., "Flow Matching for Generative Modeling", arXiv:2210.02747.
    """
    op = "guidance_step"
    check_predictions(op, "latent", latent, cond=cond, uncond=uncond)
    return torch.ops.pyvideo.guidance_step(latent, cond, uncond, guidance_scale, sigma, sigma_next, impl)
