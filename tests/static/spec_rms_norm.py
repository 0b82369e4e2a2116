"""Launches of rms_norm at the models' shapes."""

from pyvideo_kernels.kernels.rms_norm import rms_norm, rms_norm_backward
from pyvideo_kernels.testing.static import Case, meta


def _call(shape, weight=True, view=lambda x: x):
    return lambda: rms_norm(view(meta(shape)), meta(shape[-1:]) if weight else None, 1e-6)


def _backward(shape, view=lambda x: x):
    x = view(meta(shape))
    return lambda: rms_norm_backward([meta(x.shape)], x, meta(shape[-1:]), 1e-6, [True, True])


CASES = [
    Case("wan-1.3b-qk", _call((1, 32760, 1536))),
    Case("wan-14b-qk", _call((1, 32760, 5120))),
    Case("ltx-no-weight", _call((1, 4992, 2048), weight=False)),
    Case("packed-qkv-per-head", _call((2, 32760, 3, 24, 128), view=lambda x: x[:, :, 1])),
    Case("wan-14b-backward", _backward((1, 32760, 5120))),
    Case("packed-qkv-backward", _backward((2, 32760, 3, 24, 128), view=lambda x: x[:, :, 1])),
    Case("permuted", _call((2, 7, 5, 3, 128), view=lambda x: x.permute(3, 1, 0, 2, 4))),
]
