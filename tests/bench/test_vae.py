"""`bench vae`: what a decode asks for, counted; its variants, checked and timed; its file and its table."""

import json

import pytest
import torch
from typer.testing import CliRunner

from pyvideo_kernels import dispatch
from pyvideo_kernels.benchmarks import models, results, vae
from pyvideo_kernels.benchmarks.cli import app
from pyvideo_kernels.benchmarks.vae import tables
from pyvideo_kernels.benchmarks.vae.session import count
from pyvideo_kernels.benchmarks.vae.traffic import Traffic, touched

TINY = {"model": "tiny-random-wan", "height": 32, "width": 32, "frames": 5, "device": "cpu", "dtype": "fp32"}


# What a program asks for ----------------------------------------------------------------------------------------------


def test_kernels_bytes_and_flops_of_single_operations():
    meta = {"device": "meta", "dtype": torch.bfloat16}
    x, w = torch.empty(2, 3, 8, 8, **meta), torch.empty(5, 3, 3, 3, **meta)
    with Traffic() as traffic:
        y = torch.nn.functional.conv2d(x, w, padding=1)
        y.permute(0, 2, 3, 1)[:, 1:].unflatten(1, (7, 1))  # views are free
        z = y.add_(1)
        z.copy_(y)
        y + torch.empty(5, 1, 1, **meta).expand(5, 8, 8)
    conv, add, copy, broadcast = traffic.rows
    assert (conv.read, conv.written) == (2 * (x.numel() + w.numel()), 2 * y.numel())
    assert conv.flops == 2 * y.numel() * w[0].numel()
    assert (add.read, add.written, add.flops) == (2 * y.numel(), 2 * y.numel(), 0)
    assert (copy.read, copy.written) == (2 * y.numel(), 2 * y.numel())
    # An expanded dimension is read once.
    assert broadcast.read == 2 * y.numel() + 2 * 5 and touched(torch.empty(0, 4)) == 0
    assert traffic.kernels == 4 and traffic.bytes == sum(row.read + row.written for row in traffic.rows)


def test_a_convolution_of_ours_counts_as_the_stock_one():
    import pyvideo_kernels as pv

    meta = {"device": "meta", "dtype": torch.bfloat16}
    x, w = torch.empty(1, 4, 6, 7, 16, **meta), torch.empty(32, 16, 3, 3, 3, **meta)
    with Traffic() as stock:
        torch.nn.functional.conv3d(x.permute(0, 4, 1, 2, 3), w, padding=1)
    with Traffic() as ours:
        pv.causal_conv3d(x, w)
        pv.causal_conv3d(x, w, epilogue="interleave")
    (stock,), (plain, interleaved) = stock.rows, ours.rows
    assert plain.op == "pyvideo::causal_conv3d" and plain.flops == interleaved.flops == stock.flops
    assert plain.read + plain.written == stock.read + stock.written


def test_the_stock_decoder_of_wan_moves_and_computes_what_is_known_of_it():
    clip = models.architecture("wan2.1-1.3b").clip(480, 832, 81)
    eager = count(clip, torch.bfloat16, ours=False)
    # 275 TFLOP and 2.4 TB, computed by hand from the layers.
    assert eager.flops == pytest.approx(275e12, rel=0.01)
    assert eager.bytes == pytest.approx(2.4e12, rel=0.06)


def test_our_decoder_of_wan_makes_no_pass_that_can_be_folded():
    clip = models.architecture("wan2.1-1.3b").clip(480, 832, 81)
    ours = count(clip, torch.bfloat16, ours=True)
    # Computed by hand, in GB: pads, caches and norms as passes 742; pads and caches read where they lie 485; bias and
    # residual in the convolution 399; the next norm there too 301; upsampling and interleaving of frames folded 259.
    assert ours.bytes < 1.06 * 259e9
    # Doubling before a 3x3 convolution, as four convolutions of 2x2 taps: 4.6 % less to compute.
    assert ours.flops == pytest.approx((1 - 0.046) * 275e12, rel=0.01)
    by_op = ours.by_op()
    assert (
        "aten::constant_pad_nd" not in by_op
        and "aten::silu" not in by_op
        and "aten::_upsample_nearest_exact2d" not in by_op
    )
    # What is still copied: pasts of a single frame, at the smallest size.
    copied = sum(by_op.get(f"aten::{op}", (0, 0, 0))[1] for op in ("cat", "clone", "copy_"))
    assert copied < 0.02 * ours.bytes
    # 33 convolutions, 3 upsamplings, an attention and a head a latent frame; norms that no convolution can carry.
    assert ours.kernels < 21 * 75


def test_the_command_counts_without_decoding(tmp_path):
    arguments = ["vae", "--count", "-o", str(tmp_path)]
    arguments += [part for key, value in TINY.items() for part in (f"--{key}", str(value))]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "| ours |" in done.stdout and "copy speed" not in done.stdout
    assert not list(tmp_path.iterdir())


# Variants -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    return vae.run(vae.Request(**TINY))


def test_every_variant_is_checked_timed_and_counted(result):
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == ["eager", "channels_last", "ours"] and result["kind"] == "vae" and "interrupted" not in result
    assert all(row["seconds"] > 0 and row["quality"]["error"] < 1e-5 for row in rows.values())
    assert rows["eager"]["ratio"] == 1 and rows["ours"]["ratio"] == rows["eager"]["seconds"] / rows["ours"]["seconds"]
    assert any(name.startswith("causal_conv3d/") for name in rows["ours"]["calls"]) and not rows["eager"]["calls"]
    assert rows["ours"]["fallbacks"] == {}
    assert rows["ours"]["counts"]["kernels"] < rows["eager"]["counts"]["kernels"]
    layers = {layer["layer"]: layer for layer in rows["eager"]["layers"]}
    assert {"conv_in", "mid_block.resnets.0", "mid_block.attentions.0", "conv_out", "rest"} <= set(layers)
    # A call for each of the two latent frames.
    assert layers["conv_in"]["calls"] == 2


def test_the_float32_decoder_leaves_the_weights_as_they_are():
    (eager, ours) = vae.run(vae.Request(**TINY | {"dtype": "bf16", "variants": ("ours",), "layers": False}))["rows"]
    assert 0 < eager["quality"]["error"] < 0.1 and ours["quality"]["error"] <= 2 * eager["quality"]["error"]


def test_the_file_and_its_table(result, tmp_path):
    path = results.write(tmp_path / f"{tables.stem(result)}.json", result)
    assert path.name == "vae-tiny-random-wan-32x32x5-fp32-cpu.json" and results.read(path) == json.loads(
        path.read_text()
    )
    page = tables.markdown(result)
    assert "| ours |" in page and "| up_blocks.3.resnets.0 |" in page and "s at copy speed" in page


def test_a_wrong_variant_has_no_speed(monkeypatch, tmp_path):
    right = dispatch.load(dispatch_op := _op("causal_conv3d"), "cpu")

    def wrong(*args):
        out = right(*args)
        return (out[0] * 1.01, *out[1:]) if isinstance(out, tuple) else out * 1.01

    monkeypatch.setitem(dispatch._functions, (dispatch_op.name, "cpu"), wrong)
    arguments = ["vae", "--ab", "ours", "--no-layers", "-o", str(tmp_path)]
    arguments += [part for key, value in TINY.items() for part in (f"--{key}", str(value))]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    (path,) = tmp_path.glob("*.json")
    eager, ours = json.loads(path.read_text())["rows"]
    assert "seconds" in eager and "seconds" not in ours and "wrong frames" in ours["error"]


def _op(name):
    from pyvideo_kernels.schemas import OPS

    return OPS[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"variants": ("our",)}, "--ab must be one of .*'our'.*ours"),
        ({"rounds": 2}, "--rounds must be 3 or more"),
        ({"dtype": "bf8"}, "--dtype must be one of"),
        ({"model": "wan"}, "not a known architecture"),
        ({"height": 30}, "--height must be a multiple of"),
        ({"device": "tpu"}, "--device must be"),
    ],
)
def test_mistakes_are_named_before_any_work(change, words, monkeypatch):
    monkeypatch.setattr(vae, "Session", None)
    with pytest.raises(Exception, match=words) as caught:
        vae.run(vae.Request(**{**TINY, **change}))
    assert type(caught.value).__module__.startswith("pyvideo_kernels")


def test_layers_are_the_parts_without_lists():
    from torch import nn

    from pyvideo_kernels.benchmarks.vae.layers import layers_of

    block = nn.Sequential(nn.Conv1d(1, 1, 1), nn.SiLU())
    stage = nn.Module()
    stage.resnets = nn.ModuleList([block, nn.Linear(1, 1)])
    decoder = nn.Module()
    decoder.conv_in, decoder.stage, decoder.act = nn.Conv1d(1, 1, 1), stage, nn.SiLU()
    assert [name for name, _ in layers_of(decoder)] == ["conv_in", "stage.resnets.0", "stage.resnets.1"]
