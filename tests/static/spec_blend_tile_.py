"""Launches of blend_tile_ at the tiles of 480p frames, as the decoders give them."""

import torch

from pyvideo_kernels.kernels.blend_tile_ import blend_tile_
from pyvideo_kernels.testing.static import Case, meta

FRAMES, TILE, SEAM = (4, 480, 832), (256, 256), 64


def _frames(height, width, dtype, last):
    if last:
        return meta((1, FRAMES[0], height, width, 3), dtype).permute(0, 4, 1, 2, 3)
    return meta((1, 3, FRAMES[0], height, width), dtype)


def _call(dtype=torch.bfloat16, to=None, last=True, grain=1):
    height, width = TILE
    canvas = meta((1, 3, *FRAMES), to or dtype)[..., 192:384, 192:384]

    def strip(h, w):
        return _frames(h, w, dtype, last)

    return lambda: blend_tile_(
        canvas, strip(SEAM, width), strip(height, SEAM), strip(height, width),
        strip(SEAM, width), strip(height, SEAM), grain, True,
    )  # fmt: skip


CASES = [
    Case("wan-480p-channels-last-bytes", _call(to=torch.uint8)),
    Case("wan-480p-channels-first-float32", _call(dtype=torch.float32, last=False)),
    Case("wan-5b-480p-patches", _call(grain=2)),
]
