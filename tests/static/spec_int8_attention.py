"""Launches of int8_attention at the models' shapes, dense and windowed."""

import torch

from pyvideo_kernels.kernels.int8_attention import int8_attention
from pyvideo_kernels.testing.static import Case, meta


def _call(
    grid, heads, head_dim, *, window=None, causal=False, text_len=0, text_side="suffix", batch=1, kv_heads=None,
    dtype=torch.bfloat16, lse=False,
):  # fmt: skip
    tokens = grid[0] * grid[1] * grid[2] + text_len
    groups = kv_heads or heads
    q8 = meta((batch, tokens, heads, head_dim), torch.int8)
    k8 = meta((batch, tokens, groups, head_dim), torch.int8)
    v = meta((batch, tokens, groups, head_dim), dtype)
    q_scale, k_scale = (meta((batch, n, tokens), torch.float32) for n in (heads, groups))
    lens = meta((batch,), torch.int32) if text_len else None
    return lambda: int8_attention(
        q8, k8, v, q_scale, k_scale, q_scale if lse else None, grid, window, (1, 1, 1), causal, text_len, text_side,
        lens, head_dim**-0.5, lse,
    )  # fmt: skip


WAN = _call((21, 30, 52), 12, 128)
COGVIDEOX = _call((13, 30, 45), 48, 64, text_len=226, text_side="prefix", batch=2, lse=True)
WINDOWED = _call((30, 48, 80), 24, 128, window=(12, 24, 24), text_len=256)
WINDOWED_64 = _call((13, 30, 45), 48, 64, window=(5, 12, 18), text_len=226, text_side="prefix", batch=2, lse=True)
POINTERS = ("sm_80", "sm_89", "sm_120", "gfx942", "gfx950")
DESCRIPTORS = ("sm_90", "sm_100")

CASES = [
    Case("wan-1.3b-480p", WAN, matrix=True, archs=POINTERS),
    Case("wan-1.3b-480p-descriptors", WAN, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("cogvideox-text-prefix", COGVIDEOX, matrix=True, archs=POINTERS),
    Case("cogvideox-text-prefix-descriptors", COGVIDEOX, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("hunyuan-window", WINDOWED, matrix=True, archs=POINTERS),
    Case("hunyuan-window-descriptors", WINDOWED, matrix=True, tma=True, archs=DESCRIPTORS),
    Case(
        "cogvideox-window",
        WINDOWED_64,
        matrix=True,
        archs=("sm_80", "sm_120", "gfx942"),
        allow_spill={"gfx942": "scalar registers, to lanes of a vector register: no memory"},
    ),
    Case("cogvideox-window-descriptors", WINDOWED_64, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("head-dim-96-padded", _call((21, 30, 52), 8, 96, lse=True), matrix=True, archs=("sm_80", "sm_90")),
    Case("head-dim-40-padded", _call((21, 30, 52), 8, 40), matrix=True, archs=("sm_120",)),
    Case("fp32-values", _call((21, 30, 52), 12, 128, dtype=torch.float32), archs=("sm_80", "sm_90", "gfx942")),
]
