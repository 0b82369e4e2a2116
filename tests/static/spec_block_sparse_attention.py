"""Launches of block_sparse_attention at the models' shapes."""

import math

import torch

from pyvideo_kernels.kernels.block_sparse_attention import block_sparse_attention
from pyvideo_kernels.testing.static import Case, meta


def _call(
    grid, tile, heads, head_dim, *, listed=52, batch=1, kv_heads=None, dtype=torch.bfloat16, lens=False, gated=False,
    lse=False,
):  # fmt: skip
    tokens, blocks = math.prod(grid), math.prod(-(-n // side) for n, side in zip(grid, tile, strict=True))
    q = meta((batch, tokens, heads, head_dim), dtype)
    k = v = meta((batch, tokens, kv_heads or heads, head_dim), dtype)
    indices, counts = (meta((batch, heads, blocks, *more), torch.int32) for more in ((listed,), ()))
    kv_block_lens = meta((blocks,), torch.int32) if lens else None
    coarse, gate = (meta((batch, heads, blocks, head_dim), torch.float32), q) if gated else (None, None)
    return lambda: block_sparse_attention(
        q, k, v, indices, counts, grid, tile, kv_block_lens, coarse, gate, head_dim**-0.5, lse
    )


POINTERS = ("sm_80", "sm_89", "sm_120", "gfx942", "gfx950")
DESCRIPTORS = ("sm_90", "sm_100")
SHAPES = {
    # What video_sparse_attention launches, with its gate.
    "wan-1.3b-480p-gated": _call((21, 30, 52), (4, 4, 4), 12, 128, gated=True),
    "hunyuan-720p-128": _call((30, 48, 80), (4, 4, 8), 24, 128),
    "cogvideox-480p": _call((13, 30, 45), (4, 4, 4), 48, 64, batch=2, lse=True),
    "wan-1.3b-480p-flat-128-lens": _call((1, 1, 32760), (1, 1, 128), 12, 128, lens=True, lse=True),
}
CASES = [
    case
    for name, call in SHAPES.items()
    for case in (
        Case(name, call, matrix=True, archs=POINTERS),
        Case(f"{name}-descriptors", call, matrix=True, tma=True, archs=DESCRIPTORS),
    )
] + [
    Case(
        "cogvideox-480p-128-lens", _call((13, 30, 45), (4, 4, 8), 48, 64, lens=True), matrix=True,
        archs=("sm_80", "sm_90", "gfx942"),
    ),
    Case(
        "head-dim-256-grouped", _call((21, 30, 52), (4, 4, 4), 8, 256, kv_heads=2), matrix=True,
        archs=("sm_80", "sm_90", "gfx942"),
    ),
    Case("head-dim-40-padded", _call((21, 30, 52), (4, 4, 4), 8, 40), matrix=True, archs=("sm_90", "sm_120")),
    Case("fp32", _call((21, 30, 52), (4, 4, 4), 12, 128, dtype=torch.float32), archs=("sm_80", "sm_90", "gfx942")),
]  # fmt: skip
