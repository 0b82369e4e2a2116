"""The VAEs' own middle attention and last layers, for the eager side of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def vae_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Wan's: a batch of frames with one head. HunyuanVideo's: one sequence, and the mask that is made on each call."""
    b, t, s, d = q.shape
    if not causal:
        return F.scaled_dot_product_attention(q.flatten(0, 1)[:, None], k.flatten(0, 1)[:, None],
                                              v.flatten(0, 1)[:, None]).view(b, t, s, d)  # fmt: skip
    frame = torch.arange(1, t + 1, dtype=torch.int32, device=q.device).repeat_interleave(s)
    x, y = torch.meshgrid(frame, frame, indexing="xy")
    mask = torch.where(x <= y, 0, -float("inf")).to(dtype=q.dtype).expand(b, 1, -1, -1)
    q, k, v = (part.flatten(1, 2)[:, None] for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(b, t, s, d)


def decode_head_(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cache: Tensor | None = None, pad_mode: str = "zeros",
    patch: Sequence[int] = (1, 1, 1), clamp: bool = True,
) -> Tensor:  # fmt: skip
    """On ``[B, C, T, H, W]``: pad, convolve, unpatchify, clamp, and the copy into the clip."""
    if pad_mode == "replicate":
        y = F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"), weight, bias)
    elif pad_mode == "first_frame":
        y = F.conv3d(torch.cat([x[:, :, :1].repeat(1, 1, 2, 1, 1), x], 2), weight, bias, padding=(0, 1, 1))
    else:
        y = F.conv3d(F.pad(x if cache is None else torch.cat([cache, x], 2), (1, 1, 1, 1, 0, 0)), weight, bias)
    p = patch[1]
    if p > 1:
        b, _, t, h, w = y.shape
        y = y.view(b, -1, p, p, t, h, w).permute(0, 1, 4, 5, 3, 6, 2).reshape(b, -1, t, h * p, w * p)
    return out.copy_(torch.clamp(y, min=-1.0, max=1.0) if clamp else y)
