"""Oracle of block_sparse_attention, and its sample inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up
from .block_mean import blocks_of


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    grid: Sequence[int],
    tile: Sequence[int],
    kv_block_lens: Tensor | None,
    coarse: Tensor | None,
    gate: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Explicit softmax over the keys of the listed blocks, a block of queries at a time; plus ``gate · coarse``."""
    b, s, heads, head_dim = q.shape
    dtype = compute_dtype(q)
    out = torch.zeros((b, s, heads, head_dim), dtype=dtype, device=q.device)
    lse = torch.full((b, heads, s), -math.inf, dtype=dtype, device=q.device)
    block, place = blocks_of(grid, tile, q.device)
    blocks = block_counts.shape[-1]
    # The token at each place of each block; past an edge of the grid there is none.
    token = torch.full((blocks, math.prod(tile)), -1, device=q.device)
    token[block, place] = torch.arange(s, device=q.device)
    real = token >= 0
    if kv_block_lens is not None:
        real &= torch.arange(token.shape[1], device=q.device) < kv_block_lens[:, None]
    lists = block_indices.clamp(0, blocks - 1).long()
    counts = block_counts.clamp(0, lists.shape[-1])
    kv_head = (torch.arange(heads, device=q.device) // (heads // k.shape[2]))[:, None]
    for i, j in itertools.product(range(b), range(blocks)):
        longest = int(counts[i, :, j].max())
        if not longest:
            continue
        rows = token[j][token[j] >= 0]
        listed = lists[i, :, j, :longest]  # [heads, listed]
        seen = real[listed] & (torch.arange(longest, device=q.device) < counts[i, :, j, None])[..., None]
        keys, seen = token[listed].clamp(min=0).flatten(1), seen.flatten(1)  # [heads, keys]
        scores = torch.matmul(up(q[i, rows], dtype).transpose(0, 1), up(k[i, keys, kv_head], dtype).mT) * scale
        scores = scores.masked_fill(~seen[:, None], -math.inf)
        top = scores.amax(-1, keepdim=True)
        part = torch.exp(scores - torch.where(top == -math.inf, 0.0, top))
        total = part.sum(-1, keepdim=True)
        # Padding may hold anything, and 0 times NaN is NaN.
        values = up(v[i, keys, kv_head], dtype).masked_fill(~seen[..., None], 0.0)
        mixed = torch.matmul(part / torch.where(total == 0, 1.0, total), values)
        out[i, rows] = mixed.transpose(0, 1)
        lse[i, :, rows] = (top + torch.log(total)).squeeze(-1)
    if coarse is not None and gate is not None:
        out = out + up(gate, dtype) * up(coarse, dtype).transpose(1, 2)[:, block]
    return out.to(q.dtype), lse if return_lse else lse.new_empty((0,))


def summed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    grid: Sequence[int],
    tile: Sequence[int],
    kv_block_lens: Tensor | None,
    coarse: Tensor | None,
    gate: Tensor | None,
    scale: float,
    return_lse: bool,
) -> dict[int, Tensor]:
    """√terms Σ|a b| of the sums of products behind each element, as that of spacetime_attention."""
    lists = (block_indices, block_counts, grid, tile, kv_block_lens)
    mixed, _ = block_sparse_attention(q, k, v.abs(), *lists, None, None, scale, False)
    b, s, heads, head_dim = q.shape
    group = heads // k.shape[2]
    scores = q.new_zeros((b, heads, s))
    for i in range(b):
        for head in range(heads):
            keys = k[i, :, head // group].abs().T
            for rows in torch.arange(s, device=q.device).split(max(1, (1 << 24) // s)):
                scores[i, head, rows] = (q[i, rows, head].abs() @ keys).amax(-1)
    scores = scores * scale * head_dim**0.5
    out = {0: (2 * scores.transpose(1, 2).unsqueeze(-1) + s**0.5) * mixed}
    return out | ({1: scores} if return_lse else {})


def samples(dtype: torch.dtype, head_dim: int | None = None) -> Iterator[dict[str, Any]]:
    """Boxes with ragged edges, a flat sequence with short blocks, empty lists, grouped heads, packed views.

    ``head_dim``: that of all samples; None: each has its own.
    """
    g = generator()

    def dim(own: int) -> int:
        return own if head_dim is None else head_dim

    def lists(b: int, heads: int, blocks: int, listed: int, counts: Sequence[int]) -> dict[str, Tensor]:
        order = torch.rand(b, heads, blocks, blocks, generator=g).argsort(-1)[..., :listed]
        which = torch.randint(len(counts), (b, heads, blocks), generator=g)
        return {"block_indices": order.to(torch.int32), "block_counts": torch.tensor(counts, dtype=torch.int32)[which]}

    def sized(d: int, **rest: Any) -> dict[str, Any]:
        options = {"kv_block_lens": None, "coarse": None, "gate": None, "scale": d**-0.5, "return_lse": True}
        return {**options, **rest}

    # 2 x 2 x 2 boxes of (2, 4, 8), ragged on every axis; packed projection; some lists are empty.
    packed = randn(1, 3 * 5 * 9, 3, 2, dim(64), dtype=dtype, g=g)
    q, k, v = packed.unbind(2)
    yield {"q": q, "k": k, "v": v, **lists(1, 2, 8, 3, (3, 1, 0)), **sized(dim(64), grid=(3, 5, 9), tile=(2, 4, 8))}
    # A flat sequence; the last block is short, one in the middle has padding; grouped heads.
    q = randn(2, 150, 4, dim(16), dtype=dtype, g=g)
    k, v = (randn(2, 150, 2, dim(16), dtype=dtype, g=g) for _ in range(2))
    lens = torch.tensor([64, 37, 22], dtype=torch.int32)
    yield {"q": q, "k": k, "v": v, **lists(2, 4, 3, 3, (3, 2)),
           **sized(dim(16), grid=(1, 1, 150), tile=(1, 1, 64), kv_block_lens=lens)}  # fmt: skip
    # The same with a row of each block added to its tokens, weighed by token, head and channel, and by head alone.
    coarse = randn(2, 4, 3, dim(16), dtype=torch.float64 if dtype == torch.float64 else torch.float32, g=g)
    for shape in ((2, 150, 4, dim(16)), (1, 1, 4, 1)):
        gate = randn(*shape, dtype=dtype, g=g)
        flat = sized(dim(16), grid=(1, 1, 150), tile=(1, 1, 64), coarse=coarse, gate=gate, return_lse=False)
        yield {"q": q, "k": k, "v": v, **lists(2, 4, 3, 3, (2, 0)), **flat}
    # Boxes of 128 tokens with the middle one padded; logits to about ±60; a head dim that fills no block.
    q = randn(1, 3 * 4 * 8, 1, dim(40), dtype=dtype, g=g, scale=16.0)
    k, v = (randn(1, 3 * 4 * 8, 1, dim(40), dtype=dtype, g=g) for _ in range(2))
    yield {"q": q, "k": k, "v": v, **lists(1, 1, 3, 3, (3,)),
           **sized(dim(40), grid=(3, 4, 8), tile=(1, 8, 16), kv_block_lens=torch.tensor([128, 21, 128]))}  # fmt: skip
    # One token.
    q, k, v = (randn(1, 1, 1, dim(32), dtype=dtype, g=g) for _ in range(3))
    yield {"q": q, "k": k, "v": v, **lists(1, 1, 1, 1, (1,)),
           **sized(dim(32), grid=(1, 1, 1), tile=(4, 4, 4), return_lse=False)}  # fmt: skip
