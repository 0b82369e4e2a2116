"""Oracle of causal_conv3d: past and edges by indexing, the convolution, and its epilogues."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import compute_dtype, up
from .causal_conv3d_samples import samples as samples
from .rms_norm_silu import rms_norm_silu

# Operands of the product that a kernel may compute in TF32, where torch.backends.cudnn allows that.
TF32_OPERANDS = ("x", "weight", "cache")
PAD_MODES = ("zeros", "replicate", "reflect", "first_frame")
EPILOGUES = ("rms_norm_silu", "interleave", "pixel_shuffle")


def repeats_frames(pad_mode: str) -> bool:
    """Whether the oldest frame stands for those before it; zeros do otherwise."""
    return pad_mode != "zeros"


def spatial_mode(pad_mode: str) -> str:
    """What lies around a frame: ``zeros``, ``replicate`` or ``reflect``."""
    return "zeros" if pad_mode == "first_frame" else pad_mode


def shuffle_factor(epilogue: str | None, factor: Sequence[int]) -> tuple[int, int, int]:
    """Frames, rows and columns that one output position of the convolution becomes."""
    if epilogue == "interleave":
        return 2, 1, 1
    return (factor[0], factor[1], factor[2]) if epilogue == "pixel_shuffle" else (1, 1, 1)


def output_shape(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    pad_end: int = 0,
    epilogue: str | None = None,
    factor: Sequence[int] = (1, 1, 1),
) -> tuple[int, ...]:
    """``[B, ceil((T + pad_end) / st), ceil(H / sh), ceil(W / sw), O]``, unfolded by the shuffle: padding makes up for
    the kernel."""
    b, t, h, w, _ = x.shape
    sizes = [(size - 1) // step + 1 for size, step in zip((t + pad_end, h, w), stride, strict=True)]
    unfold = shuffle_factor(epilogue, factor)
    o = weight.shape[0] // (unfold[0] * unfold[1] * unfold[2])
    return (b, *(size * n for size, n in zip(sizes, unfold, strict=True)), o)


def with_past(x: Tensor, cache: Tensor | None, past: int, pad_mode: str, pad_end: int) -> Tensor:
    """``x [B, T, ...]`` preceded by ``past`` frames and followed by ``pad_end`` repeats of the last.

    The past is the cache's, and before it zeros or the oldest frame there is.
    """
    parts = [x] if cache is None or cache.shape[1] == 0 else [cache, x]
    missing = past - (parts[0].shape[1] if len(parts) > 1 else 0)
    first, last = parts[0], x if x.shape[1] else parts[0]
    b, _, *rest = x.shape
    if missing:
        fill = first[:, :1] if repeats_frames(pad_mode) else x.new_zeros((1, 1, 1, 1, 1))
        parts.insert(0, fill.expand(b, missing, *rest))
    if pad_end:
        parts.append(last[:, -1:].expand(b, pad_end, *rest))
    return torch.cat(parts, 1) if len(parts) > 1 else x


def _around(size: int, pad: int, mode: str, device: torch.device) -> Tensor:
    """Which of ``size`` pixels each position from -pad to size + pad - 1 shows."""
    at = torch.arange(-pad, size + pad, device=device)
    if mode == "reflect":
        at = (size - 1) - ((size - 1) - at.abs()).abs()
    return at.clamp(0, size - 1)


def with_border(frames: Tensor, kh: int, kw: int, mode: str) -> Tensor:
    """``frames [B, T, H, W, C]`` with the pixels around them: zeros, the edge's, or mirrored at it."""
    if mode == "zeros":
        return torch.nn.functional.pad(frames, (0, 0, kw // 2, kw // 2, kh // 2, kh // 2))
    frames = frames.index_select(2, _around(frames.shape[2], kh // 2, mode, frames.device))
    return frames.index_select(3, _around(frames.shape[3], kw // 2, mode, frames.device))


def unfold_channels(y: Tensor, epilogue: str | None, factor: Sequence[int]) -> Tensor:
    """``interleave``: [i, c] to frame i. ``pixel_shuffle``: [c, i, j, k] to frame i, row j, column k."""
    if epilogue not in ("interleave", "pixel_shuffle"):
        return y
    ft, fh, fw = shuffle_factor(epilogue, factor)
    b, t, h, w, o = y.shape
    c = o // (ft * fh * fw)
    if epilogue == "interleave":
        y = y.view(b, t, h, w, ft, c).permute(0, 1, 4, 2, 3, 5)
    else:
        y = y.view(b, t, h, w, c, ft, fh, fw).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return y.reshape(b, t * ft, h * fh, w * fw, c)


def nothing(x: Tensor, shape: tuple[int, ...], epilogue: str | None, keep: bool) -> tuple[Tensor, Tensor]:
    """``(y, z)`` of a result without elements."""
    normed = epilogue == "rms_norm_silu"
    return x.new_zeros(shape if keep or not normed else (0,)), x.new_zeros(shape if normed else (0,))


def causal_conv3d(
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
    """Convolution over [past, x, repeats], then the epilogue; ``(y, z)``, each rounded once, an unneeded one empty.

    ``z`` is the norm of the rounded ``y``: what the modules compute one after the other.
    """
    shape = output_shape(x, weight, stride, pad_end, epilogue, factor)
    if 0 in shape:
        return nothing(x, shape, epilogue, keep)
    dtype = compute_dtype(x)
    _, _, kt, kh, kw = weight.shape
    frames = with_past(up(x, dtype), None if cache is None else up(cache, dtype), kt - 1, pad_mode, pad_end)
    frames = with_border(frames, kh, kw, spatial_mode(pad_mode))
    y = torch.nn.functional.conv3d(
        frames.permute(0, 4, 1, 2, 3),
        up(weight, dtype),
        None if bias is None else up(bias, dtype),
        stride=tuple(stride),
    ).permute(0, 2, 3, 4, 1)
    y = unfold_channels(y, epilogue, factor)
    if residual is not None:
        y = y + up(residual, dtype)
    y = y.to(x.dtype).contiguous()
    if epilogue != "rms_norm_silu":
        return y, x.new_empty((0,))
    assert norm_weight is not None
    return (y if keep else x.new_empty((0,))), rms_norm_silu(y, norm_weight, norm_eps, True)


def summed(
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
) -> dict[int, Tensor]:
    """√terms Σ|a b| of the sum of products behind each element, carried through the norm to its output."""
    plain = None if epilogue == "rms_norm_silu" else epilogue
    tail = (plain, factor, None, norm_eps, True)
    absolute = [None if t is None else t.abs() for t in (x, weight, bias, cache, residual)]
    a_x, a_weight, a_bias, a_cache, a_residual = absolute
    assert a_x is not None and a_weight is not None
    sums, _ = causal_conv3d(a_x, a_weight, a_bias, a_cache, stride, pad_mode, pad_end, a_residual, *tail)
    sums = sums * weight[0].numel() ** 0.5
    if epilogue != "rms_norm_silu":
        return {0: sums}
    assert norm_weight is not None
    y, _ = causal_conv3d(x, weight, bias, cache, stride, pad_mode, pad_end, residual, *tail)
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min(norm_eps)
    # SiLU is nowhere steeper than 1.1.
    return {0: sums, 1: 1.1 * sums * norm_weight.abs() * (y.shape[-1] ** 0.5 / norm)}
