"""Launches of unipc_step at the models' shapes."""

import torch

from pyvideo_kernels.kernels.unipc_step import unipc_step
from pyvideo_kernels.testing.static import Case, meta


def _call(history, corrects=True, guided=True):
    shape = (1, 16, 21, 60, 104)
    latent, cond = meta(shape, torch.float32), meta(shape)
    coefficients = [0.5] * (2 + history)
    return lambda: unipc_step(
        latent, cond, cond if guided else None, latent if corrects else None, [latent] * history,
        5.0, 0.9, coefficients if corrects else [], coefficients,
    )  # fmt: skip


CASES = [
    Case("first", _call(0, corrects=False)),
    Case("steady", _call(2)),
    Case("third-order-unguided", _call(3, guided=False)),
]
