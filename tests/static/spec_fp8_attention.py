"""Launches of fp8_attention at the models' shapes, dense and windowed: those of int8_attention, where e4m3 is."""

import torch

from pyvideo_kernels.kernels.fp8_attention import fp8_attention
from pyvideo_kernels.testing.static import Case, meta


def _call(
    grid, heads, head_dim, *, window=None, text_len=0, text_side="suffix", batch=1, dtype=torch.bfloat16, lse=False
):  # fmt: skip
    tokens = grid[0] * grid[1] * grid[2] + text_len
    q8, k8 = (meta((batch, tokens, heads, head_dim), torch.float8_e4m3fn) for _ in range(2))
    v = meta((batch, tokens, heads, head_dim), dtype)
    scale = meta((batch, heads, tokens), torch.float32)
    lens = meta((batch,), torch.int32) if text_len else None
    return lambda: fp8_attention(
        q8, k8, v, scale, scale, scale if lse else None, grid, window, (1, 1, 1), False, text_len, text_side,
        lens, head_dim**-0.5, lse,
    )  # fmt: skip


WAN = _call((21, 30, 52), 12, 128)
COGVIDEOX = _call((13, 30, 45), 48, 64, text_len=226, text_side="prefix", batch=2, lse=True)
WINDOWED = _call((30, 48, 80), 24, 128, window=(12, 24, 24), text_len=256)
POINTERS = ("sm_89", "sm_120", "gfx950")
DESCRIPTORS = ("sm_90", "sm_100")

CASES = [
    Case("wan-1.3b-480p", WAN, matrix=True, archs=POINTERS),
    Case("wan-1.3b-480p-descriptors", WAN, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("cogvideox-text-prefix", COGVIDEOX, matrix=True, archs=POINTERS),
    Case("cogvideox-text-prefix-descriptors", COGVIDEOX, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("hunyuan-window", WINDOWED, matrix=True, archs=POINTERS),
    Case("hunyuan-window-descriptors", WINDOWED, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("fp32-values", _call((21, 30, 52), 12, 128, dtype=torch.float32), archs=("sm_90",)),
]
