"""Launches of quantize_qk at the models' shapes: packed projections, and q and k of their own."""

import torch

from pyvideo_kernels.kernels.quantize_qk import quantize_qk
from pyvideo_kernels.testing.static import Case, meta


def _packed(tokens, heads, head_dim, dtype=torch.bfloat16, precision="int8"):
    qkv = meta((1, tokens, 3, heads, head_dim), dtype)
    return lambda: quantize_qk(qkv[:, :, 0], qkv[:, :, 1], 0, tokens, precision)


def _apart(tokens, heads, kv_heads, head_dim, batch=1):
    q, k = (meta((batch, tokens, n, head_dim)) for n in (heads, kv_heads))
    return lambda: quantize_qk(q, k, 226, tokens, "int8")


CASES = [
    Case("wan-1.3b-480p-packed", _packed(32760, 12, 128)),
    Case("wan-1.3b-480p-fp8", _packed(32760, 12, 128, precision="fp8")),
    Case("cogvideox-text-prefix", _apart(17776, 48, 48, 64, batch=2)),
    Case("head-dim-40-grouped", _apart(17776, 8, 2, 40), archs=("sm_80", "sm_90")),
    Case("fp32-256", _packed(32760, 8, 256, torch.float32), archs=("sm_80", "gfx942")),
]
