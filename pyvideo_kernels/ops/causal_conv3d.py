"""Causal 3-D convolution of channels-last video, its past read from a cache."""

from __future__ import annotations

from collections.abc import Sequence

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
from ..reference.causal_conv3d import check_pad_mode, output_shape, with_past
from ._checks import check_vector

PAD_MODES = ("zeros", "replicate", "reflect", "first_frame")


def pack_weight(weight: Tensor) -> Tensor:
    """The same ``[O, C, kt, kh, kw]`` weight laid out in memory as ``[O, kt, kh, kw, C]``.

    The GPU kernels read weights so and pack any other layout on each call (small beside the convolution). A caller
    that owns the weight can pack once; the result is used like the original. A weight that is packed already is
    returned as it is.
    """
    # contiguous(channels_last_3d) would leave 1×1×1 kernels alone, whose strides are ambiguous, which is right.
    return weight.contiguous(memory_format=torch.channels_last_3d)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cache: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    pad_mode: str = "zeros",
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Convolution that sees no future frame: output frame t reads frames t - kt + 1 … t.

        y[b, t, h, w, o] = bias[o] + residual[b, t, h, w, o]
                         + Σ weight[o, c, i, j, k] * x[b, t*st + i - (kt-1), h*sh + j - kh//2, w*sw + k - kw//2, c]

    Frames before the first come from ``cache``, and are zero before those; pixels outside the frame are zero.

    Args:
        x: ``[B, T, H, W, C]``, bf16/fp16/fp32 (fp64 by the reference), last dim contiguous, any other strides.
            ``clip.permute(0, 2, 3, 4, 1)`` of a channels_last_3d clip is such a view and costs nothing.
        weight: ``[O, C, kt, kh, kw]``, dtype of ``x``, kh and kw odd; see `pack_weight`.
        bias: ``[O]`` or None.
        cache: ``[B, n, H, W, C]`` with n ≤ kt - 1, dtype of ``x``: the n frames just before ``x``. It is read in place:
            nothing is concatenated on the GPU.
        stride: one number or (st, sh, sw), in frames and pixels.
        pad_mode: ``zeros``.
        residual: shape of the result, fp32 or the dtype of ``x``; added in fp32 before the one rounding.
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``; an explicit choice never falls back.
    Returns:
        ``[B, ceil(T / st), ceil(H / sh), ceil(W / sw), O]``, contiguous, dtype of ``x``; accumulated in fp32.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: an input requires grad (no backward), another ``pad_mode``, or this implementation cannot be
            had here; names the remedy.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic T, H, W.
    Numerics: error ≤ 2 × eager's own against float64; fp32 on CUDA uses TF32 where cuDNN is allowed to.
        Deterministic: yes.
    Source: Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", arXiv:2310.05737,
        sec. 3.2 (causal 3-D convolution).
    """
    op = "causal_conv3d"
    check_tensor(op, "x", x, ndim=5)
    check_tensor(op, "weight", weight, ndim=5)
    b, _, h, w, c = x.shape
    out, _, kt, kh, kw = weight.shape
    if weight.shape[1] != c or kh % 2 == 0 or kw % 2 == 0:
        bad_shape(op, "weight", f"[O, {c}, kt, kh, kw] with odd kh and kw for `x` {list(x.shape)}", weight)
    if weight.dtype != x.dtype:
        raise DTypeError(f"{op}: `weight` must be {x.dtype} like `x`; got {describe(weight)}")
    check_vector(op, out, bias=bias)
    steps = [stride] * 3 if isinstance(stride, int) else list(stride)
    if len(steps) != 3 or not all(isinstance(step, int) and step >= 1 for step in steps):
        bad_option(op, "stride", "a positive integer or three of them (st, sh, sw)", stride)
    if pad_mode not in PAD_MODES:
        bad_option(op, "pad_mode", f"one of {', '.join(PAD_MODES)}", pad_mode)
    check_pad_mode(pad_mode)
    if cache is not None:
        check_tensor(op, "cache", cache, ndim=5)
        n = cache.shape[1]
        if cache.shape != (b, n, h, w, c) or n > kt - 1:
            bad_shape(op, "cache", f"[{b}, n, {h}, {w}, {c}] with n <= {kt - 1} (kt - 1)", cache)
        if cache.dtype != x.dtype:
            raise DTypeError(f"{op}: `cache` must be {x.dtype} like `x`; got {describe(cache)}")
    if residual is not None:
        check_tensor(op, "residual", residual, ndim=5)
        expected = output_shape(x, weight, steps)
        if residual.shape != expected:
            bad_shape(op, "residual", str(list(expected)), residual)
    check_last_dim_contiguous(op, x=x, cache=cache, residual=residual)
    check_same_device(op, x=x, weight=weight, bias=bias, cache=cache, residual=residual)
    refuse_grad(op, x=x, weight=weight, bias=bias, cache=cache, residual=residual)
    return torch.ops.pyvideo.causal_conv3d(x, weight, bias, cache, steps, pad_mode, residual, impl)


def causal_conv3d_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    stride: Sequence[int],
    pad_mode: str,
    residual: Tensor | None,
) -> Tensor:
    """``impl="cpu"``: oneDNN's convolution on channels-last frames, the residual added before it rounds.

    torch.nn.functional.conv3d sends small fp32 clips to an im2col loop that is several times slower than oneDNN, and
    adds a residual after rounding; both are avoided by calling oneDNN's entry point.
    """
    check_pad_mode(pad_mode)
    supported = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and supported):
        raise UnsupportedError(f"causal_conv3d: oneDNN does not take {x.dtype} here; use impl='reference'")
    if x.numel() == 0:
        return x.new_zeros(output_shape(x, weight, stride))
    _, _, kt, kh, kw = weight.shape
    past = kt - 1
    if x.shape[1] == 1:
        # Taps that would only meet zeros (a first frame has no past) are left out: up to two thirds of the work.
        past = 0 if cache is None else cache.shape[1]
        weight = weight[:, :, kt - 1 - past :]
    frames = with_past(x, cache, past).permute(0, 4, 1, 2, 3)
    if bias is not None:
        bias = bias.to(x.dtype)
    window = ([0, kh // 2, kw // 2], list(stride), [1, 1, 1], 1)
    if residual is None:
        y = torch.mkldnn_convolution(frames, weight, bias, *window)
    else:
        other = residual.to(x.dtype).permute(0, 4, 1, 2, 3)
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            frames, other, weight, bias, *window, "add", 1.0, None, [], None
        )
    return y.permute(0, 2, 3, 4, 1).contiguous()
