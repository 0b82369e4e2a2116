"""Ahead-of-time cases of upsample_conv2d: the doublings of Wan's, HunyuanVideo's and CogVideoX's decoders."""

from functools import partial

import torch

from pyvideo_kernels.kernels.upsample_conv2d import upsample_conv2d
from pyvideo_kernels.ops.upsample_conv2d import packed_shape
from pyvideo_kernels.reference.upsample_conv2d import output_shape
from pyvideo_kernels.testing.static import Case, meta


def _call(x, out, kt=0, time_factor=1, cached=0, first=True, pad_mode="zeros", residual=False, dtype=torch.bfloat16):
    b, _, h, w, c = x
    clip = meta(x, dtype)
    weight = meta((out, c, 3, 3) if kt == 0 else (out, c, kt, 3, 3), dtype)
    cache = meta((b, cached, h, w, c), dtype) if cached else None
    after = meta(output_shape(clip, weight, time_factor, first), dtype) if residual else None
    packed = meta(packed_shape(weight, time_factor), dtype)
    upsample_conv2d(clip, weight, meta((out,), dtype), packed, time_factor, cache, first, pad_mode, after)


# One architecture a variant: pointers, descriptors, MFMA.
_FEW = ("sm_80", "sm_90", "gfx942")
_SPILLS = "up to 9 instructions on spilled registers"
_ABORTS = "its pass to buffer loads aborts on the choice between the frames' two base pointers"


def _case(name, *args, tma=True, archs=None, **options):
    older = {"sm_120": _SPILLS, **({"gfx942": _ABORTS} if options.get("cached") else {})}
    return Case(name, partial(_call, *args, **options), matrix=True, tma=tma, archs=archs, older_triton=older)


CASES = [
    _case("wan-384-192-120p", (1, 4, 120, 208, 384), 192),
    _case("wan-192-96-240p", (1, 4, 240, 416, 192), 96),
    _case("wan2.2-1024-residual", (1, 2, 44, 80, 1024), 1024, residual=True, archs=_FEW),
    _case("hunyuan-512-space-time", (1, 5, 64, 64, 512), 512, 3, time_factor=2, pad_mode="replicate"),
    _case("hunyuan-512-space-cache", (1, 4, 32, 32, 512), 512, 3, cached=2, pad_mode="replicate", archs=_FEW),
    _case("cogvideox-512-twice", (1, 2, 60, 90, 512), 512, time_factor=2, archs=_FEW),
    _case("wan-192-96-float32", (1, 4, 240, 416, 192), 96, dtype=torch.float32, archs=_FEW),
]
