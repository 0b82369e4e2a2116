"""Whether a variant's video is still the model's: against eager's video, and against the model in float32.

Two videos from the same noise drift apart step by step, whatever rounds differently: PSNR and SSIM say how far, not who
is right. The error of one velocity prediction against the same weights in float32 says that, for eager too.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyvideo_kernels.errors import PyVideoError
from pyvideo_kernels.integrations.diffusers.steps import past_dense_steps

from .variants import map_tensors, sharing_copy

# Relative to float32: what fp32 arithmetic in another order may differ by, without and with TF32.
_FP32_BAND, _TF32_BAND = 1e-5, 5e-3


class BrokenVideo(PyVideoError):
    """A variant's video holds values that no video has; there is no quality to speak of."""


# Videos -----------------------------------------------------------------------------------------------------------


def check_finite(what: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        BrokenVideo: names ``what`` and how much of it is broken.
    """
    broken = int((~torch.isfinite(tensor)).sum())
    if broken:
        raise BrokenVideo(f"black or broken video: {broken} of {tensor.numel()} values of the {what} are NaN or inf")


def check_not_black(video: np.ndarray, reference: np.ndarray) -> None:
    """Refuse a video of one colour where ``reference`` shows something.

    Raises:
        BrokenVideo: names the value.
    """
    if video.min() == video.max() and reference.min() != reference.max():
        raise BrokenVideo(f"black or broken video: all of its pixels are {video.flat[0]:.3g}, and eager's are not")


def check_error(what: str, error: float, base: float, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse an error against float32 of more than twice eager's own.

    Args:
        what: has the error.
        base: eager's error.
        dtype, device: what both ran in and on; in float32 eager may be its own reference, and a band is allowed.
    Raises:
        BrokenVideo: names both.
    """
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    limit = max(2 * base, (_TF32_BAND if tf32 else _FP32_BAND) if dtype == torch.float32 else 0.0)
    if not error <= limit:
        raise BrokenVideo(f"wrong {what}: error {error:.2e} against float32, at most {limit:.2e}")


def frames(decoded: Tensor) -> np.ndarray:
    """``[1, 3, F, H, W]`` in [-1, 1] as the decoder gives it -> ``[F, H, W, 3]`` in [0, 1], float32."""
    video = decoded.detach()[0].float().add(1).div(2).clamp(0, 1)
    return np.ascontiguousarray(video.permute(1, 2, 3, 0).cpu().numpy())


def can_compare() -> bool:
    """Whether PSNR and SSIM can be had."""
    try:
        import skimage.metrics  # noqa: F401
    except ImportError:
        return False
    return True


def compare_videos(video: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Maximum error, and PSNR (dB) and SSIM of each frame against ``reference``, with mean and minimum.

    Args:
        video, reference: ``[F, H, W, C]`` in [0, 1].
    Returns:
        ``{"max_error", "identical", "psnr": {"mean", "min"}, "ssim": {"mean", "min"}, "frames": [{"psnr", "ssim"}]}``.
        A frame without any error has no PSNR: it is None, and so is a mean or minimum over such frames alone. Without
        scikit-image only ``max_error`` and ``identical``.
    """
    if video.shape != reference.shape:
        raise BrokenVideo(f"the video is {list(video.shape)} and eager's is {list(reference.shape)}")
    difference = np.abs(video - reference)
    out = {"max_error": float(difference.max()), "identical": not difference.any()}
    if not can_compare():
        return out
    workers = max(1, min(8, (os.cpu_count() or 1) - 1))
    with ThreadPoolExecutor(workers) as pool:  # the filters of SSIM release the interpreter lock
        rows = list(pool.map(_compare_frames, video, reference))
    return {
        **out,
        "psnr": _summary([row["psnr"] for row in rows]),
        "ssim": _summary([row["ssim"] for row in rows]),
        "frames": rows,
    }


def _compare_frames(frame: np.ndarray, reference: np.ndarray) -> dict[str, float | None]:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    if np.array_equal(frame, reference):
        return {"psnr": None, "ssim": 1.0}
    side = min(frame.shape[:2])
    window = min(7, side if side % 2 else side - 1)
    ssim = structural_similarity(reference, frame, data_range=1.0, channel_axis=-1, win_size=window)
    return {"psnr": float(peak_signal_noise_ratio(reference, frame, data_range=1.0)), "ssim": float(ssim)}


def _summary(values: list[float | None]) -> dict[str, float | None]:
    there = [value for value in values if value is not None]
    return {"mean": math.fsum(there) / len(there), "min": min(there)} if there else {"mean": None, "min": None}


def relative_error(x: Tensor, reference: Tensor) -> float:
    """``||x - reference|| / ||reference||``, accumulated in float64 a slice at a time."""
    if x.shape != reference.shape:
        raise ValueError(f"{list(x.shape)} against {list(reference.shape)}")
    error = norm = 0.0
    for a, b in zip(x.flatten().split(1 << 24), reference.flatten().split(1 << 24), strict=True):
        b = b.double()
        error += float((a.to(b.device).double() - b).square().sum())
        norm += float(b.square().sum())
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / norm)


# The model in float32 ---------------------------------------------------------------------------------------------


def first_call(model: nn.Module, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first call of ``model`` while ``run()`` runs; tensors are copies."""
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not caught:
            caught.append((map_tensors(args, _copy), map_tensors(kwargs, _copy)))

    handle = model.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return caught[0]


def _copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides, overlapping ones too: a compiled model would be compiled anew for others."""
    if not tensor.numel():
        return tensor.clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).clone().as_strided(tensor.shape, tensor.stride())


def velocity(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """What ``model`` predicts for these arguments, with the attention of most steps if its first ones are dense."""
    args, kwargs = call
    with torch.no_grad(), past_dense_steps(model):
        out = model(*args, **kwargs)
    tensor = out[0] if isinstance(out, (tuple, list)) else out.sample
    return tensor.detach().clone()


def float32_velocity(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """What the same weights predict in float32: inputs and weights upcast, TF32 off.

    Weights are upcast a block at a time, on entering it, and the block's own parameters are put back on leaving: the
    model never is in memory twice. They are put back, not cast back; nothing that shares them notices.
    """
    reference = sharing_copy(model)
    for unit, owned in _units(reference):
        _upcast_around(unit, owned)
    args, kwargs = call
    with _full_precision():
        return velocity(reference, (map_tensors(args, _to_float32), map_tensors(kwargs, _to_float32)))


def _units(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """What is upcast together, and the modules that belong to it.

    The model itself with the parameters that it owns alone, each of its parts, each member of its lists of blocks.
    """
    parts: list[nn.Module] = []
    for child in model.children():
        parts += list(child) if isinstance(child, nn.ModuleList) else [child]
    return [(model, [model]), *((part, list(part.modules())) for part in parts)]


def _upcast_around(unit: nn.Module, owned: list[nn.Module]) -> None:
    kept: list[tuple[dict[str, Any], str, Tensor]] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        for part in owned:
            stores: list[dict[str, Any]] = [part._parameters, part._buffers]
            for tensors in stores:
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16):
                        kept.append((tensors, name, tensor))
                        upcast = tensor.detach().float()
                        is_parameter = isinstance(tensor, nn.Parameter)
                        tensors[name] = nn.Parameter(upcast, requires_grad=False) if is_parameter else upcast

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        while kept:
            tensors, name, tensor = kept.pop()
            tensors[name] = tensor

    unit.register_forward_pre_hook(enter, with_kwargs=True)
    unit.register_forward_hook(leave, always_call=True)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
