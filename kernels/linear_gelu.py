"""Linear layer and GELU: a matrix product that adds the bias and takes GELU of its sums while they are in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs import linear_gelu as configs

from .launch import cdiv, on_device, refuse_float64
from .rms_norm import places, row_offsets

# 2 √(2/π) log2(e), and its product with the cubic coefficient.
_SLOPE, _CUBIC = tl.constexpr(2.302208198), tl.constexpr(0.1029432397)


@triton.jit
def _gelu(u, TANH: tl.constexpr):
    if TANH:
        # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z)): nothing cancels in the tail, and exp2 is one instruction.
        return u / (1.0 + tl.exp2(-u * (_SLOPE + _CUBIC * u * u)))
    return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _linear_gelu_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr,
    rows, width, columns, weight_n,
    n1, n2, n3, s0, s1, s2, s3,
    TANH: tl.constexpr, DIMS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Programs that run together make GROUP_M tiles of rows by as many of features as it takes: both come from cache.
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    size = min(tiles_m - first, GROUP_M)
    m = (first + pid % (GROUP_M * tiles_n) % size).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid % (GROUP_M * tiles_n) // size).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the edge: the last row and feature again, which are not stored.
    x_rows = x_ptr + row_offsets(tl.minimum(m, rows - 1), n1, n2, n3, s0, s1, s2, s3, DIMS)
    weight_rows = weight_ptr + tl.minimum(n, width - 1) * weight_n
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if WHOLE:
            x = tl.load(x_rows[:, None] + k[None, :])
            weight = tl.load(weight_rows[:, None] + k[None, :])
        else:
            x = tl.load(x_rows[:, None] + k[None, :], mask=(k < columns)[None, :], other=0.0)
            weight = tl.load(weight_rows[:, None] + k[None, :], mask=(k < columns)[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    y = _gelu(acc, TANH).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None] * width + n[None, :], y, mask=(m < rows)[:, None] & (n < width)[None, :])


def launch_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, approximate: str, config: configs.Config
) -> None:
    """Launch over the rows of ``x [..., K]``, whatever their strides, into contiguous ``out [..., N]``."""
    if out.numel() == 0:
        return
    width, columns = weight.shape
    rows = x.numel() // columns
    where, dims = places(x)
    with on_device(x):
        _linear_gelu_fwd_kernel[(cdiv(rows, config.block_m) * cdiv(width, config.block_n),)](
            x, weight, bias, out,
            rows, width, columns, weight.stride(0),
            *where,
            approximate == "tanh", dims, columns % config.block_k == 0,
            config.block_m, config.block_n, config.block_k, config.group_m,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """``impl="triton"`` of the op."""
    refuse_float64("linear_gelu", x, weight)
    width, columns = weight.shape
    config = configs.select(
        arch_for(x), width=width, columns=columns, itemsize=x.element_size(), approximate=approximate
    )
    out = x.new_empty((*x.shape[:-1], width))
    launch_fwd(x, weight, bias, out, approximate, config)
    return out
