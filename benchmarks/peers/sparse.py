"""External kernels for block_sparse_attention.

They want the tokens of a block side by side: where ours reads boxes of a grid where they lie, the way into blocks and
back belongs to what a user pays at each call. Interfaces were read in each project's own source.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyvideo_kernels.reference.block_mean import blocks_of, tile_sizes

from . import torch_attention
from .package import HALF, Inputs, Package, Peer, needs_dtype, needs_nvidia, skipped
from .torch_attention import beyond, qkv

FASTVIDEO = Package(
    "fastvideo-kernel", "fastvideo-kernel", ("fastvideo_kernel",), "block_sparse_attn_from_indices",
    "pip install fastvideo-kernel", ("0.3.0", "0.3.2"),
)  # fmt: skip
FLASHINFER = Package(
    "flashinfer", "flashinfer-python", ("flashinfer",), "VariableBlockSparseAttentionWrapper",
    "pip install flashinfer-python", ("0.2.6", "0.6.18"),
)  # fmt: skip


# Blocks -------------------------------------------------------------------------------------------------------------


def _boxes(inputs: Inputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Grid and tile, those of a flat sequence too."""
    if (size := inputs.get("block_size")) is not None:
        return (1, 1, inputs["q"].shape[1]), (1, 1, size)
    return tuple(inputs["grid"]), tuple(inputs["tile"])


def _layout(inputs: Inputs) -> Inputs:
    """Where each token goes, and how many each block holds: once a shape."""
    grid, tile = _boxes(inputs)
    device = inputs["q"].device
    block, _ = blocks_of(grid, tile, device)
    sizes = tile_sizes(grid, tile, device)
    order = block.argsort(stable=True)
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    # A token's row where blocks are compact, and where each is filled up to a whole one, its real tokens first.
    padded = block * prod(tile) + rank - first[block]
    return {**inputs, "order": order, "rank": rank, "padded": padded, "sizes": sizes.to(torch.int32)}


def _with_layout(inputs: Inputs) -> Inputs:
    return inputs if "order" in inputs else _layout(inputs)


def _fill_up(x: Tensor, inputs: Inputs) -> Tensor:
    """``[B, S, heads, D]`` -> ``[B, heads, blocks · tokens, D]``, short blocks filled up with zeros."""
    _, tile = _boxes(inputs)
    out = x.new_zeros((x.shape[0], len(inputs["sizes"]) * prod(tile), *x.shape[2:]))
    out[:, inputs["padded"]] = x
    return out.transpose(1, 2).contiguous()


def _refuses(inputs: Inputs) -> str | None:
    if inputs.get("kv_block_lens") is not None:
        return "is compared without `kv_block_lens`"
    return beyond(inputs)


# Peers --------------------------------------------------------------------------------------------------------------


def _fastvideo(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    inputs = _with_layout(inputs)
    q, k, v = (_fill_up(x, inputs) for x in qkv(inputs))
    out = function(q, k, v, inputs["block_indices"], inputs["block_counts"], inputs["sizes"])[0]
    return out.transpose(1, 2)[:, inputs["padded"]]


def _fastvideo_refuses(inputs: Inputs) -> str | None:
    if why := _refuses(inputs):
        return why
    if prod(_boxes(inputs)[1]) != 64:
        return "takes blocks of 64 tokens"
    if inputs["q"].shape[-1] not in (64, 128) or inputs["q"].shape[2] != inputs["k"].shape[2]:
        return "takes head_dim 64 or 128, and as many KV heads as query heads"
    return None if inputs.get("scale") is None else "has the default scale alone"


def _seen(inputs: Inputs) -> Tensor:
    """``[B, heads, blocks, blocks]``, true where a block is listed."""
    indices, counts = inputs["block_indices"], inputs["block_counts"]
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    seen = torch.zeros(*counts.shape, counts.shape[-1], dtype=torch.bool, device=indices.device)
    return seen.scatter_(-1, indices.long(), listed)


def _flashinfer_prepare(wrapper: Callable[..., Any], inputs: Inputs) -> Inputs:
    """Plan for these lists: on the host, with a synchronisation. A model whose lists change pays it at each call."""
    inputs = _with_layout(inputs)
    q, k = inputs["q"], inputs["k"]
    planned = wrapper(torch.empty(128 << 20, dtype=torch.uint8, device=q.device))
    sizes = inputs["sizes"].expand(q.shape[2], -1).contiguous()
    planned.plan(
        _seen(inputs)[0], sizes, sizes, q.shape[2], k.shape[2], q.shape[3], sm_scale=inputs.get("scale"),
        q_data_type=q.dtype,
    )  # fmt: skip
    return {**inputs, "plan": planned}


def _flashinfer(wrapper: Callable[..., Any], inputs: Inputs) -> Tensor:
    if "plan" not in inputs:
        inputs = _flashinfer_prepare(wrapper, inputs)
    q, k, v = (x[0, inputs["order"]].transpose(0, 1).contiguous() for x in qkv(inputs))
    return inputs["plan"].run(q, k, v).transpose(0, 1)[inputs["rank"]][None]


def _flashinfer_refuses(inputs: Inputs) -> str | None:
    if why := _refuses(inputs):
        return why
    if inputs["q"].shape[0] != 1:
        return "takes one sample"
    return None if inputs["q"].shape[2] == inputs["k"].shape[2] else "takes one list for all heads of a group"


def _flex_mask(inputs: Inputs) -> Inputs:
    from torch.nn.attention.flex_attention import BlockMask

    inputs = _with_layout(inputs)
    size, sizes, seen = prod(_boxes(inputs)[1]), inputs["sizes"], _seen(inputs)
    short = sizes < size

    def lists(seen: Tensor) -> tuple[Tensor, Tensor]:
        order = seen.int().argsort(dim=-1, descending=True, stable=True)
        return seen.sum(-1, dtype=torch.int32), order.to(torch.int32)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen[b, h, i // size, j // size] & (j % size < sizes[j // size])

    # Blocks without padding are not masked again.
    blocks = BlockMask.from_kv_blocks(*lists(seen & short), *lists(seen & ~short), BLOCK_SIZE=size, mask_mod=mask)
    return {**inputs, "block_mask": blocks}


def _flex(inputs: Inputs) -> Tensor:
    if "block_mask" not in inputs:
        inputs = _flex_mask(inputs)
    q, k, v = (_fill_up(x, inputs) for x in qkv(inputs))
    size = prod(_boxes(inputs)[1])
    # Its own choice of tiles may not divide blocks of 64.
    options = {"BLOCK_M": size, "BLOCK_N": 64} if q.device.type == "cuda" else None
    out = torch_attention._compiled_flex()(
        q, k, v, block_mask=inputs["block_mask"], scale=inputs.get("scale"), enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
    )  # fmt: skip
    return out.transpose(1, 2)[:, inputs["padded"]]


def _flex_prepare(inputs: Inputs) -> Inputs:
    """Build the mask and compile for these shapes."""
    import torch._dynamo

    prepared = _flex_mask(inputs)
    with torch._dynamo.config.patch(recompile_limit=64):  # every shape of a table is one recompilation
        _flex(prepared)
    return prepared


def peers(device: torch.device, dtype: torch.dtype) -> list[Peer]:
    """Every external kernel for block_sparse_attention, with why not where one cannot run here."""
    found = [Peer("flex", f"torch {torch.__version__}", None, _flex, prepare=_flex_prepare, refuses=_refuses)]
    for package, why_not, call, prepare, refuses, note in (
        (
            FASTVIDEO, needs_nvidia(device) or needs_dtype(dtype, torch.bfloat16), _fastvideo,
            lambda _, inputs: _layout(inputs), _fastvideo_refuses, None,
        ),
        (
            FLASHINFER, needs_nvidia(device) or needs_dtype(dtype, *HALF), _flashinfer, _flashinfer_prepare,
            _flashinfer_refuses, "its plan for the lists, made on the host, is not timed",
        ),
    ):  # fmt: skip
        there = package.find()
        if why_not or there.function is None:
            found.append(skipped(package.name, there.version, why_not or there.why_not or ""))
            continue
        notes = "; ".join(text for text in (note, package.note()) if text)
        found.append(
            Peer(
                package.name,
                there.version,
                None,
                functools.partial(call, there.function),
                prepare=functools.partial(prepare, there.function),
                refuses=refuses,
                note=notes or None,
            )
        )
    return found
