"""Nearest 2× and a 3×3 convolution of channels-last video, as 2×2-tap convolutions of the small image."""

from __future__ import annotations

from itertools import product

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
from ..reference.causal_conv3d import PAD_MODES
from ..reference.upsample_conv2d import output_shape, past_frames
from ._checks import check_cache, check_vector


def packed_shape(weight: Tensor, time_factor: int) -> tuple[int, ...]:
    """Shape of what `pack_upsample_weight` makes, where ``weight`` is."""
    o, c = weight.shape[:2]
    kt = weight.shape[2] if weight.dim() == 5 else 1
    doubled = time_factor == 2 and kt == 3
    if weight.device.type == "cpu":
        return (c, o, 4 if doubled else kt, 4, 4)
    return (8, o, 8, c) if doubled else (4, o, 4 * kt, c)


def pack_upsample_weight(weight: Tensor, time_factor: int = 1) -> Tensor:
    """The taps of each phase, as the kernels read them.

    A pixel of the doubled image is one of four (eight with time) that are made around a small pixel. Which one, its
    phase, decides which of the original taps fall on the same small pixel; their weights are summed. The sums that
    meet a frame are rounded to the dtype of ``weight`` together, so that their total, the answer to a flat image, is
    kept to half a step of the smallest of them.

    Args:
        weight: ``[O, C, 3, 3]`` or ``[O, C, kt, 3, 3]`` with kt 1 or 3.
        time_factor: that of the call.
    Returns:
        For the device of ``weight``, contiguous. On a GPU ``[phases, O, taps, C]``: phase ``(s * 2 + p) * 2 + q`` makes
        pixels (2h + p, 2w + q) of frame 2t + s; tap ``(i * 2 + a) * 2 + b`` reads pixel (h + a - 1 + p, w + b - 1 + q),
        i from the oldest frame on. On a CPU ``[C, O, kt', 4, 4]``: the weight of the transposed convolution that does
        the same (`as_transposed`).
    """
    wide = weight if weight.dim() == 5 else weight.unsqueeze(2)
    # fp32 holds the sum of four 16-bit weights; the sum of fp32 weights is rounded once.
    wide = wide.permute(2, 3, 4, 0, 1).to(torch.float64 if weight.element_size() > 2 else torch.float32).contiguous()
    kt = wide.shape[0]
    # In time the window ends with its own frame, one later than in space: the first phase is space's second.
    in_time = _MET[::-1] if time_factor == 2 and kt == 3 else (tuple(slice(i, i + 1) for i in range(kt)),)
    phases = []
    for frames, rows, columns in product(in_time, _MET, _MET):
        taps = [
            _round_together(
                torch.stack([wide[i, j, k].sum((0, 1, 2)) for j, k in product(rows, columns)]), weight.dtype
            )
            for i in frames
        ]
        phases.append(torch.cat(taps))
    packed = torch.stack(phases).transpose(1, 2).contiguous()
    return as_transposed(packed) if packed.device.type == "cpu" else packed


# Of three taps, those that fall on the first and on the second of the two small pixels that a phase reads.
_MET = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))


def _round_together(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """``sums`` [taps, ...] in ``dtype``, their total kept: the smallest tap, whose steps are finest, takes the rest."""
    rounded = sums.to(dtype).to(sums.dtype)
    smallest = sums.abs().argmin(0, keepdim=True)
    taken = rounded.gather(0, smallest) + (sums - rounded).sum(0, keepdim=True)
    return rounded.scatter_(0, smallest, taken).to(dtype)


def as_transposed(packed: Tensor) -> Tensor:
    """Packed weights as those of a transposed convolution, ``[C, O, kt', 4, 4]``.

    A small pixel h adds tap k of four to pixel 2h + k - 1: phase p and tap a meet in k = 3 - p - 2a. In time a frame t
    adds tap k to frame 2t + k, s and i meeting in k = s + 2 (1 - i); undoubled, the oldest tap comes last.
    """
    if packed.dim() == 5:
        return packed
    phases, o, _, c = packed.shape
    taps = packed.view(phases // 4, 2, 2, o, -1, 2, 2, c).flip(1, 2, 4, 5, 6)
    return taps.permute(7, 3, 4, 0, 5, 1, 6, 2).reshape(c, o, -1, 4, 4)


def as_phases(packed: Tensor) -> Tensor:
    """The inverse: ``[phases, O, taps, C]``."""
    if packed.dim() == 4:
        return packed
    c, o, kt = packed.shape[:3]
    doubled = 2 if kt == 4 else 1
    taps = packed.view(c, o, kt // doubled, doubled, 2, 2, 2, 2).flip(2, 4, 5, 6, 7)
    return taps.permute(3, 5, 7, 1, 2, 4, 6, 0).reshape(4 * doubled, o, -1, c)


def upsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    packed: Tensor | None = None,
    time_factor: int = 1,
    cache: Tensor | None = None,
    first: bool | None = None,
    pad_mode: str = "zeros",
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Convolution of the image (or clip) with every pixel repeated 2×2, without making that image.

        U[b, t, y, x, c] = x[b, t, y // 2, x // 2, c]                       (and t // 2, or (t + 1) // 2: time_factor)
        y[b, t, y, x, o] = bias[o] + residual[b, t, y, x, o]
                         + Σ weight[o, c, i, j, k] * U[b, t + i - (kt-1), y + j - 1, x + k - 1, c]

    Args:
        x: ``[B, T, H, W, C]``, bf16/fp16/fp32 (fp64 by the reference), last dim contiguous, any other strides.
        weight: ``[O, C, 3, 3]`` (each frame by itself) or ``[O, C, kt, 3, 3]`` with kt 1 or 3 (causal), dtype of ``x``.
        bias: ``[O]`` or None.
        packed: ``pack_upsample_weight(weight, time_factor)``, made once by a caller that keeps ``weight``; None: made
            on each call. It is not compared with ``weight``.
        time_factor: 2 repeats frames too: every frame twice, but the first frame of a clip once. With a weight that
            does not look back the convolution runs once for both.
        cache: ``[B, n, H, W, C]``, dtype of ``x``: the n small frames just before ``x``, n ≤ 2, or ≤ 1 for
            ``time_factor`` 2; none for a weight that does not look back.
        first: whether ``x`` starts the clip, for ``time_factor`` 2; None: it does if no ``cache`` is given.
        pad_mode: what lies outside the clip. ``zeros``: zeros before the first frame and around (not for
            ``time_factor`` 2 with kt 3). ``first_frame``: the first frame repeated, zeros around. ``replicate``: the
            first frame and the edge pixels repeated; ``reflect`` is the same, for a doubled image.
        residual: shape of the result, fp32 or the dtype of ``x``; added in fp32 before the one rounding.
        impl: ``auto``, ``reference``, ``triton``, ``cudnn`` or ``cpu``; an explicit choice never falls back.
    Returns:
        ``[B, T', 2H, 2W, O]``, contiguous, dtype of ``x``; T' = T, or 2T - 1 (``first``) or 2T for ``time_factor`` 2.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: an input requires grad (no backward), or this implementation cannot be had here; names the
            remedy.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic T, H, W.
    Numerics: error ≤ 2 × eager's own against float64, in 16 bits unless nearly everything cancels (rms(y) below a
        twentieth of √Σ(w·x)²); fp32 on CUDA uses TF32 where cuDNN is allowed to. Deterministic: yes.
    Source: Shi et al., "Is the deconvolution layer the same as a convolutional layer?", arXiv:1609.07009.
    """
    op = "upsample_conv2d"
    check_tensor(op, "x", x, ndim=5)
    check_tensor(op, "weight", weight, ndim=(4, 5))
    frames, c = x.shape[1], x.shape[4]
    o, kt = weight.shape[0], weight.shape[2] if weight.dim() == 5 else 1
    if min(o, c) < 1 or weight.shape[1] != c or tuple(weight.shape[-2:]) != (3, 3) or kt not in (1, 3):
        expected = f"[O, {c}, 3, 3] or [O, {c}, kt, 3, 3], kt 1 or 3, O and C >= 1, for `x` {list(x.shape)}"
        bad_shape(op, "weight", expected, weight)
    if weight.dtype != x.dtype:
        raise DTypeError(f"{op}: `weight` must be {x.dtype} like `x`; got {describe(weight)}")
    check_vector(op, o, bias=bias)
    if isinstance(time_factor, (bool, float)) or time_factor not in (1, 2):
        bad_option(op, "time_factor", "1 or 2", time_factor)
    if pad_mode not in PAD_MODES:
        bad_option(op, "pad_mode", f"one of {', '.join(PAD_MODES)}", pad_mode)
    if time_factor == 2 and kt == 3 and pad_mode == "zeros":
        # A single first frame behind a zero one would need taps of its own; no model pads so.
        bad_option(op, "pad_mode", "'first_frame', 'replicate' or 'reflect' for time_factor 2 with kt 3", pad_mode)
    if first is None:
        first = cache is None
    elif not isinstance(first, bool):
        bad_option(op, "first", "True, False or None", first)
    if time_factor == 2 and first and frames == 0:
        bad_shape(op, "x", "[B, T >= 1, H, W, C] where a clip begins, whose first frame is not doubled", x)
    if packed is not None:
        check_tensor(op, "packed", packed, ndim=(4, 5))
        wanted = packed_shape(weight, time_factor)
        if packed.shape != wanted or not packed.is_contiguous():
            bad_shape(op, "packed", f"{list(wanted)}, contiguous (see pack_upsample_weight)", packed)
        if packed.dtype != x.dtype:
            raise DTypeError(f"{op}: `packed` must be {x.dtype} like `x`; got {describe(packed)}")
    check_cache(op, x, cache, past_frames(weight, time_factor))
    if cache is not None and cache.shape[1] and first and time_factor == 2:
        bad_option(op, "first", "False where a `cache` holds frames before `x`", first)
    if residual is not None:
        check_tensor(op, "residual", residual, ndim=5)
        shape = output_shape(x, weight, time_factor, first)
        if residual.shape != shape:
            bad_shape(op, "residual", str(list(shape)), residual)
    check_last_dim_contiguous(op, x=x, cache=cache, residual=residual)
    given = {"weight": weight, "bias": bias, "packed": packed, "cache": cache, "residual": residual}
    check_same_device(op, x=x, **given)
    refuse_grad(op, x=x, **given)
    return torch.ops.pyvideo.upsample_conv2d(
        x, weight, bias, packed, time_factor, cache, first, pad_mode, residual, impl
    )
