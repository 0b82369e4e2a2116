"""What is measured covers the ops and is right; what is wrong gets no speed; no baseline disappears."""

import json
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from pyvideo_kernels import dispatch
from pyvideo_kernels.benchmarks import ops as bench
from pyvideo_kernels.benchmarks import results
from pyvideo_kernels.benchmarks.backends import CpuBackend
from pyvideo_kernels.benchmarks.ops import agreement, baselines
from pyvideo_kernels.benchmarks.ops import row as ops_row
from pyvideo_kernels.benchmarks.ops import table as ops_table
from pyvideo_kernels.benchmarks.peers import Peer
from pyvideo_kernels.benchmarks.registry import ENTRIES, moved_bytes
from pyvideo_kernels.error_types import UnsupportedError, UsageError, ValueOptionError
from pyvideo_kernels.sampler.cli import app
from pyvideo_kernels.schemas import OPS

CPU = torch.device("cpu")
TOPS = {"copy": 1e10, "gemm": 1e11, "gemms": {"float32": 1e11}}
SMALL = {
    "tokens": 6, "width": 32, "heads": 2, "grid": (2, 3, 4), "channels": 8, "head_dim": 16, "shape": (1, 4, 2, 4, 4),
    "ffn": 48,
}  # fmt: skip
TINY = {"tokens": 6, "width": 32, "heads": 2}


def small(sizes):
    """A shape's sizes made small; whose code it follows stays."""
    return {name: SMALL.get(name, value) for name, value in sizes.items()}


# One case for each way in which a model has a layer, not for each clip.
CASES = {
    (name, "text" if "text" in sizes else sizes.get("style", "wan")): small(sizes)
    for name, entry in ENTRIES.items()
    for shapes in (entry.gpu, entry.cpu)
    for sizes in shapes.values()
}
every_case = pytest.mark.parametrize(("name", "style"), CASES, ids=["-".join(case) for case in CASES])


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Two sets of tiny inputs are past it, not thousands."""
    monkeypatch.setattr(CpuBackend, "cache_bytes", lambda _: 1 << 10)


@pytest.fixture
def quick(monkeypatch):
    """Rows in a moment: ceilings as given, tiny shapes, one op, no external kernels."""
    monkeypatch.setattr(bench, "ceilings", lambda *_: TOPS)
    monkeypatch.setattr(baselines, "peers_for", lambda *_: {})
    shapes = {"first": TINY, "second": TINY}
    for name in ENTRIES:
        monkeypatch.setitem(
            ENTRIES, name, replace(ENTRIES[name], cpu={n: small(ENTRIES[name].cpu[s]) for n, s in
                                                       zip(shapes, [next(iter(ENTRIES[name].cpu))] * 2)})
        )  # fmt: skip


def runner(**options):
    return ops_row.Runner(CPU, torch.float32, TOPS, **{"names": ("eager",), "rounds": 3, **options})


def run_cli(*arguments):
    return CliRunner().invoke(app, ["bench", "ops", "--device", "cpu", "--dtype", "fp32", *arguments])


# The registry -------------------------------------------------------------------------------------------------------


def test_every_forward_op_is_registered():
    assert {name for name in OPS if not name.endswith("_backward")} == set(ENTRIES)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_sides_compute_the_same(name, style, dtype):
    torch.manual_seed(0)
    entry, sizes = ENTRIES[name], CASES[name, style]
    inputs = entry.inputs(**sizes, dtype=dtype, device=CPU)
    expected = entry.eager(**entry.stock(inputs))
    allowed = ops_row.tolerance(entry, sizes, dtype, CPU, expected)
    agreement.check_at_size(entry.ours(**ops_row.fresh(entry, inputs)), expected, allowed)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_of_the_tensors(name, style, dtype):
    entry, sizes = ENTRIES[name], CASES[name, style]
    inputs = entry.inputs(**sizes, dtype=dtype, device=CPU)
    ours = entry.ours(**ops_row.fresh(entry, inputs))
    assert entry.bytes(**sizes, dtype=dtype) == moved_bytes(inputs, ours, entry.returns)


def test_bytes_count_inputs_and_outputs_once():
    x = torch.zeros(4, 8, dtype=torch.bfloat16)
    assert moved_bytes({"x": x, "eps": 1e-6, "history": [x, x]}, (x, None)) == 4 * 4 * 8 * 2


def test_cogvideox_leaves_text_unrotated():
    """At its real length, which the small shapes do not reach."""
    sizes = {**TINY, "tokens": 230, "style": "cogvideox"}
    entry = ENTRIES["qk_norm_rope"]
    inputs = entry.inputs(**sizes, dtype=torch.float32, device=CPU)
    ours = entry.ours(**inputs)
    assert inputs["rotary_range"] == (226, 230)
    torch.testing.assert_close(ours, entry.eager(**inputs), rtol=1e-4, atol=1e-4)
    assert entry.bytes(**sizes, dtype=torch.float32) == moved_bytes(inputs, ours)


# Agreement at size --------------------------------------------------------------------------------------------------


def test_agreement_allows_roundings_and_no_more():
    torch.manual_seed(0)
    exact = torch.randn(30_000, 64)
    once = exact.bfloat16()
    allowed = agreement.unit(torch.bfloat16, 64)
    assert 1e-3 < agreement.check_at_size(once, exact, allowed) < 3e-3
    one_row_off = once.clone()
    one_row_off[17] = once[18]  # one in thirty thousand: the mean does not show it
    one_nan = once.clone()
    one_nan[3, 3] = float("nan")
    for wrong, text in (
        (once * 1.05, "relative error"), (one_row_off, "^at this size: output 0 at flat index 1[01]"),
        (one_nan, "not finite"),        (once[:5], "shape"), ((once, once), "2 outputs"),
    ):  # fmt: skip
        with pytest.raises(agreement.Disagreement, match=text):
            agreement.check_at_size(wrong, exact, allowed)


def test_agreement_looks_past_the_first_chunk(monkeypatch):
    monkeypatch.setattr(agreement, "_CHUNK", 64)
    exact = torch.randn(10, 40)
    wrong = exact.clone()
    wrong[8, 1] += 3.0
    assert agreement.check_at_size(exact, exact, 1e-6) == 0
    with pytest.raises(agreement.Disagreement, match="flat index 321 "):
        agreement.check_at_size(wrong, exact, 0.04)


# A row --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_every_entry_is_checked_and_measured(name):
    sizes = small(next(iter(ENTRIES[name].cpu.values())))
    measured = ops_row.Runner(CPU, torch.bfloat16, TOPS, names=("eager",), rounds=1).row(ENTRIES[name], "tiny", sizes)
    assert "error" not in measured and measured["baselines"]["eager"]["ratio"] > 0
    assert {
        "op", "shape", "dtype", "impl", "seconds", "spread", "rounds", "graph", "bytes", "flops", "rate", "unit",
        "share_of_ceiling", "baselines",
    } <= set(measured)  # fmt: skip


def off_by_one(op, impl):
    """The implementation, its rows moved down by one."""
    right = dispatch.load(OPS[op], impl)

    def wrong(x, *rest):
        return torch.roll(right(x, *rest), 1, dims=0 if x.dim() == 1 else -2)

    return wrong


def test_a_wrong_kernel_gets_no_speed(monkeypatch):
    impl = ops_row.bound_impl(ENTRIES["rms_norm"], {"x": torch.ones(2, 8)})
    monkeypatch.setitem(dispatch._functions, ("rms_norm", impl), off_by_one("rms_norm", impl))
    row = runner().row(ENTRIES["rms_norm"], "tiny", TINY)
    assert row["impl"] == impl and "rms_norm sample" in row["error"]
    assert set(row) == {"op", "shape", "dtype", "impl", "error"}
    assert "WRONG" in ops_table.line(row, CPU)


def test_a_kernel_that_is_wrong_only_at_size_gets_no_speed(monkeypatch):
    impl = ops_row.bound_impl(ENTRIES["rms_norm"], {"x": torch.ones(2, 8)})
    right = dispatch.load(OPS["rms_norm"], impl)

    def wrong(x, *rest):
        y = right(x, *rest)
        if y.numel() > 50_000:  # larger than every sample
            y.view(-1)[-1] += 1.0
        return y

    monkeypatch.setitem(dispatch._functions, ("rms_norm", impl), wrong)
    assert "error" not in runner().row(ENTRIES["rms_norm"], "tiny", TINY)
    row = runner().row(ENTRIES["rms_norm"], "large", {"tokens": 800, "width": 64, "heads": 2})
    assert "at this size: relative error" in row["error"] and "flat index 51199 is 1.0" in row["error"]
    assert "seconds" not in row and "baselines" not in row


def test_an_implementation_that_refuses_is_a_row(monkeypatch):
    def refuses(*_):
        raise UnsupportedError("not today")

    monkeypatch.setitem(dispatch._functions, ("rms_norm", "cpu"), refuses)
    row = runner(impl="cpu").row(ENTRIES["rms_norm"], "tiny", TINY)
    assert row["error"] == "UnsupportedError: not today" and row["impl"] == "cpu" and "seconds" not in row


def test_a_baseline_that_raises_is_reported():
    def broken(**_):
        raise RuntimeError("baseline broke\nand went on about it")

    row = runner().row(replace(ENTRIES["gate_residual"], eager=broken), "tiny", TINY)
    assert row["baselines"] == {"eager": {"error": "RuntimeError: baseline broke"}}
    # Ours was right on the samples and is timed; that nobody could check it at this size is said.
    assert row["seconds"] > 0 and row["unchecked_at_size"] == "eager: RuntimeError: baseline broke"
    assert "baseline broke" in ops_table.line(row, CPU) and "samples alone" in ops_table.notes([row])[0]


def test_a_baseline_that_raises_while_timed_is_reported(monkeypatch):
    calls = []

    def tires(inputs):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("tired")
        return ENTRIES["rms_norm"].eager(**inputs)

    monkeypatch.setattr(baselines, "peers_for", lambda *_: {"peer": Peer("peer", "1.0", None, tires)})
    row = runner(names=("peer", "eager")).row(ENTRIES["rms_norm"], "tiny", TINY)
    assert row["baselines"]["peer"] == {"error": "RuntimeError: tired"} and row["baselines"]["eager"]["ratio"] > 0


def test_peers_are_timed_named_refused_and_skipped_aloud(monkeypatch):
    eager = ENTRIES["rms_norm"].eager
    found = {
        "good": Peer("good", "1.2", None, lambda i: eager(i["x"], i["doubled"] / 2),
                     prepare=lambda i: {**i, "doubled": 2 * i["weight"]}, note="doubles"),
        "sloppy": Peer("sloppy", "1", None, lambda i: eager(**i) * 1.04),
        "wrong": Peer("wrong", "1", None, lambda i: eager(**i).roll(1, 1)),
        "picky": Peer("picky", "1", None, lambda i: 1 / 0, refuses=lambda i: "takes head_dim 7"),
        "absent": Peer("absent", None, "not installed: pip install absent", None),
    }  # fmt: skip
    monkeypatch.setattr(baselines, "peers_for", lambda *_: found)
    said = []
    measure = runner(names=tuple(found), say=said.append)
    for _ in range(2):
        row = measure.row(ENTRIES["rms_norm"], "tiny", TINY)
    assert said == ["skipped: absent: not installed: pip install absent"]  # once, not a row
    outcome = row["baselines"]
    assert outcome["good"]["ratio"] > 0 and (outcome["good"]["version"], outcome["good"]["note"]) == ("1.2", "doubles")
    assert outcome["sloppy"]["relative_error"] == pytest.approx(0.04, rel=1e-3) and "ratio" in outcome["sloppy"]
    assert outcome["wrong"]["error"].startswith("wrong: relative error") and "ratio" not in outcome["wrong"]
    assert outcome["picky"] == {"skipped": "takes head_dim 7"}
    assert outcome["absent"] == {"skipped": "not installed: pip install absent"}
    assert ops_table.notes([row]) == ["good: doubles"]


def test_a_peer_that_breaks_outside_its_call_is_reported(monkeypatch):
    eager = ENTRIES["rms_norm"].eager
    prepared = []

    def prepare_once(inputs):
        prepared.append(1)
        return inputs if len(prepared) == 1 else 1 / 0

    found = {
        "asked": Peer("asked", "1", None, lambda i: eager(**i), refuses=lambda i: 1 / 0),
        "prepared": Peer("prepared", "1", None, lambda i: eager(**i), prepare=prepare_once),
    }
    monkeypatch.setattr(baselines, "peers_for", lambda *_: found)
    row = runner(names=tuple(found)).row(ENTRIES["rms_norm"], "tiny", TINY)
    expected = {"error": "ZeroDivisionError: division by zero"}
    assert row["seconds"] > 0 and row["baselines"] == {"asked": expected, "prepared": expected}


def test_an_op_in_place_leaves_the_inputs_of_the_check_alone():
    entry = ENTRIES["qk_norm_rope_"]
    inputs = entry.inputs(**TINY, dtype=torch.float32, device=CPU)
    kept = inputs["q"].clone()
    copies = ops_row.fresh(entry, inputs)
    entry.ours(**copies)
    assert torch.equal(inputs["q"], kept) and copies["q"].stride() == inputs["q"].stride()
    assert not torch.equal(copies["q"], kept)


def test_a_row_is_judged_by_the_ceiling_it_would_hit():
    def rated(copy, gemm):
        tops = {"copy": copy, "gemm": gemm}
        entry, sizes = ENTRIES["patch_embed3d"], small(ENTRIES["patch_embed3d"].cpu["wan-1.3b-256"])
        moved = entry.bytes(**sizes, dtype=torch.float32)
        return ops_row.Runner(CPU, torch.float32, tops)._rate(entry, sizes, moved, 1e-3), entry.flops(**sizes), moved

    row, flops, _ = rated(copy=1e12, gemm=1e3)
    assert row["unit"] == "FLOP/s" and row["share_of_ceiling"] == pytest.approx(flops / 1e-3 / 1e3)
    row, _, moved = rated(copy=1e3, gemm=1e12)
    assert row["unit"] == "B/s" and row["rate"] == pytest.approx(moved / 1e-3) and row["bytes"] == moved


@pytest.mark.slow
def test_the_compiled_baseline_is_compiled():
    row = runner(names=("compile",)).row(ENTRIES["gate_residual"], "tiny", TINY)
    assert row["baselines"]["compile"]["ratio"] > 0 and "eager" not in row["baselines"]


# Runs and the command -----------------------------------------------------------------------------------------------


def test_run_gives_a_result_file(quick):
    rows = []
    result = bench.run(["gate_residual"], CPU, torch.float32, baselines=["eager"], rounds=3, on_row=rows.append)
    assert result["rows"] == rows and [row["shape"] for row in rows] == ["first", "second"]
    assert (result["schema"], result["kind"], result["ceilings"]) == (results.SCHEMA, "ops", TOPS)
    assert result["settings"]["rounds"] == 3 and not results.missing_provenance(result["provenance"])


def test_no_row_is_begun_that_would_end_after_the_deadline(quick, monkeypatch):
    now, seconds = [100.0], iter([5.0, 2.0, 1.0, 1.0])
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def row(self, entry, shape, sizes):
        now[0] += next(seconds)
        return {"op": entry.op, "shape": shape}

    monkeypatch.setattr(bench.Runner, "row", row)
    result = bench.run(["rms_norm", "gate_residual"], CPU, torch.float32, deadline=112.0)
    # The third could end at 112, if it took as long as the longest; the fourth at 113.
    assert [(row["op"], row["shape"]) for row in result["rows"]] == [
        ("rms_norm", "first"), ("rms_norm", "second"), ("gate_residual", "first"),
    ]  # fmt: skip
    assert result["unfinished"] == ["gate_residual second"]
    now[0], seconds = 100.0, iter([5.0, 5.0, 5.0, 5.0])
    assert "unfinished" not in bench.run(["rms_norm", "gate_residual"], CPU, torch.float32, deadline=120.0)


def test_quick_takes_the_first_shape_and_eager_alone(quick, capsys):
    result = bench.run(["gate_residual", "rms_norm"], CPU, torch.float32, rounds=7, quick=True)
    assert [(row["op"], row["shape"]) for row in result["rows"]] == [("gate_residual", "first"), ("rms_norm", "first")]
    assert all(list(row["baselines"]) == ["eager"] and row["rounds"] == bench.QUICK_ROUNDS for row in result["rows"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--op", "rms_nrom"], "did you mean 'rms_norm'?"),
        (["--dtype", "bf61"], "did you mean 'bf16'?"),
        (["--device", "cdua"], "did you mean 'cuda'?"),
        (["--impl", "trition"], "did you mean 'triton'?"),
        (["--op", "rms_norm", "--baseline", "eagre"], "did you mean 'eager'?"),
        (["--op", "guidance_step", "--impl", "cuda"], "guidance_step: impl 'cuda' needs CUDA tensors; got cpu"),
        (["--op", "rms_norm", "--impl", "sdpa"], "rms_norm: no implementation 'sdpa'; there are reference"),
    ],
)
def test_bad_input_is_refused_before_any_work(monkeypatch, arguments, text):
    monkeypatch.setattr(bench, "ceilings", lambda *_: pytest.fail("it began to measure"))
    done = run_cli(*arguments)
    assert done.exit_code == 2 and text in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="--device cuda: "):
        bench.device_named("cuda")


def test_all_ops_with_an_implementation_few_have():
    assert bench.selection([], "cuda", torch.device("cuda")) == ["guidance_step"]
    with pytest.raises(ValueOptionError, match="impl: must be one of auto, "):
        bench.selection([], "cdua", CPU)


def test_command_writes_json_and_lines(quick, tmp_path):
    out = tmp_path / "deep" / "result.json"
    done = run_cli("--op", "gate_residual", "--baseline", "eager", "--rounds", "3", "--json", str(out))
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "measured ceilings: copy 10.0 GB/s; matrix product float32 100 GFLOP/s"
    assert len(lines) == 3 and "first" in lines[1] and "eager x" in lines[1]
    result = results.read(out)
    assert len(result["rows"]) == 2 and "incomplete" not in result
    assert [path.name for path in out.parent.iterdir()] == ["result.json"]


def test_a_result_that_cannot_be_written_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ceilings", lambda *_: pytest.fail("it began to measure"))
    (tmp_path / "file").touch()
    for path, text in ((tmp_path, "must be a file"), (tmp_path / "file" / "r.json", "no such folder")):
        done = run_cli("--json", str(path))
        assert done.exit_code == 5 and text in done.stderr


def test_command_ends_with_1_when_a_row_is_wrong(quick, monkeypatch, tmp_path):
    impl = ops_row.bound_impl(ENTRIES["rms_norm"], {"x": torch.ones(2, 8)})
    monkeypatch.setitem(dispatch._functions, ("rms_norm", impl), off_by_one("rms_norm", impl))
    out = tmp_path / "r.json"
    done = run_cli("--op", "rms_norm", "--op", "gate_residual", "--quick", "--json", str(out))
    assert done.exit_code == 1 and "WRONG: rms_norm sample" in done.stdout
    wrong, right = json.loads(out.read_text())["rows"]
    assert "error" in wrong and "seconds" not in wrong and right["seconds"] > 0


@pytest.mark.parametrize("keep", [True, False])
def test_ctrl_c_keeps_the_rows_that_were_finished(quick, monkeypatch, tmp_path, keep):
    def interrupted(**_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setitem(ENTRIES, "rms_norm", replace(ENTRIES["rms_norm"], eager=interrupted))
    out = tmp_path / "r.json"
    arguments = ["--op", "gate_residual", "--op", "rms_norm", "--quick"] + (["--json", str(out)] if keep else [])
    done = run_cli(*arguments)
    assert done.exit_code == 130 and "interrupted during the measurement after 1 rows" in done.stderr
    if keep:
        assert f"kept {out}" in done.stderr
        result = results.read(out)
        assert [row["op"] for row in result["rows"]] == ["gate_residual"] and result["incomplete"]
    else:
        assert "nothing was written" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [120, 60])
@pytest.mark.parametrize("single", [True, False])
def test_a_terminal_gets_tables_in_which_wrong_is_red(monkeypatch, capsys, single, width):
    from rich.console import Console

    found = {
        "absent": Peer("absent", None, "not installed", None),
        "here-too": Peer("here-too", "1.2", None, lambda i: i["x"] + i["y"] * i["gate"]),
    }
    monkeypatch.setattr(baselines, "peers_for", lambda *_: found)
    console = Console(force_terminal=True, width=width, color_system="standard")
    printer = ops_table.RichPrinter(CPU, console, single)
    right = runner(names=("eager", *found)).row(ENTRIES["gate_residual"], "tiny", TINY)
    wrong = {"op": "rms_norm", "shape": "tiny", "dtype": "float32", "impl": "cpu", "error": "off [by] one"}
    result = {"kind": "ops", "ceilings": TOPS, "rows": []}
    printer.start(result)
    for row in (right, wrong):
        printer.row(row)
        result["rows"].append(row)
    printer.finish(result)
    text = capsys.readouterr().out
    red = " ".join(re.findall(r"\x1b\[(?:1;)?31m([^\x1b]*)", text))
    assert "WRONG" in red and "off [by] one" in " ".join(red.split())
    assert "absent" not in text and "versions: here-too 1.2" in text
    if width == 120:
        assert text.count("±") == (1 if single else 2) and "× eager" in text and "× here-" in text
    else:  # too narrow for the columns: lines, with every number in them
        assert "gate_residual" in text and f"x{right['baselines']['here-too']['ratio']:.2f}" in text
