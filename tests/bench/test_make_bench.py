"""``python -m benchmarks``, which ``make bench`` runs: its parts, its goals, and what goes wrong in them."""

import copy
import re

import pytest
import torch

from pyvideo_kernels.benchmarks import __main__ as bench
from pyvideo_kernels.benchmarks import e2e, goals, ops, results, vae
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
        asked.append((request.model, request))
        result = copy.deepcopy(sample_results.e2e()) | {"statements": []}
        result["provenance"] |= MACHINE
        result["settings"] |= {key: value for key, value in vars(request).items() if value is not None}
        result["settings"] |= {"weights": "random" if request.random_weights else "pretrained", "dtype": "bfloat16"}
        for row in result["rows"]:
            row["rounds"] = request.rounds
        result["rows"] = [row for row in result["rows"] if row["variant"] in [*request.variants, "ours"]]
        return result

    def run_decoder(request, on_event):
        asked.append(("vae", request))
        settings = {key: getattr(request, key) for key in ("model", "height", "width", "frames")}
        rows = [
            {"variant": name, "seconds": seconds, "spread": 0.1, "rounds": request.rounds, "ratio": 26.0 / seconds}
            for name, seconds in (("eager", 26.0), ("ours", 13.0))
        ]
        return {
            "schema": 1, "kind": "vae", "provenance": sample_results.PROVENANCE | MACHINE, "ceilings": {},
            "settings": settings | {"dtype": "bfloat16", "tiling": False}, "rows": rows,
        }  # fmt: skip

    monkeypatch.setattr(goals, "sampler_dtype", lambda device: torch.bfloat16)  # whatever this machine does faster
    monkeypatch.setattr(ops, "run", run_ops)
    monkeypatch.setattr(e2e, "run", run_clip)
    monkeypatch.setattr(vae, "run", run_decoder)
    return asked


PARTS = ["ops-bf16", "e2e-tiny", "e2e-blocks", "vae-wan", "ops-fp32"]


def main(tmp_path, *more):
    return bench.main(["--device", "cpu", "--output", str(tmp_path / "out"), *more])


def test_a_cpu_run_has_every_part_a_page_plots_and_goals(parts, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need the bench extra")
    main(tmp_path)
    assert [what for what, _ in parts] == ["bfloat16", "tiny", "wan2.1-1.3b", "vae", "float32"]
    assert parts[0][1] == {"baselines": ["eager", "compile"]} and parts[-1][1] == {"baselines": ["eager"]}
    tiny, blocks, decoder = (request for _, request in parts[1:4])
    assert tiny.variants == ("eager", "compile", "compile:vae=true", "ours")
    assert blocks.variants == ("eager", "ours:loop=pipeline", goals.ACCELERATED)
    assert decoder.variants == ("eager", "ours")
    assert blocks.random_weights and blocks.layers == 2 and not blocks.decode and not decoder.layers
    assert all(each.rounds >= goals.ROUNDS and each.device == "cpu" for each in (tiny, blocks, decoder))
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*.json")} == {f"{name}.json" for name in PARTS}
    page = (out / "numbers.md").read_text()
    assert "rms_norm" in page and "## Goals on CPUs" in page and list((out / "plots").glob("*-speedup.svg"))
    assert "| VAE decoder of Wan | 256×256×17 | bf16 | eager | 1.30 | 2.00 | " in page
    assert "incomplete" not in results.read(out / "ops-bf16.json")
    said = capsys.readouterr().out
    assert str(out / "numbers.md") in said and "goals reached" in said and "minutes on two Zen 4 cores" in said
    for row in ("clip of the embedded model", "blocks of Wan 1.3B", "VAE decoder of Wan"):
        assert row in said


def test_goals_that_are_missed_are_no_error_and_wrong_rows_are(parts, tmp_path, monkeypatch, capsys):
    assert main(tmp_path, "--only", "vae-wan") == 0
    assert re.search(r"\n1 of \d+ goals reached.*; \d+ are of parts that were not run", capsys.readouterr().out)
    decode = vae.run

    def slow(request, on_event):
        result = decode(request, on_event)
        result["rows"][1]["seconds"] = 52.0
        return result

    monkeypatch.setattr(vae, "run", slow)
    assert main(tmp_path, "--only", "vae-wan") == 0
    assert re.search(r"\n0 of \d+ goals reached, 1 not reached", capsys.readouterr().out)
    page = (tmp_path / "out" / "numbers.md").read_text()
    assert "| VAE decoder of Wan | 256×256×17 | bf16 | eager | 1.30 | 0.50 | " in page and "| no |" in page
    assert "blocks of Wan" not in page  # was not run

    def wrong(request, on_event):
        result = decode(request, on_event)
        result["rows"][1] = {"variant": "ours", "error": "BrokenVideo: wrong frames", "wrong": True}
        return result

    monkeypatch.setattr(vae, "run", wrong)
    assert main(tmp_path, "--only", "vae-wan") == 1
    assert "wrong or not measured: vae-wan: ours" in (said := capsys.readouterr().out) and "not reached" not in said


def test_only_runs_what_is_named_and_refuses_what_is_not(parts, tmp_path, capsys):
    main(tmp_path, "--only", "e2e-tiny", "--only", "vae-wan")
    assert [what for what, _ in parts] == ["tiny", "vae"]
    assert main(tmp_path, "--only", "vea-wan") == 2
    assert "--only must be one of ops-bf16, " in (said := capsys.readouterr().err) and "mean 'vae-wan'" in said
    assert len(parts) == 2


def test_results_to_be_committed_are_named_as_those_that_are(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "COMMITTED", tmp_path / "committed")
    main(tmp_path, "--save-as", "cpu-x")
    assert {path.name for path in (tmp_path / "committed").iterdir()} == {
        "cpu-x-bf16.json", "cpu-x-fp32.json", "cpu-x-tiny-64x64x17.json",
        "cpu-x-wan2.1-1.3b-random-2-layers-512x512x13.json", "cpu-x-vae-wan2.1-1.3b-256x256x17-bf16.json",
    }  # fmt: skip
    for path in (tmp_path / "committed").iterdir():
        assert results.read(path)["provenance"]["cpu"] == "Imaginary CPU"
    assert main(tmp_path, "--quick", "--save-as", "cpu-x") == 2
    assert "--save-as is for results" in capsys.readouterr().err


def test_a_cpu_that_is_faster_in_fp32_is_measured_in_it(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(goals, "sampler_dtype", lambda device: torch.float32)
    main(tmp_path)
    assert [what for what, _ in parts] == ["float32", "tiny", "wan2.1-1.3b", "vae", "bfloat16"]
    assert parts[0][1] == {"baselines": ["eager", "compile"]} and parts[2][1].dtype == parts[3][1].dtype == "fp32"


def test_a_gpu_has_its_own_parts_and_no_goals(parts, tmp_path):
    plan = bench.Bench(tmp_path, torch.device("cuda")).parts
    assert [part.name for part in plan] == ["ops-bf16", "e2e-tiny"]


def test_quick_is_one_part(parts, tmp_path):
    assert main(tmp_path, "--quick") == 0
    assert parts == [("bfloat16", {"quick": True})]


def test_a_part_that_fails_leaves_the_others_and_no_older_result(parts, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise UnsupportedError("no clip on this machine")

    monkeypatch.setattr(vae, "run", refuse)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "vae-wan.json").write_text("of an earlier run")
    assert main(tmp_path) == 1
    said = capsys.readouterr().out
    assert "vae-wan: no clip on this machine" in said and "vae-wan" in said.partition("wrong or not measured: ")[2]
    assert {path.stem for path in (tmp_path / "out").glob("*.json")} == set(PARTS) - {"vae-wan"}


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
    assert main(tmp_path, "--only", "ops-bf16", "--only", "ops-fp32") == 130
    assert "goals reached" in (caught := capsys.readouterr()).out  # of the part that had ended
    assert caught.err.endswith(f"what was finished is in {tmp_path / 'out' / 'ops-bf16.json'}\n")
    parts.append("not the first")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "e2e-tiny.json").write_text("of an earlier run")
    assert bench.main(["--device", "cpu", "--output", str(tmp_path / "old")]) == 130
    assert "nothing was written" in capsys.readouterr().err
