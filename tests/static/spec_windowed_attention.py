"""Launches of spacetime_attention's windowed kernels, forward and backward, at the models' shapes."""

import torch

from pyvideo_kernels.kernels.spacetime_attention import spacetime_attention, spacetime_attention_backward
from pyvideo_kernels.testing.static import Case, meta

WAN, HUNYUAN, COGVIDEOX = (21, 30, 52), (30, 48, 80), (13, 30, 45)
# Windows whose heads skip about 50, 80 and 91 % of the video's pairs.
WAN_50, WAN_80, WAN_91 = (21, 20, 39), (15, 15, 29), (9, 15, 22)
HUNYUAN_50, HUNYUAN_80, HUNYUAN_91 = (24, 36, 68), (18, 24, 54), (18, 24, 24)
COGVIDEOX_50, COGVIDEOX_80, COGVIDEOX_91 = (13, 20, 34), (9, 15, 26), (7, 11, 20)


def _arguments(grid, heads, head_dim, window, stride, *, text_len=0, text_side="suffix", batch=1, causal=False,
               kv_heads=None, dtype=torch.bfloat16):  # fmt: skip
    tokens = grid[0] * grid[1] * grid[2] + text_len
    q = meta((batch, tokens, heads, head_dim), dtype)
    k = v = meta((batch, tokens, kv_heads or heads, head_dim), dtype)
    lens = meta((batch,), torch.int32) if text_len else None
    rest = (grid, window, stride, causal, text_len, text_side, lens, head_dim**-0.5)
    return q, k, v, rest


def _call(grid, heads, head_dim, window, stride=(1, 1, 1), *, lse=False, **options):
    q, k, v, rest = _arguments(grid, heads, head_dim, window, stride, **options)
    return lambda: spacetime_attention(q, k, v, *rest, lse, "native")


def _backward(grid, heads, head_dim, window, stride=(1, 1, 1), **options):
    q, k, v, rest = _arguments(grid, heads, head_dim, window, stride, **options)
    lse = meta((q.shape[0], heads, q.shape[1]), torch.float32)
    outputs, grads = [q, lse], [q, lse]
    return lambda: spacetime_attention_backward(grads, outputs, q, k, v, *rest, True, "native", [True] * 3)


WAN_WINDOW = _call(WAN, 12, 128, WAN_91)
WAN_TILES = _call(WAN, 40, 128, WAN_50, (3, 5, 13), lse=True)
# A window a head: half of them near, half of them far in time.
WAN_HEADS = _call(WAN, 12, 128, [n for row in [WAN_91, WAN_80] * 6 for n in row])
WAN_CAUSAL = _call(WAN, 12, 128, (6, 30, 52), (3, 1, 1), causal=True)
HUNYUAN_TEXT = _call(HUNYUAN, 24, 128, HUNYUAN_91, (6, 8, 8), text_len=256, lse=True)
HUNYUAN_FAR = _call(HUNYUAN, 24, 128, HUNYUAN_80, text_len=256)
COG_TEXT = {"text_len": 226, "text_side": "prefix", "batch": 2}
COG_PREFIX = _call(COGVIDEOX, 48, 64, COGVIDEOX_80, lse=True, **COG_TEXT)
POINTERS = ("sm_80", "sm_89", "sm_120", "gfx942", "gfx950")
DESCRIPTORS = ("sm_90", "sm_100")
# More sizes and strides than a wave has scalar registers: what waits does so in vector registers, not in memory.
_SCALARS = dict.fromkeys(("gfx942", "gfx950"), "scalar registers, kept in lanes of vector registers; no stack")


CASES = [
    Case("wan-window", WAN_WINDOW, matrix=True, archs=POINTERS),
    Case("wan-window-descriptors", WAN_WINDOW, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("wan-14b-tiles-lse-descriptors", WAN_TILES, matrix=True, tma=True, archs=("sm_90",)),
    Case("wan-window-per-head", WAN_HEADS, matrix=True, archs=("sm_80", "sm_120")),
    Case("wan-window-per-head-descriptors", WAN_HEADS, matrix=True, tma=True, archs=("sm_90",)),
    Case("wan-causal", WAN_CAUSAL, matrix=True, archs=("sm_80", "sm_89")),
    Case("wan-causal-descriptors", WAN_CAUSAL, matrix=True, tma=True, archs=("sm_90",)),
    Case("hunyuan-text-suffix-lse", HUNYUAN_TEXT, matrix=True, archs=POINTERS, allow_spill=_SCALARS),
    Case("hunyuan-text-suffix-lse-descriptors", HUNYUAN_TEXT, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("hunyuan-text-suffix-descriptors", HUNYUAN_FAR, matrix=True, tma=True, archs=("sm_90",)),
    Case("cogvideox-text-prefix", COG_PREFIX, matrix=True, archs=POINTERS, allow_spill=_SCALARS),
    Case("cogvideox-text-prefix-descriptors", COG_PREFIX, matrix=True, tma=True, archs=DESCRIPTORS),
    Case("head-dim-256-grouped", _call(WAN, 8, 256, WAN_80, kv_heads=2), matrix=True, archs=("sm_80", "sm_90")),
    Case("head-dim-40-pointers", _call(WAN, 8, 40, WAN_80), matrix=True, archs=("sm_90", "sm_120")),
    Case("fp32-128", _call(WAN, 12, 128, WAN_80, dtype=torch.float32), archs=("sm_80", "sm_90")),
    Case("backward-wan-dense", _backward(WAN, 12, 128, None), matrix=True, archs=("sm_80", "sm_90")),
    Case("backward-wan-window", _backward(WAN, 12, 128, WAN_91), matrix=True, allow_spill=_SCALARS,
         older_triton={"sm_100": "2 spilled registers"}),
    Case("backward-hunyuan-text", _backward(HUNYUAN, 24, 128, HUNYUAN_80, (6, 8, 8), text_len=256), matrix=True,
         allow_spill=_SCALARS),
    Case("backward-cogvideox-text", _backward(COGVIDEOX, 48, 64, COGVIDEOX_80, **COG_TEXT), matrix=True,
         allow_spill=_SCALARS),
    Case("backward-wan-causal", _backward(WAN, 12, 128, (6, 30, 52), (3, 1, 1), causal=True), matrix=True,
         archs=("sm_80", "sm_90")),
    Case("backward-fp32-128", _backward(WAN, 12, 128, WAN_80, dtype=torch.float32), archs=("sm_80", "sm_90")),
]  # fmt: skip
