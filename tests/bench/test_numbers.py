"""docs/numbers.md, its plots and the README's table are what the committed results give, and nothing else gets in."""

import json
import shutil

import pytest

from pyvideo_kernels.benchmarks import numbers, results
from pyvideo_kernels.benchmarks.report import plots, tables
from pyvideo_kernels.error_types import ValueOptionError

RESULTS = numbers.ROOT / "benchmarks" / "results"
GPU = {
    "device": "cuda", "arch": "sm_90", "torch": "2.11.0", "triton": "3.6.0", "python": "3.12", "pyvideo_kernels": "0.1",
    "revision": "abc1234", "date": "2026-01-01", "gpu": "A Card", "driver": "580.1", "clock_sm": "1980 MHz",
}  # fmt: skip


def ops_result(*rows, **more):
    return {
        "schema": 1, "kind": "ops", "provenance": dict(GPU), "settings": {"dtype": "bfloat16"},
        "ceilings": {"copy": 3e12, "gemm": 8e14}, "rows": list(rows) or [op_row()],
    } | more  # fmt: skip


def op_row(op="rms_norm", ratio=2.5, **more):
    eager = {"seconds": 1e-4 * ratio, "spread": 1e-6, "graph": True, "ratio": ratio}
    return {
        "op": op, "shape": "wan-14b-480p", "dtype": "bfloat16", "impl": "triton", "seconds": 1e-4, "spread": 1e-6,
        "rounds": 7, "graph": True, "bytes": 10**8, "flops": 0, "rate": 2.7e12, "unit": "B/s",
        "share_of_ceiling": 0.9, "baselines": {"eager": eager},
    } | more  # fmt: skip


def clip_result():
    timing = {"median": 1.0, "spread": 0.01}
    rows = [
        {
            "variant": name,
            "seconds": dict.fromkeys(("step", "denoise", "decode", "total"), timing),
            "ratio": {"total": r},
        }
        for name, r in (("eager", 1.0), ("ours", 1.25))
    ]
    settings = {
        "model": "wan2.1-1.3b", "weights": "random", "height": 480, "width": 832, "frames": 81, "steps": 4,
        "dtype": "bfloat16",
    }  # fmt: skip
    return ops_result() | {"kind": "e2e", "settings": settings, "rows": rows}


def put(folder, name, result):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return path


# What is committed ---------------------------------------------------------------------------------------------


def test_the_generated_files_are_what_the_results_give():
    assert numbers.stale() == [], "run: make numbers"


def test_every_plot_of_every_result_is_there(tmp_path):
    """Drawn anew: a plot that somebody removed is missed, and the page with it."""
    pytest.importorskip("matplotlib", reason="pip install pyvideo-kernels[bench]")
    for result in filter(numbers.has_plots, numbers.load(RESULTS)):
        for path in plots.write_all(result, tmp_path, numbers.stem(result)):
            committed = numbers.ROOT / "docs" / "plots" / path.name
            assert committed.exists() and plots.plot_digest(committed) == plots.plot_digest(path), path.name


def test_a_decoder_s_result_is_a_table_without_plots():
    found = [result for result in numbers.load(RESULTS) if not numbers.has_plots(result)]
    assert found and {result["kind"] for result in found} == {"vae"}
    page = numbers.render()
    assert all(numbers.vae.title(result["settings"]) in page for result in found)
    assert page.count("| asked for |") == len(found)


def test_a_changed_result_is_noticed(tmp_path, monkeypatch):
    for name in ("benchmarks/results", "docs"):
        shutil.copytree(numbers.ROOT / name, tmp_path / name)
    shutil.copy(numbers.ROOT / "README.md", tmp_path)
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    assert numbers.main(["--check"]) == 0
    path = sorted((tmp_path / "benchmarks" / "results").rglob("*bf16*.json"))[0]
    result = json.loads(path.read_text())
    result["rows"][0]["seconds"] *= 3
    path.write_text(json.dumps(result))
    differs = numbers.stale()
    assert "docs/numbers.md" in differs and "README.md" in differs and any("svg" in name for name in differs)
    assert numbers.main(["--check"]) == 1


def test_make_numbers_writes_all_of_it_and_drops_old_plots(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install pyvideo-kernels[bench]")
    put(tmp_path, "benchmarks/results/a-card/ops-rms_norm.json", ops_result())
    put(tmp_path, "benchmarks/results/a-card/campaign.json", {"slices": {}})
    old = plots.write_all(ops_result(op_row("gone")), tmp_path / "docs" / "plots", "old")
    assert len(old) == 2
    (tmp_path / "README.md").write_text(f"# A\n{numbers.BEGIN}\nold\n{numbers.END}\nrest\n")
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    assert numbers.main([]) == 0 and numbers.stale() == []
    names = {path.name for path in (tmp_path / "docs" / "plots").iterdir()}
    assert names == {"a-card-ops-bf16-speedup.svg", "a-card-ops-bf16-roofline.svg"}
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("# A\n") and readme.endswith("\nrest\n") and "old" not in readme
    assert "| `rms_norm` | wan-14b-480p | triton | 0.100 | 2.50 |" in readme and "speedup.svg)" in readme


# What gets in, and what does not -------------------------------------------------------------------------------


def test_without_a_gpu_result_the_page_says_so():
    if any(r["provenance"]["device"] == "cuda" for r in numbers.load(RESULTS)):
        assert numbers.NO_GPU not in numbers.readme_section()
    else:
        assert numbers.NO_GPU in numbers.render() and numbers.NO_GPU in numbers.readme_section().replace("\n", " ")


def test_a_gpu_table_names_its_machine(tmp_path):
    put(tmp_path, "a.json", ops_result())
    put(tmp_path, "b.json", clip_result())
    page = numbers.render(tmp_path, tmp_path, tmp_path / "none")
    assert numbers.NO_GPU not in page and numbers.NO_GPU not in numbers.readme_section(tmp_path, tmp_path)
    for fact in ("A Card", "triton 3.6.0", "driver 580.1", "1980 MHz", "torch 2.11.0", "`abc1234`", "2026-01-01",
                 "copy 3.00 TB/s", "matrix product 800 TFLOP/s"):  # fmt: skip
        assert page.count(fact) >= 2, fact
    assert "## End to end on GPUs" in page and "| ours |" in page and "1.25" in page


@pytest.mark.parametrize("lost", ["gpu", "driver", "triton", "clock_sm", "torch", "revision", "date", "arch", "device"])
def test_a_gpu_row_without_provenance_is_refused(tmp_path, lost):
    result = ops_result()
    del result["provenance"][lost]
    put(tmp_path, "doctored.json", result)
    with pytest.raises(ValueOptionError, match=f"doctored.json: provenance lacks .*{lost}"):
        numbers.render(tmp_path, tmp_path)


def test_a_cpu_result_that_calls_itself_a_gpu_one_is_refused(tmp_path):
    result = json.loads(sorted(RESULTS.glob("*.json"))[0].read_text())
    result["provenance"]["device"] = "cuda"
    put(tmp_path, "doctored.json", result)
    with pytest.raises(ValueOptionError, match="provenance lacks gpu, driver, clock_sm"):
        numbers.render(tmp_path, tmp_path)


@pytest.mark.parametrize("mark", ["dry", "incomplete", "interrupted"])
def test_a_dry_or_unfinished_run_is_refused(tmp_path, mark):
    put(tmp_path, "deep/er.json", ops_result(**{mark: True}))
    with pytest.raises(ValueOptionError, match=f"is of an? {mark} run"):
        numbers.load(tmp_path)


def test_files_of_one_machine_are_one_table(tmp_path):
    put(tmp_path, "card/ops-a.json", ops_result(op_row("a")))
    later = ops_result(op_row("b"), provenance=GPU | {"revision": "def5678", "date": "2026-01-03"})
    put(tmp_path, "card/ops-b.json", later)
    put(tmp_path, "other/ops-a.json", ops_result(op_row("a"), provenance=GPU | {"gpu": "B Card"}))
    first, second = numbers.load(tmp_path)
    assert [row["op"] for row in first["rows"]] == ["a", "b"] and tables.machine(second) == "B Card"
    page = numbers.render(tmp_path, tmp_path)
    assert "at `abc1234`, `def5678`, 2026-01-01, 2026-01-03." in page and page.count("### ") == 2
    put(tmp_path, "card/again.json", ops_result(op_row("a")))
    with pytest.raises(ValueOptionError, match="a wan-14b-480p bfloat16 triton is in another file"):
        numbers.load(tmp_path)


def test_clips_that_differ_in_variants_or_settings_alone_keep_their_plots_apart(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install pyvideo-kernels[bench]")
    one, other, latents = clip_result(), clip_result(), clip_result()
    other["rows"][1]["variant"] = "ours:attention=dense"
    latents["settings"]["decode"] = False
    again = clip_result()
    again["settings"]["text_seconds"] = 1.5  # as measured in another run
    assert numbers.stem(again) == numbers.stem(one)
    paths = [put(tmp_path, f"{i}.json", each) for i, each in enumerate((one, other, latents))]
    page, *pictures = numbers.report(paths, tmp_path, "Clips")
    assert len(set(pictures)) == len(pictures) >= 3
    assert all(f"](plots/{path.name})" in page.read_text() for path in pictures)
    put(tmp_path, "3.json", again)
    with pytest.raises(ValueOptionError, match="3.json: wan2.1-1.3b.* is in another file of the same machine too"):
        numbers.load(tmp_path)


def test_a_report_is_of_the_files_given_and_nothing_else(tmp_path, monkeypatch):
    paths = [put(tmp_path, "ops.json", ops_result()), put(tmp_path, "clip.json", clip_result())]
    put(tmp_path, "another.json", {"not": "a result"})
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "mine.svg").write_text("<svg/>")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    (page,) = numbers.report(paths, tmp_path, "A title")
    text = page.read_text()
    assert text.startswith("# A title\n\nplots need matplotlib") and "rms_norm" in text and "| ours |" in text
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="pip install pyvideo-kernels[bench]")
    written = numbers.report(paths, tmp_path, "A title")
    assert all(path.exists() for path in written) and f"](plots/{written[1].name})" in page.read_text()
    assert (tmp_path / "plots" / "mine.svg").exists()


def test_tuned_configurations_are_listed(tmp_path):
    row = {"op": "rms_norm", "family": "row", "key": {"op": "rms_norm", "width": 5120}, "digest": "x", "tuned": True,
           "config": {"block": 4, "num_warps": 8}, "default_seconds": 3e-4, "seconds": 2e-4}  # fmt: skip
    put(tmp_path, "a-card.json", ops_result(row, {**row, "tuned": False}, kind="tuning"))
    page = numbers.render(tmp_path / "none", tmp_path, tmp_path)
    assert "1 of 2 shape keys are faster" in page
    assert "| row | op rms_norm, width 5120 | block 4, num_warps 8 | 1.50 |" in page


def test_the_readme_needs_its_markers():
    assert numbers.with_section(f"a{numbers.BEGIN}x{numbers.END}b", "t") == f"a{numbers.BEGIN}\nt{numbers.END}b"
    with pytest.raises(ValueOptionError, match="expected the markers"):
        numbers.with_section(f"a{numbers.END}{numbers.BEGIN}", "t")


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    put(tmp_path, "benchmarks/results/bad.json", {"schema": 0})
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    assert numbers.main([]) == 2
    assert "error: " in capsys.readouterr().err


def test_results_without_a_machine_are_refused():
    gpu = {"device": "cuda", "arch": "sm_90", "torch": "2", "python": "3", "pyvideo_kernels": "0", "revision": "abc"}
    assert results.missing_provenance(gpu) == ["date", "gpu", "driver", "triton", "clock_sm"]
