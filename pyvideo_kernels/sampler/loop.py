"""The sampling loop: prompt to latents to pixels, on the pipeline's own modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..integrations.text_cache import TextCache, text_cache
from .evaluation import Evaluation, evaluating, mode_of
from .plan import TEXT_TOKENS, Plan


@dataclass
class Conditions:
    """What the transformer is told besides the latents."""

    prompt: Tensor
    negative: Tensor | None
    image: Tensor | None = None
    """Picture embedding (Wan 2.1 image-to-video)."""
    latent: Tensor | None = None
    """Encoded first frame (image-to-video)."""
    mask: Tensor | None = None
    """0 where the first frame is given, 1 where the model makes the film (TI2V)."""


def encode_text(pipe: Any, prompt: str, negative: str | None, guided: bool, device: torch.device) -> Conditions:
    """Prompt embeddings in the transformer's dtype, as the pipeline makes them."""
    from diffusers import WanPipeline

    # Every Wan pipeline encodes alike; the image-to-video one of diffusers 0.42 fails at this without ftfy, so the
    # text-to-video method serves both. No negative prompt is the empty one.
    texts = [prompt, negative or ""] if guided else [prompt]
    with evaluating(pipe):
        encoded = [
            WanPipeline._get_t5_prompt_embeds(pipe, text, max_sequence_length=TEXT_TOKENS, device=device)
            for text in texts
        ]
        cond, uncond = encoded if guided else (encoded[0], None)
        dtype = _transformer(pipe).dtype
        return Conditions(cond.to(dtype), None if uncond is None else uncond.to(dtype))


def _transformer(pipe: Any) -> Any:
    return pipe.transformer if pipe.transformer is not None else pipe.transformer_2


def prepare_latents(
    pipe: Any, plan: Plan, seed: int, device: torch.device, conditions: Conditions, image: Any = None
) -> Tensor:
    """The noise of a seed, fp32, and the encoded picture for image-to-video.

    The noise is drawn on the CPU whatever the device, so a seed means the same film everywhere.
    """
    with evaluating(pipe):
        return _prepare_latents(pipe, plan, seed, device, conditions, image)


def _prepare_latents(
    pipe: Any, plan: Plan, seed: int, device: torch.device, conditions: Conditions, image: Any
) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    sizes = (plan.height, plan.width, plan.frames, torch.float32, device, generator)
    if image is None:
        latents: Tensor = pipe.prepare_latents(1, _transformer(pipe).config.in_channels, *sizes)
        if pipe.config.expand_timesteps:
            conditions.mask = latents.new_ones((1, 1, *latents.shape[2:]))
        return latents
    transformer = _transformer(pipe)
    if transformer.config.image_dim is not None:
        conditions.image = pipe.encode_image(image, device).to(transformer.dtype)
    pixels = pipe.video_processor.preprocess(image, height=plan.height, width=plan.width)
    pixels = pixels.to(device, dtype=torch.float32)
    made = pipe.prepare_latents(pixels, 1, pipe.vae.config.z_dim, *sizes)
    if pipe.config.expand_timesteps:
        latents, conditions.latent, conditions.mask = made
    else:
        latents, conditions.latent = made
    return latents


def denoise(
    pipe: Any,
    plan: Plan,
    latents: Tensor,
    conditions: Conditions,
    stepper: Any,
    timesteps: Tensor,
    sigmas: Tensor,
    on_step: Callable[[int, Tensor], None] = lambda i, latents: None,
    *,
    how: Evaluation | None = None,
) -> Tensor:
    """Clean latents: the transformer's two predictions a step (one without guidance), then one update.

    Args:
        stepper: ``step(i, t, latents, cond, uncond, guidance)``.
        on_step: called after each step with its index and the new latents, which are tensors of inference mode where
            `evaluating` chose that.
        how: which work the predictions share; None: none, as in diffusers.
    """
    how = how or Evaluation()
    predict = _predictor(conditions, how)
    constants = (*predict.constants, conditions.prompt, conditions.negative, conditions.image)
    keeping = text_cache(*constants) if how.text_kv_cache.on else contextlib.nullcontext()
    with evaluating(pipe), keeping as kept:
        return _denoise(pipe, plan, latents, conditions, stepper, timesteps, sigmas, on_step, predict, kept)


@dataclass
class _Predictor:
    """The model's velocity with and without the prompt, by two calls or by one on a batch of two."""

    conditions: Conditions
    prompts: Tensor | None = None
    images: Tensor | None = None

    @property
    def constants(self) -> tuple[Tensor | None, ...]:
        return self.prompts, self.images

    def __call__(
        self, model: Any, x: Tensor, timestep: Tensor, context: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        given = self.conditions
        if self.prompts is not None:
            x, timestep = torch.cat([x, x]), timestep.expand(2, *timestep.shape[1:])
            both = self._call(model, "cond_uncond", context, x, timestep, self.prompts, self.images)
            cond, uncond = both.chunk(2)
            return cond, uncond
        cond = self._call(model, "cond", context, x, timestep, given.prompt, given.image)
        if given.negative is None:
            return cond, None
        return cond, self._call(model, "uncond", context, x, timestep, given.negative, given.image)

    @staticmethod
    def _call(
        model: Any, name: str, context: dict[str, Any], x: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None
    ) -> Tensor:
        with model.cache_context(name, **context):
            out: Tensor = model(
                hidden_states=x,
                timestep=timestep,
                encoder_hidden_states=text,
                encoder_hidden_states_image=image,
                return_dict=False,
            )[0]
        return out


def _predictor(conditions: Conditions, how: Evaluation) -> _Predictor:
    negative, image = conditions.negative, conditions.image
    # Prompts of different lengths do not make a batch; the loop's own have one length.
    if negative is None or not how.guidance_batch.on or negative.shape != conditions.prompt.shape:
        return _Predictor(conditions)
    with torch.no_grad():
        prompts = torch.cat([conditions.prompt, negative])
        return _Predictor(conditions, prompts, None if image is None else torch.cat([image, image]))


def _denoise(
    pipe: Any,
    plan: Plan,
    latents: Tensor,
    conditions: Conditions,
    stepper: Any,
    timesteps: Tensor,
    sigmas: Tensor,
    on_step: Callable[[int, Tensor], None],
    predict: _Predictor,
    kept: TextCache | None,
) -> Tensor:
    boundary = None
    if pipe.config.boundary_ratio is not None:
        boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    dtype = _transformer(pipe).dtype
    # Read once: asking the device at each step would wait for it.
    times = timesteps.tolist()
    levels = sigmas.tolist()
    given, mask = conditions.latent, conditions.mask
    last = None
    for i, t in enumerate(timesteps):
        model, guidance = pipe.transformer, plan.guidance
        if boundary is not None and times[i] < boundary:
            model = pipe.transformer_2
            guidance = plan.guidance if plan.guidance_2 is None else plan.guidance_2
        if kept is not None and model is not last:
            kept.clear()  # what the other expert made of the text is not asked for again
        last = model
        x = latents
        if mask is not None:
            if given is not None:
                x = (1 - mask) * given + mask * latents
            pt, ph, pw = model.config.patch_size
            timestep = (mask[0, 0, ::pt, ::ph, ::pw] * t).flatten().unsqueeze(0)
        else:
            if given is not None:
                x = torch.cat([latents, given], dim=1)
            timestep = t.expand(1)
        context = {"step_index": i, "sigma": levels[i], "num_inference_steps": len(times)}
        cond, uncond = predict(model, x.to(dtype), timestep, context)
        latents = stepper.step(i, t, latents, cond, uncond, guidance)
        on_step(i, latents)
    if mask is not None and given is not None:
        latents = (1 - mask) * given + mask * latents
    return latents


def streams(vae: Any) -> bool:
    """Whether a VAE decodes through this package's stream: accelerated, and with the ops for it."""
    from ..integrations.swap import swapped

    return any(module is vae for _, module, _ in swapped(vae))


def decode_stream(
    pipe: Any, latents: Tensor, *, dtype: torch.dtype | None = None, say: Callable[[str], None] | None = None
) -> Iterator[Tensor]:
    """Frames ``[1, 3, t, H, W]`` from clean latents of one film, as an accelerated VAE decodes them.

    Args:
        dtype: None is that of the VAE, in [-1, 1]; torch.uint8 gives bytes.
        say: told when the decoder goes on in tiles for want of memory; None is a warning.
    """
    from ..nn import StreamingVaeDecoder

    decoder = StreamingVaeDecoder(pipe.vae, tiling="vae")
    if say is not None:
        decoder.say = say
    mode = mode_of(pipe)
    with mode():
        frames = decoder.stream(denormalise(pipe.vae, latents.to(pipe.vae.dtype)), dtype=dtype)
    return _one_by_one(frames, mode)


def _one_by_one(frames: Iterator[Tensor], mode: Callable[[], Any]) -> Iterator[Tensor]:
    """``frames``, each made in that mode; between them the caller is where it was."""
    try:
        while True:
            with mode():
                piece = next(frames, None)
            if piece is None:
                return
            yield piece
    finally:
        close = getattr(frames, "close", None)
        if close is not None:
            close()


def arrive(pieces: Iterator[Tensor]) -> Iterator[Any]:
    """Frames of a stream as arrays ``[t, H, W, 3]`` on the host: uint8 as they are, others in [0, 1], fp32.

    On a GPU a piece is copied while the next one is decoded: it is handed over once that one is under way.
    """
    waiting: list[tuple[Any, Tensor]] = []
    for piece in pieces:
        frames = piece[0].permute(1, 2, 3, 0) if piece.dtype == torch.uint8 else to_pixels(piece)
        frames = frames.contiguous()
        del piece
        if frames.device.type != "cuda":
            yield frames.numpy()
            continue
        host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
        host.copy_(frames, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(frames.device))
        waiting.append((copied, host))
        if len(waiting) > 1:
            yield _landed(*waiting.pop(0))
    for each in waiting:
        yield _landed(*each)


def _landed(copied: Any, host: Tensor) -> Any:
    copied.synchronize()
    return host.numpy()


def decode(pipe: Any, latents: Tensor, on_frames: Callable[[Tensor], None] | None = None) -> Tensor:
    """Pixels ``[T, H, W, 3]`` in [0, 1] from clean latents of one film, by the VAE's own ``decode``.

    Args:
        on_frames: receives the pixels of each latent frame, in order, as the decoder finishes it. Not called where
            the VAE decodes in tiles.
    """
    vae = pipe.vae
    with evaluating(pipe):
        latents = denormalise(vae, latents.to(vae.dtype))
    hook = None
    if on_frames is not None and not vae.use_tiling:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        patch = vae.config.patch_size

        def finished(_module: Any, _args: Any, out: Tensor) -> None:
            on_frames(to_pixels(out if patch is None else unpatchify(out, patch_size=patch)))

        hook = vae.decoder.register_forward_hook(finished)
    try:
        with evaluating(pipe):
            return to_pixels(vae.decode(latents, return_dict=False)[0])
    finally:
        if hook is not None:
            hook.remove()


def denormalise(vae: Any, latents: Tensor) -> Tensor:
    """Latents as the VAE takes them, from latents as the transformer does."""
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape)
    std = torch.tensor(vae.config.latents_std).view(shape)
    # Divided by the reciprocal, as the pipeline does: the same rounding.
    return latents / (1.0 / std.to(latents)) + mean.to(latents)


def to_pixels(video: Tensor) -> Tensor:
    """``[1, 3, T, H, W]`` in [-1, 1] to ``[T, H, W, 3]`` in [0, 1], fp32."""
    return (video[0].float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)


def to_bytes(pixels: Tensor) -> Any:
    """Pixels in [0, 1] as a uint8 array."""
    return (pixels * 255).round().to(torch.uint8).cpu().contiguous().numpy()
