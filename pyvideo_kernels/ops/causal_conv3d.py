"""Causal 3-D convolution of channels-last video, its past read from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import (
    DTypeError,
    bad_option,
    bad_shape,
    check_last_dim_contiguous,
    check_same_device,
    check_tensor,
    describe,
    refuse_grad,
)
from ..reference.causal_conv3d import EPILOGUES, PAD_MODES, output_shape, repeats_frames, shuffle_factor
from ._checks import check_cache, check_vector


def pack_weight(weight: Tensor) -> Tensor:
    """The same ``[O, C, kt, kh, kw]`` weight laid out in memory as ``[O, kt, kh, kw, C]``.

    The GPU kernels read weights so and pack any other layout on each call (small beside the convolution). A caller
    that owns the weight can pack once; the result is used like the original. A weight that is packed already is
    returned as it is. The rows that ``interleave`` and ``pixel_shuffle`` send to one pixel are read where they lie.
    """
    # contiguous(channels_last_3d) would leave 1×1×1 kernels alone, whose strides are ambiguous, which is right.
    return weight.contiguous(memory_format=torch.channels_last_3d)


def fold_time(
    x: Tensor, weight: Tensor, cache: Tensor | None, pad_mode: str, pad_end: int
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """``(x, weight, cache, pad_end)`` of the same convolution with fewer taps, where the clip is one frame long.

    Where every frame of the only window is that frame (images, and the first frame of a clip by itself), the taps in
    time are added up: a third of the products. The sums are rounded to the dtype of the weights once, each to its own
    size, which is an error of the size that rounding the result makes. Where the frames before it are zeros, the taps
    that would meet them are left out.
    """
    kt, cached = weight.shape[2], 0 if cache is None else cache.shape[1]
    if kt == 1 or x.shape[1] + pad_end != 1:
        return x, weight, cache, pad_end
    if not repeats_frames(pad_mode):
        # The end of a clip repeats its last frame, so that one is not the clip's only frame.
        return (x, weight[:, :, kt - 1 - cached :], cache, pad_end) if pad_end == 0 else (x, weight, cache, pad_end)
    if x.shape[1] + cached != 1:
        return x, weight, cache, pad_end
    frame = cache if cache is not None and cached else x
    summed = weight.sum(2, keepdim=True, dtype=torch.promote_types(weight.dtype, torch.float32))
    return frame, summed.to(weight.dtype), None, 0


def next_cache(x: Tensor, cache: Tensor | None, frames: int) -> Tensor | None:
    """The last ``frames`` frames of ``[cache, x]``: the ``cache`` of the next call, when ``x`` was this call's input.

    No pass over memory where that can be: a view of an ``x`` that has up to twice the frames that are kept, or
    ``cache`` itself where ``x`` has none. A view keeps all of ``x`` alive until the next call, so the frames of a
    longer ``x`` are copied, and so are those that come from both.

    Args:
        x: ``[B, T, H, W, C]``.
        cache: ``[B, n, H, W, C]`` or None, as it was passed with ``x``.
        frames: kt - 1 of the convolution.
    Returns:
        ``[B, min(frames, n + T), H, W, C]``; None where that is no frame at all. Whoever keeps it must not write to
        ``x`` meanwhile.
    """
    held, new = 0 if cache is None else cache.shape[1], x.shape[1]
    if frames <= 0 or held + new == 0:
        return None
    if new >= frames:
        last = x[:, new - frames :]
        return last if new <= 2 * frames else last.clone(memory_format=torch.contiguous_format)
    if cache is None or held == 0:
        return x
    old = cache[:, max(0, held - (frames - new)) :]
    return torch.cat([old, x], 1) if new else old


@overload
def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cache: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    pad_mode: str = "zeros",
    pad_end: int = 0,
    residual: Tensor | None = None,
    epilogue: Literal["interleave", "pixel_shuffle"] | None = None,
    factor: Sequence[int] | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-12,
    keep: bool = True,
    impl: str = "auto",
) -> Tensor: ...


@overload
def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    epilogue: Literal["rms_norm_silu"],
    cache: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    pad_mode: str = "zeros",
    pad_end: int = 0,
    residual: Tensor | None = None,
    factor: Sequence[int] | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-12,
    keep: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cache: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    pad_mode: str = "zeros",
    pad_end: int = 0,
    residual: Tensor | None = None,
    epilogue: str | None = None,
    factor: Sequence[int] | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-12,
    keep: bool = True,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolution that sees no future frame: output frame t reads frames t - kt + 1 … t.

        y[b, t, h, w, o] = bias[o] + residual[b, t, h, w, o]
                         + Σ weight[o, c, i, j, k] * x[b, t*st + i - (kt-1), h*sh + j - kh//2, w*sw + k - kw//2, c]

    Frames before the first come from ``cache``; ``pad_mode`` says what lies before those and around every frame:

        ================  ======================  =====================================
        ``pad_mode``      before the oldest       around a frame
        ================  ======================  =====================================
        ``zeros``         zeros                   zeros (Wan)
        ``replicate``     the oldest, repeated    its edge, repeated (HunyuanVideo)
        ``reflect``       the oldest, repeated    its pixels, mirrored at the edge (LTX-2)
        ``first_frame``   the oldest, repeated    zeros (LTX, CogVideoX)
        ================  ======================  =====================================

    ``epilogue`` says what becomes of the result before it is written:

        ``rms_norm_silu``: z = silu(y / max(||y||₂, norm_eps) * sqrt(O) * norm_weight) is returned beside y.
        ``interleave``: channels ``[i, c]`` of ``[2, O / 2]`` become frame 2t + i (Wan's upsampling in time).
        ``pixel_shuffle``: channels ``[c, i, j, k]`` become frame t*ft + i, row h*fh + j and column w*fw + k (LTX).

    Args:
        x: ``[B, T, H, W, C]``, bf16/fp16/fp32 (fp64 by the reference), last dim contiguous, any other strides.
            ``clip.permute(0, 2, 3, 4, 1)`` of a channels_last_3d clip is such a view and costs nothing. T may be 0
            where there is a cache.
        weight: ``[O, C, kt, kh, kw]``, dtype of ``x``, kh and kw odd; see `pack_weight`.
        bias: ``[O]`` or None.
        cache: ``[B, n, H, W, C]`` with n ≤ kt - 1, dtype of ``x``: the n frames just before ``x``. It is read in place:
            nothing is concatenated on the GPU. `next_cache` makes the one of the next call.
        stride: one number or (st, sh, sw), in frames and pixels.
        pad_mode: see above.
        pad_end: so many repeats of the last frame follow ``x``: with it a convolution over a whole clip that sees as
            many frames ahead as behind is ``causal_conv3d(x[:, 1:], ..., cache=x[:, :1], pad_mode="first_frame",
            pad_end=1)`` for kt = 3.
        residual: shape of the result, fp32 or the dtype of ``x``; added in fp32 before the one rounding.
        epilogue: None or see above.
        factor: (ft, fh, fw) of ``pixel_shuffle``.
        norm_weight: ``[O]`` of ``rms_norm_silu``, fp32 or the dtype of ``x``.
        norm_eps: smallest norm that is divided by, in units of y.
        keep: False: y itself is not needed beside z, and is returned empty.
        impl: ``auto``, ``reference``, ``triton``, ``cudnn`` or ``cpu``; an explicit choice never falls back.
    Returns:
        y ``[B, ceil((T + pad_end) / st), ceil(H / sh), ceil(W / sw), O]`` (``interleave``: twice the frames and half
        the channels; ``pixel_shuffle``: times the factor, over its product), contiguous, dtype of ``x``; accumulated
        in fp32. With ``rms_norm_silu``: ``(y, z)``, z of the same shape and dtype.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: an input requires grad (no backward), or this implementation cannot be had here; names the
            remedy.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic T, H, W.
    Numerics: error ≤ 2 × eager's own against float64; fp32 on CUDA uses TF32 where cuDNN is allowed to.
        Deterministic: yes.
    Source: Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", arXiv:2310.05737,
        sec. 3.2 (causal 3-D convolution); Wan Team, arXiv:2503.20314, sec. 4.1 (the cache); Shi et al., "Real-Time
        Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network",
        arXiv:1609.05158 (pixel shuffle).
    """
    op = "causal_conv3d"
    check_convolution(op, x, weight, bias, cache, pad_mode, pad_end)
    steps = [stride] * 3 if isinstance(stride, int) else list(stride) if isinstance(stride, Sequence) else []
    if len(steps) != 3 or not all(isinstance(step, int) and step >= 1 for step in steps):
        bad_option(op, "stride", "a positive integer or three of them (st, sh, sw)", stride)
    factors = _check_epilogue(op, weight.shape[0], epilogue, factor, norm_weight, keep)
    if residual is not None:
        check_tensor(op, "residual", residual, ndim=5)
        expected = output_shape(x, weight, steps, pad_end, epilogue, factors)
        if residual.shape != expected:
            bad_shape(op, "residual", str(list(expected)), residual)
    check_last_dim_contiguous(op, x=x, cache=cache, residual=residual, norm_weight=norm_weight)
    check_same_device(op, x=x, weight=weight, bias=bias, cache=cache, residual=residual, norm_weight=norm_weight)
    refuse_grad(op, x=x, weight=weight, bias=bias, cache=cache, residual=residual, norm_weight=norm_weight)
    y, z = torch.ops.pyvideo.causal_conv3d(
        x, weight, bias, cache, steps, pad_mode, pad_end, residual, epilogue, factors, norm_weight, norm_eps, keep, impl
    )
    return (y, z) if epilogue == "rms_norm_silu" else y


def check_convolution(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    pad_mode: str,
    pad_end: int,
) -> None:
    """What a causal convolution asks of its operands: shapes, dtypes, and frames to pad with."""
    check_tensor(op, "x", x, ndim=5)
    check_tensor(op, "weight", weight, ndim=5)
    _, t, h, w, c = x.shape
    out, _, kt, kh, kw = weight.shape
    if c < 1:
        bad_shape(op, "x", "[B, T, H, W, C] with C >= 1", x)
    if weight.shape[1] != c or kh % 2 == 0 or kw % 2 == 0 or kt < 1:
        bad_shape(op, "weight", f"[O, {c}, kt, kh, kw] with odd kh and kw for `x` {list(x.shape)}", weight)
    if weight.dtype != x.dtype:
        raise DTypeError(f"{op}: `weight` must be {x.dtype} like `x`; got {describe(weight)}")
    check_vector(op, out, bias=bias)
    if pad_mode not in PAD_MODES:
        bad_option(op, "pad_mode", f"one of {', '.join(PAD_MODES)}", pad_mode)
    if pad_mode == "reflect" and (h <= kh // 2 or w <= kw // 2):
        bad_shape(op, "x", f"[B, T, H > {kh // 2}, W > {kw // 2}, C] to be mirrored", x)
    if isinstance(pad_end, bool) or not isinstance(pad_end, (int, torch.SymInt)) or pad_end < 0:
        bad_option(op, "pad_end", "a number of frames, 0 or more", pad_end)
    check_cache(op, x, cache, kt - 1, " (kt - 1)")
    if pad_end and t + (0 if cache is None else cache.shape[1]) == 0:
        bad_shape(op, "x", "at least one frame, or a cache of one, for `pad_end` to repeat", x)


def _check_epilogue(
    op: str,
    out: int,
    epilogue: str | None,
    factor: Sequence[int] | None,
    norm_weight: Tensor | None,
    keep: bool,
) -> list[int]:
    """The factor for the schema; raises where an epilogue lacks its argument or another one's is given."""
    if epilogue is not None and epilogue not in EPILOGUES:
        bad_option(op, "epilogue", f"None or one of {', '.join(EPILOGUES)}", epilogue)
    factors = [1, 1, 1]
    if epilogue == "pixel_shuffle":
        factors = list(factor) if isinstance(factor, Sequence) and not isinstance(factor, str) else []
        if len(factors) != 3 or not all(isinstance(n, int) and n >= 1 for n in factors):
            bad_option(op, "factor", "three positive integers (ft, fh, fw) for `pixel_shuffle`", factor)
    elif factor is not None:
        bad_option(op, "factor", "None without `pixel_shuffle`", factor)
    unfold = shuffle_factor(epilogue, factors)
    parts = unfold[0] * unfold[1] * unfold[2]
    if out % parts:
        bad_option(op, "weight", f"of a multiple of {parts} output channels for {epilogue!r}", out)
    if epilogue == "rms_norm_silu":
        if norm_weight is None:
            bad_option(op, "norm_weight", f"[{out}] for `rms_norm_silu`", None)
        check_tensor(op, "norm_weight", norm_weight, ndim=1)
        check_vector(op, out, norm_weight=norm_weight)
    elif norm_weight is not None:
        bad_option(op, "norm_weight", "None without `rms_norm_silu`", describe(norm_weight))
    if not keep and epilogue != "rms_norm_silu":
        bad_option(op, "keep", "True without `rms_norm_silu`, whose result it drops", keep)
    return factors
