"""Ahead-of-time cases of decode_head: the last layers of the four decoders, into a slice of a clip."""

from functools import partial

import torch

from pyvideo_kernels.kernels.decode_head import decode_head_
from pyvideo_kernels.testing.static import Case, meta


def _head(x, o, patch, cached=2, pad_mode="zeros", pad_end=0, frames=torch.uint8, dtype=torch.bfloat16):
    b, t, h, w, c = x
    weight = meta((o, 3, 3, 3, c), dtype).permute(0, 4, 1, 2, 3)  # packed
    cache = meta((b, cached, h, w, c), dtype) if cached else None
    clip = meta((b, o // (patch[1] * patch[2]), 81, h * patch[1], w * patch[2]), frames)
    out = clip[:, :, : t + pad_end]
    decode_head_(out, meta(x, dtype), weight, meta((o,), dtype), cache, pad_mode, pad_end, patch, True)


WAN = (1, 4, 480, 832, 96), 3, (1, 1, 1)
WAN_5B = (1, 4, 352, 640, 256), 12, (1, 2, 2)  # Wan 2.2, 704 x 1280
HUNYUAN = (1, 17, 256, 256, 128), 3, (1, 1, 1), 0, "replicate"  # a tile
LTX = (1, 8, 128, 192, 128), 48, (1, 4, 4), 2, "first_frame", 1  # 512 x 768
_ABORTS = "its pass to buffer loads aborts on the choice between the frames' two base pointers"
_OLDER = {"gfx942": _ABORTS, "gfx950": _ABORTS}


def _case(name, *args, archs=None, **options):
    return Case(name, partial(_head, *args, **options), matrix=True, archs=archs, older_triton=_OLDER)


# sm_120 has the rule of sm_89, and gfx950 that of gfx942.
_FEW = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
CASES = [
    _case("wan-3-bytes", *WAN),
    _case("wan-2.2-12-bytes", *WAN_5B, archs=_FEW),
    _case("ltx-48", *LTX, frames=torch.bfloat16, archs=_FEW),
    _case("hunyuan-3-edges", *HUNYUAN, frames=torch.bfloat16, archs=("sm_80",)),
    _case("wan-3-float32", *WAN, frames=torch.float32, dtype=torch.float32, archs=("sm_90",)),
    _case("ltx-48-float32", *LTX, frames=torch.float32, dtype=torch.float32, archs=("sm_80",)),
]
