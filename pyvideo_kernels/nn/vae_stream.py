"""What a video VAE must say about itself to be decoded as a stream: one `VaeStream` a family."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from ..dispatch import autocasting
from ..errors import DeviceError, DTypeError, ValueOptionError, bad_option, bad_shape, check_tensor

OP = "vae decode"


class VaeStream(abc.ABC):
    """How the VAEs of one family decode a clip in steps. Stateless: what a clip needs between steps is its state.

    A step takes a run of latent frames and gives the pixel frames that are ready then. Everything that a later step
    looks back at is in the state, which `new_state` makes for each clip; so several clips may be under way at once,
    and one that is abandoned leaves nothing behind. Frames of any grouping that ``steps`` allows are the same frames.

    Modules of the VAE are called, never their weights read: hooks (offloading, casting, LoRA) stay in force.
    """

    # Of a pixel frame.
    channels: int = 3
    # Whether ``step`` can write its frames into a slice of the caller's (its argument ``out``); else they are copied.
    fills: bool = False
    # Whether the model clamps its frames to [-1, 1]. Tiles are clamped after they are blended: see ``tile_step``.
    clamps: bool = False
    # Pixels that share a weight where tiles are blended: the patch of a model that is tiled in patches.
    grain: int = 1

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @abc.abstractmethod
    def check(self, latents: Tensor, **given: Any) -> None:
        """Raise a typed error unless these latents (and the model's other arguments) can be decoded.

        Called before anything is allocated; `check_latents` does the part that is the same for all.
        """

    @abc.abstractmethod
    def frames(self, latents: int) -> int:
        """Pixel frames of so many latent frames."""

    @abc.abstractmethod
    def size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels of a latent height and width."""

    @abc.abstractmethod
    def steps(self, latents: int, chunk: int) -> list[tuple[int, int]]:
        """``[start, stop)`` of the latents of each step, at most ``chunk`` each where the model leaves a choice."""

    def ample(self, latents: Tensor) -> int:
        """Latents a step where the caller does not say."""
        return 1

    @abc.abstractmethod
    def new_state(self, **given: Any) -> Any:
        """The state before the first step of a clip; ``given`` are the model's other arguments to ``decode``."""

    @abc.abstractmethod
    def step(self, z: Tensor, state: Any, *, first: bool, last: bool, out: Tensor | None = None) -> Tensor:
        """The frames ``[B, channels, t, H, W]`` that are ready after latents ``z [B, C, n, h, w]``; t may be 0.

        Args:
            out: only ever given where ``fills``: ``[B, channels, t, H, W]`` with the t = frames(stop) - frames(start)
                of this step, any strides, a float dtype or uint8; to be written and returned.
        """

    def tile_step(self, z: Tensor, state: Any, *, first: bool, last: bool) -> Tensor:
        """``step`` on a tile: its frames before the clamping, where the model ``clamps``."""
        return self.step(z, state, first=first, last=last)

    def tiled(self, latents: Tensor) -> bool:
        """Whether the VAE's own flags ask for spatial tiles of these latents, which a stream of whole frames is not."""
        return False


def check_latents(vae: Any, latents: Any, channels: int, others: dict[str, Any]) -> None:
    """``[B, channels, T, h, w]``, nothing empty, in the dtype of the VAE and on its device.

    Args:
        others: what was given besides, of which the VAE's ``decode`` knows nothing.
    """
    if others:
        raise ValueOptionError(f"{OP}: `{next(iter(others))}` is no argument of {type(vae).__name__}")
    check_tensor(OP, "latents", latents, ndim=5)
    if latents.shape[1] != channels or 0 in latents.shape:
        bad_shape(OP, "latents", f"[B, {channels}, T, h, w] with nothing empty", latents)
    dtype = getattr(vae, "dtype", None)
    if dtype is not None and latents.dtype != dtype and not autocasting(latents):
        raise DTypeError(f"{OP}: `latents` must be {dtype} like the VAE; got {latents.dtype}")
    # A graph is traced on tensors that a call with these devices gave.
    if not torch.compiler.is_compiling():
        _check_device(vae, latents)


def _check_device(vae: Any, latents: Tensor) -> None:
    """Latents where the decoder is, unless hooks take either of them to the other."""
    first = next(getattr(vae, "decoder", vae).parameters(), None)
    if first is None or first.device == latents.device:
        return
    from ..integrations.packing import managed

    if not any(managed(module) for module in vae.modules()):
        raise DeviceError(f"{OP}: `latents` must be on {first.device} like the VAE; got {latents.device}")


def check_chunk(chunk: Any) -> None:
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        bad_option(OP, "chunk", "a positive number of latent frames", chunk)


def as_dtype(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames in [-1, 1] in another float dtype; or as bytes, [-1, 1] being 0 to 255."""
    if dtype != torch.uint8:
        return frames.to(dtype)
    return (frames.float() / 2 + 0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
