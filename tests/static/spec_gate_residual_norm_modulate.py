"""Launches of gate_residual_norm_modulate at the models' shapes."""

import torch

from pyvideo_kernels.kernels.gate_residual_norm_modulate import gate_residual_norm_modulate
from pyvideo_kernels.testing.static import Case, meta


def _call(tokens, width, gate_rows, modulation_rows, affine=False):
    x = meta((1, tokens, width))
    gate = meta((1, gate_rows, width), torch.float32) if gate_rows else None
    modulation = meta((1, modulation_rows, width), torch.float32) if modulation_rows else None
    weight = meta((width,), torch.float32) if affine else None
    return lambda: gate_residual_norm_modulate(x, x, gate, modulation, modulation, weight, weight, 1e-6)


CASES = [
    # Self-attention's gated residual into the affine norm2, then cross-attention's plain one into the modulated norm3.
    Case("wan-1.3b-norm2", _call(32760, 1536, 1, 0, affine=True)),
    Case("wan-1.3b-norm3", _call(32760, 1536, 0, 1)),
    Case("wan-14b-all", _call(32760, 5120, 1, 1)),
    Case("wan-5b-per-token", _call(18144, 3072, 18144, 18144)),
]
