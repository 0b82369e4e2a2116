"""Whether the attention that was asked for is built: the op is asked, so that this never disagrees with it."""

from __future__ import annotations

import torch

from ..attention_choice import AttentionChoice
from ..errors import UnsupportedError
from ..ops.spacetime_attention import spacetime_attention


def refuse_unbuilt(choice: AttentionChoice | None, where: str) -> None:
    """Raise if some layer would run in a precision that the op has not; computes nothing."""
    if choice is None:
        return
    for precision in {layer.precision for layer in (choice.base, *choice.layers.values())} - {"native"}:
        q = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="meta")
        try:
            spacetime_attention(q, q, q, grid=(1, 1, 1), precision=precision)
        except UnsupportedError as error:
            raise UnsupportedError(f"{where} {precision!r}: {error}") from None
