"""Launches of qk_norm_rope_means at the models' shapes."""

from math import prod

import torch

from pyvideo_kernels.kernels.qk_norm_rope_means import qk_norm_rope_means
from pyvideo_kernels.testing.static import Case, meta


def _call(grid, heads, head_dim, norm="across_heads", layout="interleaved", kv_heads=None, tile=(4, 4, 4)):
    tokens = prod(grid)
    qkv = meta((1, tokens, 3, heads, head_dim))
    q, k = qkv[:, :, 0], qkv[:, :, 1, : kv_heads or heads]
    weights = [meta((n * head_dim if norm == "across_heads" else head_dim,)) for n in (heads, k.shape[2])]
    cos, sin = (meta((1, tokens, 1, head_dim), torch.float32) for _ in range(2))
    return lambda: qk_norm_rope_means(q, k, *weights, None, None, cos, sin, norm, "rms", layout, grid, tile, 1e-6)


WAN = (21, 30, 52)
CASES = [
    Case("wan-1.3b-480p", _call(WAN, 12, 128)),
    Case("wan-14b-480p", _call(WAN, 40, 128)),
    Case("hunyuan-per-head-128", _call((30, 48, 80), 24, 128, "per_head", tile=(4, 4, 8)), archs=("sm_90", "gfx942")),
    Case("half-layout-grouped", _call((13, 30, 45), 16, 64, "per_head", "half", kv_heads=4), archs=("sm_80",)),
]
