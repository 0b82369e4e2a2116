"""bf16 or fp32 on a CPU: what this CPU does faster, by a measurement of a few milliseconds; and why."""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import torch

NARROW = 512
"""Width of a transformer below which products are not what takes its time; see docs/sampler.md."""
FASTER = 1.2
"""How many times faster bf16 must multiply to pay for its conversions, and for its rounding."""
_SHAPE = (256, 1024, 1024)


class Chosen(NamedTuple):
    """A dtype, and one line that says why."""

    dtype: torch.dtype
    why: str


def choose(width: int | None) -> Chosen:
    """For a transformer of this width; None: unknown, which is taken for a narrow one."""
    if width is None or width < NARROW:
        what = "no transformer" if width is None else f"width {width}, less than {NARROW}"
        return Chosen(torch.float32, f"{what}: products are not what takes the time")
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return Chosen(torch.float32, "oneDNN has no bf16 for this CPU")
    bf16, fp32 = measured()
    ratio = fp32 / bf16
    why = (
        f"a product of {'×'.join(map(str, _SHAPE))} takes {bf16 * 1e3:.2g} ms in bf16 and {fp32 * 1e3:.2g} ms in fp32, "
        f"{ratio:.2g} times as long"
    )
    return Chosen(torch.bfloat16 if ratio >= FASTER else torch.float32, why)


@functools.cache
def measured() -> tuple[float, float]:
    """Seconds of one product in bf16 and in fp32: the best of a few in turns, with torch's present threads."""
    m, n, k = _SHAPE
    operands = {}
    for dtype in (torch.bfloat16, torch.float32):
        operands[dtype] = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
    best = dict.fromkeys(operands, float("inf"))
    with torch.inference_mode():
        for number in range(5):
            for dtype, (x, weight) in operands.items():
                start = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                if number:  # the first prepares
                    best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16], best[torch.float32]
