"""What the models run in eager PyTorch where an op of ours would stand: the baseline of every ratio.

Each function takes the keyword arguments of the public op, after `Entry.stock` has laid them out as the model does. The
order of operations and the dtype of each are the reference implementation's, for they are what it spends its time on.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvideo_kernels.reference.spacetime_attention import axis_window


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    if scale.dtype == x.dtype:  # HunyuanVideo, CogVideoX: in the model's dtype throughout
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale) + shift
    return (F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps) * (1 + scale) + shift).type_as(x)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    if gate.dtype == x.dtype:
        return x + y * gate
    return (x.float() + y * gate).type_as(x)


def gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    new = gate_residual(x, y, gate)
    return new, layer_norm_modulate(new, scale, shift)


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: str,
    norm_type: str = "rms",
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    rotary_range: tuple[int, int] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    per_head_tables = cos.dim() == 4 and cos.shape[2] > 1

    def one(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if norm_type == "layer":  # CogVideoX
            x = F.layer_norm(x, weight.shape, weight, bias, 1e-6)
        elif norm == "per_head":  # HunyuanVideo
            x = F.rms_norm(x, weight.shape, weight, 1e-6)
        else:  # Wan and LTX: over all heads, which are split afterwards
            x = F.rms_norm(x.flatten(2), weight.shape, weight, 1e-6).unflatten(2, x.shape[2:])
        if norm == "per_head" or per_head_tables:
            return _rotate_real(x, rotary_range)
        x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[..., 0::2], sin[..., 1::2]
        out = torch.empty_like(x)
        out[..., 0::2] = x1 * c - x2 * s
        out[..., 1::2] = x1 * s + x2 * c
        return out.type_as(x)

    def _rotate_real(x: Tensor, rotated: tuple[int, int] | None) -> Tensor:
        """diffusers' ``apply_rotary_emb`` with real tables; text is left out and concatenated again."""
        if rotated is not None:
            start, stop = rotated
            return torch.cat((x[:, :start], _rotate_real(x[:, start:stop], None), x[:, stop:]), 1)
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-imaginary, real], -1).flatten(-2)
        return (x.float() * cos + turned.float() * sin).to(x.dtype)

    return one(q, q_weight, q_bias), one(k, k_weight, k_bias)


def patch_embed3d(video: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(video, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def final_layer(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, grid: Any, patch: Any) -> Tensor:
    y = F.linear(layer_norm_modulate(x, scale, shift), weight, bias)
    y = y.reshape(x.shape[0], *grid, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return y.flatten(6, 7).flatten(4, 5).flatten(2, 3)


# Elements of a mask at a time: 1 GiB, the whole of it at Wan's 480p.
_MASK = 1 << 30
# Elements of a mask that is kept from call to call.
_KEPT = 1 << 26


def spacetime_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Any = None, window: Any = None, stride: Any = (1, 1, 1), **_: Any
) -> Tensor:
    """SDPA; with a window under its mask, which is what there is without a kernel for windows."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    tokens = q.shape[2]
    # A model makes a mask once and keeps it, where it can.
    make = _kept_window_mask if tokens**2 <= _KEPT else _window_mask
    rows = max(1, _MASK // tokens)
    parts = []
    for start in range(0, tokens, rows):
        mask = make(tuple(grid), tuple(window), tuple(stride), start, min(start + rows, tokens), q.device)
        parts.append(F.scaled_dot_product_attention(q[:, :, start : start + rows], k, v, attn_mask=mask))
    return torch.cat(parts, 2).transpose(1, 2)


def _window_mask(grid: Any, window: Any, stride: Any, start: int, stop: int, device: Any) -> Tensor:
    """``[stop - start, tokens]``: what those queries see."""
    at = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    mask = torch.ones((), dtype=torch.bool, device=device)
    for place, length, size, step in zip((x.flatten() for x in at), grid, window, stride, strict=True):
        first, last = axis_window(length, size, step, False, device)
        mine = place[start:stop, None]
        mask = mask & (place >= first[mine]) & (place <= last[mine])
    return mask


_kept_window_mask = functools.lru_cache(maxsize=1)(_window_mask)


def _tiled(x: Tensor, grid: Any, tile: Any) -> Tensor:
    """``[B, S, heads, D]`` to ``[B, tiles, tokens of a tile, heads, D]``, padded with zeros."""
    t, h, w = (-n % side for n, side in zip(grid, tile, strict=True))
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, 0, 0, w, 0, h, 0, t))
    for axis in (3, 2, 1):
        x = x.unflatten(axis, (-1, tile[axis - 1]))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7, 8).flatten(4, 6).flatten(1, 3)


def quantize_qk(q: Tensor, k: Tensor, precision: str = "int8", **_: Any) -> tuple[Tensor, ...]:
    """A pass over q and one over k, and one for the mean of every 64th key (of 64 keys at least)."""
    some = k[:, :: max(1, min(k.shape[1] // 64, 64))]
    mean = some.float().mean(1)
    codes, scales = [], []
    for x in (q.float(), k.float() - mean[:, None]):
        scale = x.abs().amax(-1, keepdim=True) / (127 if precision == "int8" else 448)
        codes.append((x / scale).round().to(torch.int8) if precision == "int8" else (x / scale).to(torch.float8_e4m3fn))
        scales.append(scale[..., 0].transpose(1, 2).contiguous())
    return *codes, *scales, torch.einsum("bshd,bhd->bhs", q.float(), mean)


def qk_norm_rope_int8(**inputs: Any) -> tuple[Tensor, ...]:
    """Norm and rotation in fp32, then the codes: rounding to the inputs' dtype between would move one code in ten."""
    names = ("q", "k", "q_weight", "k_weight")
    return quantize_qk(*qk_norm_rope(**{**inputs, **{name: inputs[name].float() for name in names}}))


def int8_attention(
    q8: Tensor, k8: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, grid: Any = None, **_: Any
) -> Tensor:
    """SDPA on what the codes stand for, in the dtype of the values."""
    q, k = (
        (codes.float() * scale.transpose(1, 2).unsqueeze(-1)).to(v.dtype)
        for codes, scale in ((q8, q_scale), (k8, k_scale))
    )
    return spacetime_attention(q, k, v)


def block_mean(x: Tensor, grid: Any, tile: Any) -> Tensor:
    """As VSA does it: pad and permute into tiles, sum in fp32, divide by each tile's real size."""
    real = _tiled(torch.ones_like(x[:1, :, :1, :1]), grid, tile).float().sum(2)
    return (_tiled(x, grid, tile).float().sum(2) / real).transpose(1, 2)


def qk_norm_rope_means(grid: Any, tile: Any, **inputs: Any) -> tuple[Tensor, ...]:
    """Norm and rotation, then a pass over each of q and k for the means."""
    q, k = qk_norm_rope(**inputs)
    return q, k, block_mean(q, grid, tile), block_mean(k, grid, tile)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_counts: Tensor, grid: Any, tile: Any
) -> Tensor:
    """SDPA with the mask that the lists make, a head at a time: all heads' masks would not fit."""
    tiles = [-(-n // side) for n, side in zip(grid, tile, strict=True)]
    at = [torch.arange(n, device=q.device) // side for n, side in zip(grid, tile, strict=True)]
    block = ((at[0][:, None, None] * tiles[1] + at[1][:, None]) * tiles[2] + at[2]).flatten()
    listed = torch.arange(block_indices.shape[-1], device=q.device) < block_counts[..., None]
    seen = torch.zeros(*block_counts.shape, block_counts.shape[-1], dtype=torch.bool, device=q.device)
    seen = seen.scatter(-1, block_indices.long(), listed)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    outs = []
    for head in range(q.shape[1]):
        one = slice(head, head + 1)
        mask = seen[:, one, block][..., block]
        outs.append(F.scaled_dot_product_attention(q[:, one], k[:, one], v[:, one], mask))
    return torch.cat(outs, 1).transpose(1, 2)


def guidance_step(
    latent: Tensor, cond: Tensor, uncond: Tensor, guidance_scale: float, sigma: float, sigma_next: float
) -> Tensor:
    return latent + (sigma_next - sigma) * (uncond + guidance_scale * (cond - uncond))


def unipc_step(
    sample: Tensor, cond: Tensor, uncond: Tensor, last_sample: Tensor, history: Any, corrector: Any, predictor: Any,
    guidance_scale: float, sigma: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # The update's linear combinations alone; diffusers' step() adds a linear solve and scalar tensors to them.
    x0 = sample - sigma * (uncond + guidance_scale * (cond - uncond))
    corrected = corrector[0] * last_sample + corrector[1] * x0 + corrector[2] * history[0]
    return predictor[0] * corrected + predictor[1] * x0 + predictor[2] * history[0], x0, corrected
