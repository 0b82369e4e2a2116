"""The end of a video decoder: norm, SiLU, convolution, unpatchify and clamp, into frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import (
    DTypeError,
    ValueOptionError,
    bad_option,
    bad_shape,
    check_last_dim_contiguous,
    check_same_device,
    check_tensor,
    describe,
    refuse_grad,
)
from ..reference.causal_conv3d import spatial_mode, with_border, with_past
from ..reference.decode_head import finish, output_shape
from ._checks import check_no_broadcast, check_patch, check_vector, require_onednn
from .causal_conv3d import check_convolution, next_cache

_OP = "decode_head"
_NORMS = (None, "rms", "pixel")
_EPS = {None: 0.0, "rms": 1e-12, "pixel": 1e-8}


def decode_head(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    cache: Tensor | None = None,
    pad_mode: str = "zeros",
    pad_end: int = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    patch: Sequence[int] = (1, 1, 1),
    clamp: bool = True,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    return_cache: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor | None]:
    """The last layers of a video decoder: activations to frames, as floats or as bytes, where they are wanted.

        z = silu(norm(x))                                   (z = x without a norm)
        y = causal_conv3d(z, weight, bias, cache)
        frame[b, c, t*pt + i, h*ph + j, w*pw + k] = y[b, t, h, w, ((c*pt + i)*pw + k)*ph + j], clamped to [-1, 1]

    As bytes, ``round((frame / 2 + 0.5) * 255)`` of the frame that the float form gives.

    Args:
        x: ``[B, T, H, W, C]``, bf16/fp16/fp32 (fp64 by the reference), last dim contiguous, any other strides.
        weight: ``[O, C, kt, kh, kw]``, dtype of ``x``, kh and kw odd, O a multiple of ``pt*ph*pw``; see
            `causal_conv3d.pack_weight`.
        bias: ``[O]`` or None.
        norm: None: ``x`` is normalised and activated already (by the layer before: see docs/ops/decode_head.md);
            ``rms``: `rms_norm_silu`; ``pixel``: `pixel_norm_silu`.
        norm_weight: ``[C]``, for ``rms`` required, for ``pixel`` optional.
        eps: of the norm; None: 1e-12 for ``rms``, 1e-8 for ``pixel``.
        cache: ``[B, n, H, W, C]`` with n ≤ kt - 1, dtype of ``x``: the n frames of *z* just before ``x``. They are
            normalised once, in the call that they come from, and never again.
        pad_mode: what lies outside, as for `causal_conv3d`.
        pad_end: output frames past the end, whose windows see the last frame repeated.
        scale, shift: ``[B, C]``, of ``pixel``.
        patch: (pt, ph, pw), pixels of one position; the column inside a patch comes before the row.
        clamp: to [-1, 1]; bytes are clamped whatever it says.
        out: ``[B, O/(pt*ph*pw), (T + pad_end)*pt, H*ph, W*pw]``, any strides without overlap, dtype of ``x`` or uint8:
            written and returned; a slice of the clip's buffer, say. None: a new tensor.
        dtype: ``torch.uint8`` or the dtype of ``x``; None: that of ``out``, or of ``x``.
        return_cache: return ``(frames, cache)``, the last ``kt - 1`` frames of z as `causal_conv3d.next_cache` gives
            them, for the next call.
        impl: ``auto``, ``reference``, ``triton`` or ``cpu``, of the norm and of the rest; an explicit choice never
            falls back.
    Returns:
        The frames: ``out``, or a contiguous tensor of its shape. fp32 accumulation, one rounding (and one for z).
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: an input requires grad (no backward), or this implementation cannot be had here.
    Supports: sm_80+, gfx942+, CPU | fwd | fullgraph, CUDA graphs, dynamic T, H, W.
    Numerics: error ≤ 2 × eager's own against float64; fp32 on CUDA uses TF32 where cuDNN is allowed to. NaN stays
        NaN in float frames and is 0 in bytes. Deterministic: yes.
    Source: Wan Team, "Wan: Open and Advanced Large-Scale Video Generative Models", arXiv:2503.20314, sec. 4.1;
        HaCohen et al., "LTX-Video", arXiv:2501.00103, sec. 2.1 (the last patches decoded by the head).
    """
    check_convolution(_OP, x, weight, bias, cache, pad_mode, pad_end)
    sizes = check_patch(_OP, patch)
    if weight.shape[0] % (sizes[0] * sizes[1] * sizes[2]):
        bad_shape(_OP, "weight", f"[O, ...] with O a multiple of the patch {tuple(sizes)}", weight)
    _check_norm(x, norm, norm_weight, eps, scale, shift)
    shape = output_shape(x, weight, pad_end, sizes)
    dtype = _check_out(x, shape, out, dtype)
    check_last_dim_contiguous(_OP, x=x, cache=cache)
    tensors = {"x": x, "weight": weight, "bias": bias, "cache": cache}
    tensors |= {"norm_weight": norm_weight, "scale": scale, "shift": shift, "out": out}
    check_same_device(_OP, **tensors)
    refuse_grad(_OP, **tensors)
    z = _normalised(x, norm, norm_weight, _EPS[norm] if eps is None else eps, scale, shift, impl)
    frames = x.new_empty(shape, dtype=dtype) if out is None else out
    torch.ops.pyvideo.decode_head_(frames, z, weight, bias, cache, pad_mode, pad_end, sizes, clamp, impl)
    return (frames, next_cache(z, cache, weight.shape[2] - 1)) if return_cache else frames


def decode_head_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cache: Tensor | None = None,
    pad_mode: str = "zeros",
    pad_end: int = 0,
    patch: Sequence[int] = (1, 1, 1),
    clamp: bool = True,
    impl: str = "auto",
) -> Tensor:
    """`decode_head` of activations that are normalised already, into ``out``: the op alone, one kernel.

    Args:
        out: as for `decode_head`, overwritten. Every other argument as there.
    Returns:
        ``out``.
    Raises:
        as `decode_head`.
    Supports: sm_80+, gfx942+, CPU | fwd, in place | fullgraph, CUDA graphs, dynamic T, H, W.
    Numerics: as `decode_head`. Deterministic: yes.
    Source: as `decode_head`.
    """
    if not isinstance(out, Tensor):
        raise DTypeError(f"{_OP}: `out` must be a tensor; got {type(out).__name__}")
    options = {"cache": cache, "pad_mode": pad_mode, "pad_end": pad_end, "patch": patch, "clamp": clamp}
    decode_head(x, weight, bias, out=out, impl=impl, **options)  # type: ignore[arg-type]
    return out


def _check_norm(
    x: Tensor,
    norm: str | None,
    norm_weight: Tensor | None,
    eps: float | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    if norm not in _NORMS:
        bad_option(_OP, "norm", "None, 'rms' or 'pixel'", norm)
    check_vector(_OP, x.shape[-1], norm_weight=norm_weight)
    if norm == "rms" and norm_weight is None:
        raise ValueOptionError(f"{_OP}: `norm_weight` must be [{x.shape[-1]}] with norm='rms'; got None")
    if norm is None and (norm_weight is not None or eps is not None):
        name = "eps" if norm_weight is None else "norm_weight"
        raise ValueOptionError(f"{_OP}: `{name}` must be None without a norm; got a value")
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is None:
            continue
        if norm != "pixel":
            raise ValueOptionError(f"{_OP}: `{name}` must be None unless norm='pixel'; got a tensor")
        check_tensor(_OP, name, tensor, ndim=2)
        if tensor.shape != (x.shape[0], x.shape[-1]):
            bad_shape(_OP, name, f"[{x.shape[0]}, {x.shape[-1]}]", tensor)
    if eps is not None and not eps >= 0:
        bad_option(_OP, "eps", "a number of at least 0", eps)


def _check_out(x: Tensor, shape: tuple[int, ...], out: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the frames."""
    if out is None:
        wanted = x.dtype if dtype is None else dtype
    elif not isinstance(out, Tensor):
        raise DTypeError(f"{_OP}: `out` must be a tensor; got {type(out).__name__}")
    else:
        wanted = out.dtype
        if dtype is not None and dtype != wanted:
            raise DTypeError(f"{_OP}: `out` must be {dtype} like `dtype`; got {describe(out)}")
        if out.shape != shape:
            bad_shape(_OP, "out", str(list(shape)), out)
        check_no_broadcast(_OP, out=out)
    if wanted not in (x.dtype, torch.uint8):
        name = "dtype" if out is None else "out"
        raise DTypeError(f"{_OP}: `{name}` must be torch.uint8, or {x.dtype} like `x`; got {wanted}")
    return wanted


def _normalised(
    x: Tensor,
    norm: str | None,
    weight: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    impl: str,
) -> Tensor:
    """One pass over memory, not in the convolution's loads: there each pixel would be normalised once a tap."""
    if norm == "rms":
        from .rms_norm_silu import rms_norm_silu

        assert weight is not None
        return rms_norm_silu(x, weight, eps=eps, impl=impl)
    if norm == "pixel":
        from .pixel_norm_silu import pixel_norm_silu

        return pixel_norm_silu(x, weight, scale=scale, shift=shift, eps=eps, impl=impl)
    return x


def decode_head_cpu(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    pad_mode: str,
    pad_end: int,
    patch: Sequence[int],
    clamp: bool,
) -> None:
    """``impl="cpu"``: oneDNN's convolution on channels-last frames, then one pass that unfolds and clamps."""
    require_onednn(_OP, x)
    if out.numel() == 0:
        return
    _, _, kt, kh, kw = weight.shape
    frames, sides = with_past(x, cache, kt - 1, pad_mode, pad_end), [0, kh // 2, kw // 2]
    if spatial_mode(pad_mode) != "zeros":
        frames, sides = with_border(frames, kh, kw, spatial_mode(pad_mode)), [0, 0, 0]
    if bias is not None:
        bias = bias.to(x.dtype)
    y = torch.mkldnn_convolution(frames.permute(0, 4, 1, 2, 3), weight, bias, sides, [1, 1, 1], [1, 1, 1], 1)
    out.copy_(finish(y.permute(0, 2, 3, 4, 1), patch, clamp, out.dtype))
