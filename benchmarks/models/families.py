"""The four families of video pipelines in diffusers: how each is called without a text encoder, and how it decodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .architecture import Architecture, Clip

# A prompt of a sentence or two fills about this much of the text encoder's window; the rest is padding.
PROMPT_SHARE = 5 / 16


@dataclass(frozen=True)
class Geometry:
    """What a clip's size must fit."""

    spatial: int
    """Pixels to a latent, along height and width."""
    temporal: int
    """Frames to a latent."""
    patch: tuple[int, int, int]
    multiple: int
    """Height and width are multiples of this."""
    frame_step: int
    """Frames are a multiple of this, plus one."""


@dataclass(frozen=True)
class Prompt:
    """Text as the transformer takes it: what a text encoder made, or random numbers of that shape."""

    embeds: Tensor
    mask: Tensor
    pooled: Tensor | None = None


class Family(ABC):
    """What differs from one pipeline class to the next."""

    name: ClassVar[str]
    pipeline: ClassVar[str]
    reference: ClassVar[str]
    """The architecture whose text length and clip stand for models of this family that have no name of their own."""
    two_prompts: ClassVar[bool] = True
    """Whether guidance compares with a negative prompt (or is embedded in the transformer)."""

    @abstractmethod
    def geometry(self, arch: Architecture) -> Geometry: ...

    @abstractmethod
    def text_widths(self, transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        """Width of a text token and of the pooled text, if there is one, from the transformer's configuration."""

    @abstractmethod
    def text_inputs(self, prompt: Prompt, negative: Prompt) -> dict[str, Any]:
        """Keyword arguments of ``pipe.__call__`` that stand for the prompts."""

    @abstractmethod
    def encode(self, pipe: Any, arch: Architecture, prompt: str, negative: str) -> dict[str, Any]:
        """The same from words, through the pipeline's own text encoders."""

    @abstractmethod
    def to_vae(self, pipe: Any, clip: Clip, latents: Tensor) -> Tensor:
        """Latents as the pipeline returns them to what the decoder takes, ``[B, C, T, H, W]``, still normalised."""

    @abstractmethod
    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        """From the transformer's scale to the decoder's, in the pipeline's order of operations: the same bits."""

    def from_noise(self, pipe: Any, noise: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` to the layout and dtype that ``pipe.__call__`` takes as ``latents``."""
        return noise

    def call_options(self, clip: Clip) -> dict[str, Any]:
        """Further keyword arguments of ``pipe.__call__``."""
        return {}

    def decode_options(self, clip: Clip, latents: Tensor, seed: int) -> tuple[Tensor, dict[str, Any]]:
        """Denormalised latents and keyword arguments of ``vae.decode``."""
        return latents, {}


class Wan(Family):
    name = "wan"
    pipeline = "WanPipeline"
    reference = "wan2.1-1.3b"

    def geometry(self, arch: Architecture) -> Geometry:
        spatial = arch.vae.config["scale_factor_spatial"]
        temporal = arch.vae.config["scale_factor_temporal"]
        t, h, w = arch.transformer.config["patch_size"]
        # The pipeline refuses what 16 does not divide, whatever the VAE.
        return Geometry(spatial, temporal, (t, h, w), max(16, spatial * h), temporal)

    def text_widths(self, transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        return transformer["text_dim"], None

    def text_inputs(self, prompt: Prompt, negative: Prompt) -> dict[str, Any]:
        # No mask reaches the transformer: the pipeline zeroes the padding instead.
        blank = lambda p: p.embeds * p.mask[..., None].to(p.embeds.dtype)
        return {"prompt_embeds": blank(prompt), "negative_prompt_embeds": blank(negative)}

    def encode(self, pipe: Any, arch: Architecture, prompt: str, negative: str) -> dict[str, Any]:
        embeds, negative_embeds = pipe.encode_prompt(prompt, negative, max_sequence_length=arch.text.tokens)
        return {"prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}

    def to_vae(self, pipe: Any, clip: Clip, latents: Tensor) -> Tensor:
        return latents

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return latents / (1.0 / std) + mean


class HunyuanVideo(Family):
    name = "hunyuanvideo"
    pipeline = "HunyuanVideoPipeline"
    reference = "hunyuanvideo"
    two_prompts = False

    def geometry(self, arch: Architecture) -> Geometry:
        spatial = arch.vae.config["spatial_compression_ratio"]
        temporal = arch.vae.config["temporal_compression_ratio"]
        patch, patch_t = arch.transformer.config["patch_size"], arch.transformer.config["patch_size_t"]
        return Geometry(spatial, temporal, (patch_t, patch, patch), max(16, spatial * patch), temporal)

    def text_widths(self, transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        return transformer["text_embed_dim"], transformer["pooled_projection_dim"]

    def text_inputs(self, prompt: Prompt, negative: Prompt) -> dict[str, Any]:
        return {
            "prompt_embeds": prompt.embeds,
            "pooled_prompt_embeds": prompt.pooled,
            "prompt_attention_mask": prompt.mask,
        }

    def encode(self, pipe: Any, arch: Architecture, prompt: str, negative: str) -> dict[str, Any]:
        embeds, pooled, mask = pipe.encode_prompt(prompt, max_sequence_length=arch.text.tokens)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}

    def to_vae(self, pipe: Any, clip: Clip, latents: Tensor) -> Tensor:
        return latents

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        return latents / vae.config.scaling_factor


class LTX(Family):
    name = "ltx"
    pipeline = "LTXPipeline"
    reference = "ltx"

    def geometry(self, arch: Architecture) -> Geometry:
        config = arch.vae.config
        halvings = 2 ** sum(config["spatio_temporal_scaling"])
        spatial = config.get("spatial_compression_ratio") or config["patch_size"] * halvings
        temporal = config.get("temporal_compression_ratio") or config["patch_size_t"] * halvings
        patch, patch_t = arch.transformer.config["patch_size"], arch.transformer.config["patch_size_t"]
        return Geometry(spatial, temporal, (patch_t, patch, patch), max(32, spatial * patch), temporal)

    def text_widths(self, transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        return transformer["caption_channels"], None

    def text_inputs(self, prompt: Prompt, negative: Prompt) -> dict[str, Any]:
        return {
            "prompt_embeds": prompt.embeds,
            "prompt_attention_mask": prompt.mask,
            "negative_prompt_embeds": negative.embeds,
            "negative_prompt_attention_mask": negative.mask,
        }

    def encode(self, pipe: Any, arch: Architecture, prompt: str, negative: str) -> dict[str, Any]:
        embeds, mask, negative_embeds, negative_mask = pipe.encode_prompt(
            prompt, negative, max_sequence_length=arch.text.tokens
        )
        return self.text_inputs(Prompt(embeds, mask), Prompt(negative_embeds, negative_mask))

    def from_noise(self, pipe: Any, noise: Tensor) -> Tensor:
        config = pipe.transformer.config
        packed: Tensor = pipe._pack_latents(noise, config.patch_size, config.patch_size_t)
        return packed

    def to_vae(self, pipe: Any, clip: Clip, latents: Tensor) -> Tensor:
        config = pipe.transformer.config
        video: Tensor = pipe._unpack_latents(latents, *clip.latent, config.patch_size, config.patch_size_t)
        return video

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = (
            values.view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
            for values in (vae.latents_mean, vae.latents_std)
        )
        return latents * std / vae.config.scaling_factor + mean

    def call_options(self, clip: Clip) -> dict[str, Any]:
        return {"frame_rate": clip.arch.defaults.fps}

    def decode_options(self, clip: Clip, latents: Tensor, seed: int) -> tuple[Tensor, dict[str, Any]]:
        if not clip.arch.vae.config["timestep_conditioning"]:
            return latents, {"temb": None}
        # This decoder takes a last denoising step itself: it wants a little noise and the step's time.
        timestep, scale = 0.05, 0.025  # as in the authors' examples
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
        temb = torch.full((latents.shape[0],), timestep, device=latents.device, dtype=latents.dtype)
        return (1 - scale) * latents + scale * noise, {"temb": temb}


class CogVideoX(Family):
    name = "cogvideox"
    pipeline = "CogVideoXPipeline"
    reference = "cogvideox-5b"

    def geometry(self, arch: Architecture) -> Geometry:
        spatial = 2 ** (len(arch.vae.config["block_out_channels"]) - 1)
        temporal = int(arch.vae.config["temporal_compression_ratio"])
        patch, patch_t = arch.transformer.config["patch_size"], arch.transformer.config.get("patch_size_t") or 1
        # The VAE decodes latents two by two after a first one: an even number of them gives frames too few.
        return Geometry(spatial, temporal, (patch_t, patch, patch), spatial * patch, 2 * temporal)

    def text_widths(self, transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        return transformer["text_embed_dim"], None

    def text_inputs(self, prompt: Prompt, negative: Prompt) -> dict[str, Any]:
        # T5's padding is not masked: it is text like the rest.
        return {"prompt_embeds": prompt.embeds, "negative_prompt_embeds": negative.embeds}

    def encode(self, pipe: Any, arch: Architecture, prompt: str, negative: str) -> dict[str, Any]:
        embeds, negative_embeds = pipe.encode_prompt(prompt, negative, max_sequence_length=arch.text.tokens)
        return {"prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}

    def from_noise(self, pipe: Any, noise: Tensor) -> Tensor:
        # The pipeline keeps the dtype it is given, and the transformer takes its own alone.
        return noise.transpose(1, 2).contiguous().to(pipe.transformer.dtype)

    def to_vae(self, pipe: Any, clip: Clip, latents: Tensor) -> Tensor:
        # CogVideoX 1.5 denoises latent frames that only fill up a patch; they come first.
        surplus = latents.shape[1] - ((clip.frames - 1) // pipe.vae_scale_factor_temporal + 1)
        return latents[:, surplus:].transpose(1, 2)

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        return 1 / vae.config.scaling_factor * latents


FAMILIES: dict[str, Family] = {family.name: family for family in (Wan(), HunyuanVideo(), LTX(), CogVideoX())}
