"""Launches of rms_norm at the models' shapes."""

from pyvideo_kernels.kernels.rms_norm import rms_norm
from pyvideo_kernels.testing.static import Case, meta


def _call(shape, weight=True, view=lambda x: x):
    return lambda: rms_norm(view(meta(shape)), meta(shape[-1:]) if weight else None, 1e-6)


CASES = [
    Case("wan-1.3b-qk", _call((1, 32760, 1536))),
    Case("wan-14b-qk", _call((1, 32760, 5120))),
    Case("ltx-no-weight", _call((1, 4992, 2048), weight=False)),
    Case("packed-qkv-per-head", _call((2, 32760, 3, 24, 128), view=lambda x: x[:, :, 1])),
    Case("permuted", _call((2, 7, 5, 3, 128), view=lambda x: x.permute(3, 1, 0, 2, 4))),
]
