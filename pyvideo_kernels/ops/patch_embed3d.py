"""Patch embedding of a video: patchify folded into a matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import DTypeError, ShapeError, UnsupportedError, bad_shape, check_same_device, check_tensor
from ..reference.patch_embed3d import patchify
from ._checks import check_patch, check_vector


def patch_embed3d(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    patch: Sequence[int] | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Cut a video into patches and project each to a token; no convolution, no copy of the video.

        token[b, n] = weight · patch_n(video[b]) + bias,    n over (T/pt, H/ph, W/pw), W fastest

    Args:
        video: ``[B, C, T, H, W]``, bf16/fp16/fp32 (fp64 by the reference), any strides (channels-last, sliced,
            permuted); T, H, W multiples of the patch.
        weight: ``[D, C, pt, ph, pw]`` as a Conv3d has it, or ``[D, C*pt*ph*pw]`` with ``patch``; dtype of ``video``.
        bias: ``[D]``, or None.
        patch: (pt, ph, pw); may be left out when ``weight`` has five dimensions, and must agree with it if given.
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        ``[B, (T/pt)(H/ph)(W/pw), D]``, contiguous, dtype of ``video``; accumulated in fp32 (fp32 inputs are not
        rounded to TF32), one rounding.
    Raises:
        ShapeError, DTypeError, DeviceError: names the argument, what was expected, what came.
        UnsupportedError: this implementation cannot be had here; names the remedy.
    Supports: sm_80+, gfx942+, CPU | fwd, bwd | fullgraph, CUDA graphs, dynamic T, H, W.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929, eq. 1; Arnab et al., "ViViT",
        arXiv:2103.15691, sec. 3.2 (tubelets).
    """
    op = "patch_embed3d"
    check_tensor(op, "video", video, ndim=5)
    check_tensor(op, "weight", weight, ndim=(2, 5))
    channels = video.shape[1]
    if weight.dim() == 5:
        derived = tuple(weight.shape[2:])
        if patch is not None and tuple(patch) != derived:
            raise ShapeError(f"{op}: `patch` must be {derived} like `weight` {list(weight.shape)}; got {tuple(patch)}")
        pt, ph, pw = derived
    elif patch is None:
        raise ShapeError(f"{op}: `patch` must be (pt, ph, pw) when `weight` has two dimensions; got None")
    else:
        pt, ph, pw = check_patch(op, patch)
    columns = channels * pt * ph * pw
    if weight.dim() == 5 and weight.shape[1] != channels:
        bad_shape(op, "weight", f"[D, {channels}, pt, ph, pw] for `video` {list(video.shape)}", weight)
    if weight.dim() == 2 and weight.shape[1] != columns:
        bad_shape(op, "weight", f"[D, {columns}] = [D, {channels}*{pt}*{ph}*{pw}]", weight)
    if video.shape[2] % pt or video.shape[3] % ph or video.shape[4] % pw:
        bad_shape(op, "video", f"[B, C, T, H, W] with T, H, W multiples of the patch ({pt}, {ph}, {pw})", video)
    if weight.dtype != video.dtype:
        raise DTypeError(f"{op}: `weight` must be {video.dtype} like `video`; got {weight.dtype}")
    check_vector(op, weight.shape[0], bias=bias)
    check_same_device(op, video=video, weight=weight, bias=bias)
    out: Tensor = torch.ops.pyvideo.patch_embed3d(video, weight, bias, [pt, ph, pw], impl)
    return out


def patch_embed3d_cpu(video: Tensor, weight: Tensor, bias: Tensor | None, patch: Sequence[int]) -> Tensor:
    """``impl="cpu"``: patches packed once, then one BLAS product in the inputs' dtype (fp32 accumulation)."""
    from .. import _native

    check_linear("patch_embed3d", video, bias)
    pack = _native.part("patchify") or patchify
    return torch.nn.functional.linear(pack(video, patch), weight.reshape(weight.shape[0], -1), bias)


def check_linear(op: str, x: Tensor, bias: Tensor | None) -> None:
    """Refuse what the CPU's matrix product would compute in another precision than the contract's."""
    bf16 = x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not (x.dtype == torch.float32 or bf16) or (bias is not None and bias.dtype != x.dtype):
        raise UnsupportedError(
            f"{op}: impl 'cpu' takes fp32, or bf16 with bf16 `bias` where oneDNN has it; use impl='reference'"
        )
