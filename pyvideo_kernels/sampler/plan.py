"""What a run will do and what it costs, worked out before any weight is read. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..attention_text import choose
from ..error_types import UsageError
from .modeldir import Model
from .settings import Settings

TEXT_TOKENS = 512
"""Length to which Wan pipelines pad a prompt."""


@dataclass(frozen=True)
class Plan:
    """One film, every choice made."""

    model: str
    height: int
    width: int
    frames: int
    fps: float
    steps: int
    guidance: float
    guidance_2: float | None
    scheduler: str
    grid: tuple[int, int, int]
    """Tokens along time, height and width."""
    tflop: float
    """Transformer and decoder; guidance counts twice, the text encoder is left out."""
    upscale: int = 1
    text_share: float = 0.0
    """Of a transformer call's products: those that depend on the text alone."""
    cross_share: float = 0.0
    """Of them: the attention to the text."""
    text_kv: int = 0
    """Numbers in the keys and values of both prompts' texts, in all layers."""

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w

    @property
    def guided(self) -> bool:
        """Whether each step evaluates the model without the prompt too."""
        return self.guidance > 1

    def text_kv_bytes(self, itemsize: int) -> int:
        """What it takes to keep all that is made of the text; its projection is small beside keys and values."""
        return self.text_kv * itemsize

    def line(self, dtype: str, device: str, kernels: str, how: str = "") -> str:
        """The plan in one line; ``how`` the model is evaluated, if there is something to say."""
        guidance = f"{self.guidance:g}" + (f"/{self.guidance_2:g}" if self.guidance_2 is not None else "")
        work = f"{self.tflop:.3g} TFLOP" if self.tflop < 1000 else f"{self.tflop / 1000:.3g} PFLOP"
        scale = f" ×{self.upscale}" if self.upscale > 1 else ""
        return (
            f"{self.model}: {self.width}×{self.height}{scale}, {self.frames} frames at {self.fps:g} fps, "
            f"{self.tokens:,} tokens, ≈ {work}; {dtype} on {device}; {self.steps} steps of {self.scheduler}, "
            f"guidance {guidance}{how and f'; {how}'}; {kernels}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"grid": list(self.grid), "tokens": self.tokens, "tflop": round(self.tflop, 4)}


def make_plan(settings: Settings, model: Model, image_size: tuple[int, int] | None = None) -> Plan:
    """Fill in the model's defaults and check every size.

    Args:
        image_size: width and height of ``--image``: the default size keeps its aspect ratio.
    Raises:
        UsageError: one sentence with the nearest thing that works.
    """
    d = model.defaults
    if settings.image is not None and not model.takes_image:
        raise UsageError(
            f"{model.name} makes films from text alone: drop --image, or choose an image-to-video model (see "
            "pyvideo models)"
        )
    if settings.image is None and model.wants_image:
        raise UsageError(f"{model.name} starts from a picture: add --image FILE")
    height, width = settings.height or d.height, settings.width or d.width
    if image_size and settings.height is None and settings.width is None:
        height, width = _fit(image_size, d.height * d.width, model.multiple)
    frames = settings.frames or d.frames
    _check_sizes(model, height, width)
    t = model.temporal
    if (frames - 1) % t:
        below = (frames - 1) // t * t + 1
        raise UsageError(
            f"--frames must be {t}k + 1 for {model.name}; got {frames}: use {_nearest(frames, below, below + t)}"
        )
    patch = model.patch
    grid = (
        ((frames - 1) // t + 1) // patch[0],
        height // model.spatial // patch[1],
        width // model.spatial // patch[2],
    )
    limit = int(model.transformer.get("rope_max_seq_len") or 1024)
    for option, tokens, most in (
        ("frames", grid[0], (limit * patch[0] - 1) * t + 1),
        ("height", grid[1], limit * model.spatial * patch[1]),
        ("width", grid[2], limit * model.spatial * patch[2]),
    ):
        if tokens > limit:
            raise UsageError(f"--{option} goes past the positions {model.name} knows; use at most {most}")
    steps = settings.steps or d.steps
    guidance = d.guidance if settings.guidance is None else settings.guidance
    guidance_2 = d.guidance_2 if settings.guidance is None and model.boundary_ratio is not None else None
    tokens = grid[0] * grid[1] * grid[2]
    calls = steps * (2 if guidance > 1 else 1)
    density = _density(settings, model, grid, steps)
    one_call = transformer_tflop(model.transformer, tokens, density=density)
    tflop = calls * one_call
    tflop += decoder_tflop(model.vae, height, width, frames)
    return Plan(
        model=model.name,
        height=height,
        width=width,
        frames=frames,
        fps=settings.fps or d.fps,
        steps=steps,
        guidance=guidance,
        guidance_2=guidance_2,
        scheduler=settings.scheduler or d.scheduler or _own_scheduler(model.scheduler),
        grid=grid,
        tflop=tflop,
        upscale=settings.upscale or d.upscale,
        text_share=round(_text_tflop(model.transformer) / one_call, 6),
        cross_share=round(_cross_tflop(model.transformer, tokens) / one_call, 6),
        text_kv=_text_kv(model.transformer) * (2 if guidance > 1 else 1),
    )


def _density(settings: Settings, model: Model, grid: tuple[int, int, int], steps: int) -> float:
    """The share of self-attention that ``--attention`` computes, checked against the model's blocks and heads."""
    choice = choose(settings.attention, "--attention")
    if choice is None:
        return 1.0
    blocks, heads = (int(model.transformer[key]) for key in ("num_layers", "num_attention_heads"))
    reason = choice.unfit(blocks, heads)
    if reason is not None:
        raise UsageError(f"--attention: {model.name}: {reason}")
    return choice.density(grid, blocks, steps)


def _own_scheduler(config: Mapping[str, Any]) -> str:
    name = str(config.get("_class_name", ""))
    return {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"}.get(name, name)


def _nearest(value: int, below: int, above: int) -> str:
    if below < 1:
        return str(above)
    near, far = (below, above) if value - below <= above - value else (above, below)
    return f"{near} or {far}"


def _check_sizes(model: Model, height: int, width: int) -> None:
    m = model.multiple
    wrong = [(name, v) for name, v in (("height", height), ("width", width)) if v % m]
    if wrong:
        parts = [f"--{name} {_nearest(v, v // m * m, (v // m + 1) * m)}" for name, v in wrong]
        got = " and ".join(f"{name} {v}" for name, v in wrong)
        raise UsageError(
            f"height and width must be multiples of {m} for {model.name}; got {got}: use {', '.join(parts)}"
        )


def _fit(image_size: tuple[int, int], area: int, multiple: int) -> tuple[int, int]:
    """Height and width of about ``area`` pixels with the aspect ratio of the picture."""
    ratio = image_size[1] / image_size[0]
    height = max(multiple, round((area * ratio) ** 0.5) // multiple * multiple)
    width = max(multiple, round((area / ratio) ** 0.5) // multiple * multiple)
    return height, width


def transformer_tflop(
    config: Mapping[str, Any], tokens: int, text: int = TEXT_TOKENS, *, density: float = 1.0
) -> float:
    """Matrix multiplications of one forward pass, of self-attention ``density``, in 1e12 multiply-adds × 2."""
    d = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    ffn, layers = int(config["ffn_dim"]), int(config["num_layers"])
    linear = 2 * tokens * (4 * d * d + 2 * d * d + 2 * d * ffn) + 2 * text * 2 * d * d
    attention = 4 * tokens * tokens * d * density + 4 * tokens * text * d
    pt, ph, pw = config.get("patch_size") or (1, 2, 2)
    ends = 2 * tokens * d * pt * ph * pw * (int(config["in_channels"]) + int(config["out_channels"]))
    return (layers * (linear + attention) + ends) / 1e12


def _text_tflop(config: Mapping[str, Any], text: int = TEXT_TOKENS) -> float:
    """Of `transformer_tflop`: the keys and values of the text."""
    d = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    return int(config["num_layers"]) * 2 * text * 2 * d * d / 1e12


def _cross_tflop(config: Mapping[str, Any], tokens: int, text: int = TEXT_TOKENS) -> float:
    """Of `transformer_tflop`: the attention of all tokens to the text."""
    d = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    return int(config["num_layers"]) * 4 * tokens * text * d / 1e12


def _text_kv(config: Mapping[str, Any], text: int = TEXT_TOKENS) -> int:
    """Numbers in the keys and values of one text, and in its projection."""
    d = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    return (2 * int(config["num_layers"]) + 1) * text * d


def decoder_tflop(config: Mapping[str, Any], height: int, width: int, frames: int) -> float:
    """The VAE's decoder, scaled from 8.70 MFLOP a pixel of Wan 2.1's (96 channels, two blocks a level)."""
    base = int(config.get("decoder_base_dim") or config.get("base_dim") or 96)
    blocks = int(config.get("num_res_blocks") or 2)
    pixels = height * width * frames / float(config.get("patch_size") or 1) ** 2
    return 8.70e6 * (base / 96) ** 2 * (blocks + 1) / 3 * pixels / 1e12
