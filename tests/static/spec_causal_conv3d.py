"""Ahead-of-time cases of causal_conv3d: the convolutions of Wan's VAE at 480p, and what other models' ask for."""

from functools import partial

import torch

from pyvideo_kernels.kernels.causal_conv3d import causal_conv3d
from pyvideo_kernels.testing.static import Case, meta


def _conv(x, out, kernel, cached, residual=False, stride=(1, 1, 1), dtype=torch.bfloat16, pad_mode="zeros",
          pad_end=0, epilogue=None, factor=(1, 1, 1), keep=True):  # fmt: skip
    b, t, h, w, c = x
    ft, fh, fw = (2, 1, 1) if epilogue == "interleave" else factor
    rows = out * ft * fh * fw
    weight = meta((rows, *kernel, c), dtype).permute(0, 4, 1, 2, 3)  # packed
    cache = meta((b, cached, h, w, c), dtype) if cached else None
    frames = ((t + pad_end - 1) // stride[0] + 1) * ft
    after = meta((b, frames, h * fh, w * fw, out), dtype) if residual else None
    norm = meta((out,), dtype) if epilogue == "rms_norm_silu" else None
    causal_conv3d(
        meta(x, dtype), weight, meta((rows,), dtype), cache, stride, pad_mode, pad_end, after, epilogue, factor, norm,
        1e-12, keep,
    )  # fmt: skip


# One architecture a variant: pointers, descriptors, MFMA.
_FEW = ("sm_80", "sm_90", "gfx942")
_ABORTS = "its pass to buffer loads aborts on the choice between the frames' two base pointers"
_SPILLS = "up to 48 instructions on spilled registers"
_OLDER = {"gfx942": _ABORTS, "gfx950": _ABORTS, "sm_100": _SPILLS, "sm_120": _SPILLS}
_NORM = {"epilogue": "rms_norm_silu"}


def _case(name, *args, tma=True, archs=None, **options):
    return Case(name, partial(_conv, *args, **options), matrix=True, tma=tma, archs=archs, older_triton=_OLDER)


CASES = [
    _case("wan-96-480p", (1, 4, 480, 832, 96), 96, (3, 3, 3), 2, residual=True),
    _case("wan-192-240p", (1, 4, 240, 416, 192), 192, (3, 3, 3), 2, residual=True),
    _case("wan-384-60p", (1, 1, 60, 104, 384), 384, (3, 3, 3), 2, residual=True),
    _case("wan-384-first-frame", (1, 1, 60, 104, 384), 384, (3, 3, 3), 0, archs=_FEW),
    _case("wan-time-downsample", (1, 3, 120, 208, 192), 192, (3, 1, 1), 2, stride=(2, 1, 1), archs=_FEW),
    _case("wan-conv-in-16", (1, 1, 60, 104, 16), 384, (3, 3, 3), 2, archs=_FEW),
    # Three channels are no multiple of 16 bytes, which descriptors need.
    _case("wan-conv-out-3", (1, 4, 480, 832, 96), 3, (3, 3, 3), 2, archs=_FEW),
    _case("wan-conv-in-3", (1, 4, 480, 832, 3), 96, (3, 3, 3), 2, tma=False, archs=_FEW),
    _case("wan-shortcut-1x1", (1, 4, 120, 208, 192), 384, (1, 1, 1), 0, archs=_FEW),
    _case("wan-96-float32", (1, 4, 480, 832, 96), 96, (3, 3, 3), 2, residual=True, dtype=torch.float32),
    # Both outputs of a residual block's second convolution, and the normed one alone of its first.
    _case("wan-96-480p-norm", (1, 4, 480, 832, 96), 96, (3, 3, 3), 2, residual=True, **_NORM),
    _case("wan-192-240p-norm", (1, 4, 240, 416, 192), 192, (3, 3, 3), 2, residual=True, **_NORM),
    _case("wan-192-240p-norm-alone", (1, 4, 240, 416, 192), 192, (3, 3, 3), 2, keep=False, archs=_FEW, **_NORM),
    # The norm of 384 channels is a launch of its own, rms_norm_silu's.
    _case("wan-time-upsample-384", (1, 1, 60, 104, 384), 384, (3, 1, 1), 2, epilogue="interleave", archs=_FEW),
    # Edges are repeated: boxes inside by descriptors, those at the edge by pointers.
    _case("hunyuan-128", (1, 4, 256, 256, 128), 128, (3, 3, 3), 0, residual=True, pad_mode="replicate"),
    # The end of a clip whose convolutions look ahead: the last frame is repeated.
    _case("ltx-512-reflect", (1, 4, 64, 96, 512), 512, (3, 3, 3), 2, pad_mode="reflect", pad_end=1, archs=_FEW),
    _case("ltx-upsample-512", (1, 4, 32, 48, 512), 256, (3, 3, 3), 2, pad_mode="first_frame",
          epilogue="pixel_shuffle", factor=(2, 2, 2), archs=_FEW),
]  # fmt: skip
