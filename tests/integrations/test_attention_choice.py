"""What attention= may say: spellings, refusals, the command line, files of options and the benchmarks' variants."""

import json

import pytest
import torch
from typer.testing import CliRunner

import pyvideo_kernels as pv
from pyvideo_kernels import _native
from pyvideo_kernels.attention_choice import DENSE
from pyvideo_kernels.attention_text import choose
from pyvideo_kernels.benchmarks.e2e.variants import parse
from pyvideo_kernels.errors import UnsupportedError, UsageError, ValueOptionError
from pyvideo_kernels.integrations import swap
from pyvideo_kernels.sampler import Sampler, Settings
from pyvideo_kernels.sampler.cli import app
from pyvideo_kernels.sampler.settings import read_config
from pyvideo_kernels.sampler.video import read_metadata
from pyvideo_kernels.tiny import MODEL_DIR

from .helpers import inputs, run, tiny, used

GRID = (2, 2, 3)
WINDOW = (3, 3, 2)
TINY_CONFIG = json.loads((MODEL_DIR / "transformer" / "config.json").read_text())
TINY_LAYERS = TINY_CONFIG["num_layers"]
SENTENCE = "a red ball moves left on a black background"


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("sparse", r"must be one of dense, int8, fp8, none, or KEY=VALUE.*got 'sparse'"),
        ({"windw": (3, 3, 3)}, r"no key 'windw' \(did you mean 'window'\?\); there are window, stride"),
        ("window=3x3", r"`window` must be three sizes .*; got \[3, 3\]"),
        ({"window": (3, 0, 3)}, "`window` must be tokens, an integer of at least 1, or a share .*; got 0"),
        ({"window": (3, 1.5, 3)}, "a float above 0 and at most 1; got 1.5"),
        ({"window": (3, True, 3)}, "got True"),
        ({"window": [(3, 3, 3)] * 3}, "`window` must be one row, or one for each of 2 heads; got 3"),
        ({"window": (3, 3, 3), "top_k": 2}, "`window` and `top_k` exclude each other"),
        ("top_k=2,share=0.5", "`top_k` and `share` exclude each other"),
        ({"stride": (1, 2, 2)}, "`stride` goes with window"),
        ({"window": (3, 3, 3), "stride": (1, 4, 1)}, r"`stride` must be at most the window \(3, 3, 3\)"),
        ({"window": (3, 3, 3), "tile": (4, 4, 4)}, "`tile` goes with top_k or share"),
        ({"top_k": 2, "tile": (4, 4, 5)}, "`tile` must be 64 or 128 tokens in all"),
        ({"top_k": 0}, "`top_k` must be tiles, an integer of at least 1"),
        ("share=1.1", "`share` must be a share of the attention mass"),
        ("top_k=2,precision=int8", "`precision` int8 goes with window or alone"),
        ("int4", r"got 'int4' \(did you mean 'int8'\?\)"),
        ({"precision": "int4"}, r"`precision` must be native, int8, fp8; got 'int4'"),
        ("dense,dense_steps=2", "dense attention needs no dense_layers and dense_steps"),
        ({"dense_steps": 2}, "give window, top_k, share or precision"),
        ("window=3x3x3,dense_steps=1.5", "`dense_steps` must be steps, an integer of at least 0, or a share"),
        ("window=3x3x3,dense_layers=4-2", "ranges that go up"),
        ({"window": (3, 3, 3), "dense_layers": [2]}, "names block 2; there are 2, 0 to 1"),
        ({"window": (3, 3, 3), "dense_layers": 1, "layers": {0: "dense"}}, "block 0 is named twice"),
        ({"layers": {0: {"window": (3, 3, 3), "dense_steps": 1}}}, "`layers` 0 must be what these blocks run"),
        ({"layers": {"a-b": "dense"}}, "`layers` 'a-b' must be a number of blocks, or indices"),
        (7, "must be one of dense"),
        ("window=3x3x3,window=1x1x1", "`window` is given twice"),
    ],
)
def test_refused_before_anything_is_changed(choice, words):
    model = tiny()
    with pytest.raises(ValueOptionError, match=f"accelerate: `attention`.*{words}"):
        pv.accelerate(model, attention=choice)
    assert not list(swap.swapped(model))


def test_the_ops_of_an_attention_must_be_asked_for():
    with pytest.raises(ValueOptionError, match="window 3×3×2 needs spacetime_attention among `ops`"):
        pv.accelerate(tiny(), ops=["rms_norm"], attention={"window": WINDOW})
    with pytest.raises(ValueOptionError, match="needs block_mean, spacetime_attention among"):
        pv.accelerate(tiny(), ops=["block_sparse_attention"], attention={"top_k": 1, "dense_steps": 1})
    ops = ["block_mean", "block_sparse_attention"]
    model = tiny()
    report = pv.accelerate(model, ops=ops, attention={"top_k": 1}, strict=True)
    run(model, inputs())
    assert used(report) == set(ops)


@pytest.mark.parametrize("choice", ["int8", "fp8", {"window": WINDOW, "precision": "int8"}])
def test_a_precision_is_what_the_op_has(choice):
    """Refused by name as long as the op refuses it, and not longer."""
    precision = choose(choice).base.precision
    q = torch.randn(1, 12, 2, 16)
    try:
        pv.spacetime_attention(q, q, q, grid=GRID, precision=precision)
    except UnsupportedError:
        with pytest.raises(UnsupportedError, match=f"accelerate: attention '{precision}': spacetime_attention"):
            pv.accelerate(tiny(), attention=choice)
    else:
        report = pv.accelerate(tiny(), attention=choice, strict=True)
        assert precision in report.to_dict()["modules"]["blocks.0.attn1"]["attention"]


def test_spellings_say_the_same():
    assert choose("none") is None and choose(None) is None
    assert choose("dense").base == DENSE and choose("dense") == choose({"precision": "native"})
    pairs = [
        ("window=9x15x26,stride=1x3x1,dense_steps=0.1,dense_layers=0-1+29",
         {"window": [9, 15, 26], "stride": (1, 3, 1), "dense_steps": 0.1, "dense_layers": {0, 1, 29}}),
        ("window=1x2x3/4x5x0.5,dense_layers=2", {"window": [[1, 2, 3], [4, 5, 0.5]], "dense_layers": [0, 1]}),
        ("int8,dense_layers=1", {"precision": "int8", "dense_layers": (0,)}),
        ("share=0.9,tile=4x8x4", {"share": 0.9, "tile": [4, 8, 4]}),
    ]  # fmt: skip
    for text, mapping in pairs:
        choice = choose(text)
        assert choice == choose(mapping) == choose(choice) == choose(choice.to_dict()), text
    layers = choose({"window": (1, 2, 3), "layers": {"2-3+7": "dense", (4, 5): {"top_k": 0.2}}})
    assert choose(layers.to_dict()) == layers and str(layers) == (
        "window 1×2×3; blocks 2-3+7 dense; blocks 4-5 top 0.2 of the tiles of 4×4×4"
    )


def test_verify_is_for_what_the_model_computes():
    result = CliRunner().invoke(app, ["verify", "--attention", "window=0.5x0.5x0.5"])
    assert result.exit_code == 2 and "window 0.5×0.5×0.5 is meant to differ: use dense" in result.stderr
    exact = [choose("dense"), choose({"layers": {0: "dense"}})]
    assert all(choice.exact for choice in exact) and not choose({"layers": {0: "int8"}}).exact


def test_the_plan_checks_it_against_the_model_and_counts_what_is_left():
    heads, blocks = TINY_CONFIG["num_attention_heads"], TINY_LAYERS
    sampler = Sampler(Settings(prompt=SENTENCE))

    def tflop(attention):
        return sampler.plan(Settings(prompt=SENTENCE, steps=4, attention=attention)).tflop

    grid, width = (5, 4, 4), heads * TINY_CONFIG["attention_head_dim"]
    dense = tflop(None)
    assert tflop("dense") == tflop("window=1.0x1.0x1.0") == tflop("share=0.5") == dense
    # Two guided calls in each of three sparse steps, all blocks but two, all but 12 of 80 keys left out.
    pairs = (5 * 4 * 4) ** 2
    saved = 2 * 3 * (blocks - 2) * 4 * pairs * width * (1 - (3 * 2 * 2) / 80) / 1e12
    assert dense - tflop("window=3x2x2,dense_steps=1,dense_layers=2") == pytest.approx(saved)
    assert choose("top_k=1").density(grid, blocks, 4) == pytest.approx(1 / 2)  # two tiles
    with pytest.raises(UsageError, match=f"--attention: tiny: names block {blocks}; there are {blocks}"):
        tflop({"top_k": 1, "dense_layers": [blocks]})
    with pytest.raises(UsageError, match=f"one for each of {heads} heads; got {heads + 1}"):
        tflop({"window": [(1, 1, 1)] * (heads + 1)})


# The command line, files of options, and the benchmarks' variants -----------------------------------------------------


def test_the_command_line_takes_it(tmp_path, monkeypatch):
    out, stats = tmp_path / "film.gif", tmp_path / "stats.json"
    text = "window=0.5x0.5x0.5,dense_steps=1,dense_layers=2"
    command = ["sample", SENTENCE, "--steps", "2", "--output", str(out), "--stats", str(stats)]
    result = CliRunner().invoke(app, [*command, "--attention", text])
    assert result.exit_code == 0, (result.output, result.exception)
    plan = result.stderr.splitlines()[0]
    assert plan.endswith("attention window 0.5×0.5×0.5; first step dense; blocks 0-1 dense")
    (entry,) = json.loads(stats.read_text())["runs"]
    asked = {"window": [0.5, 0.5, 0.5], "dense_steps": 1, "dense_layers": 2}
    assert entry["attention"] == asked == read_metadata(out)["attention"] and choose(asked) == choose(text)
    modules, layers = entry["accelerate"]["modules"], TINY_LAYERS
    assert modules["transformer.blocks.1.attn1"]["attention"] == "dense"
    shown = modules[f"transformer.blocks.{layers - 1}.attn1"]["attention"]
    assert shown == "window 3×2×2 of 5×4×4, 85 % sparse; first step dense"
    # Two steps, each one call with both halves of guidance; the first is dense.
    calls, windowed = entry["calls"]["spacetime_attention"], layers - 2
    assert sum(calls.values()) == 2 * layers
    # On a CPU: windows are compiled, and dense attention where the CPU multiplies bf16.
    assert calls["cpu"] in (windowed, 2 * layers) if _native.available() else calls["reference"] == windowed
    assert not entry["accelerate"]["fallbacks"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("windw=3x3x3", "--attention: there is no key 'windw' (did you mean 'window'?)"),
        ("window=3x3", "--attention: `window` must be three sizes"),
        ("flash", "--attention must be one of dense, int8, fp8, none, or KEY=VALUE"),
        ("window=3x3x3,dense_steps=two", "--attention: `dense_steps` must be a number"),
    ],
)
def test_the_command_line_refuses_it_in_a_sentence(text, words, monkeypatch):
    monkeypatch.setattr(Sampler, "__init__", lambda *_: pytest.fail("work was begun"))
    result = CliRunner().invoke(app, ["sample", SENTENCE, "--attention", text])
    assert result.exit_code == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1


def test_files_and_python_take_a_mapping(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("attention:\n  top_k: 0.2\n  dense_steps: 4\n  layers: {28-29: dense}\n")
    (given,) = read_config(config).values()
    choice = choose(given)
    assert (choice.base.top_k, choice.dense_steps, choice.layer(29)) == ((1, 5), 4, DENSE)
    assert Settings(prompt="x", attention=given).check().attention == given
    config.write_text("attention: 3\n")
    with pytest.raises(UsageError, match="attention must be of type str or mapping; got 3"):
        read_config(config)
    with pytest.raises(UsageError, match="--attention: `top_k` must be tiles"):
        Settings(prompt="x", attention={"top_k": 0}).check()
    with pytest.raises(UsageError, match="--eager runs diffusers' own modules"):
        Settings(prompt="x", attention={"top_k": 1}, eager=True).check()


def test_a_variant_takes_the_same_text():
    variant = parse("ours:attention=window=0.5x0.5x0.5,dense_steps=4,impl=auto,strict=true")
    assert variant.name == "ours:attention=window=0.5x0.5x0.5,dense_steps=4,impl=auto,strict=true"
    assert variant.accelerate == {"attention": "window=0.5x0.5x0.5,dense_steps=4", "impl": "auto", "strict": True}
    assert parse("compile+ours:attention=int8").accelerate == {"attention": "int8"}
    assert parse("ours:attention=none").accelerate == {"attention": None}
    for text, words in (
        ("ours:attention=windw=3x3x3", "attention: there is no key 'windw' \\(did you mean 'window'"),
        ("ours:window=3x3x3", "ours has no key 'window'"),
        ("ours:attention=flash", "attention must be one of dense"),
        ("ours:attention=top_k=2,impl=auto,tile=4x4x4", "ours has no key 'tile'"),
    ):
        with pytest.raises(ValueOptionError, match=words):
            parse(text)
