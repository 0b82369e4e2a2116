"""The tuner: it finds the fastest, keeps out the wrong, and loses nothing that was finished."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyvideo_kernels.benchmarks import results
from pyvideo_kernels.benchmarks.timing import Timing
from pyvideo_kernels.benchmarks.tune import launches
from pyvideo_kernels.benchmarks.tune import run as tune
from pyvideo_kernels.benchmarks.tune import search as tune_search
from pyvideo_kernels.benchmarks.tune.launches import Compiled, Job, Launch
from pyvideo_kernels.benchmarks.tune.search import OutOfTime, Question, Search
from pyvideo_kernels.configs import tuned
from pyvideo_kernels.errors import UnsupportedError, ValueOptionError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import samples
from pyvideo_kernels.testing.static import Reading

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
THREE = ("guidance_step", "rms_norm_silu", "gate_residual")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="walks the tuner in Triton's interpreter")


class Clock:
    """Stands in for `timing.interleaved`: runs each call once and times it by the configuration that it launched."""

    def __init__(self, seconds):
        self.seconds, self.rounds = seconds, []

    def __call__(self, calls, sets, *, device, rounds, failures):
        self.rounds.append((len(calls), rounds))
        out = {}
        for name, call in calls.items():
            with tuned.recording() as asked:
                call(sets[0])
            try:
                out[name] = Timing(self.seconds(asked[0].config), 0.001, rounds)
            except MemoryError as error:
                failures[name] = error
        return out


def rows_four(config):
    return 0.5 if getattr(config, "rows", 0) == 4 else 1.0


def run(out, *ops, clock=rows_four, oracle=False, **options):
    """Tune rms_norm_silu, or ``ops``; the oracle's own samples take the interpreter long, so they run if asked for."""
    options = {"dry": True, "workers": 0, "on_progress": lambda line: None, **options}
    with pytest.MonkeyPatch.context() as patch:
        if not oracle:
            patch.setattr(tune, "_red", lambda question, device: "")
        return tune.tune(ops or ("rms_norm_silu",), "cpu", out=out, timer=Clock(clock), **options)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "table.json"


@pytest.fixture
def kernel(monkeypatch):
    """Break rms_norm_silu for chosen configurations: ``kernel(when, how)``."""
    module = __import__("pyvideo_kernels.kernels.rms_norm_silu", fromlist=["launch_fwd"])
    launch = module.launch_fwd

    def broken(when, how):
        def launch_fwd(x, y, weight, eps, silu, config):
            if when(config):
                how(lambda: launch(x, y, weight, eps, silu, config), y)
            else:
                launch(x, y, weight, eps, silu, config)

        monkeypatch.setattr(module, "launch_fwd", launch_fwd)

    return broken


def question(family="rms_norm_silu"):
    launch = Launch(family, "sample 0", "float16")
    (asked,) = launches.asked(launch, "cpu")
    return Question(asked.family, asked.key, (launch,))


# The search ------------------------------------------------------------------------------------------------------


def test_the_known_fastest_is_found():
    clock = Clock(rows_four)
    row = Search(CPU, "sm_90", None, timer=clock, say=lambda line: None).answer(question())
    assert row["tuned"] and row["config"]["rows"] == 4
    assert row["seconds"] == 0.5 and row["default_seconds"] == 1.0 and row["default_config"]["rows"] == 8
    assert row["digest"] == tuned.digest("rms_norm_silu") and row["candidates"] > 8
    # Many with few rounds, few with many; never more in turns than may keep their outputs alive.
    assert clock.rounds[0] == (8, 5) and clock.rounds[-1] == (4, 7)
    assert all(count <= 8 for count, _ in clock.rounds)


@pytest.mark.parametrize(
    ("seconds", "spread", "wins"), [(0.97, 0.001, True), (0.985, 0.001, False), (0.97, 0.02, False), (1.2, 0.0, False)]
)
def test_a_win_is_beyond_two_percent_and_beyond_the_spread(seconds, spread, wins):
    assert tune_search.beats(Timing(seconds, spread, 7), Timing(1.0, 0.001, 7)) is wins
    assert tune_search.beats(Timing(seconds, 0.001, 7), Timing(1.0, spread, 7)) is wins


def test_a_configuration_that_loses_at_one_shape_is_not_chosen():
    def at(**seconds):
        return {name: Timing(value, 0.01, 7) for name, value in seconds.items()}

    table = [at(rule=1.0, uneven=1.2, even=0.95), at(rule=10.0, uneven=8.0, even=9.5)]
    assert tune_search.choose("rule", ["uneven", "even"], table) == "even"
    assert tune_search.choose("rule", ["uneven"], table) == "rule"


def _reading(**change):
    values = {"kernel": "k", "num_warps": 4, "registers": 64, "spills": 0, "stack": 0, "shared": 1024, "matrix": {},
              "tma_loads": 0, "vector_loads": 1, **change}  # fmt: skip
    return Compiled((Reading(**values),))


def test_what_does_not_fit_is_never_run():
    asked = question()
    rule, *others = tuned.families()[asked.family].candidates("cpu", **dict(asked.key))
    bad = dict(zip(others, (_reading(spills=2), _reading(shared=1 << 20), Compiled(error="X: no")), strict=False))

    class Stub:
        def compile(self, jobs, until):
            return {job: bad.get(job.config, _reading()) for job in jobs}

    run = []

    def clock(config):
        run.append(config)
        return 1.0 if config == rule else 0.9

    row = Search(CPU, "sm_90", Stub(), timer=Clock(clock), say=lambda line: None).answer(asked)
    assert row["dropped"] == {"spills": 1, "shared memory": 1, "compiler": 1}
    assert rule in run and not set(run) & set(bad)


def test_a_rule_that_spills_is_still_what_others_are_held_to():
    asked = question()

    class Stub:
        def compile(self, jobs, until):
            return {job: _reading(spills=1) for job in jobs}

    row = Search(CPU, "sm_90", Stub(), timer=Clock(rows_four), say=lambda line: None).answer(asked)
    assert not row["tuned"] and row["dropped"] == {"spills": row["candidates"] - 1}


def test_the_oracle_s_samples_are_compiled_before_they_are_run():
    begun, asked = [], []

    class Stub:
        def ahead(self, jobs):
            begun.extend(jobs)

        def compile(self, jobs, until):
            asked.extend(jobs)
            return {}

    search = Search(CPU, "sm_90", Stub())
    search.prepare(question())
    assert not begun  # the interpreter compiles nothing
    search.device = torch.device("cuda")
    search.candidates = lambda question: ["one", "two"]
    search.prepare(question())
    assert len(asked) == len(list(samples(OPS["rms_norm_silu"], torch.float16))) and not any(j.family for j in asked)
    assert begun[: len(asked)] == asked and [job.config for job in begun[len(asked) :]] == ["one", "two"]


def test_work_the_compilers_did_not_finish_is_not_guessed():
    class Slow:
        def compile(self, jobs, until):
            return {}

    with pytest.raises(OutOfTime):
        Search(CPU, "sm_90", Slow(), timer=Clock(rows_four)).answer(question())


# Wrong configurations --------------------------------------------------------------------------------------------


def _off(launch, y):
    launch()
    y.view(-1)[3] += 0.5


def _nothing(launch, y):
    pass


def _raises(launch, y):
    raise RuntimeError("out of resource: registers")


@pytest.mark.parametrize(("how", "words"), [(_off, "1 of"), (_nothing, "NaN"), (_raises, "out of resource")])
def test_a_wrong_candidate_is_dropped_aloud_however_fast(out, kernel, how, words, monkeypatch):
    monkeypatch.setattr(tune_search, "_PASSES", ((8, 3),))
    said = []
    kernel(lambda config: config.rows == 4, how)
    summary = run(out, dry=True, on_progress=said.append)
    (row,) = json.loads(out.read_text())["rows"]
    if row["candidates"] == 2:  # a dry run tries two; the wrong one may not be among them
        search = Search(CPU, "sm_90", None, timer=Clock(rows_four), say=said.append)
        row, wrong = search.answer(question()), search.wrong
    else:
        wrong = summary["wrong"]
    assert row["config"]["rows"] != 4 and not row["tuned"]
    assert sum(row["dropped"].values()) == len(wrong) > 0
    assert all("rows=4" in text and words in text for text in wrong)
    assert any("DROPPED" in line and "rows=4" in line for line in said)


def test_the_order_of_a_sum_is_no_difference_and_a_lost_tile_is(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(4000, 64, generator=generator)
    a = exact.bfloat16()
    b = (exact * (1 + 1e-3 * torch.randn(exact.shape, generator=generator))).bfloat16()
    assert not torch.equal(a, b) and tune_search.difference([a], [b]) is None
    monkeypatch.setattr(tune_search, "_PIECE", 1000)
    assert tune_search.difference([a], [b]) is None
    assert tune_search.difference([a[:0]], [b[:0]]) is None
    lost, poisoned = (lambda t: t[17].zero_(), "elements differ"), (lambda t: t[3999, 63].fill_(torch.nan), "NaN")
    for spoil, words in (lost, poisoned):
        c = b.clone()
        spoil(c)
        assert words in tune_search.difference([a, a], [b, c])
    total = exact.double().sum(0).float()
    assert tune_search.difference([total], [exact.flip(0).cumsum(0)[-1]]) is None


def test_codes_may_round_the_other_way_now_and_then():
    a = torch.randint(-127, 127, (100, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    rounded, coarse, shifted = a.clone(), a.clone(), a + 1
    rounded[3, :32] += 1
    coarse[3, 5] = a[3, 5] - 2 if a[3, 5] > 0 else a[3, 5] + 2
    assert tune_search.difference([a], [rounded]) is None and tune_search.difference([a[:0]], [a[:0]]) is None
    assert tune_search.difference([a], [coarse]) == "output 0: 1 of 6400 codes differ, by up to 2"
    assert tune_search.difference([a], [shifted]) == "output 0: 6400 of 6400 codes differ, by up to 1"


def test_memory_of_the_right_answer_does_not_pass_for_one(kernel):
    """A kernel that writes nothing finds the rule's output in the memory that it is given, unless that is poisoned."""
    kernel(lambda config: config.rows == 4, _nothing)
    before = torch.are_deterministic_algorithms_enabled()
    asked = question()
    rule, *others = tuned.families()[asked.family].candidates("cpu", **dict(asked.key))
    bad = [config for config in others if config.rows == 4]
    found = Search(CPU, "sm_90", None, say=lambda line: None).agreeing(asked, asked.launches[0], [rule, *bad])
    assert set(found) == set(bad)
    assert torch.are_deterministic_algorithms_enabled() == before


def test_nothing_is_tuned_where_the_rule_itself_is_wrong(out, kernel):
    kernel(lambda config: True, _off)
    summary = run(out, oracle=True)
    assert not summary["finished"] and not out.exists()
    assert len(summary["wrong"]) == 1 and "rms_norm_silu" in summary["wrong"][0]


def test_of_a_slow_kernel_only_the_nearest_are_tried(monkeypatch):
    monkeypatch.setattr(tune_search, "_SCREEN_S", 0.0)
    asked = question()
    candidates = tuned.families()[asked.family].candidates("cpu", **dict(asked.key))
    row = Search(CPU, "sm_90", None, timer=Clock(lambda config: 1.0), say=lambda line: None).answer(asked)
    assert row["dropped"] == {"time": len(candidates) - 5} and row["candidates"] == len(candidates)


def test_what_cannot_be_timed_is_dropped():
    def seconds(config):
        if config.rows == 4:
            raise MemoryError("too large")
        return 1.0

    search = Search(CPU, "sm_90", None, timer=Clock(seconds), say=lambda line: None)
    row = search.answer(question())
    assert not row["tuned"] and row["dropped"]["failed"] == len(search.wrong) > 0
    assert all("MemoryError: too large" in text for text in search.wrong)


def test_what_takes_the_process_down_is_left_out_the_next_time(out, kernel):
    def crash(launch, y):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    second = tuned.families()["rms_norm_silu"].candidates("cpu", **dict(question().key))[1]
    kernel(lambda config: config == second, crash)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(out)
    (crashed,) = json.loads(out.read_text())["crashed"]
    assert crashed["config"] == dataclasses.asdict(second) and "illegal memory access" in crashed["error"]
    assert len(run(out)["finished"]) == 1
    assert len(json.loads(out.read_text())["crashed"]) == 1


# The table -------------------------------------------------------------------------------------------------------


def test_resuming_skips_what_is_finished(out):
    first = run(out, "rms_norm")
    # The forward's rows, and the backward's rows and sums.
    assert len(first["finished"]) == 3 and not first["skipped"]
    assert {row["op"] for row in json.loads(out.read_text())["rows"]} == {"rms_norm", "rms_norm_backward"}
    written = out.read_text()
    second = run(out, "rms_norm")
    assert not second["finished"] and second["skipped"] == first["finished"] and out.read_text() == written


def test_without_resuming_a_key_is_measured_again_and_has_one_row(out):
    for _ in range(2):
        assert len(run(out, resume=False)["finished"]) == 1
    assert len(json.loads(out.read_text())["rows"]) == 1


@pytest.mark.parametrize("change", ["digest", "default_config", "measured"])
def test_a_key_is_measured_again_when_what_it_depends_on_changed(out, change):
    run(out)
    table = json.loads(out.read_text())
    table["rows"][0][change] = {"digest": "0" * 16, "default_config": {"rows": 1}, "measured": []}[change]
    out.write_text(json.dumps(table))
    assert len(run(out)["finished"]) == 1


@pytest.mark.parametrize(
    "spoil", [lambda t: t["provenance"].update(triton="2.0.0"), lambda t: t.update(rows=[3]), lambda t: t.clear()]
)
def test_rows_of_another_compiler_or_a_broken_file_are_not_kept(out, spoil):
    run(out)
    table = json.loads(out.read_text())
    spoil(table)
    out.write_text(json.dumps(table))
    said = []
    assert len(run(out, on_progress=said.append)["finished"]) == 1
    assert out.name in said[0]
    assert len(json.loads(out.read_text())["rows"]) == 1


def test_an_interrupt_loses_nothing_that_was_finished(out):
    def stop(line):
        if len(json.loads(out.read_text())["rows"]) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, *THREE, on_progress=stop)
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2
    done = run(out, *THREE)
    assert len(done["skipped"]) == 2 and len(done["finished"]) == 1
    assert [row for row in json.loads(out.read_text())["rows"] if row in rows] == rows


def test_a_spent_budget_leaves_the_rest(out):
    summary = run(out, *THREE, budget_s=-1.0)
    assert not summary["finished"] and len(summary["left"]) == 3 and not out.exists()


def test_other_ops_rows_stay(out):
    run(out, "rms_norm_silu")
    run(out, "guidance_step")
    assert {row["op"] for row in json.loads(out.read_text())["rows"]} == {"rms_norm_silu", "guidance_step"}


def test_only_a_card_s_own_table_goes_among_the_package_s(out, monkeypatch):
    with pytest.raises(ValueOptionError, match="outside configs/"):
        run(tuned.FOLDER / "nvidia-h100-80gb-hbm3.json")
    with pytest.raises(ValueOptionError, match="outside configs/"):
        run(None)
    with pytest.raises(ValueOptionError, match="`device` must be a CUDA device, or `dry` set"):
        run(out, dry=False)
    with pytest.raises(ValueOptionError, match="`op` must be one of"):
        run(out, "no_such_op")
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    with pytest.raises(UnsupportedError, match="TRITON_INTERPRET"):
        run(out)
    monkeypatch.setattr(tune, "target_of", lambda device: tuned.Target("sm_90", "nvidia-h200"))
    cuda = torch.device("cuda")
    assert tune.table_path(cuda, None) == tuned.FOLDER / "nvidia-h200.json"
    assert tune.table_path(cuda, out) == out
    with pytest.raises(ValueOptionError, match="must be nvidia-h200.json"):
        tune.table_path(cuda, tuned.FOLDER / "nvidia-a100.json")


def test_what_is_written_is_what_launchers_read(out, tmp_path, monkeypatch):
    """A row found by the tuner chooses, under the name and on the card that it was measured on."""
    asked = question()
    row = Search(CPU, "sm_90", None, timer=Clock(rows_four), say=lambda line: None).answer(asked)
    where = {"device": "cuda", "gpu": "Test Card", "driver": "1", "arch": "sm_90", "clock_sm": "1"}
    monkeypatch.setattr(tune, "provenance", lambda device: {**results.provenance(CPU), **where})
    path = tmp_path / "test-card.json"
    tune.Table(path, CPU, {}).put(row)
    assert results.read(path)["kind"] == "tuning"
    family = tuned.families()[asked.family]
    with tuned.tables_in(tmp_path):
        chosen = family(tuned.Target("sm_90", "test-card"), **dict(asked.key))
    assert dataclasses.asdict(chosen) == row["config"] != row["default_config"]


# Compilers -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Deadly:
    """A launch on which the compiler dies."""

    def args(self, device):
        os._exit(3)

    def run(self, args):
        pass


def compile_in_processes(folder):
    """Run by the test below where Triton compiles."""
    good = Launch("rms_norm_silu", "wan-480p-quarter-384", "bfloat16")
    (asked,) = launches.asked(good, "sm_90")
    rule, other, *_ = tuned.families()[asked.family].candidates("sm_90", **dict(asked.key))
    jobs = [Job(good, "sm_90", asked.family, asked.key, other), Job(Deadly(), "sm_90", asked.family, asked.key, rule)]
    far = [Job(Launch("rms_norm_silu", "sample 1", "bfloat16"), "sm_90")]
    for op, shape in (("gate_residual", "wan-14b-480p"), ("patch_embed3d", "wan-1.3b-480p")):
        launch = Launch(op, shape, "bfloat16")
        (each,) = launches.asked(launch, "sm_90")
        config = tuned.families()[each.family].candidates("sm_90", **dict(each.key))[-1]
        far.append(Job(launch, "sm_90", each.family, each.key, config))
    with launches.Compiler(1) as compiler:
        compiler.ahead([jobs[0]])
        print("far", [compiled.error for compiled in compiler.compile(far).values()])
        done = compiler.compile(jobs)
    print("misfits", [done[job].misfit("sm_90") for job in jobs], done[jobs[1]].error)
    args = good.args(CPU)
    for config in (other, rule):
        # As on a card, with tensors that have addresses: the worker's kernel must be found on disk.
        with tune_search._compilations() as compiled, launches.static.compiling_for("sm_90"):
            with launches.forced_config(asked.family, config), torch.inference_mode():
                good.run(args)
        print("compiled here", compiled)
    rows = []
    for config in (other, dataclasses.replace(other, rows=16, num_warps=1)):
        rows.append({**tuned.as_row(asked.family, asked.key, config), "tuned": True, "digest": tuned.digest(good.op),
                     "dtype": good.dtype, "measured": [{"shape": good.shape}]})  # fmt: skip
    where = dict.fromkeys(tuned.PROVENANCE, "x") | {"arch": "sm_90", "triton": tuned.triton_version()}
    for name, each in zip(("good", "bad"), rows, strict=True):
        table = {"schema": 1, "kind": "tuning", "provenance": {**where, "gpu": name}, "rows": [each]}
        (Path(folder) / f"{name}.json").write_text(json.dumps(table))
        print(name, launches.static.check_tuned(Path(folder) / f"{name}.json"))


def test_compiling_in_processes(tmp_path):
    """The timing process finds what a worker compiled, a crash takes one job alone, and a table that does not fit is
    seen by the static check."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = tmp_path / "script.py"
    call = f"test_tune.compile_in_processes({str(tmp_path)!r})"
    script.write_text(f"from tests.bench import test_tune\nif __name__ == '__main__': {call}\n")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == "far [None, None, None]"
    assert lines[0] == "misfits [None, 'compiler'] the compiler crashed"
    assert lines[1] == "compiled here []"
    assert lines[2] == "compiled here ['_rms_norm_silu_fwd_kernel']"
    assert lines[3] == "good []"
    assert lines[4].startswith("bad [") and "bad.json: rms_norm_silu" in lines[4] and " spills" in lines[4]


def test_the_command_line_walks_the_same_steps(out, capsys):
    """Compiled by a worker for sm_90, checked and timed in the interpreter by the real harness."""
    arguments = ["--op", "rms_norm_silu", "--device", "cpu", "--dry", "--workers", "1", "--rounds", "3"]
    assert tune.main([*arguments, "--out", str(out)]) == 0
    assert "1 keys measured" in capsys.readouterr().out
    found = results.read(out)
    assert found["kind"] == "tuning" and found["settings"]["dry"] and found["provenance"]["triton"]
    (row,) = found["rows"]
    assert row["candidates"] == 2 and row["seconds"] > 0 and row["measured"][0]["shape"] == "sample 0"
    assert tune.main([*arguments, "--out", str(out), "--resume"]) == 0
    assert "1 finished before" in capsys.readouterr().out
    assert tune.main(arguments) == 2
    assert "outside configs/" in capsys.readouterr().err
    assert tune.main(["--op", "rms_norm"]) == 2
    assert "torch finds none" in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_said(out, capsys, monkeypatch):
    monkeypatch.setattr(tune, "_red", lambda question, device: "")
    out.mkdir()
    arguments = ["--op", "guidance_step", "--device", "cpu", "--dry", "--workers", "0", "--rounds", "3"]
    assert tune.main([*arguments, "--out", str(out)]) == 5
    assert "cannot be written" in capsys.readouterr().err
