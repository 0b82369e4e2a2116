"""Decoding a clip of latents as a stream of frames, in memory that does not grow with the clip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..dispatch import autocasting
from ..errors import DeviceError, DTypeError, UnsupportedError, bad_shape, check_tensor, describe
from .vae_stream import OP, VaeStream, as_dtype, check_chunk

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)


class StreamingVaeDecoder:
    """Frames of a clip as they are decoded.

        decoder = StreamingVaeDecoder(pipe.vae)
        for frames in decoder.stream(latents, chunk=2):       # [B, 3, t, H, W]
            film.write(frames)

    It holds nothing between clips and nothing of a clip but what later frames look back at (the caches of the causal
    convolutions), so its memory is constant in the length of the clip. Latents are what ``vae.decode`` takes. Gradients
    are not recorded.

    Args:
        vae: ``AutoencoderKLWan`` (2.1, 2.2). It is accelerated in place, as by ``accelerate(vae, impl=impl)``, unless
            it is already with this ``impl``; ``restore(vae)`` undoes that.
        impl: of the ops; ``auto`` leaves an accelerated VAE as it is.
        tiling: None decodes whole frames, whatever the flags of the VAE.
    Raises:
        ModelError: a model this package does not know.
        UnsupportedError: ``tiling`` is not None.
    """

    def __init__(self, vae: Any, *, impl: str = "auto", tiling: Any = None) -> None:
        from ..integrations import accelerate, streams
        from ..integrations.swap import swapped

        if tiling is not None:
            raise UnsupportedError(f"{OP}: `tiling` must be None: whole frames are decoded; got {tiling!r}")
        vae = getattr(vae, "_orig_mod", vae)
        self._stream = streams.stream_of(vae)
        present = next((settings for _, _, settings in swapped(vae)), None)
        if present is None:
            accelerate(vae, impl=impl)
        elif impl not in ("auto", present.impl):
            accelerate(vae, impl=impl, ops=present.ops, strict=present.strict)
        self.vae = vae

    def stream(
        self, latents: Tensor, *, chunk: int = 1, dtype: torch.dtype | None = None, **given: Any
    ) -> Iterator[Tensor]:
        """The frames of a clip ``[B, C, t, H, W]``, in order, as they are ready.

        Args:
            latents: ``[B, C, T, h, w]`` in the dtype of the VAE.
            chunk: latent frames a step. More are faster on small frames and take more memory; the frames are the same.
                A causal VAE takes the first latent, which becomes one frame, by itself.
            dtype: of the frames; None is that of the VAE, in [-1, 1], and torch.uint8 gives bytes.
            given: other arguments of the model's ``decode``.
        Raises:
            ShapeError, DTypeError, ValueOptionError: at once, not at the first frame.
        """
        stream = self._stream
        _check(stream, latents, chunk, dtype, given)
        return self._frames(stream, latents, chunk, dtype, given)

    def _frames(
        self, stream: VaeStream, latents: Tensor, chunk: int, dtype: torch.dtype | None, given: dict[str, Any]
    ) -> Iterator[Tensor]:
        _fetch(self.vae)
        state = stream.new_state(**given)
        steps = stream.steps(latents.shape[2], chunk)
        for run in steps:
            # Not around the yield: the caller's grad mode is the caller's.
            with torch.no_grad():
                frames = _step(stream, latents, state, run, run == steps[-1], dtype)
            if frames.shape[2]:
                yield frames

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        *,
        chunk: int | None = None,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        """All frames of a clip, ``[B, C, T, H, W]``: what ``stream`` gives, joined in one preallocated tensor.

        Args:
            chunk: as in ``stream``; None is 1.
            out: written and returned; its dtype then is ``dtype``.
        """
        stream = self._stream
        _check(stream, latents, 1 if chunk is None else chunk, dtype, given)
        if out is not None:
            _check_out(stream, latents, dtype, out)
        _fetch(self.vae)
        return decode_clip(stream, latents, chunk=chunk, dtype=dtype, out=out, **given)


def decode_clip(
    stream: VaeStream,
    latents: Tensor,
    *,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    **given: Any,
) -> Tensor:
    """The frames of a clip in one tensor; arguments as in `StreamingVaeDecoder.decode`, checked by the caller."""
    steps = stream.steps(latents.shape[2], chunk or 1)
    dtype = dtype if out is None else out.dtype
    state = stream.new_state(**given)
    if out is None and torch.is_grad_enabled() and (latents.requires_grad or _trains(stream.vae)):
        # Writing into slices would record every slice of the whole.
        return torch.cat([_step(stream, latents, state, run, run == steps[-1], dtype) for run in steps], 2)
    # Under autocast the dtype of the frames is not known before there are some.
    fills = stream.fills and not autocasting(latents)
    if out is None and fills:
        where = _where(stream.vae, latents)
        out = latents.new_empty(_shape(stream, latents), dtype=dtype or latents.dtype, device=where)
    done = 0
    for run in steps:
        # Runs may overlap (HunyuanVideo's temporal tiles): the last one is not the first to reach the end.
        last = run == steps[-1]
        if fills and out is not None:
            ready = stream.frames(run[1]) - stream.frames(run[0])
            _step(stream, latents, state, run, last, dtype, out[:, :, done : done + ready])
        else:
            frames = _step(stream, latents, state, run, last, dtype)
            ready = frames.shape[2]
            if out is None:
                out = frames.new_empty(_shape(stream, latents))
            out[:, :, done : done + ready].copy_(frames)
        done += ready
    assert out is not None
    return out


def _step(
    stream: VaeStream,
    latents: Tensor,
    state: Any,
    run: tuple[int, int],
    last: bool,
    dtype: torch.dtype | None,
    out: Tensor | None = None,
) -> Tensor:
    start, stop = run
    first, z = start == 0, latents[:, :, start:stop]
    if out is None:
        frames = stream.step(z, state, first=first, last=last)
        return frames if dtype is None else as_dtype(frames, dtype)
    return stream.step(z, state, first=first, last=last, out=out)


def _shape(stream: VaeStream, latents: Tensor) -> tuple[int, ...]:
    b, _, frames, height, width = latents.shape
    return (b, stream.channels, stream.frames(frames), *stream.size(height, width))


def _check(stream: VaeStream, latents: Tensor, chunk: Any, dtype: torch.dtype | None, given: dict[str, Any]) -> None:
    check_chunk(chunk)
    if dtype is not None and dtype not in _DTYPES:
        raise DTypeError(f"{OP}: `dtype` must be a float dtype, torch.uint8 or None; got {dtype}")
    stream.check(latents, **given)


def _check_out(stream: VaeStream, latents: Tensor, dtype: torch.dtype | None, out: Tensor) -> None:
    if not isinstance(out, Tensor) or out.dtype != torch.uint8:
        check_tensor(OP, "out", out, ndim=5)
    shape = _shape(stream, latents)
    if out.shape != shape:
        bad_shape(OP, "out", str(list(shape)), out)
    if dtype is not None and out.dtype != dtype:
        raise DTypeError(f"{OP}: `out` must be {dtype} like `dtype`; got {describe(out)}")
    if out.device != latents.device:
        raise DeviceError(f"{OP}: `out` must be on {latents.device} like `latents`; got {describe(out)}")


def _trains(vae: Any) -> bool:
    return any(parameter.requires_grad for parameter in vae.parameters())


def _where(vae: Any, latents: Tensor) -> torch.device:
    """Where the frames come out: where hooks take the latents, if they offload the VAE."""
    from ..integrations.upfront import execution_device

    return execution_device(vae) or latents.device


def _fetch(vae: Any) -> None:
    """What diffusers does before ``vae.decode``: a pipeline's offloading brings the model in."""
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)
