"""Decoding a clip of latents as a stream of frames, in memory that does not grow with the clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..dispatch import autocasting
from ..errors import DeviceError, DTypeError, bad_shape, check_tensor, describe
from .tiled import decoded, tell
from .tiling import TilePlan, check_tiling, resolve
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
        vae: ``AutoencoderKLWan`` (2.1, 2.2), ``AutoencoderKLHunyuanVideo``, ``AutoencoderKLLTXVideo`` or
            ``AutoencoderKLCogVideoX``. It is accelerated in place, as by ``accelerate(vae, impl=impl)``, unless it is
            already with this ``impl``; ``restore(vae)`` undoes that.
        impl: of the ops; ``auto`` leaves an accelerated VAE as it is.
        tiling: None decodes whole frames, whatever the flags of the VAE. ``"auto"`` measures what they take, and
            where that is more than there is, takes smaller steps, then the tiles that fit with the fewest FLOPs.
            ``"vae"`` does as the flags of the VAE say (``enable_tiling``); a `pyvideo_kernels.nn.TilePlan` decodes in
            those tiles. Where memory runs out and nobody asked for tiles, the clip is decoded again in smaller steps or
            in tiles, which is said aloud, and goes on with the frame that it stopped at.
    Raises:
        ModelError: a model this package does not know.
        ValueOptionError: ``tiling`` is something else.
    """

    def __init__(self, vae: Any, *, impl: str = "auto", tiling: Any = None) -> None:
        from ..integrations import accelerate, streams
        from ..integrations.swap import swapped

        check_tiling(tiling)
        vae = getattr(vae, "_orig_mod", vae)
        self._stream = streams.stream_of(vae)
        present = next((settings for _, _, settings in swapped(vae)), None)
        if present is None:
            accelerate(vae, impl=impl)
        elif impl not in ("auto", present.impl):
            accelerate(vae, impl=impl, ops=present.ops, strict=present.strict)
        self.vae = vae
        self.tiling = tiling
        self.say: Callable[[str], None] = tell
        """Told when tiles are taken for want of memory: a warning, unless it is set to something else."""

    def stream(
        self, latents: Tensor, *, chunk: int = 1, dtype: torch.dtype | None = None, **given: Any
    ) -> Iterator[Tensor]:
        """The frames of a clip ``[B, C, t, H, W]``, in order, as they are ready.

        Args:
            latents: ``[B, C, T, h, w]`` in the dtype of the VAE.
            chunk: latent frames a step. More are faster on small frames and take more memory; the frames are the same.
                A causal VAE takes the first latent, which becomes one frame, by itself. HunyuanVideo and CogVideoX,
                whose norms span time, take their own groups whatever it says.
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

        def whole(chunk: int) -> Iterator[Tensor]:
            return _whole(stream, latents, chunk, dtype, given)

        tiling = resolve(self.tiling, stream, latents)
        try:
            yield from decoded(stream, latents, chunk, tiling, whole, dtype=dtype, given=given, say=self.say)
        finally:
            _release(self.vae)

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
            chunk: as in ``stream``; None is 1, and of LTX-Video as many as are small beside the GPU.
            out: written and returned; its dtype then is ``dtype``.
        """
        stream = self._stream
        _check(stream, latents, 1 if chunk is None else chunk, dtype, given)
        if out is not None:
            _check_out(stream, latents, dtype, out)
        _fetch(self.vae)
        tiling = resolve(self.tiling, stream, latents)
        try:
            return decode_clip(stream, latents, chunk=chunk, dtype=dtype, out=out, tiling=tiling, say=self.say, **given)
        finally:
            _release(self.vae)


def decode_clip(
    stream: VaeStream,
    latents: Tensor,
    *,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    tiling: Any = None,
    say: Callable[[str], None] = tell,
    **given: Any,
) -> Tensor:
    """The frames of a clip in one tensor; arguments as in `StreamingVaeDecoder.decode`, checked by the caller."""
    chunk = chunk or stream.ample(latents)
    if out is None and tiling is None and (torch.compiler.is_compiling() or records(stream, latents)):
        # Writing into slices would record every slice of the whole; and a compiler has its own mind of where to write.
        steps, state = stream.steps(latents.shape[2], chunk), stream.new_state(**given)
        return torch.cat([_step(stream, latents, state, run, run == steps[-1], dtype) for run in steps], 2)
    dtype = dtype if out is None else out.dtype
    if out is None and not autocasting(latents):
        # Under autocast the dtype of the frames is not known before there are some.
        shape = _shape(stream, latents)
        if isinstance(tiling, TilePlan):
            # Flags of a VAE may cut tiles that do not add up to whole frames.
            shape = (*shape[:3], *tiling.size(stream, *latents.shape[3:]))
        where = _where(stream.vae, latents)
        out = latents.new_empty(shape, dtype=dtype or latents.dtype, device=where)

    def whole(chunk: int) -> Iterator[Tensor]:
        return _whole(stream, latents, chunk, dtype, given, out)

    pieces = decoded(stream, latents, chunk, tiling, whole, dtype=dtype, given=given, out=out, say=say)
    done = 0
    for frames in pieces:
        if out is None:
            out = frames.new_empty((*frames.shape[:2], stream.frames(latents.shape[2]), *frames.shape[3:]))
        into = out[:, :, done : done + frames.shape[2]]
        if into.data_ptr() != frames.data_ptr():
            into.copy_(frames)
        done += frames.shape[2]
    assert out is not None
    return out


def _whole(
    stream: VaeStream,
    latents: Tensor,
    chunk: int,
    dtype: torch.dtype | None,
    given: dict[str, Any],
    out: Tensor | None = None,
) -> Iterator[Tensor]:
    """Whole frames as they are ready; slices of ``out`` where that is given."""
    steps, state = stream.steps(latents.shape[2], chunk), stream.new_state(**given)
    done = 0
    for run in steps:
        # Runs may overlap (HunyuanVideo's temporal tiles): the last one is not the first to reach the end.
        last, into = run == steps[-1], None
        if out is not None and stream.fills:
            into = out[:, :, done : done + stream.frames(run[1]) - stream.frames(run[0])]
        # Not around the yield: the caller's grad mode is the caller's.
        with torch.no_grad():
            frames = _step(stream, latents, state, run, last, dtype, into)
            if out is not None and into is None:
                frames = out[:, :, done : done + frames.shape[2]].copy_(frames)
        done += frames.shape[2]
        if frames.shape[2]:
            yield frames
        # The caller's now: it would count against the next step.
        del frames


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


def records(stream: VaeStream, latents: Tensor) -> bool:
    """Whether a decode of these latents now would record gradients."""
    if not torch.is_grad_enabled():
        return False
    return latents.requires_grad or any(parameter.requires_grad for parameter in stream.vae.parameters())


def _where(vae: Any, latents: Tensor) -> torch.device:
    """Where the frames come out: where hooks take the latents, if they offload the VAE."""
    from ..integrations.upfront import execution_device

    return execution_device(vae) or latents.device


def _release(vae: Any) -> None:
    """Packed weights of a model that is offloaded between calls go with it."""
    from ..integrations.packing import forget_offloaded

    forget_offloaded(vae)


def _fetch(vae: Any) -> None:
    """What diffusers does before ``vae.decode``: a pipeline's offloading brings the model in."""
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)
