"""Inputs of attention, and what it takes for an adapter of a peer to be right."""

import torch
import torch.nn.functional as F

import pyvideo_kernels as pv
from pyvideo_kernels.benchmarks.peers import peers_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GRID, HEADS, HEAD_DIM = (2, 3, 4), 2, 64


def qkv(grid=GRID, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, text=0):
    torch.manual_seed(0)
    tokens = grid[0] * grid[1] * grid[2] + text
    q = torch.randn(2, tokens, heads, head_dim)
    k, v = (torch.randn(2, tokens, kv_heads, head_dim) + 1 for _ in range(2))
    return {"q": q, "k": k, "v": v, "grid": grid}


def oracle(inputs):
    return pv.spacetime_attention(**inputs, impl="reference")


def check(name, inputs, device=CUDA, dtype=torch.bfloat16, op="spacetime_attention"):
    """The adapter takes the inputs, leaves them as they were, and returns what our op returns."""
    one = peers_for(op, device, dtype)[name]
    assert one.why_not is None and one.refuses(inputs) is None
    before = {key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    expected = getattr(pv, op)(**inputs, impl="reference")
    for given in (inputs, one.prepare(inputs)):
        torch.testing.assert_close(one.call(given), expected, rtol=1e-4, atol=1e-4)
    for key, value in before.items():
        assert torch.equal(inputs[key], value), f"{name} changed {key}"
    return one


def attend(q, k, v, scale=None):
    """[B, S, heads, head_dim] in and out."""
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale, enable_gqa=True)
    return out.transpose(1, 2)
