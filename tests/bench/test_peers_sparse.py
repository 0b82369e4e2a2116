"""Adapters of external kernels for block_sparse_attention, against stand-ins with their signatures and layouts."""

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels.benchmarks.peers import peers_for
from pyvideo_kernels.benchmarks.peers import torch_attention as peers_torch

from .peers_helpers import CPU, CUDA, check

OP = "block_sparse_attention"


def blocks(grid=(3, 5, 9), tile=(4, 4, 4), b=1, heads=2, kv_heads=2, head_dim=64, flat=False):
    g = torch.Generator().manual_seed(0)
    s = grid[0] * grid[1] * grid[2]
    count = 1
    for n, side in zip(grid, tile, strict=True):
        count *= -(-n // side)
    q = torch.randn(b, s, heads, head_dim, generator=g)
    k, v = (torch.randn(b, s, kv_heads, head_dim, generator=g) + 1 for _ in range(2))
    order = torch.rand(b, heads, count, count, generator=g).argsort(-1)[..., :3].to(torch.int32)
    counts = torch.randint(1, 4, (b, heads, count), generator=g, dtype=torch.int32)
    cut = {"block_size": 64} if flat else {"grid": grid, "tile": tile}
    return {"q": q, "k": k, "v": v, "block_indices": order, "block_counts": counts, **cut}


def block_sparse_attn_from_indices(q, k, v, q2k_idx, q2k_num, variable_block_sizes):
    """``[B, heads, S, D]`` in whole blocks of 64, real tokens first; returns the output and an lse."""
    b, heads, s, d = q.shape
    assert all(x.shape == q.shape and x.is_contiguous() for x in (q, k, v))
    assert s == 64 * len(variable_block_sizes) and variable_block_sizes.dtype == torch.int32
    out = torch.full_like(q, torch.nan)
    for i in range(b):
        for h in range(heads):
            for m in range(s // 64):
                listed = q2k_idx[i, h, m, : q2k_num[i, h, m]].tolist()
                keys = [64 * n + j for n in listed for j in range(int(variable_block_sizes[n]))]
                rows = slice(64 * m, 64 * m + int(variable_block_sizes[m]))
                out[i, h, rows] = (q[i, h, rows] @ k[i, h, keys].T * d**-0.5).softmax(-1) @ v[i, h, keys]
    return out, None


class VariableBlockSparseAttentionWrapper:
    """``[heads, S, D]``, blocks of any size one after another, a mask of blocks a head."""

    def __init__(self, workspace):
        assert workspace.dtype == torch.uint8

    def plan(self, seen, rows, cols, heads, kv_heads, head_dim, sm_scale=None, q_data_type=None):
        assert seen.dtype == torch.bool and seen.shape == (heads, rows.shape[1], cols.shape[1])
        expanded = [
            mask.repeat_interleave(r, 0).repeat_interleave(c, 1) for mask, r, c in zip(seen, rows, cols, strict=True)
        ]
        self.mask = torch.stack(expanded)
        self.scale = head_dim**-0.5 if sm_scale is None else sm_scale

    def run(self, q, k, v):
        scores = (q @ k.transpose(1, 2) * self.scale).masked_fill(~self.mask, -torch.inf)
        return scores.softmax(-1) @ v


@pytest.fixture
def uncompiled(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(peers_torch, "_compiled_flex", lambda: flex_attention)


@pytest.mark.parametrize("inputs", [blocks(), blocks((1, 1, 150), (1, 1, 64), flat=True)], ids=["boxes", "flat"])
def test_adapters(inputs, h100, install, monkeypatch, uncompiled):
    install("fastvideo-kernel", "0.3.2", {
        "fastvideo_kernel": {"block_sparse_attn_from_indices": block_sparse_attn_from_indices},
    })  # fmt: skip
    install("flashinfer-python", "0.6.18", {
        "flashinfer": {"VariableBlockSparseAttentionWrapper": VariableBlockSparseAttentionWrapper},
    })  # fmt: skip
    for name in ("fastvideo-kernel", "flashinfer"):
        assert check(name, inputs, op=OP).version in ("0.3.2", "0.6.18")
    check("flex", inputs, device=CPU, dtype=torch.float32, op=OP)
    assert "not timed" in peers_for(OP, CUDA, torch.bfloat16)["flashinfer"].note


def test_an_adapter_that_reads_other_blocks_is_seen(h100, install):
    def off_by_one(q, k, v, q2k_idx, q2k_num, sizes):
        return block_sparse_attn_from_indices(q, k, v, (q2k_idx + 1) % len(sizes), q2k_num, sizes)

    install("fastvideo-kernel", "0.3.2", {"fastvideo_kernel": {"block_sparse_attn_from_indices": off_by_one}})
    with pytest.raises(AssertionError, match="not close"):
        check("fastvideo-kernel", blocks(), op=OP)


def test_refusals_name_the_reason(h100, install):
    install("fastvideo-kernel", "0.3.2", {"fastvideo_kernel": {"block_sparse_attn_from_indices": print}})
    install("flashinfer-python", "0.6.18", {"flashinfer": {"VariableBlockSparseAttentionWrapper": print}})
    found = peers_for(OP, CUDA, torch.bfloat16)
    for name, inputs, why in (
        ("fastvideo-kernel", blocks(tile=(4, 4, 8)), "blocks of 64"),
        ("fastvideo-kernel", blocks(head_dim=32), "head_dim 64 or 128"),
        ("fastvideo-kernel", blocks(kv_heads=1), "KV heads"),
        ("fastvideo-kernel", blocks() | {"scale": 1.0}, "default scale"),
        ("flashinfer", blocks(b=2), "one sample"),
        ("flashinfer", blocks(kv_heads=1), "one list for all heads"),
        ("flex", blocks() | {"kv_block_lens": torch.ones(1)}, "kv_block_lens"),
        ("flex", blocks() | {"return_lse": True}, "return_lse"),
    ):
        assert why in found[name].refuses(inputs)
    assert "takes bfloat16; this is float32" in peers_for(OP, CUDA, torch.float32)["fastvideo-kernel"].why_not
    assert peers_for(OP, CPU, torch.bfloat16)["flashinfer"].why_not == "needs a CUDA GPU"


def test_grouped_heads_in_flex(uncompiled):
    check("flex", blocks(heads=4, kv_heads=2, b=2), device=CPU, dtype=torch.float32, op=OP)
    assert pv.block_sparse_attention(**blocks(heads=4, kv_heads=2, b=2)).shape == (2, 135, 4, 64)
