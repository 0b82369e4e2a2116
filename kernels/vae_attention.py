"""One wide head over the pixels of a frame, or of a frame and those before it: flash attention with D in pieces.

D (384, 512, 1024) is no power of two and too wide for one tile: two powers of two side by side (384 = 256 + 128) hold
queries, keys, values and results. Beyond 512 the results are shared out over programs, each of which computes the
scores anew from pieces of the queries. Which keys count is a range of rows: there is no mask but that of its tail.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs.vae_attention import VaeAttentionConfig, select
from pyvideo_kernels.errors import UnsupportedError

from .launch import cdiv, on_device, refuse_float64

_OP = "vae_attention"


@triton.jit
def _rows(source, box, frame, first, base, stride, col, D: tl.constexpr, WHOLE: tl.constexpr,
          DESCRIPTORS: tl.constexpr, N: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """``N`` rows of keys or values from row ``first``, all of which exist; columns from ``col``, zeros past ``D``.

    ``WHOLE``: none is past it.
    """
    columns = col + tl.arange(0, W)
    if DESCRIPTORS:
        rows = source.load([box, frame, first, col]).reshape(N, W)
    else:
        at = source + base + tl.cast(first, tl.int64) * stride + tl.arange(0, N)[:, None] * stride + columns[None, :]
        if WHOLE:
            rows = tl.load(at)
        else:
            rows = tl.load(at, mask=columns[None, :] < D, other=0.0)
    return rows


@triton.jit
def _tail_rows(source, box, frame, first, count, base, stride, col, D: tl.constexpr, DESCRIPTORS: tl.constexpr,
               N: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """The same for the last ``count`` rows: zeros after them, whatever is there (0 times NaN is NaN)."""
    n = tl.arange(0, N)
    if DESCRIPTORS:
        rows = source.load([box, frame, first, col]).reshape(N, W)
        rows = tl.where((n < count)[:, None], rows, 0.0)
    else:
        columns = col + tl.arange(0, W)
        at = source + base + tl.cast(first, tl.int64) * stride + n[:, None] * stride + columns[None, :]
        rows = tl.load(at, mask=(n < count)[:, None] & (columns < D)[None, :], other=0.0)
    return rows


@triton.jit
def _query(q_tile, stride, row_mask, col, D: tl.constexpr, M: tl.constexpr, W: tl.constexpr):
    columns = col + tl.arange(0, W)
    at = q_tile + tl.arange(0, M)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=row_mask[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _weigh(scores, top, total, scale_log2):
    """Fold a tile of raw scores into the running maximum and sum; returns weights, decay, maximum, sum.

    As `softmax.soften`, for results in two tiles. Every row sees a key, so the maximum is finite, or NaN for good.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores * scale_log2 - (new_top * scale_log2)[:, None])
    decay = tl.exp2((top - new_top) * scale_log2)
    return weights, decay[:, None], new_top, total * decay + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["s", "frames", "tiles"])
def _vae_attention_fwd_kernel(
    q_ptr, k, k2, v, v2, o_ptr,
    s, frames, tiles, scale, scale_log2,
    q_b, q_t, q_s, k_b, k_t, k_s, v_b, v_t, v_s,
    D: tl.constexpr, CAUSAL: tl.constexpr, DESCRIPTORS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, W2: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = W + W2
    SHARES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    LAST: tl.constexpr = (SHARES - 1) * COLUMNS
    pid = tl.program_id(0)
    # Tiles of a frame adjoin, and read the same keys. Causal: the frames with most of them begin.
    tile, pid = pid % tiles, pid // tiles
    col = pid % SHARES * COLUMNS
    pid = pid // SHARES
    t, b = (pid % frames).to(tl.int64), (pid // frames).to(tl.int64)
    if CAUSAL:
        t = frames - 1 - t
    # Tile bases are int64 scalars; offsets within a tile fit int32 (the launcher checks).
    first = (tile * M).to(tl.int64)
    row_mask = first + tl.arange(0, M) < s
    q_tile = q_ptr + b * q_b + t * q_t + first * q_s
    # Causal: one run of keys, which the launcher shows as one frame.
    k_base, v_base, box, frame, keys = b * k_b, b * v_b, b.to(tl.int32), 0, s
    if CAUSAL:
        keys = ((t + 1) * s).to(tl.int32)
    else:
        k_base, v_base, frame = k_base + t * k_t, v_base + t * v_t, t.to(tl.int32)
    acc = tl.zeros([M, W], tl.float32)
    acc2 = acc
    if W2 > 0:
        acc2 = tl.zeros([M, W2], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    q = tl.zeros([1, 1], q_ptr.dtype.element_ty)
    q2 = q
    if STEP == 0:
        q = _query(q_tile, q_s, row_mask, 0, D, M, W)
        if W2 > 0:
            q2 = _query(q_tile, q_s, row_mask, W, D, M, W2)
    for n in tl.range(0, keys // N * N, N, disable_licm=not DESCRIPTORS):
        if STEP == 0:
            rows = _rows(k, box, frame, n, k_base, k_s, 0, D, W <= D, DESCRIPTORS, N, W)
            scores = tl.dot(q, rows.T, input_precision="ieee")
            if W2 > 0:
                rows2 = _rows(k2, box, frame, n, k_base, k_s, W, D, COLUMNS <= D, DESCRIPTORS, N, W2)
                scores = tl.dot(q2, rows2.T, scores, input_precision="ieee")
        else:
            scores = tl.zeros([M, N], tl.float32)
            for c in tl.range(0, D, STEP):
                part = _query(q_tile, q_s, row_mask, c, D, M, STEP)
                rows = _rows(k, box, frame, n, k_base, k_s, c, D, D % STEP == 0, DESCRIPTORS, N, STEP)
                scores = tl.dot(part, rows.T, scores, input_precision="ieee")
        weights, decay, top, total = _weigh(scores, top, total, scale_log2)
        values = _rows(v, box, frame, n, v_base, v_s, col, D, LAST + W <= D, DESCRIPTORS, N, W)
        weights = weights.to(values.dtype)
        acc = tl.dot(weights, values, acc * decay, input_precision="ieee")
        if W2 > 0:
            values2 = _rows(v2, box, frame, n, v_base, v_s, col + W, D, LAST + COLUMNS <= D, DESCRIPTORS, N, W2)
            acc2 = tl.dot(weights, values2, acc2 * decay, input_precision="ieee")
    # A run-time range of nought or one: straight code after the loop is fused with it, and its registers spill.
    for n in tl.range(keys // N * N, keys, N, num_stages=1, disable_licm=True):
        count = keys - n
        if STEP == 0:
            rows = _tail_rows(k, box, frame, n, count, k_base, k_s, 0, D, DESCRIPTORS, N, W)
            scores = tl.dot(q, rows.T, input_precision="ieee")
            if W2 > 0:
                rows2 = _tail_rows(k2, box, frame, n, count, k_base, k_s, W, D, DESCRIPTORS, N, W2)
                scores = tl.dot(q2, rows2.T, scores, input_precision="ieee")
        else:
            scores = tl.zeros([M, N], tl.float32)
            for c in tl.range(0, D, STEP, num_stages=1):
                part = _query(q_tile, q_s, row_mask, c, D, M, STEP)
                rows = _tail_rows(k, box, frame, n, count, k_base, k_s, c, D, DESCRIPTORS, N, STEP)
                scores = tl.dot(part, rows.T, scores, input_precision="ieee")
        scores = tl.where((tl.arange(0, N) < count)[None, :], scores, float("-inf"))
        weights, decay, top, total = _weigh(scores, top, total, scale_log2)
        values = _tail_rows(v, box, frame, n, count, v_base, v_s, col, D, DESCRIPTORS, N, W)
        weights = weights.to(values.dtype)
        acc = tl.dot(weights, values, acc * decay, input_precision="ieee")
        if W2 > 0:
            values2 = _tail_rows(v2, box, frame, n, count, v_base, v_s, col + W, D, DESCRIPTORS, N, W2)
            acc2 = tl.dot(weights, values2, acc2 * decay, input_precision="ieee")
    o_tile = o_ptr + ((b * frames + t) * s + first) * D + tl.arange(0, M)[:, None] * D
    columns = col + tl.arange(0, W)
    inverse = 1 / total[:, None]
    mask = row_mask[:, None] & (columns < D)[None, :]
    tl.store(o_tile + columns[None, :], (acc * inverse).to(o_ptr.dtype.element_ty), mask=mask)
    if W2 > 0:
        columns2 = col + W + tl.arange(0, W2)
        mask2 = row_mask[:, None] & (columns2 < D)[None, :]
        tl.store(o_tile + columns2[None, :], (acc2 * inverse).to(o_ptr.dtype.element_ty), mask=mask2)


def descriptors_can_address(*tensors: Tensor) -> bool:
    """Whether TMA can read these ``[B, T, S, D]`` views: bases and strides in units of 16 bytes."""
    for x in tensors:
        strides = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
        if x.data_ptr() % 16 or any(stride <= 0 or stride * x.element_size() % 16 for stride in strides):
            return False
    return True


def _descriptor(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    # The stride of a dimension of size 1 is arbitrary, and may be one that a descriptor refuses.
    strides = [stride if size > 1 else 16 for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, width])


def one_run(x: Tensor) -> Tensor:
    """``[B, 1, T*S, D]``: a view where frames follow each other in memory, a copy elsewhere."""
    return x.flatten(1, 2).unsqueeze(1)


def launch_fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, causal: bool, scale: float, config: VaeAttentionConfig
) -> None:
    """Launch over ``q [B, T, S, D]`` and keys and values of that shape, or ``[B, 1, T*S, D]`` if causal."""
    b, frames, s, d = q.shape
    tiles = cdiv(s, config.block_m)
    keys, values = [(k, k), (v, v)]
    if config.descriptors:
        n, width, width2 = config.block_n, config.width, config.width2
        keys = tuple(_descriptor(k, n, w) for w in (config.step or width, width2 or width))
        values = tuple(_descriptor(v, n, w) for w in (width, width2 or width))
    with on_device(q):
        _vae_attention_fwd_kernel[(tiles * cdiv(d, config.columns) * frames * b,)](
            q, *keys, *values, out,
            s, frames, tiles, scale, scale * math.log2(math.e),
            *(stride for x in (q, k, v) for stride in x.stride()[:3]),
            d, causal, config.descriptors,
            config.block_m, config.block_n, config.width, config.width2, config.step,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def vae_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """``impl="triton"`` of the op."""
    refuse_float64(_OP, q)
    out = q.new_empty(q.shape)
    causal = causal and q.shape[1] > 1
    if causal:
        k, v = one_run(k), one_run(v)
    aligned = descriptors_can_address(k, v)
    config = select(arch_for(q), d=q.shape[3], itemsize=q.element_size(), aligned=aligned)
    if max(x.stride(2) for x in (q, k, v)) * max(config.block_m, config.block_n) >= 2**31:
        raise UnsupportedError(f"{_OP}: impl 'triton' needs tokens less than 2^24 elements apart; copy the view")
    if k.shape[2] >= 2**31:
        raise UnsupportedError(f"{_OP}: impl 'triton' has fewer than 2^31 keys; got {k.shape[2]}")
    if out.numel():
        launch_fwd(q, k, v, out, causal, scale, config)
    return out
