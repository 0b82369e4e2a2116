"""upsample_conv2d by a library: oneDNN on a CPU, cuDNN on NVIDIA.

The phases together are a transposed convolution of the small image (kernel 4, stride 2): it writes every pixel of the
large image once, where it belongs, and the large input is never made. What a library lacks is a pass of its own: the
past is joined to the clip, repeated edges are copied around it, the residual is added afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..reference.upsample_conv2d import output_shape, past_frames, with_past
from . import causal_conv3d_library
from ._checks import require_onednn
from .upsample_conv2d import as_transposed, pack_upsample_weight


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Tensor | None,
    time_factor: int,
    cache: Tensor | None,
    first: bool,
    pad_mode: str,
    residual: Tensor | None,
) -> Tensor:
    shape = output_shape(x, weight, time_factor, first)
    if x.numel() == 0:
        return x.new_zeros(shape)
    kt = weight.shape[2] if weight.dim() == 5 else 1
    kernel = as_transposed(pack_upsample_weight(weight, time_factor) if packed is None else packed)
    past = past_frames(weight, time_factor)
    if past and x.shape[1] == 1 and (cache is None or cache.shape[1] == 0):
        # An image: the frames that are read are zeros or itself, which then is more channels of one image.
        kernel = kernel[:, :, :1] if pad_mode == "zeros" else kernel[:, :, time_factor - 1 :: time_factor]
        x = x.repeat(1, 1, 1, 1, kernel.shape[2])
        kernel = kernel.permute(2, 0, 1, 3, 4).flatten(0, 1).unsqueeze(2)
        kt, past = 1, 0
    frames = with_past(x, cache, past, pad_mode) if past else x
    edge = 1
    if pad_mode in ("replicate", "reflect"):
        frames, edge = _repeat_edges(frames), 3
    if bias is not None:
        bias = bias.to(x.dtype)
    on_gpu = x.device.type == "cuda"
    if kt == 1:
        b, t = frames.shape[:2]
        images, kernel = frames.flatten(0, 1).permute(0, 3, 1, 2), kernel[:, :, 0]
        if on_gpu:
            # In any other layout torch would bring both into one of its own first.
            images, kernel = (part.contiguous(memory_format=torch.channels_last) for part in (images, kernel))
        y = torch.conv_transpose2d(images, kernel, bias, 2, edge).permute(0, 2, 3, 1).unflatten(0, (b, t))
        if shape[1] != t:
            twice = torch.arange(2 * t - shape[1], 2 * t, device=x.device) // 2
            y = y.index_select(1, twice)
    else:
        # In time as in space: the ends, which see a frame too few, are cut off.
        clip = frames.permute(0, 4, 1, 2, 3)
        if on_gpu:
            clip, kernel = (part.contiguous(memory_format=torch.channels_last_3d) for part in (clip, kernel))
        window = ((time_factor, 2, 2), (kt - 1, edge, edge))
        y = torch.conv_transpose3d(clip, kernel, bias, *window).permute(0, 2, 3, 4, 1)
        y = y[:, y.shape[1] - shape[1] :]
    return y.contiguous() if residual is None else torch.add(y, residual, out=x.new_empty(shape))


def _repeat_edges(x: Tensor) -> Tensor:
    """One more pixel on every side, equal to the edge."""
    x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
    return torch.cat([x[:, :, :, :1], x, x[:, :, :, -1:]], 3)


def upsample_conv2d_cpu(x: Tensor, *rest: Any) -> Tensor:
    """``impl="cpu"``: oneDNN's transposed convolution."""
    require_onednn("upsample_conv2d", x)
    return _convolve(x, *rest)


def upsample_conv2d_cudnn(
    x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, time_factor: int, *rest: Any
) -> Tensor:
    """``impl="cudnn"``: the transposed convolution that torch hands to cuDNN."""
    _label()
    # The first frame by itself or not: what is cut off was computed too.
    made = math.prod(output_shape(x, weight, time_factor, False))
    causal_conv3d_library.refuse_wide("upsample_conv2d", max(x.numel(), made))
    return _convolve(x, weight, bias, packed, time_factor, *rest)


def _label() -> str:
    try:
        return causal_conv3d_library.cudnn_label()
    except UnsupportedError as error:
        raise UnsupportedError(str(error).replace("causal_conv3d", "upsample_conv2d")) from error


def cudnn_for_auto() -> str:
    """What `dispatch.explain` says of cuDNN here; raises UnsupportedError where there is none."""
    return f"{_label()}, where Triton's kernel does not run"


def in_order(choices: tuple[str, ...], args: Sequence[Any]) -> tuple[tuple[str, ...], str]:
    """``auto``'s order for a call: a cuDNN known to be wrong or slow in 3-D convolutions is left out of them."""
    weight = args[1]
    if "cudnn" in choices and weight.dim() == 5 and weight.shape[2] > 1:
        if problem := causal_conv3d_library.cudnn_problem():
            rest = tuple(impl for impl in choices if impl != "cudnn")
            return rest, f"cuDNN is left out of 3-D convolutions ({problem}, see doctor)"
    return choices, ""
