"""Train the text encoder and the transformer by flow matching on an endless stream of new clips.

    python -m pyvideo_kernels.tiny.train_dit --run runs/tiny --minutes 120

Stops and resumes at will: the run folder holds everything, and starting the command again goes on.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import (
    FLOW_SHIFT,
    MAX_PROMPT_TOKENS,
    PIPELINE_PROMPT_TOKENS,
    Z_DIM,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)
from .clips import draw_scenes, render
from .latents import LatentSpace
from .runs import RunFolder, build_optimizers, set_threads, train


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    # On the CPU the bf16 backward of this call is eight times slower than the fp32 one.
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias)


class PaddedCrossAttention:
    """Cross-attention over the prompt's own tokens and one padding key that stands for all the others.

    The pipeline attends to ``512 - n`` identical padding keys; adding ``log(512 - n)`` to the logit of a
    single one gives the same softmax, forty times cheaper.
    """

    def __init__(self) -> None:
        self.bias: Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        context = encoder_hidden_states
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        k = attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        v = attn.to_v(context).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        out = _attention(q, k, v, self.bias)
        return attn.to_out[0](out.transpose(1, 2).flatten(2, 3))


class FusedRotarySelfAttention:
    """Self-attention with the rotary embedding as one complex product; the stock one writes strided halves."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        cos, sin = rotary_emb

        def rotate(x: Tensor) -> Tensor:
            x = x.float().unflatten(2, (attn.heads, -1))
            pairs = x.unflatten(-1, (-1, 2))
            turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
            return (x * cos + turned * sin).transpose(1, 2)

        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        q, k = rotate(attn.norm_q(attn.to_q(hidden_states))), rotate(attn.norm_k(attn.to_k(hidden_states)))
        out = _attention(q, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2, 3))


class TextToLatent(nn.Module):
    """The two trained networks as one module: prompt tokens and noisy latents in, velocity out."""

    def __init__(self, vocab_size: int, **overrides: Any) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(vocab_size)
        self.transformer = build_transformer(**overrides)
        self.cross = PaddedCrossAttention()
        for block in self.transformer.blocks:
            block.attn1.set_processor(FusedRotarySelfAttention())
            block.attn2.set_processor(self.cross)

    def forward(self, noisy: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        text = self.text_encoder(ids, mask).last_hidden_state
        text = F.pad(text * mask[..., None], (0, 0, 0, 1))
        pads = (PIPELINE_PROMPT_TOKENS - mask.sum(1)).float().log()
        bias = torch.cat([torch.where(mask > 0, 0.0, -1e4), pads[:, None]], 1)
        self.cross.bias = bias[:, None, None, :]
        return self.transformer(noisy, sigma * 1000, text, return_dict=False)[0]


def sample_sigma(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels, shifted towards the noisy end where the layout of the clip is decided."""
    u = torch.rand(count, generator=generator)
    # Stratified over the batch: every step sees the whole range.
    u = (torch.randperm(count, generator=generator) + u) / count
    return (FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)).clamp(1e-3, 1.0)


class Batches:
    """Endless training batches: noisy latents, noise level, prompt tokens, target velocity, loss weight."""

    def __init__(self, space: LatentSpace, tokenizer: Any, args: argparse.Namespace) -> None:
        self.space, self.tokenizer, self.args = space, tokenizer, args

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        count = self.args.batch
        clips = render(draw_scenes(count, generator), generator)
        z = self.space.encode(clips)
        dropped = (torch.rand(count, generator=generator) < self.args.caption_dropout).tolist()
        prompts = ["" if d else s.prompt for d, s in zip(dropped, clips.scenes, strict=True)]
        tokens = self.tokenizer(prompts, padding="max_length", max_length=MAX_PROMPT_TOKENS, return_tensors="pt")
        sigma = sample_sigma(count, generator)
        noise = torch.randn(z.shape, generator=generator)
        s = sigma.view(-1, 1, 1, 1, 1)
        noisy, target = (1 - s) * z + s * noise, noise - z
        # The object covers a tenth of the cells but carries every word of the prompt but one.
        cover = F.avg_pool2d(clips.coverage[:, ::4].flatten(0, 1)[:, None], 8)
        touched = F.max_pool2d((cover > 0.01).float(), 3, 1, 1).view(count, 1, *z.shape[2:])
        weight = 1 + self.args.object_weight * (1 - s) * touched
        return noisy, sigma, tokens.input_ids, tokens.attention_mask, target, weight / weight.mean()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--name", default="dit", help="subfolder of the run")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after this many steps in all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long, decay included")
    parser.add_argument("--decay-minutes", type=float, default=0.0, help="length of the closing linear decay")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3, help="for everything but Muon's matrices")
    parser.add_argument("--muon-lr", type=float, default=3e-3, help="0: AdamW for everything")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--caption-dropout", type=float, default=0.1)
    parser.add_argument("--object-weight", type=float, default=3.0)
    parser.add_argument("--heads", type=int, default=4, help="of 32 channels each")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="autocast; faster where the CPU has bf16 units")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    set_threads(args.threads)
    torch.manual_seed(args.seed)
    space = LatentSpace.for_run(args.run, Z_DIM)
    tokenizer = build_tokenizer()
    model = TextToLatent(len(tokenizer), num_layers=args.layers, num_attention_heads=args.heads).to(args.device)
    folder = RunFolder(args.run / args.name, model, build_optimizers(model, args.lr, args.muon_lr), args.ema)
    batches = Batches(space, tokenizer, args)

    def loss_at(generator: torch.Generator) -> Tensor:
        with torch.autocast(args.device, enabled=False):
            noisy, sigma, ids, mask, target, weight = (x.to(args.device) for x in batches(generator))
        error = (model(noisy, sigma, ids, mask).float() - target).square()
        return (error * weight).mean()

    train(args, model, folder, loss_at)


if __name__ == "__main__":
    main()
