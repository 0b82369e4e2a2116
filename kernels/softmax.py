"""The online softmax that the attention kernels share: base 2, fp32, one FMA an element for scale and maximum."""

import triton
import triton.language as tl


@triton.jit
def soften(scores, acc, top, total, scale_log2, MASKED: tl.constexpr = False):
    """Fold a tile of raw scores into the running maximum (raw too) and sum; returns weights, acc, maximum, sum.

    ``MASKED``: a row may have seen no key yet, and -inf - -inf is NaN.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = new_top
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * scale_log2 - (base * scale_log2)[:, None])
    decay = tl.exp2((top - base) * scale_log2)
    return weights, acc * decay[:, None], new_top, total * decay + tl.sum(weights, 1)


@triton.jit
def finish(acc, top, total, scale):
    """Normalised rows and their natural-log LSE; zeros and -inf where no key was seen."""
    # Not `total > 0`: a NaN would give an LSE of -inf, which merges as a part that saw nothing.
    nothing = total == 0
    divisor = tl.where(nothing, 1.0, total)
    return acc / divisor[:, None], tl.where(nothing, float("-inf"), top * scale + tl.log(divisor))
