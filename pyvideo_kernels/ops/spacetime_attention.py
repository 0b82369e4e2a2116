"""Attention over the tokens of a video, and the merge of partial results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import schemas as schemas  # registers torch.ops.pyvideo
from ..errors import (
    DTypeError,
    UnsupportedError,
    bad_option,
    bad_shape,
    check_last_dim_contiguous,
    check_same_device,
    check_tensor,
    refuse_grad,
)
from ._checks import check_triple

_OP = "spacetime_attention"


def spacetime_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    window: Sequence[int] | Sequence[Sequence[int]] | None = None,
    stride: Sequence[int] = (1, 1, 1),
    causal_time: bool = False,
    text_len: int = 0,
    text_side: str = "suffix",
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    precision: str = "native",
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every token of a (T, H, W) grid, with text tokens in the same launch.

        out[i] = Σ_j exp(scale · q[i]·k[j] - lse[i]) v[j],   lse[i] = log Σ_j exp(scale · q[i]·k[j])

    over the keys j that query i sees: all of them, or a neighbourhood on the grid (docs/ops/spacetime_attention.md).

    Args:
        q: ``[B, S, heads, head_dim]``, bf16/fp16/fp32 (fp64 by the reference and SDPA), ``S = T*H*W + text_len``,
            video tokens in (T, H, W) order; last dim contiguous, any other strides (views of a packed QKV too).
        k, v: ``[B, S, kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``, and query head i uses
            KV head ``i // (heads // kv_heads)``.
        grid: tokens in (time, height, width).
        window: keys a video query sees along each axis, ``(wt, wh, ww)`` or one row per head ``[heads, 3]``;
            None: all (dense). A window larger than the grid means the whole axis.
        stride: queries that share one window along each axis, at most ``window``.
        causal_time: queries see frames up to their own.
        text_len: text tokens in the sequence; video queries see them, and they see everything.
        text_side: ``suffix`` (after the video) or ``prefix``.
        kv_lens: ``[B]`` int32/int64, how many of the text tokens are valid as keys (the first ones), clamped to
            ``[0, text_len]``; None: all.
        scale: multiplies the scores, positive; None: ``head_dim ** -0.5``.
        return_lse: also return ``lse``, natural logarithm, ``[B, heads, S]`` fp32 (fp64 for fp64 inputs).
        precision: ``native``: products of the inputs' dtype, fp32 accumulation. ``int8``: `quantize_qk`, then
            `int8_attention`: queries and keys in int8 with a scale a row, values as they are; no backward. ``fp8``: the
            same in e4m3, by `fp8_attention`.
        impl: ``auto``, ``reference``, ``triton``, ``cpu``, ``sdpa`` or ``flash`` (an installed FlashAttention-4 or -3);
            an explicit choice never falls back.
    Returns:
        ``[B, S, heads, head_dim]``, contiguous, dtype of ``q``; or ``(out, lse)``. A query with no key to see gives
        zeros and an ``lse`` of -inf.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the argument, what was expected, what came.
        UnsupportedError: a precision or an option that this implementation has not.
    Supports: sm_80+, gfx942+, CPU | fwd, bwd of q, k and v | fullgraph, CUDA graphs, dynamic S and grid. In Triton
        head_dim ≤ 256, ≤ 128 for the backward; ``flash`` is dense, ``sdpa`` too and, giving no lse, without a backward.
    Numerics: error ≤ 2 × eager's own against float64. Deterministic: yes.
    Source: Dao, "FlashAttention-2", arXiv:2307.08691; Hassani et al., "Generalized Neighborhood Attention",
        arXiv:2504.16922.
    """
    _check_tensors(q, k, v)
    grid, flat_window, stride = check_options(_OP, "q", q, grid, window, stride, text_len, text_side, kv_lens)
    if scale is None:
        scale = q.shape[3] ** -0.5
    if not 0 < scale < math.inf:
        bad_option(_OP, "scale", "a positive number", scale)
    if precision not in ("native", "int8", "fp8"):
        bad_option(_OP, "precision", "'native', 'int8' or 'fp8'", precision)
    if precision != "native":
        refuse_grad(f"{_OP} in precision {precision!r}", q=q, k=k, v=v)
        start = text_len if text_side == "prefix" else 0
        video = (start, start + grid[0] * grid[1] * grid[2])
        *codes, lse_shift = torch.ops.pyvideo.quantize_qk(q, k, *video, precision, impl)
        attend = torch.ops.pyvideo.int8_attention if precision == "int8" else torch.ops.pyvideo.fp8_attention
        out, lse = attend(
            *codes[:2], v, *codes[2:], lse_shift if return_lse else None, grid, flat_window, stride, causal_time,
            text_len, text_side, kv_lens, scale, return_lse, impl,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    # The backward stands on the outputs, lse among them.
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    out, lse = torch.ops.pyvideo.spacetime_attention(
        q, k, v, grid, flat_window, stride, causal_time, text_len, text_side, kv_lens, scale,
        return_lse or wants_grad, precision, impl,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from the partial results over each of them.

        lse = log Σ_p exp(lse_p),   out = Σ_p exp(lse_p - lse) out_p

    Args:
        outs: per part ``[B, S, heads, head_dim]``, one dtype.
        lses: per part ``[B, heads, S]``, natural logarithm; -inf where the part had no key to see.
    Returns:
        ``(out, lse)``: dtype of the parts, and of their ``lse``; summed in fp32 (fp64 for fp64 parts) and rounded
        once. Zeros and -inf where no part had a key. Differentiable.
    Raises:
        ShapeError, DTypeError, DeviceError, ValueOptionError: names the part, what was expected, what came.
    Source: Liu et al., "Ring Attention with Blockwise Transformers", arXiv:2310.01889.
    """
    op = "merge_attention"
    if len(outs) == 0 or len(outs) != len(lses):
        bad_option(op, "lses", f"one for each of the outs ({len(outs)}, at least 1)", len(lses))
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_tensor(op, f"outs[{index}]", out, ndim=4)
        check_tensor(op, f"lses[{index}]", lse, ndim=3)
        check_same_device(op, **{"outs[0]": outs[0], f"outs[{index}]": out, f"lses[{index}]": lse})
        if out.shape != outs[0].shape:
            bad_shape(op, f"outs[{index}]", f"{list(outs[0].shape)} like `outs[0]`", out)
        if out.dtype != outs[0].dtype:
            raise DTypeError(f"{op}: `outs[{index}]` must be {outs[0].dtype} like `outs[0]`; got {out.dtype}")
        if lse.shape != (out.shape[0], out.shape[2], out.shape[1]):
            bad_shape(op, f"lses[{index}]", f"[{out.shape[0]}, {out.shape[2]}, {out.shape[1]}]", lse)
    dtype = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    parts = torch.stack([lse.to(dtype) for lse in lses])
    lse = torch.logsumexp(parts, 0)
    # exp(-inf - -inf) is NaN: where no part saw a key, subtract 0 instead, and every weight is 0.
    weights = torch.exp(parts - torch.where(lse == -math.inf, 0.0, lse))
    total = torch.zeros(outs[0].shape, dtype=dtype, device=outs[0].device)
    for weight, out in zip(weights.unbind(0), outs, strict=True):
        # A part without keys may hold anything (0 * NaN is NaN).
        scaled = weight.transpose(1, 2).unsqueeze(-1)
        total = total + torch.where(scaled > 0, scaled * out.to(dtype), 0.0)
    return total.to(outs[0].dtype), lse.to(lses[0].dtype)


def spacetime_attention_sdpa(
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
    """``impl="sdpa"`` of the op: torch's ``scaled_dot_product_attention`` on transposed views."""
    refuse_precision("sdpa", precision)
    if not sees_all(grid, window, causal_time):
        raise UnsupportedError(f"{_OP}: impl 'sdpa' is dense; use impl='triton' or 'cpu' for a window or causal time")
    if return_lse:
        raise UnsupportedError(
            f"{_OP}: impl 'sdpa' gives no lse, which `return_lse` and gradients need; use impl='triton' or 'reference'"
        )
    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[2] != k.shape[2]}
    if kv_lens is not None:
        if q.device.type == "cuda":
            raise UnsupportedError(f"{_OP}: impl 'sdpa' would leave its flash kernels for `kv_lens`; use impl='triton'")
        if q.shape[1] == text_len:
            raise UnsupportedError(f"{_OP}: impl 'sdpa' cannot mask every key of a row; use impl='reference'")
        at = torch.arange(q.shape[1], device=q.device) - (0 if text_side == "prefix" else q.shape[1] - text_len)
        masked = (at >= kv_lens.clamp(min=0)[:, None]) & (at < text_len)
        options["attn_mask"] = ~masked[:, None, None, :]
    lse = q.new_empty((0,), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    if q.numel() == 0:
        return q.new_empty(q.shape), lse
    by_heads = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    if q.device.type == "cuda":
        from .attention_libraries import dense_sdpa

        out = dense_sdpa(*by_heads, scale)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(*by_heads, **options)
    # The flash kernels write [B, S, heads, D] order, so this copies only what another backend laid out otherwise.
    return out.transpose(1, 2).contiguous(), lse


def sees_all(grid: Sequence[int], window: Sequence[int] | None, causal_time: bool) -> bool:
    """Whether every query sees the whole grid: for no head is a window shorter than an axis, and time is not cut."""
    return not (causal_time and grid[0] > 1) and (window is None or all(n >= grid[i % 3] for i, n in enumerate(window)))


def refuse_precision(impl: str, precision: str) -> None:
    """For implementations of the native precision alone."""
    if precision != "native":
        raise UnsupportedError(f"{_OP}: precision {precision!r} is not built in impl {impl!r}; use precision='native'")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(_OP, name, tensor, ndim=4)
        if tensor.dtype != q.dtype:
            raise DTypeError(f"{_OP}: `{name}` must be {q.dtype} like `q`; got {tensor.dtype}")
    b, s, heads, head_dim = q.shape
    if heads < 1 or head_dim < 1:
        bad_shape(_OP, "q", "[B, S, heads, head_dim] with at least one head and one channel", q)
    if k.shape[0] != b or k.shape[1] != s or k.shape[3] != head_dim or k.shape[2] < 1 or heads % k.shape[2]:
        bad_shape(_OP, "k", f"[{b}, {s}, a divisor of {heads}, {head_dim}] for `q` {list(q.shape)}", k)
    if v.shape != k.shape:
        bad_shape(_OP, "v", f"{list(k.shape)} like `k`", v)
    check_last_dim_contiguous(_OP, q=q, k=k, v=v)
    check_same_device(_OP, q=q, k=k, v=v)


def check_options(
    op: str,
    name: str,
    q: Tensor,
    grid: Sequence[int],
    window: Any,
    stride: Sequence[int],
    text_len: int,
    text_side: str,
    kv_lens: Tensor | None,
) -> tuple[list[int], list[int] | None, list[int]]:
    """Grid, flat window and stride for the schema, checked against ``q`` (the argument ``name``) with the text."""
    sizes = check_triple(op, "grid", grid, 0)
    if not isinstance(text_len, (int, torch.SymInt)) or text_len < 0:
        bad_option(op, "text_len", "an integer of at least 0", text_len)
    if q.shape[1] != sizes[0] * sizes[1] * sizes[2] + text_len:
        bad_shape(op, name, f"[B, T*H*W + text_len, heads, head_dim] for grid {sizes} and text_len {text_len}", q)
    if text_side not in ("suffix", "prefix"):
        bad_option(op, "text_side", "'suffix' or 'prefix'", text_side)
    if kv_lens is not None:
        _check_kv_lens(op, kv_lens, q, text_len)
    sizes, strides, flat_window = check_windows(op, sizes, window, stride, q.shape[2])
    return sizes, flat_window, strides


def _check_kv_lens(op: str, kv_lens: Tensor, q: Tensor, text_len: int) -> None:
    if not isinstance(kv_lens, Tensor) or kv_lens.dtype not in (torch.int32, torch.int64):
        got = kv_lens.dtype if isinstance(kv_lens, Tensor) else type(kv_lens).__name__
        raise DTypeError(f"{op}: `kv_lens` must be an int32 or int64 tensor; got {got}")
    if kv_lens.shape != (q.shape[0],):
        bad_shape(op, "kv_lens", f"[{q.shape[0]}]", kv_lens)
    check_same_device(op, q=q, kv_lens=kv_lens)
    if text_len == 0:
        bad_option(op, "kv_lens", "None without text tokens (it counts the valid ones of text_len)", "a tensor")


def check_windows(
    op: str, grid: Sequence[int], window: Any, stride: Sequence[int], heads: int
) -> tuple[list[int], list[int], list[int] | None]:
    """Grid and stride as lists, and the window, or one for each head, as one list of triples (None: dense)."""
    sides, step = check_triple(op, "grid", grid, 0), check_triple(op, "stride", stride, 1)
    if window is None:
        if step != [1, 1, 1]:
            bad_option(op, "stride", "(1, 1, 1) without a window", tuple(step))
        return sides, step, None
    if isinstance(window, Tensor):
        window = window.tolist()
    if not isinstance(window, (list, tuple)):
        bad_option(op, "window", f"(wt, wh, ww) or one row for each of the {heads} heads", window)
    nested = len(window) > 0 and not isinstance(window[0], (int, torch.SymInt))
    rows = list(window) if nested else [window]
    if nested and len(rows) != heads:
        bad_option(op, "window", f"(wt, wh, ww) or one row for each of the {heads} heads", window)
    triples = [check_triple(op, "window", row, 1) for row in rows]
    for row in triples:
        if any(s > w for s, w in zip(step, row, strict=True)):
            bad_option(op, "stride", f"at most the window {tuple(row)} along each axis", tuple(step))
    return sides, step, [n for row in triples for n in row]
