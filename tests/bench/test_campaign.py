"""A campaign without a card: the same slices on tiny shapes, and what crashes, hangs, is cut off or resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from pyvideo_kernels import collect_env, dispatch
from pyvideo_kernels.benchmarks import e2e, numbers, ops, results
from pyvideo_kernels.benchmarks.campaign import correctness, slices
from pyvideo_kernels.benchmarks.campaign import run as campaign
from pyvideo_kernels.benchmarks.campaign import runs as slice_runs
from pyvideo_kernels.benchmarks.campaign import state as campaign_state
from pyvideo_kernels.benchmarks.campaign import worker as slice_process
from pyvideo_kernels.benchmarks.campaign.slices import Slice
from pyvideo_kernels.benchmarks.campaign.state import State
from pyvideo_kernels.benchmarks.campaign.worker import Outcome
from pyvideo_kernels.benchmarks.e2e import session
from pyvideo_kernels.benchmarks.registry import ENTRIES
from pyvideo_kernels.benchmarks.tune import launches
from pyvideo_kernels.configs import tuned
from pyvideo_kernels.error_types import ValueOptionError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import samples

CPU = torch.device("cpu")
ROOT = numbers.ROOT
HERE = "tests.bench.campaign_slices"
WHERE = {"device": "cpu", "torch": "x"}


def piece(name, what="good", seconds=1.0, **more):
    return Slice(name, "test", f"{HERE}:{what}", seconds, **more)


def walk(plan, out, *, seconds=60.0, resume=True, keep=False, pack=None, where=WHERE):
    state = State(out, where, dry=True, fresh=not resume)
    one = campaign.Campaign(plan, state, device="cpu", seconds=seconds + campaign.RESERVE, keep=keep, pack=pack)
    one.run()
    return state


def statuses(state):
    return {name: entry["status"] for name, entry in state.slices.items()}


# The real slices ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """One dry campaign over every slice, as a user runs it."""
    out = tmp_path_factory.mktemp("campaign") / "dry"
    # --keep: whoever edits a kernel while this runs does not have it walked again.
    argv = ["--device", "cpu", "--dry", "--keep", "--minutes", "8", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.campaign", *argv, "--pack", str(out.with_suffix(".tar.gz"))],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_a_dry_campaign_walks_the_slices_and_writes_a_file_each(dry):
    out, said = dry
    names = {each.name for each in slices.plan()}
    assert {path.stem for path in out.glob("*.json")} == names | {"campaign"}
    kinds = {name: results.read(out / f"{name}.json")["kind"] for name in names}
    assert set(kinds.values()) == {"environment", "correctness", "tuning", "ops", "e2e", "vae"}
    assert f"\n{len(names)} done; results in {out}\n" in said
    state = json.loads((out / "campaign.json").read_text())
    assert state["dry"] and {entry["status"] for entry in state["slices"].values()} == {"done"}
    order = [line.split()[1] for line in said.splitlines() if line.startswith("running")]
    assert order == [each.name for each in slices.plan()]


@pytest.mark.slow
def test_what_the_slices_found(dry):
    out, _ = dry
    read = lambda name: json.loads((out / f"{name}.json").read_text())
    rows = read("correctness-rms_norm")["rows"]
    assert {row["outcome"] for row in rows} == {"passed"} and {row["test"] for row in rows} >= {"canary"}
    assert any(row["test"].startswith("test_matches_float64") for row in rows)
    (row,) = read("ops-guidance_step")["rows"]
    assert row["shape"] == "tiny" and row["baselines"]["eager"]["ratio"] > 0
    assert read("tune-rms_norm")["found"]["finished"] and not list(tuned.FOLDER.glob("dry*"))
    assert [row["variant"] for row in read("e2e-wan2.1-1.3b-480p")["rows"]] == ["eager", "ours"]
    assert read("environment")["ceilings"]["copy"] > 0 and read("environment")["environment"]["versions"]["torch"]


@pytest.mark.slow
def test_no_table_takes_a_dry_result(dry):
    out, _ = dry
    with pytest.raises(ValueOptionError, match="is of a dry run"):
        numbers.load(out)
    for path in out.glob("*.json"):
        result = json.loads(path.read_text())
        assert result["dry"] is True
        if path.name != "campaign.json":
            assert result["provenance"]["device"] == "cpu"


@pytest.mark.slow
def test_a_dry_campaign_makes_a_report_and_an_archive(dry):
    out, said = dry
    page = (out / "report" / "numbers.md").read_text()
    assert "guidance_step" in page and "rms_norm" in page and "tiny-random-wan" in page
    assert f"report: {out / 'report' / 'numbers.md'}" in said
    with tarfile.open(out.with_suffix(".tar.gz")) as tar:
        names = set(tar.getnames())
    assert {"dry/ops-rms_norm.json", "dry/campaign.json", "pyvideo_kernels/verified.json"} <= names
    assert not [name for name in names if name.startswith("/")]


# The walk ----------------------------------------------------------------------------------------------------


def test_a_crash_takes_nothing_else_down(tmp_path):
    plan = [piece("a"), piece("exits", "exits"), piece("killed", "killed"), piece("raises", "raises"),
            piece("quits", "quits"), piece("b", parameters={"red": 2})]  # fmt: skip
    state = walk(plan, tmp_path)
    assert statuses(state) == {"a": "done", "exits": "failed", "killed": "failed", "raises": "failed",
                               "quits": "failed", "b": "done"}  # fmt: skip
    assert "the last words" in state.slices["exits"]["tail"] and "exit code 3" in state.slices["exits"]["summary"]
    assert "SIGKILL" in state.slices["killed"]["summary"]
    assert (
        "illegal memory access" in state.slices["raises"]["summary"] and "Traceback" in state.slices["raises"]["tail"]
    )
    assert str(ROOT) not in state.path.read_text()  # it is committed with the results
    assert "tail" not in state.slices["b"] and state.slices["b"]["red"] == 2
    pids = [json.loads((tmp_path / f"{name}.json").read_text())["pid"] for name in "ab"]
    assert pids[0] != pids[1]  # nothing runs in a process in which something has failed

    again = walk(plan, tmp_path)  # tried once more, and no more than that
    assert again.attempts(plan[1]) == 2
    before = again.path.read_text()
    walk(plan, tmp_path)
    assert json.loads(before) == json.loads(again.path.read_text())


def test_the_tuner_s_process_and_compilers_outlive_other_slices(tmp_path):
    tunes = {name: Slice(name, "tune", f"{HERE}:good", 1.0) for name in ("t1", "t2", "t3")}
    plan = [tunes["t1"], piece("a"), tunes["t2"], piece("b"), piece("c", alone=True), tunes["t3"]]
    # A dry walk has one process for all.
    state = State(tmp_path, WHERE, dry=False, fresh=True)
    campaign.Campaign(plan, state, device="cpu", seconds=60.0 + campaign.RESERVE).run()
    pids = {path.stem: json.loads(path.read_text())["pid"] for path in tmp_path.glob("??.json")}
    pids |= {name: json.loads((tmp_path / f"{name}.json").read_text())["pid"] for name in "abc"}
    assert pids["t1"] == pids["t2"] != pids["t3"] and len(set(pids.values())) == 5
    assert launches.shared_compiler(3) is launches.shared_compiler(3)


def test_what_failed_with_other_sources_is_tried_again(tmp_path):
    source = tmp_path / "source.py"
    source.write_text("broken")
    plan = [piece("a", "exits", files=(source,))]
    for attempts in (1, 2, 2):
        assert walk(plan, tmp_path / "out").attempts(plan[0]) == attempts
    source.write_text("mended")
    state = walk([piece("a", files=(source,))], tmp_path / "out")
    assert statuses(state) == {"a": "done"} and state.attempts(plan[0]) == 0


def test_a_slice_that_fails_leaves_no_result(tmp_path):
    (tmp_path / "kept.json").write_text("an older one")
    state = walk([piece("a", "writes_and_fails"), piece("kept", "writes_and_fails")], tmp_path)
    assert set(statuses(state).values()) == {"failed"}
    assert {path.name for path in tmp_path.iterdir()} == {"campaign.json", "kept.json"}
    assert (tmp_path / "kept.json").read_text() == "an older one"


def test_a_hang_is_stopped_by_its_own_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Slice, "limit", property(lambda self: 3.0))
    state = walk([piece("hangs", "hangs"), piece("after")], tmp_path)
    assert statuses(state) == {"hangs": "failed", "after": "done"}
    assert state.slices["hangs"]["summary"] == "stopped after 3 s"
    assert "never ends" in state.slices["hangs"]["tail"]


def test_the_time_limit_cuts_a_slice_which_is_then_left(tmp_path):
    state = walk([piece("hangs", "hangs", 2.0), piece("after")], tmp_path, seconds=5.0)
    assert statuses(state) == {"hangs": "left"}
    assert state.least(piece("hangs", "hangs", 2.0)) > 5  # not tried again in as little time


def test_what_does_not_fit_gives_way_to_what_does(tmp_path):
    plan = [piece("large", seconds=500.0), piece("small"), piece("also large", seconds=400.0)]
    assert statuses(walk(plan, tmp_path, seconds=30.0)) == {"small": "done"}


def test_resume_does_what_is_not_done(tmp_path):
    changing = tmp_path / "source.py"
    changing.write_text("one")
    plan = [piece("a"), piece("b", files=(changing,)), piece("c")]
    walk(plan, tmp_path / "out")
    dates = lambda: {name: (tmp_path / "out" / f"{name}.json").stat().st_mtime_ns for name in "abc"}
    first = dates()
    walk(plan, tmp_path / "out")
    assert dates() == first
    changing.write_text("two")
    (tmp_path / "out" / "c.json").unlink()
    state = State(tmp_path / "out", WHERE, dry=True, fresh=False)
    assert [state.status(each, keep=False) for each in plan] == ["done", "stale", "left"]
    assert [state.status(each, keep=True) for each in plan] == ["done", "done", "left"]
    walk(plan, tmp_path / "out", keep=True)
    kept = dates()
    assert kept["a"] == first["a"] and kept["b"] == first["b"] and kept["c"] != first["c"]
    walk(plan, tmp_path / "out")
    assert dates()["b"] != first["b"] and dates()["c"] == kept["c"]
    other = State(tmp_path / "out", WHERE | {"torch": "y"}, dry=True, fresh=False)
    assert {other.status(each, keep=False) for each in plan} == {"stale"}
    walk(plan[:1], tmp_path / "out", resume=False)
    assert dates()["a"] != first["a"]


def test_a_slice_that_goes_on_takes_several_turns(tmp_path):
    plan = [piece("long", "goes_on", 300.0, least=1.0)]
    for turn, status in ((1, "left"), (2, "left"), (3, "done")):
        state = walk(plan, tmp_path, seconds=20.0)
        assert statuses(state) == {"long": status} and state.slices["long"]["summary"] == f"turn {turn}"


def test_what_needs_an_absent_module_is_skipped_aloud(tmp_path, capsys):
    state = walk([piece("a", needs=("no_such_module",))], tmp_path)
    assert statuses(state) == {"a": "skipped"}
    assert "skipped  a: needs no_such_module, not installed" in capsys.readouterr().out


def test_dry_and_real_do_not_mix(tmp_path):
    walk([piece("a")], tmp_path)
    with pytest.raises(ValueOptionError, match="holds a dry campaign, this is a real one"):
        State(tmp_path, WHERE, dry=False, fresh=True)
    (tmp_path / campaign_state.FILE).write_text("{")
    with pytest.raises(ValueOptionError, match="not the state of a campaign"):
        State(tmp_path, WHERE, dry=True, fresh=False)


def test_a_signal_keeps_what_is_finished(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from pyvideo_kernels import collect_env
from pyvideo_kernels.benchmarks.campaign import run as campaign, slices
from pyvideo_kernels.benchmarks.campaign.slices import Slice
slices.plan = lambda dry: [Slice("a", "test", "{HERE}:good", 1.0), Slice("b", "test", "{HERE}:hangs", 30.0)]
sys.exit(campaign.main(["--device", "cpu", "--dry", "--minutes", "5", "--out", sys.argv[1]]))
"""
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    said = []
    for line in run.stdout:
        said.append(line)
        if "running  b" in line:
            break
    time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    rest, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and "everything finished is kept" in rest
    assert "1 done, 1 left" in rest and "go on with: python -m benchmarks.campaign --minutes 5 --resume" in rest
    assert (tmp_path / "a.json").exists()


def test_ctrl_c_does_so_too(tmp_path, monkeypatch, capsys):
    run = campaign.Process.run

    def interrupted(self, request, seconds):
        if request["out"].endswith("b.json"):
            raise KeyboardInterrupt
        return run(self, request, seconds)

    monkeypatch.setattr(campaign.Process, "run", interrupted)
    monkeypatch.setattr(slices, "plan", lambda dry: [piece("a"), piece("b"), piece("c")])
    assert campaign.main(["--device", "cpu", "--dry", "--out", str(tmp_path)]) == 130
    assert "1 done, 2 left" in capsys.readouterr().out
    monkeypatch.setattr(campaign.Process, "run", run)
    monkeypatch.setattr(campaign.Campaign, "report", lambda self: None)
    assert campaign.main(["--device", "cpu", "--dry", "--out", str(tmp_path), "--resume"]) == 0
    assert "3 done;" in capsys.readouterr().out


def test_variants_without_time_are_no_rows_and_leave_the_slice_unfinished(tmp_path, monkeypatch):
    rows = [
        {"variant": "eager", "seconds": {"step": {"median": 0.5}}},
        {"variant": "compile", "error": f"{session.LEFT_OUT}too late"},
        {"variant": "ours", "error": "OutOfMemoryError: full"},
    ]
    asked = []
    monkeypatch.setattr(e2e, "run", lambda request: asked.append(request) or {"rows": list(rows)})
    job = slice_process.Job(tmp_path / "e2e-x.json", "cpu", True, {"model": "tiny-random-wan"}, 100.0)
    outcome = slice_runs.e2e(job)
    assert (outcome.red, outcome.unfinished) == (1, True) and "no time for compile" in outcome.summary
    assert [row["variant"] for row in json.loads(job.out.read_text())["rows"]] == ["eager", "ours"]
    assert 0 < asked[0].seconds < 100


def test_shapes_without_time_leave_the_slice_unfinished_and_its_rows_on_disk(tmp_path, monkeypatch):
    asked = []
    row = {"op": "rms_norm", "shape": "a", "baselines": {"eager": {"ratio": 2.0}}}

    def run(names, device, dtype, *, deadline):
        asked.append(deadline - time.monotonic())
        return {"rows": rows, "unfinished": ["rms_norm b"]}

    monkeypatch.setattr(ops, "run", run)
    job = slice_process.Job(tmp_path / "ops-x.json", "cpu", False, {"ops": ["rms_norm"], "dtype": "bf16"}, 100.0)
    rows = []
    assert slice_runs.ops(job).unfinished and not job.out.exists()
    rows = [row]
    outcome = slice_runs.ops(job)
    assert outcome == Outcome("1 rows; up to 2.00 x eager; no time for rms_norm b", unfinished=True)
    assert json.loads(job.out.read_text())["rows"] == rows
    assert all(0 < seconds < 100 for seconds in asked)


# The plan ----------------------------------------------------------------------------------------------------


def test_the_plan_covers_every_op_and_starts_with_correctness():
    plan = slices.plan()
    names = [each.name for each in plan]
    assert len(set(names)) == len(names) and names == [each.name for each in slices.plan(dry=True)]
    assert {f"correctness-{op}" for op in OPS if not op.endswith(("_", "_backward"))} <= set(names)
    assert {f"ops-{op}" for op in ENTRIES if not op.endswith("_")} <= set(names)
    measured = {op for each in plan if each.group == "ops" for op in each.parameters["ops"]}
    assert measured == set(ENTRIES)
    groups = [each.group for each in plan]
    assert groups[0] == "environment" and set(groups[1 : 1 + len(slices.families())]) == {"correctness"}
    assert {"wan2.1-1.3b", "wan2.1-14b"} <= {each.parameters.get("model") for each in plan}
    decoders = {each.parameters["model"] for each in plan if each.group == "vae"}
    assert decoders == {"wan2.1-1.3b", "wan2.1-14b", "wan2.2-5b", "hunyuanvideo", "ltx", "cogvideox-5b"}
    for each in plan:
        assert not each.missing() and each.seconds <= 9 * 60 - campaign.RESERVE, each.name
        for path in each.files:
            assert path.is_file() or path.parent == ROOT / "tests" / "ops", path


def test_a_result_depends_on_the_op_s_sources_and_tuned_configurations(tmp_path, monkeypatch):
    plan = {each.name: each for each in slices.plan()}
    where = {"gpu": "A Card"}
    keys = lambda: {name: each.key(where) for name, each in plan.items()}
    before = keys()
    assert before["ops-rms_norm"] != plan["ops-rms_norm"].key({"gpu": "B Card"})
    assert ROOT / "kernels" / "rms_norm.py" in slices.sources("rms_norm")
    assert ROOT / "csrc" / "rms_norm" / "rms_norm_cpu.cpp" in slices.sources("rms_norm")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    row = {"family": "row", "key": {"op": "rms_norm"}, "config": {"rows": 4}, "digest": "x", "tuned": True}
    gpu = {"gpu": "A Card", "driver": "1", "arch": "sm_90", "torch": "2", "triton": "3", "revision": "a", "date": "b"}
    table = {"schema": 1, "kind": "tuning", "provenance": gpu, "rows": [row]}
    (tmp_path / "a-card.json").write_text(json.dumps(table))
    changed = {name for name, key in keys().items() if key != before[name]}
    assert changed == {"correctness-rms_norm", "ops-rms_norm"} | {n for n in plan if n.startswith("e2e")}


def test_a_result_depends_on_what_measures_it_and_not_on_what_shows_it():
    def named(root):
        files = (path.relative_to(ROOT / "benchmarks").with_suffix("") for path in slices.measuring(root))
        return {".".join(part for part in file.parts if part != "__init__") for file in files}

    names = {root: named(root) for root in ("ops", "tune.run", "e2e")}
    shared = {"timing", "backends"}
    assert names["ops"] >= shared | {"ops.row", "ops.baselines", "ops.agreement", "registry", "shapes", "eager"}
    peers = {f"peers.{path.stem}" for path in (ROOT / "benchmarks" / "peers").glob("[!_]*.py")}
    assert len(peers) >= 5 and names["ops"] >= peers | {"peers"}  # a new one counts too
    assert names["tune.run"] >= shared | {"tune.search", "tune.launches", "registry", "shapes"}
    assert "e2e" not in names["tune.run"]
    assert names["e2e"] >= shared | {
        "e2e.session", "e2e.attention_choice", "e2e.quality", "profile", "models", "models.random_weights",
        "models.families",
    }  # fmt: skip
    shown = {name.rpartition(".")[2] for name in set().union(*names.values())}
    assert not shown & {"tables", "plots", "numbers", "results", "campaign", "cli", "table", "console"}
    (clip,) = (each for each in slices.plan() if each.name == "e2e-wan2.1-14b-480p")
    assert ROOT / "benchmarks" / "models" / "architectures" / "wan2.1-14b.json" in clip.files


def test_only_names_slices_patterns_and_groups():
    plan = slices.plan()
    assert [each.name for each in campaign.select(plan, ["environment"])] == ["environment"]
    assert {each.group for each in campaign.select(plan, ["tune", "ops-r*"])} == {"tune", "ops"}
    with pytest.raises(ValueOptionError, match="did you mean 'ops-rms_norm'"):
        campaign.select(plan, ["ops-rms_nrm"])


def test_the_command_line(capsys, tmp_path):
    assert campaign.main(["--list", "--dry"]) == 0
    listed = capsys.readouterr().out
    assert "ops-spacetime_attention" in listed and "minutes on an H100" in listed
    assert campaign.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "a campaign measures a card" in capsys.readouterr().err
    for bad in (["--minutes", "0"], ["--minutes", "soon"], ["--device", "tpu"]):
        with pytest.raises(SystemExit, match="2"):
            campaign.main(bad)
    if not torch.cuda.is_available():
        assert campaign.main(["--device", "cuda"]) == 2
        assert "the card does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print('a warning, then no JSON')", "expected JSON .*got 'a warning, then no JSON"),
        ("import time; time.sleep(60)", "nothing came of it in 2 s"),
        ("import sys; sys.exit('driver mismatch')", "does not answer: driver mismatch"),
    ],
)
def test_a_card_that_does_not_answer_is_a_sentence(monkeypatch, capsys, tmp_path, code, text):
    run = subprocess.run
    monkeypatch.setattr(campaign.subprocess, "run", lambda argv, **more: run([argv[0], "-c", code], **more))
    monkeypatch.setattr(campaign, "_ANSWER_S", 2.0)
    assert campaign.main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert re.search(text, capsys.readouterr().err)


def test_the_card_is_named_by_what_collect_env_says(monkeypatch):
    monkeypatch.delenv("PYVIDEO_REVISION", raising=False)
    facts = collect_env.collect()
    card = {"gpu": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "driver": "580.1"}
    on_card = facts | {"gpus": [card], "revision": "abc1234"}
    where, folder = campaign.named(on_card, WHERE)
    assert folder == "nvidia-h100-80gb-hbm3" and where["gpu"] == card["gpu"] and where["arch"] == "sm_90"
    with pytest.raises(ValueOptionError, match="give --revision"):
        campaign.named(on_card | {"revision": None}, WHERE)
    monkeypatch.setenv("PATH", "")  # no git: as in a copy without .git
    assert collect_env.revision() == {}
    monkeypatch.setenv("PYVIDEO_REVISION", "abc1234")
    assert collect_env.revision() == {"revision": "abc1234"}


# Correctness rows ----------------------------------------------------------------------------------------------


def test_samples_are_compiled_ahead_in_every_dtype_and_head_dim(monkeypatch):
    asked = []

    class Recorder:
        def compile(self, jobs, until):
            asked.extend(jobs)
            return dict.fromkeys(jobs)

    monkeypatch.setattr(launches, "shared_compiler", lambda workers: Recorder())
    assert correctness.compile_ahead("spacetime_attention", CPU) == len(asked) == len(set(asked))
    forward = [job.launch for job in asked if job.launch.op == "spacetime_attention"]
    assert {launch.dtype for launch in forward} == {"bfloat16", "float16", "float32"}
    for head_dim in dispatch.HEAD_DIMS:
        of = [launch for launch in forward if launch.shape.endswith(f"of head_dim {head_dim}")]
        assert len(of) == 3 * len(list(samples(OPS["spacetime_attention"], torch.float32, head_dim=head_dim)))
        assert all(launch.args(launches.META)[0].shape[-1] == head_dim for launch in of[:2])
    assert any("head_dim" not in launch.shape for launch in forward)  # those of the test file
    assert "spacetime_attention_backward" in {job.launch.op for job in asked}


def test_red_tests_speak_against_the_record():
    canaries = [
        {"op": "a", "impl": impl, "dtype": dtype, "head_dim": None, "ok": True, "error": "", "digest": "d"}
        for impl in ("triton", "cuda")
        for dtype in ("bfloat16", "float32")
    ]
    canaries.append({**canaries[0], "dtype": "float16", "ok": None})
    verdicts = lambda *tests: {(r["impl"], r["dtype"]): r["ok"] for r in correctness.judged(canaries, tests)}
    assert set(verdicts().values()) == {True} and len(verdicts()) == 4
    red = verdicts({"impl": "triton", "dtype": "bfloat16", "outcome": "failed"})
    assert [key for key, ok in red.items() if not ok] == [("triton", "bfloat16")]
    assert sum(verdicts({"dtype": "float32", "outcome": "not run"}).values()) == 2
    assert not any(verdicts({"outcome": "failed"}).values())


def test_a_lost_card_ends_the_session(tmp_path):
    path = tmp_path / "test_lost.py"
    path.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize(('impl', 'dtype'), [('triton', 'bfloat16'), ('triton', 'float32')])\n"
        "def test_kernel(impl, dtype):\n"
        "    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_skipped():\n    pytest.skip('no reason')\n"
    )
    plugin = correctness.Rows("op", on_card=True)
    code = """
import json, sys, pytest
from pyvideo_kernels.benchmarks.campaign import correctness
plugin = correctness.Rows("op", on_card=True)
pytest.main([sys.argv[1], "-q", "-p", "no:cacheprovider", "--rootdir", sys.argv[2]], plugins=[plugin])
print(json.dumps(list(plugin.rows.values())))
"""
    done = subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path)], capture_output=True, text=True,
                          cwd=ROOT, timeout=120)  # fmt: skip
    first, second, third = json.loads(done.stdout.splitlines()[-1])
    assert first["outcome"] == "failed" and "illegal memory access" in first["message"]
    assert (first["impl"], first["dtype"], first["op"]) == ("triton", "bfloat16", "op")
    assert second["outcome"] == third["outcome"] == "not run" and "state was lost in" in second["message"]
    assert plugin.rows == {}


def test_tests_that_read_the_device_are_selected_on_a_card():
    from tests import conftest
    from tests.ops import helpers

    def direct():
        return torch.zeros(1, device=helpers.DEVICE)

    def inside():
        return [torch.zeros(1, device=helpers.DEVICE) for _ in range(2)]

    def neither():
        return torch.zeros(1)

    names = [
        function.__name__ for function in (direct, inside, neither) if conftest._names_the_device(function.__code__)
    ]
    assert names == ["direct", "inside"]


def test_the_archive_lies_flat_outside_the_checkout(tmp_path):
    out = tmp_path / "results"
    out.mkdir()
    (out / "a.json").write_text("{}")
    campaign.pack(tmp_path / "new" / "take.tar.gz", out)
    with tarfile.open(tmp_path / "new" / "take.tar.gz") as tar:
        assert "results/a.json" in tar.getnames() and Path("pyvideo_kernels/verified.json").as_posix() in tar.getnames()
