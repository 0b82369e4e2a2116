"""What the tests share that hand attention to a library: FlashAttention by stand-ins, calls of the op."""

import importlib.util
import types
from types import SimpleNamespace

import torch

from pyvideo_kernels.ops import flash_attention as flash
from pyvideo_kernels.schemas import OPS

OP = OPS["spacetime_attention"]
CARD = torch.device("cuda", 0)
HALF = torch.bfloat16


def attention_and_lse(q, k, v, scale):
    """In their layout, by plain products; natural logarithm, ``[B, heads, S]`` fp32."""
    heads = q.shape[2] // k.shape[2]
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), scores.logsumexp(-1)


class FlashModule(types.ModuleType):
    """``flash_attn_func`` as the releases have it; ``calls`` are its arguments, ``change`` spoils the result."""

    def __init__(self, name, kind):
        super().__init__(name)
        self.__version__ = "0.1"
        self.__spec__ = importlib.util.spec_from_loader(name, None)
        self.__path__ = []
        self.calls, self.change = [], lambda out, lse: (out, lse)

        def run(q, k, v, softmax_scale, causal, asked):
            assert all(x.dim() == 4 and x.stride(-1) == 1 for x in (q, k, v)) and q.dtype in (HALF, torch.float16)
            assert not causal and q.shape[2] % k.shape[2] == 0 and k.shape == v.shape and q.shape[1] == k.shape[1]
            assert not torch.is_grad_enabled()
            self.calls.append(SimpleNamespace(q=q, k=k, v=v, scale=softmax_scale, asked=asked))
            out, lse = attention_and_lse(q, k, v, softmax_scale)
            return self.change(out.to(q.dtype), lse)

        def early3(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
            return run(q, k, v, softmax_scale, causal, None)

        def late3(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), return_attn_probs=False):
            out, lse = run(q, k, v, softmax_scale, causal, return_attn_probs)
            return (out, lse) if return_attn_probs else out

        def four(q, k, v, qv=None, softmax_scale=None, causal=False, num_splits=1, return_lse=False):
            out, lse = run(q, k, v, softmax_scale, causal, return_lse)
            return out, lse if return_lse else None

        self.flash_attn_func = {"early 3": early3, "3": late3, "4": four}[kind]


def arguments(q, k, v, **options):
    given = {
        "grid": [1, 1, q.shape[1]], "window": None, "stride": [1, 1, 1], "causal_time": False, "text_len": 0,
        "text_side": "suffix", "kv_lens": None, "scale": q.shape[-1] ** -0.5, "return_lse": False,
        "precision": "native",
    }  # fmt: skip
    return OP.bind(q=q, k=k, v=v, **given | options)


def packed(s=24, heads=2, head_dim=64, dtype=HALF, b=2):
    return torch.randn(b, s, 3, heads, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype).unbind(2)


def run_flash(*args, **options):
    return flash.spacetime_attention_flash(*arguments(*args, **options))


def misaligned():
    q, k, v = packed(head_dim=64)
    flat = torch.zeros(q.numel() + 1, dtype=HALF)
    return flat[1:].view(q.shape), k.contiguous(), v.contiguous()
