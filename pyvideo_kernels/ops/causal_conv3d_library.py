"""causal_conv3d by a library's convolution: oneDNN on the CPU, cuDNN on CUDA.

A library pads with zeros in space alone. The rest is made for it here: the past and the end of the clip, edges that are
repeated or mirrored (one copy of the clip that is as large as it will be), and the epilogues after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..reference import rms_norm_silu as norm_oracle
from ..reference.causal_conv3d import output_shape, shuffle_factor, spatial_mode, unfold_channels
from ..reference.causal_conv3d import with_past as joined
from .causal_conv3d import fold_time


def padded(x: Tensor, cache: Tensor | None, weight: Tensor, pad_mode: str, pad_end: int) -> tuple[Tensor, list[int]]:
    """``[past, x, repeats]`` as a ``[B, C, T, H, W]`` view of channels-last memory, and the padding that is left to do."""
    kt, kh, kw = weight.shape[2:]
    mode, ph, pw = spatial_mode(pad_mode), kh // 2, kw // 2
    if mode == "zeros" or (ph == 0 and pw == 0):
        return joined(x, cache, kt - 1, pad_mode, pad_end).permute(0, 4, 1, 2, 3), [0, ph, pw]
    b, t, h, w, c = x.shape
    cached = 0 if cache is None else cache.shape[1]
    past = kt - 1
    out = x.new_empty((b, past + t + pad_end, h + 2 * ph, w + 2 * pw, c))
    inside = out[:, :, ph : ph + h, pw : pw + w]
    inside[:, past : past + t] = x
    if cache is not None:
        inside[:, past - cached : past] = cache
    step = 1 if mode == "reflect" else 0
    own = out[:, past - cached : past + t]
    for i in range(1, ph + 1):
        own[:, :, ph - i] = own[:, :, ph + i * step]
        own[:, :, ph + h - 1 + i] = own[:, :, ph + h - 1 - i * step]
    for i in range(1, pw + 1):
        own[:, :, :, pw - i] = own[:, :, :, pw + i * step]
        own[:, :, :, pw + w - 1 + i] = own[:, :, :, pw + w - 1 - i * step]
    out[:, : past - cached] = own[:, :1]
    out[:, past + t :] = own[:, -1:]
    return out.permute(0, 4, 1, 2, 3), [0, 0, 0]


def fold_channels(y: Tensor, epilogue: str | None, factor: Sequence[int]) -> Tensor:
    """A residual of the result's shape in the layout of the convolution: `unfold_channels` backwards."""
    if epilogue not in ("interleave", "pixel_shuffle"):
        return y
    ft, fh, fw = shuffle_factor(epilogue, factor)
    b, t, h, w, c = y.shape
    cells = y.reshape(b, t // ft, ft, h // fh, fh, w // fw, fw, c)
    order = (0, 1, 3, 5, 2, 4, 6, 7) if epilogue == "interleave" else (0, 1, 3, 5, 7, 2, 4, 6)
    return cells.permute(order).reshape(b, t // ft, h // fh, w // fw, ft * fh * fw * c)


def _finished(
    y: Tensor, x: Tensor, epilogue: str | None, factor: Sequence[int], norm_weight: Tensor | None, norm_eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``y [B, T, H, W, O]`` of the convolution, through the epilogue."""
    y = unfold_channels(y, epilogue, factor).contiguous()
    if epilogue != "rms_norm_silu":
        return y, x.new_empty((0,))
    assert norm_weight is not None
    return (y if keep else x.new_empty((0,))), _norm_silu(y, norm_weight, norm_eps)


def _norm_silu(y: Tensor, norm_weight: Tensor, norm_eps: float) -> Tensor:
    from .. import _native

    try:
        z: Tensor = _native.rms_norm_silu(y, norm_weight, norm_eps, True)
    except UnsupportedError:
        z = norm_oracle.rms_norm_silu(y, norm_weight, norm_eps, True)
    return z


def _nothing(x: Tensor, shape: tuple[int, ...], epilogue: str | None, keep: bool) -> tuple[Tensor, Tensor]:
    normed = epilogue == "rms_norm_silu"
    return x.new_zeros(shape if keep or not normed else (0,)), x.new_zeros(shape if normed else (0,))


def causal_conv3d_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    stride: Sequence[int],
    pad_mode: str,
    pad_end: int,
    residual: Tensor | None,
    epilogue: str | None,
    factor: Sequence[int],
    norm_weight: Tensor | None,
    norm_eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """``impl="cpu"``: oneDNN's convolution on channels-last frames, the residual added before it rounds.

    torch.nn.functional.conv3d sends small fp32 clips to an im2col loop that is several times slower than oneDNN, and
    adds a residual after rounding; both are avoided by calling oneDNN's entry point.
    """
    supported = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and supported):
        raise UnsupportedError(f"causal_conv3d: oneDNN does not take {x.dtype} here; use impl='reference'")
    shape = output_shape(x, weight, stride, pad_end, epilogue, factor)
    if 0 in shape:
        return _nothing(x, shape, epilogue, keep)
    x, weight, cache, pad_end = fold_time(x, weight, cache, pad_mode, pad_end)
    frames, padding = padded(x, cache, weight, pad_mode, pad_end)
    if bias is not None:
        bias = bias.to(x.dtype)
    window = (padding, list(stride), [1, 1, 1], 1)
    if residual is None:
        y = torch.mkldnn_convolution(frames, weight, bias, *window)
    else:
        other = fold_channels(residual.to(x.dtype), epilogue, factor).permute(0, 4, 1, 2, 3)
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            frames, other, weight, bias, *window, "add", 1.0, None, [], None
        )
    return _finished(y.permute(0, 2, 3, 4, 1), x, epilogue, factor, norm_weight, norm_eps, keep)
