"""causal_conv3d by a library's convolution: oneDNN on the CPU, cuDNN on CUDA.

A library pads with zeros in space alone. The rest is made for it here: the past and the end of the clip, edges that are
repeated or mirrored (one copy of the clip that is as large as it will be), and the epilogues after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..reference import rms_norm_silu as norm_oracle
from ..reference.causal_conv3d import nothing, output_shape, shuffle_factor, spatial_mode, unfold_channels
from ..reference.causal_conv3d import with_past as joined
from ._checks import require_onednn
from .causal_conv3d import fold_time


def padded(x: Tensor, cache: Tensor | None, weight: Tensor, pad_mode: str, pad_end: int) -> tuple[Tensor, list[int]]:
    """``[past, x, repeats]`` as a ``[B, C, T, H, W]`` view of channels-last memory, and the zeros that it lacks."""
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

    if y.device.type == "cuda":
        z: Tensor = torch.ops.pyvideo.rms_norm_silu(y, norm_weight, norm_eps, True, "auto")
        return z
    try:
        z = _native.rms_norm_silu(y, norm_weight, norm_eps, True)
    except UnsupportedError:
        z = norm_oracle.rms_norm_silu(y, norm_weight, norm_eps, True)
    return z


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
    require_onednn("causal_conv3d", x)
    shape = output_shape(x, weight, stride, pad_end, epilogue, factor)
    if 0 in shape:
        return nothing(x, shape, epilogue, keep)
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


# cuDNN ----------------------------------------------------------------------------------------------------------------

CUDNN_CHANNELS, CUDNN_TAPS = 256, 9
"""From so many channels on either side, and taps, cuDNN's convolution is taken first for 16-bit clips. It is reported
near the peak of the tensor cores there, which pays for what it needs beside (a copy that joins cache and clip, passes
for the bias, the residual and the epilogue), and far from it at 96 and 192 channels. Not our measurement."""


INDEXED = 2**31
"""From so many elements on, of what goes into a library's convolution or comes out of it, its 32-bit indices may wrap
(pytorch/pytorch/issues/144855)."""


def _elements(x: Tensor, weight: Tensor, pad_end: int) -> int:
    """Elements of the larger of the clip with all that is made around it, and the result."""
    b, t, h, w, c = x.shape
    o, _, kt, kh, kw = weight.shape
    return b * max((kt - 1 + t + pad_end) * (h + kh - 1) * (w + kw - 1) * c, (t + pad_end) * h * w * o)


def refuse_wide(op: str, elements: int) -> None:
    """Raise UnsupportedError for a clip that cuDNN may index wrongly."""
    if elements >= INDEXED:
        raise UnsupportedError(f"{op}: impl 'cudnn' takes fewer than 2^31 elements; got {elements}; use impl='triton'")


def cudnn_label() -> str:
    """``cuDNN 9.15.1``; raises UnsupportedError where torch has none to call."""
    from ..collect_env import cudnn_version

    version = cudnn_version()
    if version is None:
        raise UnsupportedError("causal_conv3d: impl 'cudnn' needs a torch that is built with cuDNN; use impl='triton'")
    if not torch.backends.cudnn.enabled:
        raise UnsupportedError("causal_conv3d: impl 'cudnn' is off; set torch.backends.cudnn.enabled = True")
    return f"cuDNN {version}"


def cudnn_problem() -> str:
    """The known problem of this torch with its cuDNN in 3-D convolutions, by name; empty without one."""
    from .. import known_bad
    from ..collect_env import cudnn_version

    found = known_bad.conv3d_trouble(known_bad.Setup({"torch": torch.__version__, "cudnn": cudnn_version()}))
    return "" if found is None else found.name


def cudnn_for_auto() -> str:
    """What `dispatch.explain` says of cuDNN here; raises UnsupportedError where ``auto`` must not take it."""
    label = cudnn_label()
    if problem := cudnn_problem():
        raise UnsupportedError(f"causal_conv3d: `auto` leaves {label} out: {_effect(problem)} ({problem}, see doctor)")
    return f"{label}, first from {CUDNN_CHANNELS} channels on"


def in_order(choices: tuple[str, ...], args: Sequence[Any]) -> tuple[tuple[str, ...], str]:
    """``auto``'s order for a call's arguments, and why where it is another than usual.

    cuDNN first where it is known to be the faster one; not at all with a cuDNN that is known to be wrong or slow.
    """
    x, weight = args[0], args[1]
    if "cudnn" not in choices:
        return choices, ""
    if problem := cudnn_problem():
        rest = tuple(impl for impl in choices if impl != "cudnn")
        return rest, f"cuDNN is left out: {_effect(problem)} ({problem}, see doctor)"
    if _elements(x, weight, args[6]) >= INDEXED:
        return tuple(impl for impl in choices if impl != "cudnn"), "cuDNN is left out: 2^31 elements or more"
    o, c, *taps = weight.shape
    if x.element_size() == 2 and min(o, c) >= CUDNN_CHANNELS and taps[0] * taps[1] * taps[2] >= CUDNN_TAPS:
        first = ("cudnn", *(impl for impl in choices if impl != "cudnn"))
        return first, f"cuDNN first: {c} and {o} channels are at least {CUDNN_CHANNELS}"
    return choices, ""


def _effect(problem: str) -> str:
    return f"known to be {problem.rpartition('-')[2]} in 3-D convolutions"


def causal_conv3d_cudnn(
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
    """``impl="cudnn"``: torch's convolution on channels-last clips, and a pass each for what it does not do."""
    cudnn_label()
    refuse_wide("causal_conv3d", _elements(x, weight, pad_end))
    shape = output_shape(x, weight, stride, pad_end, epilogue, factor)
    if 0 in shape:
        return nothing(x, shape, epilogue, keep)
    x, weight, cache, pad_end = fold_time(x, weight, cache, pad_mode, pad_end)
    frames, padding = padded(x, cache, weight, pad_mode, pad_end)
    bias = None if bias is None else bias.to(x.dtype)
    # In any other layout torch would bring clip and weight into one of its own first.
    y = torch.nn.functional.conv3d(
        frames.contiguous(memory_format=torch.channels_last_3d),
        weight.contiguous(memory_format=torch.channels_last_3d), bias, tuple(stride), padding,
    ).permute(0, 2, 3, 4, 1)  # fmt: skip
    if residual is not None:
        if epilogue in ("interleave", "pixel_shuffle"):
            y = unfold_channels(y, epilogue, factor)
        y = y.add_(residual)
        epilogue = epilogue if epilogue == "rms_norm_silu" else None
    return _finished(y, x, epilogue, factor, norm_weight, norm_eps, keep)
