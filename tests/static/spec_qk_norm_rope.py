"""Launches of qk_norm_rope at the models' shapes."""

import torch

from pyvideo_kernels.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_, qk_norm_rope_backward
from pyvideo_kernels.testing.static import Case, meta


def _across(tokens, heads, head_dim, *, tables=(1, 1), rope=True, inplace=False, eps=1e-6):
    """q and k views of one packed projection, one RMS over all heads (Wan, LTX)."""
    qkv = meta((1, tokens, 3, heads, head_dim))
    weight = meta((heads * head_dim,))
    table = meta((tables[0], tokens, tables[1], head_dim), torch.float32) if rope else None
    function = qk_norm_rope_ if inplace else qk_norm_rope
    options = ("across_heads", "rms", "interleaved", 0, -1, eps)
    return lambda: function(qkv[:, :, 0], qkv[:, :, 1], weight, weight, None, None, table, table, *options)


def _per_head(tokens, heads, kv_heads, head_dim, rotary, layout="interleaved", norm_type="rms"):
    """Joint text and video sequence, one statistic a head (HunyuanVideo, CogVideoX)."""
    q, k = meta((1, tokens, heads, head_dim)), meta((1, tokens, kv_heads, head_dim))
    vector = meta((head_dim,))
    bias = vector if norm_type == "layer" else None
    table = meta((rotary[1] - rotary[0], head_dim), torch.float32)
    options = ("per_head", norm_type, layout, *rotary, 1e-6)
    return lambda: qk_norm_rope(q, k, vector, vector, bias, bias, table, table, *options)


def _backward(tokens, heads, head_dim, norm="across_heads", norm_type="rms"):
    """Gradients of a packed projection and of the norm's vectors."""
    qkv, grad = meta((1, tokens, 3, heads, head_dim)), meta((1, tokens, heads, head_dim))
    vector = meta((heads * head_dim if norm == "across_heads" else head_dim,))
    bias = vector if norm_type == "layer" else None
    table = meta((tokens, head_dim), torch.float32)
    options = (norm, norm_type, "interleaved", 0, -1, 1e-6)
    needs = [True, True, True, True, bias is not None, bias is not None]
    return lambda: qk_norm_rope_backward(
        [grad, grad], qkv[:, :, 0], qkv[:, :, 1], vector, vector, bias, bias, table, table, *options, needs
    )


CASES = [
    Case("wan-1.3b-480p", _across(32760, 12, 128)),
    Case("wan-14b-480p-in-place", _across(32760, 40, 128, inplace=True)),
    Case("wan-14b-cross", _across(32760, 40, 128, rope=False)),
    Case("ltx", _across(6144, 32, 64, tables=(1, 32), eps=1e-5)),
    Case("hunyuan-720p", _per_head(118800 + 256, 24, 24, 128, (0, 118800))),
    Case("cogvideox-5b", _per_head(226 + 17550, 48, 48, 64, (226, 17776), norm_type="layer")),
    Case("wan-1.3b-backward", _backward(32760, 12, 128)),
    Case("wan-14b-backward", _backward(32760, 40, 128)),
    Case("cogvideox-5b-backward", _backward(17776, 48, 64, "per_head", "layer")),
    Case("half-96-grouped", _per_head(4096, 16, 4, 96, (0, 4096), layout="half")),
]
