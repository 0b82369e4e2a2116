"""The regression gate: noise passes, a slowdown does not, and what cannot be compared is refused in a sentence."""

import copy
import json
import math
import random
import statistics

import pytest
from typer.testing import CliRunner

from pyvideo_kernels.benchmarks import compare as gate
from pyvideo_kernels.benchmarks.cli import app
from pyvideo_kernels.error_types import ValueOptionError

CPU = {
    "device": "cpu", "arch": "cpu", "torch": "2.13.0", "python": "3.11", "pyvideo_kernels": "0.1.0", "revision": "abc",
    "date": "2026-01-01", "cpu": "A CPU", "threads": 2,
}  # fmt: skip


def sample(seconds, noise=0.02):
    return {"seconds": seconds, "spread": seconds * noise}


def op_row(op="rms_norm", ours=1e-3, noise=0.02, impl="cpu", **baselines):
    baselines = baselines or {"eager": sample(4e-3), "compile": sample(2e-3)}
    for value in baselines.values():
        if "seconds" in value:
            value.setdefault("ratio", value["seconds"] / ours)
    return {
        "op": op, "shape": "s", "dtype": "bfloat16", "impl": impl, **sample(ours, noise), "baselines": baselines
    }  # fmt: skip


def ops_file(*rows, **where):
    return {"schema": 1, "kind": "ops", "provenance": CPU | where, "settings": {}, "ceilings": {}, "rows": list(rows)}


def clip(variant, step, noise=0.01):
    timing = {"median": step, "spread": step * noise}
    seconds = {"step": timing, "total": {"median": step * 4, "spread": step * noise}, "first": 9.0}
    return {"variant": variant, "seconds": seconds}


def e2e_file(*rows, **settings):
    settings = {"model": "tiny", "height": 64, "steps": 4} | settings
    return ops_file() | {"kind": "e2e", "settings": settings, "rows": list(rows)}


def verdicts(comparison):
    return {(c.row.split()[0], c.measure): c.verdict for c in comparison.changes}


def test_noise_within_the_spread_passes():
    """Medians of noisy rounds around the same truth, a thousand pairs of runs: at most 1 % are called a change."""
    rng = random.Random(0)

    def noisy(truth):
        rounds = sorted(rng.gauss(truth, 0.08 * truth) for _ in range(7))
        low, middle, high = statistics.quantiles(rounds, n=4)
        return {"seconds": middle, "spread": (high - low) / 2}

    flagged = 0
    for _ in range(1000):
        old, new = ({**op_row(eager=noisy(4e-3)), **noisy(1e-3)} for _ in range(2))
        flagged += gate.compare(ops_file(old), ops_file(new, cpu="another")).failed
    assert flagged <= 10


@pytest.mark.parametrize("same", [True, False])
def test_a_slowdown_of_a_fifth_is_flagged(same):
    where = {} if same else {"cpu": "another CPU"}
    found = gate.compare(ops_file(op_row()), ops_file(op_row(ours=1.2e-3), **where))
    assert found.failed and found.absolute is same
    expected = {("rms_norm", "vs eager"): "slower", ("rms_norm", "vs compile"): "slower"}
    assert verdicts(found) == (expected | {("rms_norm", "seconds"): "slower"} if same else expected)


def test_a_slower_machine_is_no_regression():
    """Both sides took half as long again: the ratio holds, and seconds of another machine are not compared."""
    old = op_row()
    new = op_row(ours=1.5e-3, eager=sample(6e-3), compile=sample(3e-3))
    assert not gate.compare(ops_file(old), ops_file(new, threads=1)).failed


def test_the_tolerance_is_the_documented_formula():
    found = gate.compare(ops_file(op_row(noise=0.03)), ops_file(op_row(noise=0.04), cpu="another"))
    (eager,) = (c for c in found.changes if c.measure == "vs eager")
    assert eager.tolerance == pytest.approx(2 * math.sqrt(0.03**2 + 0.04**2 + 2 * 0.02**2))
    quiet = gate.compare(ops_file(op_row(noise=0.0)), ops_file(op_row(noise=0.0)))
    (seconds,) = (c for c in quiet.changes if c.measure == "seconds")
    assert seconds.tolerance == gate.FLOOR


def test_an_improvement_is_not_a_failure():
    found = gate.compare(ops_file(op_row()), ops_file(op_row(ours=0.5e-3)))
    assert not found.failed and set(verdicts(found).values()) == {"faster"}
    assert found.of("faster")[0].gain == pytest.approx(2)


def test_lost_new_and_wrong_rows():
    old = ops_file(op_row("a"), op_row("b"), op_row("c"))
    wrong = {key: value for key, value in op_row("b").items() if key in ("op", "shape", "dtype", "impl")}
    found = gate.compare(old, ops_file(op_row("a"), wrong | {"error": "off by one"}, op_row("d")))
    assert found.lost == ["c s bfloat16 cpu"] and found.new_rows == ["d s bfloat16 cpu"]
    assert found.wrong == ["b s bfloat16 cpu: off by one"]
    assert gate.compare(old, ops_file(op_row("a"), op_row("b"))).failed
    assert gate.compare(ops_file(op_row("b")), ops_file(wrong | {"error": "off by one"})).failed
    assert not gate.compare(ops_file(op_row("a")), ops_file(op_row("a"), op_row("d"))).failed


def test_a_row_bound_to_another_implementation_is_still_compared():
    slower = gate.compare(ops_file(op_row()), ops_file(op_row(ours=4e-3, impl="reference")))
    assert slower.rebound == ["rms_norm s bfloat16: cpu -> reference"] and not slower.lost and slower.failed
    assert not gate.compare(ops_file(op_row()), ops_file(op_row(ours=0.5e-3, impl="triton"))).failed


def test_a_baseline_that_no_longer_runs_is_named():
    new = op_row(eager=sample(4e-3), compile={"error": "RuntimeError: no compiler"})
    found = gate.compare(ops_file(op_row()), ops_file(new))
    assert found.baselines == ["rms_norm s bfloat16 cpu: compile: RuntimeError: no compiler"] and not found.failed


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0, None, "fast"])
@pytest.mark.parametrize("where", ["ours", "baseline"])
def test_a_time_that_is_no_time_is_refused(bad, where):
    row = copy.deepcopy(op_row())
    (row if where == "ours" else row["baselines"]["eager"])["seconds"] = bad
    with pytest.raises(ValueOptionError, match="must be a positive number of seconds; got"):
        gate.compare(ops_file(op_row()), ops_file(row))


def test_clips_are_compared_by_phase_and_variant():
    old = e2e_file(clip("eager", 1.0), clip("ours", 0.5), clip("ours:cache=0.1", 0.3))
    new = e2e_file(clip("eager", 1.0), clip("ours", 0.65), {"variant": "ours:cache=0.1", "error": "no memory"})
    found = gate.compare(old, new)
    assert {c.measure for c in found.of("slower")} == {
        "step vs eager",
        "step seconds",
        "total vs eager",
        "total seconds",
    }
    assert {c.row for c in found.of("slower")} == {"ours"}
    assert found.wrong == ["ours:cache=0.1: no memory"]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (ops_file(op_row()), e2e_file(clip("eager", 1.0)), "different kinds: ops and e2e"),
        (ops_file(op_row()), ops_file(op_row(), device="cuda"), "different kinds of device: cpu and cuda"),
        (e2e_file(clip("eager", 1.0)), e2e_file(clip("eager", 1.0), steps=8), "the clips differ: steps 4 and 8"),
        (ops_file() | {"kind": "tuning"}, ops_file() | {"kind": "tuning"}, "only results of kind ops or e2e"),
        (ops_file(op_row(eager=sample(1))), ops_file(op_row(other=sample(1)), threads=1), "nothing to compare"),
    ],
)
def test_what_cannot_be_compared_is_refused(old, new, why):
    with pytest.raises(ValueOptionError, match=why):
        gate.compare(old, new)


def run(tmp_path, old, new):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, result in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(result))
    return CliRunner().invoke(app, ["compare", *map(str, paths)], env={"COLUMNS": "200"})


def test_the_command_exits_by_the_verdict(tmp_path):
    good = run(tmp_path, ops_file(op_row()), ops_file(op_row(ours=1.01e-3)))
    assert good.exit_code == 0, good.output
    assert "1 rows compared: 0 slower, 0 faster; 0 lost, 0 wrong, 0 new" in good.output
    bad = run(tmp_path, ops_file(op_row()), ops_file(op_row(ours=1.5e-3)))
    assert bad.exit_code == 1 and "Regressions" in bad.output and "-33.3%" in bad.output
    refused = run(tmp_path, ops_file(op_row()), e2e_file(clip("eager", 1.0)))
    assert refused.exit_code == 2 and "different kinds" in refused.output
    not_there = CliRunner().invoke(app, ["compare", str(tmp_path / "none.json"), str(tmp_path / "new.json")])
    assert not_there.exit_code == 2 and "not a result file" in not_there.output
    nan = run(tmp_path, ops_file(op_row()), ops_file(op_row(ours=math.nan)))
    assert nan.exit_code == 2 and "got nan" in nan.output


def test_without_rich_the_table_is_plain(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    gate.show(gate.compare(ops_file(op_row(noise=0.3)), ops_file(op_row(ours=0.1e-3))))
    out = capsys.readouterr().out
    assert "Improvements:" in out and "4.00x" in out and "40.00x" in out and "+900.0%" in out
    assert "Too noisy to judge within 25%:\n  rms_norm" in out
