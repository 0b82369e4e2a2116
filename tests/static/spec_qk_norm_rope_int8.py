"""Launches of qk_norm_rope_int8 at the models' shapes."""

import torch

from pyvideo_kernels.kernels.qk_norm_rope_int8 import qk_norm_rope_int8
from pyvideo_kernels.testing.static import Case, meta


def _call(tokens, heads, head_dim, norm="across_heads", layout="interleaved", kv_heads=None, start=0, precision="int8"):
    qkv = meta((1, tokens, 3, heads, head_dim))
    q, k = qkv[:, :, 0], qkv[:, :, 1, : kv_heads or heads]
    groups = k.shape[2]
    weights = [meta((n * head_dim if norm == "across_heads" else head_dim,)) for n in (heads, groups)]
    cos, sin = (meta((1, tokens - start, 1, head_dim), torch.float32) for _ in range(2))
    return lambda: qk_norm_rope_int8(
        q, k, *weights, None, None, cos, sin, norm, "rms", layout, start, -1, 1e-6, precision
    )  # fmt: skip


CASES = [
    Case("wan-1.3b-480p-packed", _call(32760, 12, 128)),
    Case("wan-1.3b-480p-fp8", _call(32760, 12, 128, precision="fp8")),
    Case("wan-14b-480p-packed", _call(32760, 40, 128), archs=("sm_80", "sm_90", "gfx942")),
    Case("hunyuan-per-head", _call(115200, 24, 128, norm="per_head"), archs=("sm_90", "gfx942")),
    Case("half-layout-grouped", _call(17776, 16, 64, "per_head", "half", kv_heads=4, start=226), archs=("sm_80",)),
]
