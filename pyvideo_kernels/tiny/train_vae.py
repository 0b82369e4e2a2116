"""Train the autoencoder's two halves against the fixed latent space, each on its own.

    python -m pyvideo_kernels.tiny.train_vae decoder --run runs/tiny --minutes 60
    python -m pyvideo_kernels.tiny.train_vae encoder --run runs/tiny --minutes 15

The decoder learns to undo the linear code and sharpens what it lost; the encoder learns to compute it.
Both resume where they stopped.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import Z_DIM, build_vae
from .clips import Clips, draw_scenes, render
from .latents import SPATIAL, TEMPORAL, LatentSpace
from .runs import RunFolder, build_optimizers, set_threads, train

LOG_VARIANCE = -12.0
"""What the encoder is taught to answer as the log-variance of every latent: as good as none."""


class Half(nn.Module):
    """The encoder or the decoder with its 1x1 convolution, run over a whole clip in two calls.

    diffusers decodes latent by latent; apart from the first one the cache gives the same result for any
    number of latents a call, and two large calls train much faster than five small ones.
    """

    def __init__(self, part: str, space: LatentSpace, **overrides: Any) -> None:
        super().__init__()
        vae = build_vae(space.latents_mean.tolist(), space.latents_std.tolist(), **overrides)
        self.part = part
        self.slots = vae._cached_conv_counts[part]
        if part == "decoder":
            self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        else:
            self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, x: Tensor) -> Tensor:
        cache: list[Any] = [None] * self.slots
        if self.part == "encoder":
            first = self.encoder(x[:, :, :1], feat_cache=cache, feat_idx=[0])
            rest = self.encoder(x[:, :, 1:], feat_cache=cache, feat_idx=[0])
            return self.quant_conv(torch.cat([first, rest], 2))
        x = self.post_quant_conv(x)
        first = self.decoder(x[:, :, :1], feat_cache=cache, feat_idx=[0], first_chunk=True)
        rest = self.decoder(x[:, :, 1:], feat_cache=cache, feat_idx=[0])
        return torch.cat([first, rest], 2)


def crop(clips: Clips, generator: torch.Generator, latents: int, cells: int) -> Clips:
    """A window of ``latents`` latent frames and ``cells`` x ``cells`` latent cells, anywhere in the clip."""
    total = (clips.coverage.shape[1] - 1) // TEMPORAL + 1
    rows, columns = (n // SPATIAL for n in clips.coverage.shape[2:])
    windows = []
    for cover in clips.coverage:
        t, y, x = (
            int(torch.randint(limit - size + 1, (1,), generator=generator))
            for limit, size in ((total, latents), (rows, cells), (columns, cells))
        )
        t, y, x = t * TEMPORAL, y * SPATIAL, x * SPATIAL
        size = cells * SPATIAL
        windows.append(cover[t : t + (latents - 1) * TEMPORAL + 1, y : y + size, x : x + size])
    return Clips(clips.scenes, torch.stack(windows), clips.color, clips.background)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("decoder", "encoder"))
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--steps", type=int, default=10**9, help="stop after this many steps in all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long, decay included")
    parser.add_argument("--decay-minutes", type=float, default=0.0, help="length of the closing linear decay")
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--latents", type=int, default=5, help="latent frames a training window spans")
    parser.add_argument("--cells", type=int, default=6, help="latent cells along its side")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--latent-noise", type=float, default=0.1, help="largest noise on the decoder's input")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def loss_of(half: Half, space: LatentSpace, clips: Clips, noise: Tensor, scale: Tensor, device: str) -> Tensor:
    """Distance to the clip (decoder) or to its code (encoder)."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    video = patchify(clips.video(), 2).to(device)
    code = space.encode(clips)
    if half.part == "encoder":
        mean, log_variance = half(video).float().chunk(2, 1)
        error = (space.normalize(mean.cpu()) - code).square().mean()
        return error + 1e-3 * (log_variance.cpu() - LOG_VARIANCE).square().mean()
    error = half(space.denormalize(code + noise * scale).to(device)).float() - video
    # The absolute error keeps edges sharp, the squared one punishes patches of a wrong colour.
    return error.abs().mean() + error.square().mean()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    set_threads(args.threads)
    torch.manual_seed(args.seed)
    space = LatentSpace.for_run(args.run, Z_DIM)
    half = Half(args.part, space).to(args.device)
    folder = RunFolder(args.run / args.part, half, build_optimizers(half, args.lr), args.ema)

    def loss_at(generator: torch.Generator) -> Tensor:
        whole = render(draw_scenes(args.batch, generator), generator)
        clips = crop(whole, generator, args.latents, args.cells)
        noise = torch.randn(args.batch, Z_DIM, args.latents, args.cells, args.cells, generator=generator)
        scale = args.latent_noise * torch.rand(args.batch, 1, 1, 1, 1, generator=generator)
        return loss_of(half, space, clips, noise, scale, args.device)

    train(args, half, folder, loss_at)


if __name__ == "__main__":
    main()
