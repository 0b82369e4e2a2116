"""Adapters of external kernels: those that run on a CPU against eager code, the others against stand-ins.

A stand-in has the signature and the layout that its project documents, checks what it is given, and computes.
"""

import dataclasses
import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import pyvideo_kernels as pv
from pyvideo_kernels.benchmarks import peer, peers_attention, peers_torch
from pyvideo_kernels.benchmarks.peer import Package, order
from pyvideo_kernels.benchmarks.peers import detect, peers_for
from pyvideo_kernels.benchmarks.registry import ENTRIES

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GRID, HEADS, HEAD_DIM = (2, 3, 4), 2, 64
SIZES = {
    "tokens": 6, "width": 32, "heads": 2, "grid": (2, 4, 4), "channels": 8, "head_dim": 16, "shape": (1, 4, 2, 4, 4),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh():
    peer._find.cache_clear()
    yield
    peer._find.cache_clear()


@pytest.fixture
def h100(monkeypatch):
    """A machine whose first card is an sm_90, as far as adapters ask."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


@pytest.fixture
def install(monkeypatch):
    """Put stand-ins for packages in place: ``install("natten", "0.21.6", {"natten": {"attention": f}})``."""
    versions, fakes = {}, set()
    monkeypatch.setattr(peer, "installed", versions.get)
    monkeypatch.setattr(peer, "_importable", fakes.__contains__)  # whatever this machine has

    def put(distribution, version, modules):
        if version is not None:
            versions[distribution] = version
        for name, attributes in modules.items():
            for depth in range(1, name.count(".") + 2):
                path = ".".join(name.split(".")[:depth])
                fakes.add(path)
                if path not in modules and path in sys.modules:
                    continue
                module = types.ModuleType(path)
                module.__spec__ = importlib.machinery.ModuleSpec(path, None)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, path, module)
            for attribute, value in attributes.items():
                setattr(sys.modules[name], attribute, value)

    return put


def qkv(grid=GRID, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, text=0):
    torch.manual_seed(0)
    tokens = grid[0] * grid[1] * grid[2] + text
    q = torch.randn(2, tokens, heads, head_dim)
    k, v = (torch.randn(2, tokens, kv_heads, head_dim) + 1 for _ in range(2))
    return {"q": q, "k": k, "v": v, "grid": grid}


def oracle(inputs):
    return pv.spacetime_attention(**inputs, impl="reference")


def check(name, inputs, device=CUDA, dtype=torch.bfloat16, op="spacetime_attention"):
    """The adapter takes the inputs, leaves them as they were, and returns what our op returns."""
    one = peers_for(op, device, dtype)[name]
    assert one.why_not is None and one.refuses(inputs) is None
    before = {key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    expected = getattr(pv, op)(**inputs, impl="reference")
    for given in (inputs, one.prepare(inputs)):
        torch.testing.assert_close(one.call(given), expected, rtol=1e-4, atol=1e-4)
    for key, value in before.items():
        assert torch.equal(inputs[key], value), f"{name} changed {key}"
    return one


def attend(q, k, v, scale=None):
    """[B, S, heads, head_dim] in and out."""
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


# Here, on a CPU -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", sorted(ENTRIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peers_that_run_here_compute_what_eager_code_does(op, dtype, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled: the adapter is in question; the compiler has a test of its own.
    monkeypatch.setattr(peers_torch, "_compiled_flex", lambda: flex_attention)
    torch.manual_seed(0)
    entry = ENTRIES[op]
    inputs = entry.inputs(**{key: SIZES[key] for key in next(iter(entry.cpu.values()))}, dtype=dtype, device=CPU)
    expected = getattr(pv, op)(**inputs, impl="reference")
    bound = 1e-4 if dtype == torch.float32 else 4e-2
    for one in peers_for(op.removesuffix("_"), CPU, dtype).values():
        assert (one.call is None) == (one.why_not is not None)
        if one.call is not None and one.refuses(inputs) is None:
            with torch.inference_mode():
                out = one.call(one.prepare(inputs))
            assert out.dtype == dtype
            torch.testing.assert_close(out, expected, rtol=bound, atol=bound)


def test_what_runs_on_a_cpu():
    assert {n for n, p in peers_for("spacetime_attention", CPU, torch.float32).items() if not p.why_not} == {
        "sdpa-flash", "sdpa-math", "flex",
    }  # fmt: skip
    for op, name in (
        ("layer_norm_modulate", "torch-layer-norm"), ("rms_norm_silu", "torch-rms-norm"),
        ("patch_embed3d", "unfold-linear"), ("causal_conv3d", "conv3d-channels-last"),
    ):  # fmt: skip
        assert peers_for(op, CPU, torch.float32)[name].why_not is None
    assert peers_for("gate_residual", CPU, torch.float32) == {}
    # Installing it would not help.
    assert peers_for("spacetime_attention", CPU, torch.float32)["natten"].why_not == "needs a CUDA GPU"
    assert peers_for("rms_norm", CPU, torch.float32)["quack"].why_not == "needs a CUDA GPU"


@pytest.mark.slow
def test_flex_attention_compiled_with_windows_of_each_head():
    inputs = qkv() | {"window": ((1, 3, 2), (2, 1, 4)), "stride": (1, 1, 2), "causal_time": True}
    one = check("flex", inputs, CPU, torch.float32)
    assert one.version == f"torch {torch.__version__}"


@pytest.mark.parametrize(
    "options",
    [
        {"window": (1, 2, 3), "stride": (1, 1, 2), "text_len": 3},
        {"window": (2, 3, 2), "text_len": 3, "text_side": "prefix"},
        {"causal_time": True, "scale": 0.3},
    ],
)
def test_flex_attention_has_our_windows(options, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(peers_torch, "_compiled_flex", lambda: flex_attention)
    check("flex", qkv(text=options.get("text_len", 0)) | options, CPU, torch.float32)


@pytest.mark.parametrize("cached", [0, 1, 2])
def test_convolution_reads_its_past(cached):
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(1, 3, 4, 5, 6), "weight": torch.randn(7, 6, 3, 3, 3), "bias": torch.randn(7),
        "stride": (1, 2, 1), "residual": torch.randn(1, 3, 2, 5, 7),
    }  # fmt: skip
    if cached:
        inputs["cache"] = torch.randn(1, cached, 4, 5, 6)
    one = check("conv3d-channels-last", inputs, CPU, torch.float32, op="causal_conv3d")
    assert one.prepare(inputs)["weight"].is_contiguous(memory_format=torch.channels_last_3d)


def test_pinned_backends_are_pinned(monkeypatch):
    pinned = []
    real = peers_torch.sdpa_kernel
    monkeypatch.setattr(peers_torch, "sdpa_kernel", lambda backend: pinned.append(backend.name) or real(backend))
    for name in ("sdpa-flash", "sdpa-math"):
        check(name, qkv(kv_heads=1), CPU, torch.float32)
    assert set(pinned) == {"FLASH_ATTENTION", "MATH"}


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
    assert "30x48x80" in refusal("fastvideo-kernel", window)
    assert "odd number of 6x8x8 tiles" in refusal(
        "fastvideo-kernel", dense | {"grid": (18, 48, 80), "window": (12, 24, 24), "stride": (6, 8, 8)}
    )
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


# Packages: found, named, loaded ------------------------------------------------------------------------------------


def test_nothing_is_installed_here_and_each_says_how_to_get_it(install):
    for load in (True, False):
        rows = detect(load)
        assert {"flash-attn-4", "sageattention", "fastvideo-kernel", "natten", "xformers"} <= {
            name for name, *_ in rows
        }
        assert all(version is None and why.startswith("not installed: pip install") for _, version, why in rows)


def test_a_package_that_does_not_load_says_why(tmp_path, monkeypatch, h100, capsys):
    (tmp_path / "built_for_another_torch.py").write_text(
        "print('welcome'); raise OSError('undefined symbol: _ZN2at4_ops')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peer, "installed", {"xformers": "0.0.29"}.get)
    package = dataclasses.replace(peers_attention.XFORMERS, modules=("built_for_another_torch",))
    monkeypatch.setattr(peers_attention, "XFORMERS", package)
    one = peers_for("spacetime_attention", CUDA, torch.bfloat16)["xformers"]
    assert one.version == "0.0.29" and one.call is None
    assert "cannot be imported (OSError: undefined symbol" in one.why_not
    out, err = capsys.readouterr()
    assert out == "" and "welcome" in err


def test_a_package_without_the_function_says_so(install):
    install("natten", "0.17.5", {"natten": {}})
    assert peers_attention.NATTEN.find() == peer.Found("0.17.5", None, "natten 0.17.5: natten has no attention")


def test_flash_attention_4_alone_is_not_taken_for_2(install):
    install("flash-attn-4", "4.0.0b27", {"flash_attn.cute": {"flash_attn_func": print}})
    assert peers_attention.FLASH4.find().function is print
    assert peers_attention.FLASH2.find().why_not.startswith("not installed")


def test_a_version_nobody_has_read_is_tried_and_named(install, h100):
    install("flash-attn-4", "4.1.0", {"flash_attn.cute": {"flash_attn_func": lambda q, k, v, **_: attend(q, k, v)}})
    one = check("flash-attn-4", qkv())
    assert one.version == "4.1.0" and "written for flash-attn-4 4.0.0b0 to 4.0.0b27" in one.note


def test_versions_are_ordered():
    ordered = ["2.9", "3.0.0.b1", "3.0.0", "4.0.0.dev1", "4.0.0b0", "4.0.0b9", "4.0.0b27", "4.0.0rc1", "4.0.0", "4.0.1"]
    assert sorted(reversed(ordered), key=order) == ordered
    assert order("2.11.0+cu130") == order("2.11")
    package = Package("x", "x", ("x",), "f", "pip install x", ("1.0.6", "2.2.0"))
    assert package.missing() == "not installed: pip install x"


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


def test_fastvideos_sliding_tiles_are_our_windows_with_a_stride(install, h100, monkeypatch):
    grid, tile = (6, 6, 4), (2, 2, 2)
    counts = [n // size for n, size in zip(grid, tile, strict=True)]
    monkeypatch.setattr(peers_attention, "_STA_CANVASES", (grid,))
    monkeypatch.setattr(peers_attention, "_STA_TILE", tile)

    def sliding_tile_attention(q, k, v, window_size, text_length, has_text=True, seq_shape="30x48x80"):
        """As its own test defines it: [B, heads, S, head_dim], tile by tile, windows in tiles, centres clamped."""
        assert (text_length, has_text, seq_shape) == (0, False, "6x6x4") and q.shape[1] == HEADS == len(window_size)
        at = torch.arange(q.shape[2]) // 8
        places = (at // (counts[1] * counts[2]), at // counts[2] % counts[1], at % counts[2])
        masks = []
        for window in window_size:
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
            for place, count, size in zip(places, counts, window, strict=True):
                centre = place.clamp(size // 2, count - 1 - size // 2)
                mask &= (centre[:, None] - place[None, :]).abs() <= size // 2
            masks.append(mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.stack(masks))

    install("fastvideo-kernel", "0.3.2", {"fastvideo_kernel": {"sliding_tile_attention": sliding_tile_attention}})
    check("fastvideo-kernel", qkv(grid) | {"window": (6, 2, 2), "stride": tile})
    check("fastvideo-kernel", qkv(grid) | {"window": ((2, 6, 2), (6, 6, 2)), "stride": tile})


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


def test_modulation_for_each_token_is_no_affine():
    one = peers_for("layer_norm_modulate", CPU, torch.float32)["torch-layer-norm"]
    x, vector = torch.randn(2, 3, 8), torch.randn(1, 1, 8)
    assert "one scale for all tokens" in one.refuses({"x": x, "scale": torch.randn(2, 1, 8), "shift": vector})
    assert "one shift" in one.refuses({"x": x, "scale": vector})
    assert "has one affine" in one.refuses({"x": x, "scale": vector, "shift": vector, "weight": torch.ones(8)})
