"""Launch configurations: tuned tables, forcing, candidates and what is legal."""

import dataclasses
import json
import warnings

import pytest
import torch

from pyvideo_kernels.configs import arch_for, causal_conv3d, forced_arch, forced_config, row, spacetime_attention, tuned
from pyvideo_kernels.configs.elementwise import FlatConfig, TileConfig
from pyvideo_kernels.configs.final_layer import Config as FinalConfig
from pyvideo_kernels.configs.patch_embed3d import Config as EmbedConfig
from pyvideo_kernels.configs.qk_norm_rope import Config as QkConfig
from pyvideo_kernels.configs.row import RowConfig, SumConfig
from pyvideo_kernels.errors import UnsupportedError, ValueOptionError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import samples
from pyvideo_kernels.testing.static import ARCHS

from . import helpers

NAME = "NVIDIA H100 80GB HBM3"
GPU = "nvidia-h100-80gb-hbm3"
KEY = {"op": "rms_norm", "width": 1536, "itemsize": 2}
FAST = RowConfig(2048, 4, 8)


def _row(**change):
    values = {"family": "row", "key": KEY, "config": dataclasses.asdict(FAST), "digest": tuned.digest("rms_norm"),
              "tuned": True, "seconds": 1.0, "default_seconds": 2.0, "spread": 0.1, **change}  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}


def _write(folder, *rows, schema=1, **provenance):
    where = {"gpu": NAME, "driver": "580", "arch": "sm_90", "torch": torch.__version__, "date": "2026-01-01",
             "triton": tuned.triton_version(), **provenance}  # fmt: skip
    result = {"schema": schema, "kind": "tuning", "provenance": where, "settings": {}, "ceilings": {}, "rows": rows}
    (folder / f"{GPU}.json").write_text(json.dumps(result))


def _chosen(folder, arch="sm_90", gpu=GPU, **key):
    with tuned.tables_in(folder), forced_arch(arch, gpu):
        return row.select(arch_for(torch.empty(0)), **{**KEY, **key})


RULE = row.select("sm_90", **KEY)


# Tables ----------------------------------------------------------------------------------------------------------


def test_a_card_s_table_answers_for_its_keys(tmp_path):
    _write(tmp_path, _row())
    assert RULE != FAST
    assert _chosen(tmp_path) == FAST
    # The order in which a launcher names its keywords does not matter.
    with tuned.tables_in(tmp_path), forced_arch("sm_90", GPU):
        assert row.select(arch_for(torch.empty(0)), itemsize=2, width=1536, op="rms_norm") == FAST


def test_a_launch_takes_what_the_table_says(tmp_path, monkeypatch):
    module = __import__("pyvideo_kernels.kernels.rms_norm", fromlist=["launch_fwd"])
    wanted, launched, launch = RowConfig(64, 4, 2), [], module.launch_fwd
    monkeypatch.setattr(module, "launch_fwd", lambda *a: launched.append(a[-1]) or launch(*a))
    _write(tmp_path, _row(key={**KEY, "width": 48, "itemsize": 4}, config=dataclasses.asdict(wanted)))
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(0)).to(helpers.DEVICE)
    with tuned.tables_in(tmp_path), forced_arch("sm_90", GPU):
        y = module.rms_norm(x, None, 1e-6)
        module.rms_norm(x.half(), None, 1e-6)
    assert launched == [wanted, row.select("sm_90", **{**KEY, "width": 48})] and launched[0] != launched[1]
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (48,), None, 1e-6))


@pytest.mark.parametrize(
    ("rows", "provenance", "asked"),
    [
        ([_row()], {}, {"width": 3072}),
        ([_row()], {}, {"itemsize": 4}),
        ([_row()], {}, {"op": "rms_norm_backward"}),
        ([_row()], {}, {"gpu": "nvidia-h200"}),
        ([_row()], {}, {"gpu": None}),
        ([_row(digest="0" * 16)], {}, {}),
        ([_row(tuned=False)], {}, {}),
        ([_row()], {"triton": "2.0.0"}, {}),
        ([], {}, {}),
    ],
    ids=["width", "itemsize", "op", "card", "no card", "kernel", "rule was faster", "triton", "empty"],
)
def test_anything_else_takes_the_rule_in_silence(tmp_path, rows, provenance, asked):
    _write(tmp_path, *rows, **provenance)
    key = {name: value for name, value in asked.items() if name in KEY}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _chosen(tmp_path, gpu=asked.get("gpu", GPU), **key) == row.select("sm_90", **{**KEY, **key})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a table"),
        ("[]", "schema"),
        (lambda p: _write(p, schema=2), "schema"),
        (lambda p: _write(p, driver=""), "lacks driver"),
        (lambda p: _write(p, gpu="NVIDIA H200"), "nvidia-h200.json"),
        (lambda p: _write(p, arch="sm_100"), "measured on sm_100"),
        (lambda p: _write(p, _row(config=None)), "lacks a valid config"),
        (lambda p: _write(p, _row(config={"block_d": 1024, "rows": 1, "num_warps": 4})), "must cover the row of 1536"),
        (lambda p: _write(p, _row(config={"block_d": 2048, "rows": 3, "num_warps": 4})), "power of two"),
        (lambda p: _write(p, _row(config={"block": 2048})), "unexpected keyword"),
        (lambda p: _write(p, _row(key={**KEY, "heads": 3})), "unexpected keyword"),
    ],
)
def test_a_bad_table_is_refused_with_a_sentence_once(tmp_path, text, words):
    if isinstance(text, str):
        (tmp_path / f"{GPU}.json").write_text(text)
    else:
        text(tmp_path)
    with tuned.tables_in(tmp_path), forced_arch("sm_90", GPU):
        with pytest.warns(RuntimeWarning, match="rules choose") as caught:
            assert row.select(arch_for(torch.empty(0)), **KEY) == RULE
        assert words in str(caught[0].message) and f"{GPU}.json" in str(caught[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert row.select(arch_for(torch.empty(0)), **{**KEY, "width": 512}).block_d == 512
        assert "rules choose" in tuned.describe(GPU, "sm_90") or "hold" in tuned.describe(GPU, "sm_90")


def test_describe_counts_what_holds(tmp_path):
    _write(tmp_path, _row(), _row(key={**KEY, "width": 2048}, digest="0" * 16))
    with tuned.tables_in(tmp_path):
        assert "1 tuned configurations hold, 1 are of other kernels" in tuned.describe(GPU, "sm_90")
        assert "no table" in tuned.describe("nvidia-a100", "sm_80")


def test_answers_are_kept_and_a_rule_s_refusal_is_not(monkeypatch):
    select, count = row.select, []
    monkeypatch.setattr(select, "rule", lambda arch, **key: count.append(1) or RULE)
    select.clear()
    for _ in range(3):
        assert select("sm_90", **KEY) == RULE
    assert len(count) == 1
    select.clear()
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="exceed"):
            select("sm_90", op="rms_norm", width=1 << 20, itemsize=2)


def test_the_interpreter_looks_nothing_up(monkeypatch):
    monkeypatch.setattr(tuned, "table", lambda *_: pytest.fail("a table was read"))
    tuned.clear()
    target = arch_for(torch.empty(0))
    assert target == "cpu" and target.gpu is None
    row.select(target, **KEY)


def test_the_package_s_tables_can_be_read():
    for path in tuned.FOLDER.glob("*.json"):
        found = tuned.read(path)
        for each in found["rows"]:
            if each["tuned"] and tuned.current(each):
                tuned.row_config(each, found["provenance"]["arch"])


def test_the_digest_is_of_the_code_and_what_it_imports(tmp_path, monkeypatch):
    files = {"rms_norm": "from .launch import cdiv\nx = 1\n", "launch": "from . import pairs\ny = 1\n", "pairs": ""}

    def digest(**change):
        for name, text in {**files, **change}.items():
            (tmp_path / f"{name}.py").write_text(text)
        return tuned.digest.__wrapped__("rms_norm")

    find = tuned.importlib.util.spec_from_file_location
    monkeypatch.setattr(
        tuned.importlib.util, "find_spec", lambda name: find(name, tmp_path / f"{name.rpartition('.')[2]}.py")
    )
    first = digest()
    assert digest(launch="# a comment\nfrom . import pairs\n\ny = 1  \n") == first
    assert digest(launch="from . import pairs\ny = 2\n") != first
    assert digest(pairs="z = 1\n") != first
    assert digest(rms_norm="from .launch import cdiv\nx = 2\n") != first


# Forcing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "family", "other"),
    [
        ("rms_norm", "row", lambda c: dataclasses.replace(c, rows=2 * c.rows)),
        ("gate_residual", "tile", lambda c: dataclasses.replace(c, rows=2 * c.rows, block_d=16)),
        ("causal_conv3d", "causal_conv3d", lambda c: dataclasses.replace(c, block_h=4, block_w=4, block_k=32)),
    ],
)
def test_a_forced_configuration_reaches_the_kernel(op, family, other, monkeypatch):
    module = __import__(f"pyvideo_kernels.kernels.{op}", fromlist=[op])
    args = OPS[op].bind(**next(samples(OPS[op], torch.float16, helpers.DEVICE)))
    launched, launch = [], module.launch_fwd
    monkeypatch.setattr(module, "launch_fwd", lambda *a, **k: launched.append(a[-1]) or launch(*a, **k))
    with tuned.recording() as asked:
        expected = getattr(module, op)(*args)
    wanted = other(asked[0].config)
    assert wanted != asked[0].config
    with forced_config(family, wanted):
        found = getattr(module, op)(*args)
    assert launched == [asked[0].config, wanted]
    assert asked[0].op == op
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_forcing_can_be_narrowed_to_a_key_and_ends(monkeypatch):
    with forced_config("row", FAST, op="rms_norm"):
        assert row.select("sm_90", **KEY) == FAST
        assert row.select("sm_90", **{**KEY, "op": "layer_norm_modulate"}) == RULE
        with pytest.raises(ValueOptionError, match="must cover the row of 4096"):
            row.select("sm_90", **{**KEY, "width": 4096})
    assert row.select("sm_90", **KEY) == RULE


def test_forcing_refuses_what_makes_no_sense():
    with pytest.raises(ValueOptionError, match="`family` must be one of .*causal_conv3d"), forced_config("conv", FAST):
        pass
    with pytest.raises(ValueOptionError, match="must be a TileConfig"), forced_config("tile", FAST):
        pass


# Candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: RowConfig(2048, 3, 4),
        lambda: RowConfig(2048, 1, 32),
        lambda: RowConfig(1 << 17, 1, 4),
        lambda: SumConfig(16, 128, 8, 4),
        lambda: FlatConfig(1000, 4),
        lambda: TileConfig(0, 128, 4),
        lambda: QkConfig(3, 64, 4),
        lambda: EmbedConfig(128, 64, 64, 1, 0, 8, 2),
        lambda: FinalConfig(True, 128, 64, 8, 8, 3),
        lambda: causal_conv3d.ConvConfig(2, 4, 32, 64, 0, 4, 3),
        lambda: causal_conv3d.ConvConfig(8, 16, 32, 64, 8, 4, 3),
        lambda: causal_conv3d.ConvConfig(8, 16, 32, 64, 0, 4, 0),
        lambda: spacetime_attention.AttentionConfig(8, 128, 128, 8, 3),
        lambda: spacetime_attention.AttentionConfig(128, 96, 128, 8, 3),
    ],
)
def test_a_configuration_that_no_kernel_takes_cannot_be_made(make):
    with pytest.raises(ValueOptionError, match="Config: "):
        make()


def test_what_is_legal_depends_on_the_shape():
    attention = spacetime_attention.AttentionConfig(128, 128, 128, 8, 3, descriptors=True)
    key = {"head_dim": 128, "itemsize": 2, "aligned": True, "vectors": True}
    illegal = spacetime_attention.select.illegal
    assert illegal(attention, "sm_90", **key) is None
    assert "descriptors" in illegal(attention, "sm_90", **{**key, "aligned": False})
    assert "block_d" in illegal(attention, "sm_90", **{**key, "head_dim": 64})
    assert "is no AttentionConfig" in illegal(FAST, "sm_90", **key)
    families = tuned.families()
    assert "`folded`" in families["final_layer"].illegal(
        FinalConfig(True, 128, 64, 64, 8, 3), "sm_90", features=64, itemsize=2, folded=False
    )
    assert "`k_chunks`" in families["patch_embed3d"].illegal(
        EmbedConfig(128, 64, 32, 1, 4, 8, 2), "sm_90", width=1536, columns=64, itemsize=2
    )
    whole = {"op": "qk_norm_rope", "heads": 12, "head_dim": 128, "whole_row": True, "itemsize": 2}
    assert "all 12 heads" in families["qk_norm_rope"].illegal(QkConfig(8, 64, 4), "sm_90", **whole)


@pytest.fixture(scope="module")
def keys():
    from pyvideo_kernels.benchmarks.registry import ENTRIES
    from pyvideo_kernels.benchmarks.tune.launches import asked, launches_of

    found = {}
    for op in ENTRIES:
        for launch in launches_of(op, torch.device("cuda"), torch.bfloat16):
            found.update(dict.fromkeys((each.family, each.key) for each in asked(launch, "sm_90")))
    return list(found)


def test_the_registered_shapes_reach_forward_and_backward_kernels(keys):
    asked = {family for family, _ in keys}
    assert asked <= set(tuned.families())
    assert {"causal_conv3d", "final_layer", "flat", "patch_embed3d", "qk_norm_rope", "rms_norm_silu", "row",
            "spacetime_attention", "sum", "tile"} <= asked  # fmt: skip
    ops = {dict(key).get("op", family) for family, key in keys}
    assert {"rms_norm_backward", "layer_norm_modulate_backward", "qk_norm_rope_backward"} <= ops <= set(OPS)


@pytest.mark.parametrize("arch", [*ARCHS, "cpu"])
def test_candidates_are_legal_and_begin_with_the_rule(keys, arch):
    for name, key in keys:
        family = tuned.families()[name]
        for itemsize in (2, 4):
            shape = {**dict(key), "itemsize": itemsize}
            found = family.candidates(arch, **shape)
            assert found[0] == family.rule(arch, **shape)
            assert len(set(found)) == len(found) and 2 <= len(found) <= family.limit
            assert all(family.illegal(config, arch, **shape) is None for config in found)


def test_candidates_of_the_matrix_kernels_leave_out_no_kind():
    key = {"head_dim": 128, "itemsize": 2, "aligned": True, "vectors": True}
    found = spacetime_attention.candidates("sm_90", **key)
    assert {c.descriptors for c in found} == {True, False}
    assert not any(c.descriptors for c in spacetime_attention.candidates("sm_80", **key))
    assert {4, 8, 16} <= {c.num_warps for c in found} and {2, 3, 4} <= {c.num_stages for c in found}
    assert {(64, 128), (128, 64), (128, 128)} <= {(c.block_m, c.block_n) for c in found}
    conv = causal_conv3d.candidates("sm_90", c=96, o=96, itemsize=2, aligned=True)
    assert {(64, 32), (64, 0), (128, 0)} <= {(c.block_n, c.block_n2) for c in conv}
