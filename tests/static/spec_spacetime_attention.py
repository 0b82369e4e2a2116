"""Launches of spacetime_attention at the models' shapes."""

import torch

from pyvideo_kernels.kernels.spacetime_attention import spacetime_attention
from pyvideo_kernels.testing.static import Case, meta


def _call(
    grid, heads, head_dim, *, text_len=0, text_side="suffix", batch=1, kv_heads=None, dtype=torch.bfloat16, lse=False
):
    tokens = grid[0] * grid[1] * grid[2] + text_len
    q = meta((batch, tokens, heads, head_dim), dtype)
    k = v = meta((batch, tokens, kv_heads or heads, head_dim), dtype)
    lens = meta((batch,), torch.int32) if text_len else None
    return lambda: spacetime_attention(
        q, k, v, grid, None, (1, 1, 1), False, text_len, text_side, lens, head_dim**-0.5, lse, "native"
    )


WAN = _call((21, 30, 52), 12, 128)
COGVIDEOX = _call((13, 30, 45), 48, 64, text_len=226, text_side="prefix", batch=2, lse=True)
HUNYUAN = _call((30, 48, 80), 24, 128, text_len=256, lse=True)
POINTERS = ("sm_80", "sm_89", "sm_120", "gfx942", "gfx950")
DESCRIPTORS = ("sm_90", "sm_100")

# The common shapes on every architecture; the corners where another code path or the most registers are at stake.
CASES = [
    Case("wan-1.3b-480p", WAN, matrix=True, archs=POINTERS),
    Case("wan-1.3b-480p-descriptors", WAN, matrix=True, tma=True, archs=DESCRIPTORS),
    Case(
        "cogvideox-text-prefix",
        COGVIDEOX,
        matrix=True,
        archs=POINTERS,
        older_triton={"gfx942": "10 spilled registers"},
    ),
    Case("cogvideox-text-prefix-descriptors", COGVIDEOX, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("hunyuan-text-suffix-lse", HUNYUAN, matrix=True, archs=("sm_80",)),
    Case("hunyuan-text-suffix-lse-descriptors", HUNYUAN, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("head-dim-256-grouped", _call((21, 30, 52), 8, 256, kv_heads=2), matrix=True, archs=("sm_80", "gfx942")),
    Case("head-dim-256-descriptors", _call((21, 30, 52), 8, 256), matrix=True, tma=True, archs=("sm_90",)),
    Case("head-dim-40-padded", _call((21, 30, 52), 8, 40), matrix=True, archs=("sm_120",)),
    Case("head-dim-40-descriptors", _call((21, 30, 52), 8, 40), matrix=True, tma=True, archs=("sm_90",)),
    Case("head-dim-36-pointers", _call((21, 30, 52), 8, 36), matrix=True, archs=("sm_90",)),
    Case("head-dim-35-scalar-loads", _call((21, 30, 52), 8, 35), matrix=True, archs=("sm_80",)),
    Case("fp32-128", _call((21, 30, 52), 12, 128, dtype=torch.float32), archs=("sm_80", "sm_90", "gfx942")),
]
