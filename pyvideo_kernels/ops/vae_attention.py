"""Attention of a VAE's middle block: one wide head over the pixels of a frame, or of a frame and those before it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import (
    DTypeError,
    UnsupportedError,
    bad_option,
    bad_shape,
    check_last_dim_contiguous,
    check_same_device,
    check_tensor,
    describe,
    refuse_grad,
)

_OP = "vae_attention"


def vae_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """One-head softmax attention over the pixels of each frame, or of each frame and the frames before it.

        out[t, i] = Σ_j softmax_j(scale · q[t, i]·k[j]) v[j],   j over the S tokens of frame t
                                                                (causal: of frames 0 … t)

    Args:
        q, k, v: ``[B, T, S, D]``, S tokens a frame, bf16/fp16/fp32 (fp64 by the reference and SDPA), last dim
            contiguous, any other strides: the thirds of a fused projection are read in place.
        causal: a token sees whole frames up to its own, as a mask by blocks would say; none is made.
        scale: multiplies the scores, positive; None: ``D ** -0.5``.
        impl: ``auto``, ``reference``, ``sdpa``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        ``[B, T, S, D]``, contiguous, dtype of ``q``.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: an input requires grad (no backward), or this implementation cannot be had here.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic B, T, S. D ≤ 1024 in Triton.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, eq. 1; Kong et al., "HunyuanVideo",
        arXiv:2412.03603, sec. 4.1 (the causal 3-D VAE).
    """
    check_tensor(_OP, "q", q, ndim=4)
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(_OP, name, tensor, ndim=4)
        if tensor.shape != q.shape:
            bad_shape(_OP, name, f"{list(q.shape)} like `q`", tensor)
        if tensor.dtype != q.dtype:
            raise DTypeError(f"{_OP}: `{name}` must be {q.dtype} like `q`; got {describe(tensor)}")
    if q.shape[-1] == 0:
        bad_shape(_OP, "q", "[B, T, S, D] with D >= 1", q)
    if not isinstance(causal, bool):
        bad_option(_OP, "causal", "True or False", causal)
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        bad_option(_OP, "scale", "a positive finite number", scale)
    check_last_dim_contiguous(_OP, q=q, k=k, v=v)
    check_same_device(_OP, q=q, k=k, v=v)
    refuse_grad(_OP, q=q, k=k, v=v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out: Tensor = torch.ops.pyvideo.vae_attention(q, k, v, causal, scale, impl)
    return out


def vae_attention_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """``impl="sdpa"``: frames are a batch with one head; causal, one call a frame over the keys so far, no mask."""
    if q.numel() == 0:
        return q.new_empty(q.shape)
    if q.device.type == "cuda":
        _refuse_unfused(q, k, v)
    # torch's CPU kernel takes a row, or a block of keys, whose scores are NaN for one that is masked.
    # Rows first: a sum of a view with gaps, all at once, takes six times as long.
    hides_nan = q.device.type == "cpu" and not all(math.isfinite(float(x.sum(-1).sum())) for x in (q, k))
    if not causal or q.shape[1] == 1:
        # Where frames do not follow each other in memory they stand where torch has heads; its result is transposed.
        folded = all(x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in (q, k, v))
        if folded:
            rows, keys, values = (x.flatten(0, 1).unsqueeze(1) for x in (q, k, v))
            return _attend(rows, keys, values, scale, hides_nan).reshape(q.shape).contiguous()
        return _attend(q, k, v, scale, hides_nan).contiguous()
    out = q.new_empty(q.shape)
    for t in range(q.shape[1]):
        # [B, 1, tokens, D]; a view where frames follow each other in memory.
        keys, values = (x[:, : t + 1].flatten(1, 2).unsqueeze(1) for x in (k, v))
        out[:, t : t + 1] = _attend(q[:, t : t + 1], keys, values, scale, hides_nan)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, hides_nan: bool) -> Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    if hides_nan:
        lost = q.isnan().any(-1, keepdim=True) | k.isnan().any(-1).any(-1)[..., None, None]
        out = out.masked_fill(lost, torch.nan)
    return out


def _refuse_unfused(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what torch would compute by unfused products, with every score in memory."""
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    cuda = torch.backends.cuda
    kernels = (cuda.can_use_flash_attention, cuda.can_use_efficient_attention, cuda.can_use_cudnn_attention)
    if q.dtype != torch.float64 and not any(usable(params, False) for usable in kernels):
        raise UnsupportedError(
            f"{_OP}: no fused kernel behind impl 'sdpa' takes D = {q.shape[-1]} in {q.dtype} here; use impl='triton'"
        )
