"""Adapters of external kernels that a CPU cannot run, against stand-ins; and what each peer does not serve.

A stand-in has the signature and the layout that its project documents, checks what it is given, and computes.
"""

import types

import pytest
import torch
import torch.nn.functional as F

from pyvideo_kernels.benchmarks.peers import attention as peers_attention
from pyvideo_kernels.benchmarks.peers import peers_for
from pyvideo_kernels.benchmarks.peers import torch_attention as peers_torch

from .peers_helpers import CPU, CUDA, GRID, HEAD_DIM, HEADS, attend, check, oracle, qkv

# What is not served, and why ---------------------------------------------------------------------------------------


def refusal(name, inputs, dtype=torch.bfloat16, op="spacetime_attention"):
    return peers_for(op, CUDA, dtype)[name].refuses(inputs)


def test_refusals_name_the_reason(h100, install, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    install("flash-attn-4", "4.0.0b27", {"flash_attn.cute": {"flash_attn_func": never}})
    install("sageattention", "1.0.6", {"sageattention": {"sageattn": never}})
    install("xformers", "0.0.35", {"xformers.ops": {"memory_efficient_attention": never}})
    install("natten", "0.21.6", {"natten": {"attention": never, "na3d": never}})
    install("fastvideo-kernel", "0.3.2", {"fastvideo_kernel": {"sliding_tile_attention": never}})
    dense, window = qkv(), qkv() | {"window": (1, 3, 3)}
    assert "every token" in refusal("flash-attn-4", window)
    assert "head_dim a multiple of 8" in refusal("flash-attn-4", qkv(head_dim=20))
    assert "64, 96 or 128; this is 256" in refusal("sageattention", qkv(head_dim=256))
    assert "KV heads" in refusal("xformers", qkv(kv_heads=1))
    assert "kv_lens" in refusal("sdpa-flash", dense | {"kv_lens": torch.tensor([1, 1])})
    assert "return_lse" in refusal("natten", dense | {"return_lse": True})
    assert refusal("natten", dense) is None and refusal("natten", window) is None
    assert "one window for all heads" in refusal("natten", dense | {"window": ((1, 3, 3), (1, 1, 1))})
    assert "text" in refusal("natten", qkv(text=4) | {"window": (1, 3, 3), "text_len": 4})
    assert "no dense form" in refusal("fastvideo-kernel", dense)
    wide = qkv(head_dim=128) | {"grid": (18, 48, 80), "window": (18, 24, 24), "stride": (6, 8, 8)}
    assert (
        refusal("fastvideo-kernel", wide) is None
        and refusal("fastvideo-kernel", wide | {"window": (6, 48, 80)}) is None
    )
    for change, why in (
        ({"q": dense["q"]}, "head_dim 128"),
        ({"grid": (30, 48, 80)}, "grid 36x48x48 or 18x48x80 without text"),
        ({"text_len": 8}, "grid 30x48x80 with a suffix of at most 256"),
        ({"grid": (30, 48, 80), "text_len": 300}, "at most 256"),
        ({"grid": (30, 48, 80), "text_len": 8, "text_side": "prefix"}, "suffix"),
        ({"window": (12, 24, 24)}, "odd number of 6x8x8 tiles"),
        ({"window": (18, 24, 20)}, "odd number of 6x8x8 tiles"),
        ({"stride": (1, 1, 1)}, "stride of one tile"),
        ({"causal_time": True}, "no causal time"),
    ):
        assert why in refusal("fastvideo-kernel", wide | change)
    assert refusal("fastvideo-kernel", wide | {"grid": (30, 48, 80), "text_len": 256}) is None
    monkeypatch.setattr(peers_torch, "_SCORES_GIB", 1e-9)
    assert "GiB of scores" in refusal("sdpa-math", dense)


@pytest.mark.parametrize(
    ("op", "name", "dtype", "capability", "why"),
    [
        ("spacetime_attention", "flash-attn-4", torch.float32, (9, 0), "takes bfloat16 and float16; this is float32"),
        ("spacetime_attention", "flash-attn-3", torch.bfloat16, (10, 0), "needs sm_90; this is sm_100"),
        ("spacetime_attention", "flash-attn-4", torch.bfloat16, (7, 5), "needs sm_80 or later; this is sm_75"),
        ("spacetime_attention", "sdpa-cudnn", torch.float32, (9, 0), "takes bfloat16 and float16"),
        ("rms_norm", "quack", torch.bfloat16, (8, 0), "needs sm_90 or later; this is sm_80"),
    ],
)
def test_cards_and_dtypes_that_do_not_do(op, name, dtype, capability, why, install, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    install("flash-attn-4", "4.0.0b27", {"flash_attn.cute": {"flash_attn_func": print}})
    install("flash_attn_3", "3.0.0", {"flash_attn_interface": {"flash_attn_func": print}})
    install("quack-kernels", "0.6.4", {"quack": {"rmsnorm": print}})
    one = peers_for(op, CUDA, dtype)[name]
    assert one.call is None and why in one.why_not


def test_a_fused_backend_says_in_torchs_words_what_it_does_not_take(monkeypatch):
    import warnings

    def cannot(params, debug):
        assert debug
        warnings.warn("Flash takes no head_dim 512 (Triggered internally at sdp_utils.cpp:1.)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *_: None)
    monkeypatch.setitem(peers_torch._CAN_USE, "sdpa-flash", cannot)
    view = types.SimpleNamespace(device=CUDA, shape=(1, 2, 3, 4))
    inputs = {name: types.SimpleNamespace(transpose=lambda *_: view) for name in "qkv"}
    assert peers_torch._sdpa_refuses("sdpa-flash", inputs) == "Flash takes no head_dim 512"


def test_modulation_for_each_token_is_no_affine():
    one = peers_for("layer_norm_modulate", CPU, torch.float32)["torch-layer-norm"]
    x, vector = torch.randn(2, 3, 8), torch.randn(1, 1, 8)
    assert "one scale for all tokens" in one.refuses({"x": x, "scale": torch.randn(2, 1, 8), "shift": vector})
    assert "one shift" in one.refuses({"x": x, "scale": vector})
    assert "has one affine" in one.refuses({"x": x, "scale": vector, "shift": vector, "weight": torch.ones(8)})


# Adapters of what cannot be here, against stand-ins ----------------------------------------------------------------


def test_flash_attention_of_every_release(install, h100):
    def four(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None)):
        assert q.shape[1:3] == (24, HEADS) and not causal
        return attend(q, k, v, softmax_scale), torch.empty(0)

    def three(q, k, v, softmax_scale=None, causal=False, qv=None):
        return attend(q, k, v, softmax_scale)

    def two(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        return attend(q, k, v, softmax_scale)

    install("flash-attn-4", "4.0.0b27", {"flash_attn.cute": {"flash_attn_func": four}})
    install("flash_attn_3", "3.0.0", {"flash_attn_interface": {"flash_attn_func": three}})
    install("flash-attn", "2.8.3", {"flash_attn": {"flash_attn_func": two}})
    for name in ("flash-attn-4", "flash-attn-3", "flash-attn-2"):
        one = check(name, qkv(kv_heads=1) | {"scale": 0.2})
        assert one.note is None


def test_sageattention_1_smooths_keys_in_place_unless_told_not_to(install, h100):
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **_):
        assert tensor_layout == "NHD" and k.shape[1] == 24
        if smooth_k:
            k -= k.mean(dim=1, keepdim=True)
        assert k.mean(dim=1).abs().max() < 1e-5, "keys are quantised with their mean"
        return attend(q, k, v, sm_scale)

    install("sageattention", "1.0.6", {"sageattention": {"sageattn": sageattn}})
    one = check("sageattention", qkv() | {"scale": 0.2})
    assert one.version == "1.0.6" and "8-bit" in one.note


def test_sageattention_2(install, h100):
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
        assert tensor_layout == "NHD" and not kwargs
        return attend(q, k, v, sm_scale)

    install("sageattention", "2.2.0", {"sageattention": {"sageattn": sageattn}})
    check("sageattention", qkv(head_dim=80))


def test_xformers(install, h100):
    def attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert query.shape == key.shape == (2, 24, HEADS, HEAD_DIM)  # B, M, H, K
        return attend(query, key, value, scale)

    install("xformers", "0.0.35", {"xformers.ops": {"memory_efficient_attention": attention}})
    check("xformers", qkv() | {"scale": 0.2})


def test_natten_dense_and_windowed(install, h100):
    def attention(query, key, value, is_causal=False, scale=None):
        return attend(query, key, value, scale)

    def na3d(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None):
        assert query.shape[1:4] == GRID and all(k <= n for k, n in zip(kernel_size, GRID, strict=True))
        assert is_causal[1:] == (False, False)
        flat = {"q": query.flatten(1, 3), "k": key.flatten(1, 3), "v": value.flatten(1, 3), "grid": GRID}
        options = {"window": kernel_size, "stride": stride, "causal_time": is_causal[0], "scale": scale}
        return oracle(flat | options).unflatten(1, GRID)

    install("natten", "0.21.6", {"natten": {"attention": attention, "na3d": na3d}})
    check("natten", qkv())
    check("natten", qkv() | {"window": (1, 3, 9), "stride": (1, 2, 1), "causal_time": True, "scale": 0.2})


@pytest.mark.parametrize("text", [0, 5])
def test_fastvideos_sliding_tiles_are_our_windows_with_a_stride(text, install, h100, monkeypatch):
    grid, tile = (6, 6, 4), (2, 2, 2)
    counts, video = [n // size for n, size in zip(grid, tile, strict=True)], 144
    monkeypatch.setattr(peers_attention, "_STA_WITH_TEXT" if text else "_STA_PLAIN", (grid,))
    monkeypatch.setattr(peers_attention, "_STA_TILE", tile)

    def sliding_tile_attention(q, k, v, window_size, text_length, has_text=True, seq_shape="30x48x80"):
        """As its own test defines it: [B, heads, S, head_dim], tile by tile, windows in tiles, centres clamped."""
        assert (text_length, has_text, seq_shape) == (text, text > 0, "6x6x4") and q.shape[1] == HEADS
        at = torch.arange(q.shape[2]) // 8
        is_text = torch.arange(q.shape[2]) >= video
        places = (at // (counts[1] * counts[2]), at // counts[2] % counts[1], at % counts[2])
        masks = []
        for window in window_size:
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
            for place, count, size in zip(places, counts, window, strict=True):
                centre = place.clamp(size // 2, count - 1 - size // 2)
                mask &= (centre[:, None] - place[None, :]).abs() <= size // 2
            masks.append(mask | is_text | is_text[:, None])
        assert len(masks) == HEADS
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.stack(masks))

    install("fastvideo-kernel", "0.3.2", {"fastvideo_kernel": {"sliding_tile_attention": sliding_tile_attention}})
    inputs = qkv(grid, head_dim=128, text=text) | {"stride": tile, "text_len": text}
    check("fastvideo-kernel", inputs | {"window": (6, 2, 2)})
    check("fastvideo-kernel", inputs | {"window": ((2, 6, 4), (6, 6, 2))})


def test_norms(install, h100):
    def liger(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert offset == 0.0 and not in_place and casting_mode == "gemma"
        return F.rms_norm(X, X.shape[-1:], W, eps)

    def quack(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False):
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    def flashinfer(input, weight, eps=1e-6, out=None, enable_pdl=None):
        assert input.dim() == 2 and weight.dtype == input.dtype
        return F.rms_norm(input, input.shape[-1:], weight, eps)

    install("liger_kernel", "0.8.2", {"liger_kernel.transformers.functional": {"liger_rms_norm": liger}})
    install("quack-kernels", "0.6.4", {"quack": {"rmsnorm": quack}})
    install("flashinfer-python", "0.6.18", {"flashinfer.norm": {"rmsnorm": flashinfer}})
    x = torch.randn(2, 5, 32)
    for name in ("liger-kernel", "quack", "flashinfer"):
        check(name, {"x": x, "weight": torch.randn(32), "eps": 0.5}, op="rms_norm")
    mixed = {"x": x.bfloat16(), "weight": torch.randn(32)}
    assert "dtype of x" in refusal("flashinfer", mixed, op="rms_norm")
    assert refusal("quack", mixed, op="rms_norm") is None
    for name in ("liger-kernel", "flashinfer"):
        assert "needs a weight" in refusal(name, {"x": x}, op="rms_norm")
