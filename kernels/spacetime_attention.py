"""Dense attention over video and text tokens: one pass over the keys, fp32 softmax and accumulators.

Two variants of one algorithm: tiles moved by tensor descriptors (TMA, a rank-4 box over ``[B, S, heads, D]``, so
that no view is ever copied or permuted) and by pointers (everything else, and views a descriptor cannot address).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs.spacetime_attention import AttentionConfig, select
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.ops.spacetime_attention import refuse_precision, sees_all

from .boxes import stride_unit
from .launch import cdiv, on_device, refuse_float64
from .softmax import finish, soften
from .windowed_attention import windowed_attention
from .windowed_attention_backward import windowed_attention_backward

_OP = "spacetime_attention"

# Which text keys count (constexpr TEXT): all; the first kv_lens[b], text after the video; the same, text before it.
_ALL, _SUFFIX, _PREFIX = 0, 1, 2


# Sizes are not specialised: a new grid or text length never compiles again.
_SIZES = ["s", "tiles", "head_stop", "body_start", "body_stop", "text_len"]


@triton.jit
def _program(tiles, heads, group):
    """This program's query tile, batch (int64: it multiplies strides), head and KV head; tiles of a head adjoin."""
    pid = tl.program_id(0)
    head = pid // tiles % heads
    return pid % tiles, (pid // tiles // heads).to(tl.int64), head, head // group


@triton.jit
def _key_tiles(batch, lens_ptr, head_stop, body_start, body_stop, text_len, TEXT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Visible keys are ``[0, head_stop)``, valid text in front of the video, and ``[body_start, body_stop)``.

    Returns both stops, the whole tiles in each, and the range of ragged tails (0: of the head, 1: of the body),
    which are peeled: the main loop has no mask. Bounds are run-time values even where one range is empty: known
    ones let LLVM fuse the peeled tail into straight code, whose registers then spill.
    """
    if TEXT != 0:
        valid = tl.minimum(tl.maximum(tl.load(lens_ptr + batch), 0), text_len).to(tl.int32)
        if TEXT == 1:
            body_stop = body_stop - text_len + valid
        else:
            head_stop = valid
    first_tail = (head_stop % BLOCK_N == 0).to(tl.int32)
    last_tail = 1 + ((body_stop - body_start) % BLOCK_N != 0).to(tl.int32)
    return head_stop, body_stop, head_stop // BLOCK_N, (body_stop - body_start) // BLOCK_N, first_tail, last_tail


@triton.jit
def _tile_start(i, head_tiles, body_start, BLOCK_N: tl.constexpr):
    """First key of whole tile ``i``."""
    return i * BLOCK_N + tl.where(i < head_tiles, 0, body_start - head_tiles * BLOCK_N)


@triton.jit
def _tail(i, head_stop, head_tiles, body_start, body_stop, body_tiles, BLOCK_N: tl.constexpr):
    """First key of ragged tail ``i`` and how many keys it has."""
    start = tl.where(i == 0, head_tiles * BLOCK_N, body_start + body_tiles * BLOCK_N)
    return start, tl.where(i == 0, head_stop, body_stop) - start


@triton.jit(do_not_specialize=_SIZES)
def _spacetime_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lens_ptr,
    s, heads, group, tiles, head_stop, body_start, body_stop, text_len, scale, scale_log2,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    D: tl.constexpr, UNIT: tl.constexpr, TEXT: tl.constexpr, HAS_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, batch, head, kv_head = _program(tiles, heads, group)
    # Strides come in units of UNIT elements: a head dim such as 40 is no multiple of 16, which is all that Triton
    # looks at, and multiplying here tells it that vectors of UNIT are aligned.
    # Tile bases are int64 scalars; offsets within a tile fit int32 (the launcher checks).
    q_b, q_s, q_h = tl.cast(q_b, tl.int64) * UNIT, q_s * UNIT, tl.cast(q_h, tl.int64) * UNIT
    k_b, k_s, k_h = tl.cast(k_b, tl.int64) * UNIT, k_s * UNIT, tl.cast(k_h, tl.int64) * UNIT
    v_b, v_s, v_h = tl.cast(v_b, tl.int64) * UNIT, v_s * UNIT, tl.cast(v_h, tl.int64) * UNIT
    cols = tl.arange(0, BLOCK_D)
    keys = tl.arange(0, BLOCK_N)
    first = (tile * BLOCK_M).to(tl.int64)
    queries = tl.arange(0, BLOCK_M)
    row_mask = first + queries < s
    col_mask = cols < D
    q_tile = q_ptr + batch * q_b + first * q_s + head * q_h
    q = tl.load(q_tile + queries[:, None] * q_s + cols[None, :], mask=row_mask[:, None] & col_mask[None, :], other=0.0)
    k_head = k_ptr + batch * k_b + kv_head * k_h
    v_head = v_ptr + batch * v_b + kv_head * v_h
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    head_stop, body_stop, head_tiles, body_tiles, first_tail, last_tail = _key_tiles(
        batch, lens_ptr, head_stop, body_start, body_stop, text_len, TEXT, BLOCK_N
    )
    start = tl.cast(_tile_start(0, head_tiles, body_start, BLOCK_N), tl.int64)
    k_tile = k_head + start * k_s + keys[:, None] * k_s + cols[None, :]
    v_tile = v_head + start * v_s + keys[:, None] * v_s + cols[None, :]
    # "ieee" says that fp32 products are not rounded to TF32; fp16 and bf16 are not touched by it.
    # disable_licm: what it hoists here ends in registers that sm_80 and sm_120 do not have.
    for i in tl.range(0, head_tiles + body_tiles, disable_licm=True):
        if D == BLOCK_D:
            k = tl.load(k_tile)
        else:
            k = tl.load(k_tile, mask=col_mask[None, :], other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee")
        weights, acc, top, total = soften(scores, acc, top, total, scale_log2)
        if D == BLOCK_D:
            v = tl.load(v_tile)
        else:
            v = tl.load(v_tile, mask=col_mask[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        step = BLOCK_N + tl.where(i + 1 == head_tiles, body_start - head_tiles * BLOCK_N, 0).to(tl.int64)
        k_tile += step * k_s
        v_tile += step * v_s
    for i in tl.range(first_tail, last_tail, num_stages=1, disable_licm=True):
        n, count = _tail(i, head_stop, head_tiles, body_start, body_stop, body_tiles, BLOCK_N)
        seen = keys < count
        k_tile = k_head + n.to(tl.int64) * k_s + keys[:, None] * k_s + cols[None, :]
        v_tile = v_head + n.to(tl.int64) * v_s + keys[:, None] * v_s + cols[None, :]
        k = tl.load(k_tile, mask=seen[:, None] & col_mask[None, :], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(q, k.T, input_precision="ieee"), float("-inf"))
        weights, acc, top, total = soften(scores, acc, top, total, scale_log2)
        v = tl.load(v_tile, mask=seen[:, None] & col_mask[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    out, lse = finish(acc, top, total, scale)
    row = (batch * s + first) * heads + head
    o_tile = o_ptr + row * D + queries[:, None] * (heads * D) + cols[None, :]
    tl.store(o_tile, out.to(o_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])
    if HAS_LSE:
        tl.store(lse_ptr + (batch * heads + head) * s + first + queries, lse, mask=row_mask)


@triton.jit(do_not_specialize=_SIZES)
def _spacetime_attention_descriptor_fwd_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, lens_ptr,
    s, heads, group, tiles, head_stop, body_start, body_stop, text_len, scale, scale_log2,
    TEXT: tl.constexpr, HAS_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, batch, head, kv_head = _program(tiles, heads, group)
    keys = tl.arange(0, BLOCK_N)
    first = tile * BLOCK_M
    box = batch.to(tl.int32)
    # Boxes past S or D are filled with zeros on load and clipped on store.
    q = q_desc.load([box, first, head, 0]).reshape(BLOCK_M, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    head_stop, body_stop, head_tiles, body_tiles, first_tail, last_tail = _key_tiles(
        batch, lens_ptr, head_stop, body_start, body_stop, text_len, TEXT, BLOCK_N
    )
    for i in tl.range(0, head_tiles + body_tiles):
        n = _tile_start(i, head_tiles, body_start, BLOCK_N)
        k = k_desc.load([box, n, kv_head, 0]).reshape(BLOCK_N, BLOCK_D)
        weights, acc, top, total = soften(tl.dot(q, k.T), acc, top, total, scale_log2)
        v = v_desc.load([box, n, kv_head, 0]).reshape(BLOCK_N, BLOCK_D)
        acc = tl.dot(weights.to(v.dtype), v, acc)
    for i in tl.range(first_tail, last_tail, num_stages=1):
        n, count = _tail(i, head_stop, head_tiles, body_start, body_stop, body_tiles, BLOCK_N)
        k = k_desc.load([box, n, kv_head, 0]).reshape(BLOCK_N, BLOCK_D)
        scores = tl.where((keys < count)[None, :], tl.dot(q, k.T), float("-inf"))
        weights, acc, top, total = soften(scores, acc, top, total, scale_log2)
        v = v_desc.load([box, n, kv_head, 0]).reshape(BLOCK_N, BLOCK_D)
        if TEXT != 0:
            # Padding text may hold anything, and 0 times NaN is NaN; rows past S come as zeros.
            v = tl.where((keys < count)[:, None], v, 0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc)
    out, lse = finish(acc, top, total, scale)
    o_desc.store([box, first, head, 0], out.to(o_desc.dtype).reshape(1, BLOCK_M, 1, BLOCK_D))
    if HAS_LSE:
        queries = first + tl.arange(0, BLOCK_M)
        tl.store(lse_ptr + (batch * heads + head) * s + queries, lse, mask=queries < s)


def descriptors_can_address(*tensors: Tensor) -> bool:
    """Whether TMA can read these ``[B, S, heads, D]`` views: bases and strides in units of 16 bytes."""
    for x in tensors:
        strides = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
        if x.data_ptr() % 16 or any(stride <= 0 or stride * x.element_size() % 16 for stride in strides):
            return False
    return True


def _descriptor(x: Tensor, rows: int, config: AttentionConfig) -> TensorDescriptor:
    # The stride of a dimension of size 1 is arbitrary, and may be one that a descriptor refuses.
    strides = [stride if size > 1 else 16 for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, rows, 1, config.block_d])


def launch_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    kv_lens: Tensor | None,
    text_len: int,
    text_side: str,
    scale: float,
    config: AttentionConfig,
) -> None:
    """Launch over ``q [B, S, heads, D]`` into contiguous ``out`` and, unless None, ``lse [B, heads, S]``."""
    b, s, heads, head_dim = q.shape
    tiles = cdiv(s, config.block_m)
    grid = (tiles * b * heads,)
    text = _ALL if kv_lens is None else _PREFIX if text_side == "prefix" else _SUFFIX
    body_start = text_len if text == _PREFIX else 0
    shape = (s, heads, heads // k.shape[2], tiles, 0, body_start, s, text_len, scale, scale * math.log2(math.e))
    unit = stride_unit(q, k, v)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    with on_device(q):
        if config.descriptors:
            _spacetime_attention_descriptor_fwd_kernel[grid](
                _descriptor(q, config.block_m, config), _descriptor(k, config.block_n, config),
                _descriptor(v, config.block_n, config), _descriptor(out, config.block_m, config), lse, kv_lens,
                *shape, text, lse is not None, config.block_m, config.block_n, config.block_d, **options,
            )  # fmt: skip
        else:
            _spacetime_attention_fwd_kernel[grid](
                q, k, v, out, lse, kv_lens, *shape,
                *(stride // unit for x in (q, k, v) for stride in x.stride()[:3]),
                head_dim, unit, text, lse is not None,
                config.block_m, config.block_n, config.block_d, **options,
            )  # fmt: skip


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
    """``impl="triton"`` of the op."""
    refuse_precision("triton", precision)
    refuse_float64(_OP, q)
    if not sees_all(grid, window, causal_time):
        return windowed_attention(
            q, k, v, grid, window, stride, causal_time, text_len, text_side, kv_lens, scale, return_lse
        )
    b, s, heads, head_dim = q.shape
    out = q.new_empty((b, s, heads, head_dim))
    lse = q.new_empty((b, heads, s) if return_lse else (0,), dtype=torch.float32)
    aligned = descriptors_can_address(q, k, v, out)
    vectors = stride_unit(q, k, v) * q.element_size() >= 8
    config = select(arch_for(q), head_dim=head_dim, itemsize=q.element_size(), aligned=aligned, vectors=vectors)
    if max(x.stride(1) for x in (q, k, v)) * max(config.block_m, config.block_n) >= 2**31:
        raise UnsupportedError("spacetime_attention: impl 'triton' needs tokens less than 2^24 elements apart")
    if out.numel():
        launch_fwd(q, k, v, out, lse if return_lse else None, kv_lens, text_len, text_side, scale, config)
    return out, lse


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
    """``impl="triton"`` of the backward: one pair of kernels for dense and windowed; dense is the widest window."""
    refuse_precision("triton", precision)
    refuse_float64(_OP, q)
    out, lse = outputs
    do, dlse = grads
    where = (grid, window, stride, causal_time, text_len, text_side, kv_lens, scale)
    if not return_lse:
        # The forward was not asked for what the backward stands on (the public function asks).
        out, lse = spacetime_attention(q, k, v, *where, True, precision)
    return windowed_attention_backward(
        torch.zeros_like(out) if do is None else do,
        dlse.contiguous() if dlse is not None and return_lse else None,
        out, lse, q, k, v, *where, needs,
    )  # fmt: skip
