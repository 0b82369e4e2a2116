"""Peers that run on a CPU compute what eager code does; packages are found and named, or said to be missing.

The adapters of kernels that a CPU cannot run are tested in test_peer_adapters.py.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels.benchmarks.peers import attention as peers_attention
from pyvideo_kernels.benchmarks.peers import detect, peers_for
from pyvideo_kernels.benchmarks.peers import package as peer
from pyvideo_kernels.benchmarks.peers import torch_attention as peers_torch
from pyvideo_kernels.benchmarks.peers.package import Package, order
from pyvideo_kernels.benchmarks.registry import ENTRIES

from .peers_helpers import CPU, CUDA, attend, check, qkv

SIZES = {
    "tokens": 6, "width": 32, "heads": 2, "grid": (2, 4, 4), "channels": 8, "head_dim": 16, "shape": (1, 4, 2, 4, 4),
    "tile": (1, 8, 8), "sparsity": 0.5, "out": 8, "ffn": 48,
}  # fmt: skip


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


@pytest.mark.parametrize("other", [{"epilogue": "interleave"}, {"pad_mode": "replicate"}, {"pad_end": 1}])
def test_a_convolution_with_an_epilogue_is_not_the_librarys(other):
    one = peers_for("causal_conv3d", CPU, torch.float32)["conv3d-channels-last"]
    assert one.refuses({"residual": None}) is None and "pads with zeros" in one.refuses(other)


def test_pinned_backends_are_pinned(monkeypatch):
    pinned = []
    real = peers_torch.sdpa_kernel
    monkeypatch.setattr(peers_torch, "sdpa_kernel", lambda backend: pinned.append(backend.name) or real(backend))
    for name in ("sdpa-flash", "sdpa-math"):
        check(name, qkv(kv_heads=1), CPU, torch.float32)
    assert set(pinned) == {"FLASH_ATTENTION", "MATH"}


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


def test_the_page_names_every_peer(h100):
    section = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text().split("## Peers")[1].split("\n## ")[0]
    table = {line.split("|")[1] for line in section.splitlines() if line.startswith("| `")}
    named = {name for cell in table for name in re.findall("`([^`]+)`", cell)}
    known = {name for op in ENTRIES for device in (CPU, CUDA) for name in peers_for(op, device, torch.float32)}
    assert named == known
