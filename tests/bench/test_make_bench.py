"""``python -m benchmarks``, which ``make bench`` runs: its parts, its time limit, and what goes wrong in them."""

import copy

import pytest

from pyvideo_kernels.benchmarks import __main__ as bench
from pyvideo_kernels.benchmarks import e2e, ops, results
from pyvideo_kernels.error_types import UnsupportedError

from . import sample_results

MACHINE = {"device": "cpu", "arch": "cpu", "cpu": "Imaginary CPU", "threads": 2}


@pytest.fixture
def parts(monkeypatch):
    """Stand-ins for what measures; the list says what was asked of them."""
    asked = []

    def run_ops(names, device, dtype, *, on_row, on_start, **options):
        asked.append((str(dtype).removeprefix("torch."), options))
        row = copy.deepcopy(sample_results.ops()["rows"][0]) | {"dtype": asked[-1][0], "impl": "cpu"}
        result = copy.deepcopy(sample_results.ops()) | {"rows": [row]}
        result["provenance"] |= MACHINE
        result["settings"]["dtype"] = asked[-1][0]
        result["ceilings"]["gemms"] = {asked[-1][0]: result["ceilings"]["gemm"]}
        on_start({**result, "rows": []})
        on_row(row)
        return result

    def run_clip(request, on_event):
        asked.append(("clip", request))
        result = copy.deepcopy(sample_results.e2e()) | {"statements": []}
        result["provenance"] |= MACHINE
        return result

    monkeypatch.setattr(ops, "run", run_ops)
    monkeypatch.setattr(e2e, "run", run_clip)
    return asked


def main(tmp_path, *more):
    return bench.main(["--device", "cpu", "--output", str(tmp_path / "out"), *more])


def test_a_cpu_run_has_both_dtypes_a_clip_a_page_and_plots(parts, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need the bench extra")
    main(tmp_path)
    assert [what for what, _ in parts] == ["bfloat16", "float32", "clip"]
    assert parts[0][1] == {"baselines": ["eager", "compile"]} and parts[1][1] == {"baselines": ["eager"]}
    assert parts[2][1].variants == ("eager", "ours") and parts[2][1].device == "cpu"
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*.json")} == {"ops-bf16.json", "ops-fp32.json", "e2e-tiny.json"}
    assert "rms_norm" in (out / "numbers.md").read_text() and list((out / "plots").glob("*-speedup.svg"))
    assert "incomplete" not in results.read(out / "ops-bf16.json")
    assert str(out / "numbers.md") in capsys.readouterr().out


def test_quick_is_one_part(parts, tmp_path):
    assert main(tmp_path, "--quick") == 0
    assert parts == [("bfloat16", {"quick": True})]


def test_parts_that_do_not_fit_are_left_out_aloud(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "LIMIT", -1.0)
    assert main(tmp_path) == 0
    assert [what for what, _ in parts] == ["bfloat16"]
    said = capsys.readouterr().out
    assert "ops-fp32: left out" in said and "e2e-tiny: left out" in said


def test_a_part_that_fails_leaves_the_others_and_no_older_result(parts, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise UnsupportedError("no clip on this machine")

    monkeypatch.setattr(e2e, "run", refuse)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "e2e-tiny.json").write_text("of an earlier run")
    assert main(tmp_path) == 1
    said = capsys.readouterr().out
    assert "e2e-tiny: no clip on this machine" in said and "wrong or not measured: e2e-tiny" in said
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {"ops-bf16.json", "ops-fp32.json"}


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(parts, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert main(tmp_path) == 5
    assert "choose another --output" in capsys.readouterr().err and not parts


def test_ctrl_c_says_what_is_kept(parts, tmp_path, monkeypatch, capsys):
    finished = ops.run

    def interrupted(names, device, dtype, **options):
        if not parts:
            return finished(names, device, dtype, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "run", interrupted)
    assert main(tmp_path) == 130
    assert capsys.readouterr().err.endswith(f"what was finished is in {tmp_path / 'out' / 'ops-bf16.json'}\n")
    parts.append("not the first")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "e2e-tiny.json").write_text("of an earlier run")
    assert bench.main(["--device", "cpu", "--output", str(tmp_path / "old")]) == 130
    assert "nothing was written" in capsys.readouterr().err
