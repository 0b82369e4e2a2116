"""``impl="triton"`` of fp8_attention: the kernels of int8_attention, to which the dtype of the codes says which."""

from .int8_attention import int8_attention as fp8_attention

__all__ = ["fp8_attention"]
