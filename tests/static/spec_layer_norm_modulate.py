"""Launches of layer_norm_modulate at the models' shapes."""

import torch

from pyvideo_kernels.kernels.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_backward
from pyvideo_kernels.testing.static import Case, meta


def _call(tokens, width, modulation_rows, affine=False):
    modulation = meta((1, modulation_rows, width), torch.float32) if modulation_rows else None
    weight = meta((width,), torch.float32) if affine else None
    return lambda: layer_norm_modulate(meta((1, tokens, width)), modulation, modulation, weight, weight, 1e-6)


def _backward(tokens, width, modulation_rows, affine=False, sums=True):
    x, modulation = meta((1, tokens, width)), meta((1, modulation_rows, width), torch.float32)
    weight = meta((width,), torch.float32) if affine else None
    needs = [True, sums, sums, affine, affine]
    return lambda: layer_norm_modulate_backward([x], x, modulation, modulation, weight, weight, 1e-6, needs)


CASES = [
    Case("wan-1.3b-480p", _call(32760, 1536, 1)),
    Case("wan-14b-480p", _call(32760, 5120, 1)),
    Case("wan-5b-per-token", _call(18144, 3072, 18144)),
    Case("wan-1.3b-affine", _call(32760, 1536, 0, affine=True)),
    Case("wan-1.3b-backward-all", _backward(32760, 1536, 1, affine=True)),
    Case("wan-5b-backward-per-token", _backward(18144, 3072, 18144)),
    Case("wan-14b-backward-dx", _backward(32760, 5120, 1, sums=False)),
]
