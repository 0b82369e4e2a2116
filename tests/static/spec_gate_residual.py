"""Launches of gate_residual at the models' shapes."""

import torch

from pyvideo_kernels.kernels.gate_residual import gate_residual
from pyvideo_kernels.testing.static import Case, meta


def _call(tokens, width, gate_rows):
    gate = meta((1, gate_rows, width), torch.float32)
    return lambda: gate_residual(meta((1, tokens, width)), meta((1, tokens, width)), gate)


CASES = [
    Case("wan-1.3b-480p", _call(32760, 1536, 1)),
    Case("wan-14b-480p", _call(32760, 5120, 1)),
    Case("wan-5b-per-token", _call(18144, 3072, 18144)),
]
