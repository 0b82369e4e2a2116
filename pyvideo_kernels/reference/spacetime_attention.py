"""Oracle of spacetime_attention, windows and causal time included, and its sample inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute_dtype, generator, randn, up

# Scores held at a time: 64 MiB in float32, whatever the number of tokens.
_MAX_SCORES = 1 << 24


def axis_window(
    length: int, window: int, stride: int, causal: bool, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """First and last key index that each of ``length`` positions sees along one axis (the formula of the docs)."""
    i = torch.arange(length, device=device)
    k = min(window, length)
    if causal:
        leader = torch.clamp((i // stride) * stride + stride - 1, max=length - 1)
        return torch.clamp(leader - k + 1, min=0), i
    leader = torch.clamp((i // stride) * stride + stride // 2, max=length - 1)
    centre = torch.clamp(leader, k // 2, length - 1 - (k // 2 + k % 2 - 1))
    return centre - k // 2, centre + k // 2 + k % 2 - 1


class _Visibility:
    """Which keys a run of queries sees; ``None`` from :meth:`rows` means all of them."""

    def __init__(
        self,
        grid: Sequence[int],
        window: Sequence[int] | None,
        stride: Sequence[int],
        causal_time: bool,
        text_len: int,
        text_side: str,
        device: torch.device,
    ) -> None:
        t, h, w = grid
        video = t * h * w
        self.tokens = video + text_len
        self.text_start = 0 if text_side == "prefix" else video
        self.text_stop = self.text_start + text_len
        self.masked = window is not None or causal_time
        at = torch.arange(self.tokens, device=device)
        self.is_text = (at >= self.text_start) & (at < self.text_stop)
        self.text_position = at - self.text_start
        if not self.masked:
            return
        cell = torch.where(self.is_text, 0, at - (text_len if text_side == "prefix" else 0))
        self.coordinates = (cell // (h * w), cell // w % h, cell % w) if video else (cell, cell, cell)
        rows = torch.tensor([max(n, 1) for n in grid] if window is None else list(window)).view(-1, 3).tolist()
        self.bounds = [
            [
                axis_window(max(grid[axis], 1), row[axis], stride[axis], causal_time and axis == 0, device)
                for axis in range(3)
            ]
            for row in rows
        ]

    def rows(self, start: int, stop: int, valid_text: Tensor | None) -> Tensor | None:
        """``[heads or 1, stop - start, tokens]``, true where the query sees the key."""
        mask: Tensor | None = None
        if self.masked:
            per_head = []
            for bounds in self.bounds:
                seen = torch.ones(stop - start, self.tokens, dtype=torch.bool, device=self.is_text.device)
                for coordinate, (first, last) in zip(self.coordinates, bounds, strict=True):
                    query = coordinate[start:stop]
                    seen &= (coordinate >= first[query][:, None]) & (coordinate <= last[query][:, None])
                per_head.append(seen | self.is_text | self.is_text[start:stop, None])
            mask = torch.stack(per_head)
        if valid_text is not None:
            valid = ~self.is_text | (self.text_position < valid_text)
            mask = valid.expand(1, stop - start, -1) if mask is None else mask & valid
        return mask


def spacetime_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window: Sequence[int] | None,
    stride: Sequence[int],
    causal_time: bool,
    text_len: int,
    text_side: str,
    kv_lens: Tensor | None,
    scale: float,
    return_lse: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Explicit softmax over the visible keys, a bounded number of query rows at a time."""
    b, s, heads, head_dim = q.shape
    groups = k.shape[2]
    dtype = compute_dtype(q)
    out = q.new_empty((b, s, heads, head_dim))
    lse = q.new_empty((b, heads, s) if return_lse else (0,), dtype=dtype)
    visible = _Visibility(grid, window, stride, causal_time, text_len, text_side, q.device)
    rows = max(1, _MAX_SCORES // max(1, heads * s))
    for batch in range(b):
        keys = up(k[batch], dtype).permute(1, 2, 0).unsqueeze(1)  # [groups, 1, D, S]
        values = up(v[batch], dtype).permute(1, 0, 2).unsqueeze(1)  # [groups, 1, S, D]
        for start in range(0, s, rows):
            stop = min(s, start + rows)
            queries = up(q[batch, start:stop], dtype).unflatten(1, (groups, heads // groups)).permute(1, 2, 0, 3)
            scores = torch.matmul(queries, keys).flatten(0, 1) * scale  # [heads, rows, S]
            mask = visible.rows(start, stop, None if kv_lens is None else kv_lens[batch])
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            top = scores.amax(-1, keepdim=True)
            # A row with nothing to see: exp(-inf - 0) = 0 everywhere, then 0 / 1.
            weights = torch.exp(scores - torch.where(top == -math.inf, 0.0, top))
            total = weights.sum(-1, keepdim=True)
            weights = weights / torch.where(total == 0, 1.0, total)
            mixed = torch.matmul(weights.unflatten(0, (groups, heads // groups)), values).flatten(0, 1)
            out[batch, start:stop] = mixed.transpose(0, 1).to(q.dtype)
            if return_lse:
                lse[batch, :, start:stop] = (top + torch.log(total)).squeeze(-1)
    return out, lse


def summed(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], window: Sequence[int] | None, stride: Sequence[int],
    causal_time: bool, text_len: int, text_side: str, kv_lens: Tensor | None, scale: float, return_lse: bool,
    precision: str,
) -> dict[int, Tensor]:  # fmt: skip
    """√terms Σ|a b| of the sums of products behind each element.

    A score is off by as much as its own sum, the log of a sum of exponentials by no more than the scores are, and the
    weights by twice that; then there is the sum over the keys.
    """
    rest = (grid, window, stride, causal_time, text_len, text_side, kv_lens, scale, return_lse, precision)
    mixed, _ = spacetime_attention(q, k, v.abs(), *rest)
    b, s, heads, head_dim = q.shape
    keys = k.abs().repeat_interleave(heads // k.shape[2], 2).permute(0, 2, 3, 1)
    rows = max(1, _MAX_SCORES // max(1, b * heads * s))
    largest = [
        torch.matmul(part.abs().transpose(1, 2), keys).amax(-1) for part in q.split(rows, 1) if s
    ]  # fmt: skip
    scores = torch.cat(largest, -1) * scale * head_dim**0.5 if largest else q.new_zeros((b, heads, s))
    out = {0: (2 * scores.transpose(1, 2).unsqueeze(-1) + s**0.5) * mixed}
    return out | ({1: scores} if return_lse else {})


def spacetime_attention_backward(
    grads: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window: Sequence[int] | None,
    stride: Sequence[int],
    causal_time: bool,
    text_len: int,
    text_side: str,
    kv_lens: Tensor | None,
    scale: float,
    return_lse: bool,
    precision: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (q, k, v), those in ``needs``, from explicit weights, a bounded number of query rows at a time.

        P = exp(scale · q·k - lse),   ds = P ∘ (do·v - Σ do ∘ out + dlse)
        dq = scale · ds·k,   dk = scale · dsᵀ·q,   dv = Pᵀ·do

    ``outputs``: the forward's ``(out, lse)``, taken as they were rounded; without ``return_lse`` both are made again.
    """
    b, s, heads, _ = q.shape
    groups = k.shape[2]
    dtype = compute_dtype(q)
    do, dlse = grads
    out, lse = outputs
    if not return_lse:
        rest = (grid, window, stride, causal_time, text_len, text_side, kv_lens, scale, True, precision)
        out, lse = spacetime_attention(q, k, v, *rest)
        dlse = None
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q, k, v))
    visible = _Visibility(grid, window, stride, causal_time, text_len, text_side, q.device)
    rows = max(1, _MAX_SCORES // max(1, heads * s))

    def split(x: Tensor) -> Tensor:
        """``[rows, heads, D]`` as ``[groups, heads of a group, rows, D]``."""
        return up(x, dtype).unflatten(1, (groups, heads // groups)).permute(1, 2, 0, 3)

    for batch in range(b):
        keys, values = (up(x[batch], dtype).transpose(0, 1).unsqueeze(1) for x in (k, v))  # [groups, 1, S, D]
        for start in range(0, s, rows):
            stop = min(s, start + rows)
            queries = split(q[batch, start:stop])
            scores = torch.matmul(queries, keys.mT) * scale
            mask = visible.rows(start, stop, None if kv_lens is None else kv_lens[batch])
            if mask is not None:
                mask = mask.expand(heads, -1, -1).unflatten(0, (groups, heads // groups))
                scores = scores.masked_fill(~mask, -math.inf)
            base = up(lse[batch, :, start:stop], dtype).unflatten(0, (groups, -1)).unsqueeze(-1)
            # A row with nothing to see: exp(-inf - 0) = 0 everywhere.
            weights = torch.exp(scores - torch.where(base == -math.inf, 0.0, base))
            dscores = torch.zeros_like(weights)
            if do is not None:
                d_out = split(do[batch, start:stop])
                dv[batch] += torch.matmul(weights.mT, d_out).sum(1).transpose(0, 1)
                delta = (d_out * split(out[batch, start:stop])).sum(-1, keepdim=True)
                dscores = torch.matmul(d_out, values.mT) - delta
            if dlse is not None:
                dscores = dscores + up(dlse[batch, :, start:stop], dtype).unflatten(0, (groups, -1)).unsqueeze(-1)
            dscores = weights * dscores * scale
            dq[batch, start:stop] = torch.matmul(dscores, keys).flatten(0, 1).transpose(0, 1)
            dk[batch] += torch.matmul(dscores.mT, queries).sum(1).transpose(0, 1)
    return [x.to(q.dtype) for x, need in zip((dq, dk, dv), needs, strict=True) if need]


def gradient_samples(dtype: torch.dtype, head_dim: int | None = None) -> Iterator[dict[str, Any]]:
    """The samples whose gradient is not zero by nature: with a single key there is no choice to learn."""
    for kwargs in samples(dtype, head_dim):
        if kwargs["q"].shape[1] > 1:
            yield kwargs


def samples(dtype: torch.dtype, head_dim: int | None = None) -> Iterator[dict[str, Any]]:
    """Ragged grids, one token, odd head dims, grouped heads, packed and permuted views, text on both sides.

    ``head_dim``: that of all samples; None: each has its own.
    """
    g = generator()

    def dim(own: int) -> int:
        return own if head_dim is None else head_dim

    dense: dict[str, Any] = {
        "window": None, "stride": (1, 1, 1), "causal_time": False, "text_len": 0, "text_side": "suffix",
        "kv_lens": None, "return_lse": True, "precision": "native",
    }  # fmt: skip

    def separate(b: int, s: int, heads: int, groups: int, d: int, scale: float = 1.0) -> dict[str, Any]:
        q = randn(b, s, heads, d, dtype=dtype, g=g, scale=scale)
        k, v = (randn(b, s, groups, d, dtype=dtype, g=g) for _ in range(2))
        return {"q": q, "k": k, "v": v, "scale": d**-0.5}

    yield {**dense, **separate(1, 1, 1, 1, dim(64)), "grid": (1, 1, 1), "return_lse": False}
    # A packed [B, S, 3, heads, D] projection with unused columns: rows far apart, unequal strides.
    packed = randn(2, 105, 4, 3, dim(40), dtype=dtype, g=g)
    q, k, v = packed[:, :, 0], packed[:, :, 1], packed[:, :, 3]
    yield {**dense, "q": q, "k": k, "v": v, "scale": dim(40) ** -0.5, "grid": (3, 5, 7)}
    # Grouped heads, text after the video with one row that has none; and before it.
    lens = torch.tensor([5, 0], dtype=torch.int32)
    yield {**dense, **separate(2, 39, 4, 2, dim(64)), "grid": (1, 4, 8), "text_len": 7, "kv_lens": lens}
    text = {"text_len": 37, "text_side": "prefix", "kv_lens": torch.tensor([33])}
    yield {**dense, **separate(1, 127, 1, 1, dim(128)), "grid": (2, 5, 9), **text}
    # Heads outermost in memory (a transposed view), and logits to about ±60.
    q, k, v = (randn(1, 3, 20, dim(64), dtype=dtype, g=g).transpose(1, 2) for _ in range(3))
    yield {**dense, "q": q, "k": k, "v": v, "scale": 0.1, "grid": (5, 2, 2), "return_lse": False}
    wide = separate(1, 33, 1, 1, dim(64), scale=16.0)
    yield {**dense, **wide, "grid": (3, 1, 11)}
    # Text alone, none of it valid in one row of the batch: zeros and -inf.
    nothing = {"text_len": 23, "kv_lens": torch.tensor([0, 17])}
    yield {**dense, **separate(2, 23, 1, 1, dim(64), scale=8.0), "grid": (0, 0, 0), **nothing}
    # Windows: a row for each of four grouped heads, strides, text before; and the end of a causal stream.
    rows = (2, 3, 2, 1, 3, 5, 3, 2, 4, 2, 2, 2)
    text = {"text_len": 3, "text_side": "prefix", "kv_lens": torch.tensor([2, 0], dtype=torch.int32)}
    shape = separate(2, 3 * 3 * 5 + 3, 4, 2, dim(64))
    yield {**dense, **shape, **text, "grid": (3, 3, 5), "window": rows, "stride": (1, 2, 2)}
    causal = {"window": (3, 2, 3), "stride": (2, 1, 3), "causal_time": True, "text_len": 2}
    yield {**dense, **separate(1, 5 * 2 * 4 + 2, 1, 1, dim(128)), **causal, "grid": (5, 2, 4)}
