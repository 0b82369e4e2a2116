"""The sampling loop: prompt to latents to pixels, on the pipeline's own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


@torch.no_grad()
def encode_text(pipe: Any, prompt: str, negative: str | None, guided: bool, device: torch.device) -> Conditions:
    """Prompt embeddings in the transformer's dtype, as the pipeline makes them."""
    from diffusers import WanPipeline

    # Every Wan pipeline encodes alike; the image-to-video one of diffusers 0.42 fails at this without ftfy, so the
    # text-to-video method serves both. No negative prompt is the empty one.
    texts = [prompt, negative or ""] if guided else [prompt]
    encoded = [
        WanPipeline._get_t5_prompt_embeds(pipe, text, max_sequence_length=TEXT_TOKENS, device=device) for text in texts
    ]
    cond, uncond = encoded if guided else (encoded[0], None)
    dtype = _transformer(pipe).dtype
    return Conditions(cond.to(dtype), None if uncond is None else uncond.to(dtype))


def _transformer(pipe: Any) -> Any:
    return pipe.transformer if pipe.transformer is not None else pipe.transformer_2


@torch.no_grad()
def prepare_latents(
    pipe: Any, plan: Plan, seed: int, device: torch.device, conditions: Conditions, image: Any = None
) -> Tensor:
    """The noise of a seed, fp32, and the encoded picture for image-to-video.

    The noise is drawn on the CPU whatever the device, so a seed means the same film everywhere.
    """
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


@torch.no_grad()
def denoise(
    pipe: Any,
    plan: Plan,
    latents: Tensor,
    conditions: Conditions,
    stepper: Any,
    timesteps: Tensor,
    sigmas: Tensor,
    on_step: Callable[[int, Tensor], None] = lambda i, latents: None,
) -> Tensor:
    """Clean latents: two transformer calls a step (one without guidance), then one update.

    Args:
        stepper: ``step(i, t, latents, cond, uncond, guidance)``.
        on_step: called after each step with its index and the new latents.
    """
    boundary = None
    if pipe.config.boundary_ratio is not None:
        boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    dtype = _transformer(pipe).dtype
    # Read once: asking the device at each step would wait for it.
    times = timesteps.tolist()
    levels = sigmas.tolist()
    given, mask = conditions.latent, conditions.mask
    for i, t in enumerate(timesteps):
        model, guidance = pipe.transformer, plan.guidance
        if boundary is not None and times[i] < boundary:
            model = pipe.transformer_2
            guidance = plan.guidance if plan.guidance_2 is None else plan.guidance_2
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
        x = x.to(dtype)
        context = {"step_index": i, "sigma": levels[i], "num_inference_steps": len(times)}

        def predict(name: str, text: Tensor, model: Any = model, x: Tensor = x, timestep: Tensor = timestep,
                    context: dict[str, Any] = context) -> Tensor:  # fmt: skip
            with model.cache_context(name, **context):
                out: Tensor = model(
                    hidden_states=x,
                    timestep=timestep,
                    encoder_hidden_states=text,
                    encoder_hidden_states_image=conditions.image,
                    return_dict=False,
                )[0]
            return out

        cond = predict("cond", conditions.prompt)
        uncond = None if conditions.negative is None else predict("uncond", conditions.negative)
        latents = stepper.step(i, t, latents, cond, uncond, guidance)
        on_step(i, latents)
    if mask is not None and given is not None:
        latents = (1 - mask) * given + mask * latents
    return latents


def streams(vae: Any) -> bool:
    """Whether a VAE decodes through this package's stream: accelerated, and with the ops for it."""
    from ..integrations.swap import swapped

    return any(module is vae for _, module, _ in swapped(vae))


@torch.no_grad()
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
    frames: Iterator[Tensor] = decoder.stream(denormalise(pipe.vae, latents.to(pipe.vae.dtype)), dtype=dtype)
    return frames


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


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, on_frames: Callable[[Tensor], None] | None = None) -> Tensor:
    """Pixels ``[T, H, W, 3]`` in [0, 1] from clean latents of one film, by the VAE's own ``decode``.

    Args:
        on_frames: receives the pixels of each latent frame, in order, as the decoder finishes it. Not called where
            the VAE decodes in tiles.
    """
    vae = pipe.vae
    latents = denormalise(vae, latents.to(vae.dtype))
    hook = None
    if on_frames is not None and not vae.use_tiling:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        patch = vae.config.patch_size

        def finished(_module: Any, _args: Any, out: Tensor) -> None:
            on_frames(to_pixels(out if patch is None else unpatchify(out, patch_size=patch)))

        hook = vae.decoder.register_forward_hook(finished)
    try:
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
