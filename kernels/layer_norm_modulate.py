"""LayerNorm + affine + modulation: one read of x, one write of y, fp32 inside; and its backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for, row
from pyvideo_kernels.reference import reduce_to

from .launch import bs_strides, cdiv, on_device, refuse_float64, unit_stride


@triton.jit
def norm_modulate_rows(
    x, row_b, row_s, cols, mask, col_mask, d, eps,
    scale_ptr, scale_b, scale_s, shift_ptr, shift_b, shift_s, weight_ptr, bias_ptr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Normalise and modulate fp32 rows ``x [rows, block_d]``; columns past d must be zero in ``x``."""
    mean = tl.sum(x, 1) / d
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / d + eps)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + cols[None, :], mask=col_mask[None, :], other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + cols[None, :], mask=col_mask[None, :], other=0.0).to(tl.float32)
    if HAS_SCALE:
        at = scale_ptr + (row_b * scale_b + row_s * scale_s)[:, None] + cols[None, :]
        y = y * (1.0 + tl.load(at, mask=mask, other=0.0).to(tl.float32))
    if HAS_SHIFT:
        at = shift_ptr + (row_b * shift_b + row_s * shift_s)[:, None] + cols[None, :]
        y = y + tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _layer_norm_modulate_fwd_kernel(
    x_ptr, y_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr,
    n_rows, s, d, eps,
    x_b, x_s, scale_b, scale_s, shift_b, shift_s,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # int64: a row index times a stride passes 2^31 elements on long clips.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_b, row_s = rows // s, rows % s
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < d
    mask = (rows < n_rows)[:, None] & col_mask[None, :]
    x = tl.load(x_ptr + (row_b * x_b + row_s * x_s)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    y = norm_modulate_rows(
        x, row_b, row_s, cols, mask, col_mask, d, eps,
        scale_ptr, scale_b, scale_s, shift_ptr, shift_b, shift_s, weight_ptr, bias_ptr,
        HAS_SCALE, HAS_SHIFT, HAS_WEIGHT, HAS_BIAS,
    )  # fmt: skip
    tl.store(y_ptr + rows[:, None] * d + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def launch_fwd(
    x: Tensor,
    y: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    config: row.RowConfig,
) -> None:
    """Launch over ``x [B, S, D]`` into contiguous ``y``."""
    b, s, d = x.shape
    n_rows = b * s
    if n_rows == 0:
        return
    with on_device(x):
        _layer_norm_modulate_fwd_kernel[(cdiv(n_rows, config.rows),)](
            x, y, scale, shift, weight, bias,
            n_rows, s, d, eps,
            x.stride(0), x.stride(1), *bs_strides(scale), *bs_strides(shift),
            scale is not None, shift is not None, weight is not None, bias is not None,
            config.rows, config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``impl="triton"`` of the op."""
    refuse_float64("layer_norm_modulate", x, scale, shift, weight, bias)
    config = row.select(arch_for(x), op="layer_norm_modulate", width=x.shape[-1], itemsize=x.element_size())
    y = x.new_empty(x.shape)
    launch_fwd(x, y, scale, shift, weight, bias, eps, config)
    return y


# Backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _layer_norm_modulate_dx_kernel(
    dy_ptr, x_ptr, dx_ptr, mean_ptr, rstd_ptr, scale_ptr, weight_ptr,
    n_rows, s, d, eps,
    dy_b, dy_s, x_b, x_s, scale_b, scale_s,
    HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr, WRITE_DX: tl.constexpr, WRITE_STATS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Statistics of each row, and dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_b, row_s = rows // s, rows % s
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (cols < d)[None, :]
    x = tl.load(x_ptr + (row_b * x_b + row_s * x_s)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / d
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / d + eps)
    if WRITE_STATS:
        tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
        tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    if WRITE_DX:
        xhat = centred * rstd[:, None]
        at = dy_ptr + (row_b * dy_b + row_s * dy_s)[:, None] + cols[None, :]
        g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if HAS_SCALE:
            at = scale_ptr + (row_b * scale_b + row_s * scale_s)[:, None] + cols[None, :]
            g = g * (1.0 + tl.load(at, mask=mask, other=0.0).to(tl.float32))
        if HAS_WEIGHT:
            g = g * tl.load(weight_ptr + cols[None, :], mask=(cols < d)[None, :], other=0.0).to(tl.float32)
        dx = (g - (tl.sum(g, 1) / d)[:, None] - xhat * (tl.sum(g * xhat, 1) / d)[:, None]) * rstd[:, None]
        tl.store(dx_ptr + rows[:, None] * d + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_modulate_sums_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, weight_ptr, bias_ptr,
    dscale_ptr, dshift_ptr, dweight_ptr, dbias_ptr,
    s, d, chunks,
    dy_b, dy_s, x_b, x_s, scale_b, scale_s,
    HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    DSCALE: tl.constexpr, DSHIFT: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr, SHIFT_PER_TOKEN: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of modulation and affine parameters: one fp32 sum per chunk of tokens, or one per token."""
    pid = tl.program_id(0)
    b, chunk = (pid // chunks).to(tl.int64), pid % chunks
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_mask = (cols < d)[None, :]
    weight = tl.full((1, BLOCK_D), 1.0, tl.float32)
    bias = tl.zeros((1, BLOCK_D), tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols[None, :], mask=col_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols[None, :], mask=col_mask, other=0.0).to(tl.float32)
    dscale = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dshift = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, CHUNK, ROWS):
        tokens = chunk.to(tl.int64) * CHUNK + start + tl.arange(0, ROWS)
        inside = tokens < s
        mask = inside[:, None] & col_mask
        at = dy_ptr + b * dy_b + tokens[:, None] * dy_s + cols[None, :]
        dy = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + b * x_b + tokens[:, None] * x_s + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + b * s + tokens, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + b * s + tokens, mask=inside, other=0.0)
        xhat = (x - mean[:, None]) * rstd[:, None]
        out = (b * s + tokens)[:, None] * d + cols[None, :]
        if DSHIFT:
            if SHIFT_PER_TOKEN:
                tl.store(dshift_ptr + out, dy, mask=mask)
            else:
                dshift += dy
        if DSCALE:
            if SCALE_PER_TOKEN:
                tl.store(dscale_ptr + out, dy * (xhat * weight + bias), mask=mask)
            else:
                dscale += dy * (xhat * weight + bias)
        if DWEIGHT or DBIAS:
            if HAS_SCALE:
                at = scale_ptr + b * scale_b + tokens[:, None] * scale_s + cols[None, :]
                dy = dy * (1.0 + tl.load(at, mask=mask, other=0.0).to(tl.float32))
            dweight += dy * xhat
            dbias += dy
    out = pid.to(tl.int64) * d + cols
    # Every sum runs over the tokens of one chunk in a fixed order, so the result never depends on scheduling.
    if DSCALE and not SCALE_PER_TOKEN:
        tl.store(dscale_ptr + out, tl.sum(dscale, 0), mask=cols < d)
    if DSHIFT and not SHIFT_PER_TOKEN:
        tl.store(dshift_ptr + out, tl.sum(dshift, 0), mask=cols < d)
    if DWEIGHT:
        tl.store(dweight_ptr + out, tl.sum(dweight, 0), mask=cols < d)
    if DBIAS:
        tl.store(dbias_ptr + out, tl.sum(dbias, 0), mask=cols < d)


def launch_bwd(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dx: Tensor | None,
    sums: Sequence[Tensor | None],
    per_token: Sequence[bool],
    config: row.RowConfig,
    sum_config: row.SumConfig,
) -> None:
    """Write ``dx`` and the fp32 ``sums`` of (scale, shift, weight, bias), those given; ``[B, S or chunks, D]`` each."""
    b, s, d = x.shape
    n_rows = b * s
    wants_sums = any(t is not None for t in sums)
    mean, rstd = (x.new_empty((n_rows,), dtype=torch.float32) if wants_sums else None for _ in range(2))
    strides = (dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), *bs_strides(scale))
    with on_device(x):
        _layer_norm_modulate_dx_kernel[(cdiv(n_rows, config.rows),)](
            dy, x, dx, mean, rstd, scale, weight,
            n_rows, s, d, eps, *strides,
            scale is not None, weight is not None, dx is not None, wants_sums,
            config.rows, config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip
        if wants_sums:
            chunks = cdiv(s, sum_config.chunk)
            _layer_norm_modulate_sums_kernel[(b * chunks, cdiv(d, sum_config.block_d))](
                dy, x, mean, rstd, scale, weight, bias, *sums,
                s, d, chunks, *strides,
                scale is not None, weight is not None, bias is not None,
                *(t is not None for t in sums), *per_token,
                sum_config.chunk, sum_config.rows, sum_config.block_d,
                num_warps=sum_config.num_warps,
            )  # fmt: skip


def layer_norm_modulate_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """``impl="triton"`` of the backward op: gradients of (x, scale, shift, weight, bias), those in ``needs``."""
    (dy,) = grads
    assert dy is not None
    refuse_float64("layer_norm_modulate_backward", dy, x, scale, shift, weight, bias)
    arch = arch_for(x)
    shape = {"op": "layer_norm_modulate_backward", "width": x.shape[-1], "itemsize": x.element_size()}
    config, sum_config = row.select(arch, **shape), row.select_sum(arch, **shape)
    b, s, d = x.shape
    parameters = (scale, shift, weight, bias)
    # The partial sums take s tokens each, unless the argument has a value per token.
    per_token = [t is not None and t.dim() == 3 and t.shape[1] > 1 for t in parameters[:2]]
    slots = [s if token else cdiv(s, sum_config.chunk) for token in (*per_token, False, False)]
    dx = x.new_empty(x.shape) if needs[0] else None
    sums = [
        x.new_empty((b, n, d), dtype=torch.float32) if need else None for n, need in zip(slots, needs[1:], strict=True)
    ]
    if x.numel() and (dx is not None or any(needs[1:])):
        launch_bwd(unit_stride(dy), x, scale, weight, bias, eps, dx, sums, per_token, config, sum_config)
    out = [] if dx is None else [dx]
    for total, like, token in zip(sums, parameters, (*per_token, False, False), strict=True):
        if total is not None and like is not None:
            out.append(reduce_to(total if token else total.sum(1, keepdim=True), like))
    return out
