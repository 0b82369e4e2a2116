"""pyvideo bench e2e: the order of turns, the arithmetic, what becomes of errors, and what is in the files."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from pyvideo_kernels.benchmarks import e2e, models, results
from pyvideo_kernels.benchmarks.cli import app
from pyvideo_kernels.benchmarks.e2e import Request, clips, quality, session
from pyvideo_kernels.benchmarks.e2e import statements as said
from pyvideo_kernels.benchmarks.e2e.clips import Clip, Clock, ratios, run_clip, seconds, turns
from pyvideo_kernels.benchmarks.e2e.session import Session, Source
from pyvideo_kernels.benchmarks.e2e.variants import parse, parse_all
from pyvideo_kernels.benchmarks.report import tables
from pyvideo_kernels.error_types import ModelError, UsageError, ValueOptionError
from pyvideo_kernels.sampler.problems import Exit, Interrupted

CPU = torch.device("cpu")
TINY = Request(model="tiny-random-wan", random_weights=True, steps=2, device="cpu", dtype="bf16")


# Turns, clocks and arithmetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_variant_gets_every_place_equally_often(count):
    variants = "ABCD"[:count]
    orders = [turns(variants, number) for number in range(2 * count)]
    for place in range(count):
        assert sorted(order[place] for order in orders) == sorted(variants * 2)
    assert all(sorted(order) == sorted(variants) for order in orders)


def test_two_variants_alternate_so_that_a_drift_cancels():
    assert ["".join(turns("AB", number)) for number in range(4)] == ["AB", "BA", "BA", "AB"]


class FakeClock(Clock):
    """Time that passes when the pipeline says so."""

    def __init__(self, device=CPU):
        super().__init__(device)
        self.now = 0.0

    def mark(self):
        return self.now


def test_a_clip_is_timed_phase_by_phase():
    clock = FakeClock()

    def pipe(callback_on_step_end, steps):
        clock.now += 5  # preparations: part of denoising, not of a step
        for index in range(steps):
            clock.now += 1 + index
            assert callback_on_step_end(None, index, None, {}) == {}
        clock.now += 0.5
        return (torch.ones(1),)

    def decode(pipe, latents):
        clock.now += 7
        return latents + 1

    clip = run_clip(pipe, {"steps": 3}, decode, clock)
    assert clip.steps == [2, 3] and clip.denoise == 11.5 and clip.decode == 7 and clip.total == 18.5
    assert clip.latents.item() == 1 and clip.video.item() == 2 and clip.peak is None
    alone = run_clip(pipe, {"steps": 1}, None, clock)
    assert alone.steps == [6] and alone.decode is None and alone.total == alone.denoise == 6.5


def test_on_a_gpu_steps_are_marked_by_events_and_memory_is_beside_what_was_there(monkeypatch):
    """The device is a stand-in: events that know when the stream reached them, and an allocator that is told."""
    stream = {"now": 0.0, "allocated": 100, "peak": 100, "waits": 0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, on):
            self.at = stream["now"]

        def elapsed_time(self, end):
            assert stream["waits"] == 2, "read before the device had reached it"
            return (end.at - self.at) * 1e3

    def wait(device):
        stream["waits"] += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: stream["allocated"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: stream.update(peak=stream["allocated"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: stream["peak"])

    def pipe(callback_on_step_end):
        for _ in range(3):
            stream.update(now=stream["now"] + 2, peak=130)
            callback_on_step_end()
            assert stream["waits"] == 1, "the host waited for a step"
        return (torch.ones(1),)

    def decode(pipe, latents):
        stream.update(now=stream["now"] + 0.25, peak=170)
        return latents

    clip = run_clip(pipe, {}, decode, Clock(torch.device("cuda", 0)))
    assert clip.steps == [2.0, 2.0] and clip.denoise == 6.0 and clip.decode == 0.25 and clip.peak == 70


def test_seconds_are_medians_and_ratios_are_of_medians():
    slow = [Clip([2.0, 4.0], 10.0, 2.0, None), Clip([4.0, 4.0], 12.0, 2.0, None), Clip([4.0, 9.0], 99.0, 2.0, None)]
    fast = [Clip([1.0, 2.0], 6.0, 1.0, None)] * 3
    base, this = seconds(slow), seconds(fast)
    assert base["step"]["median"] == 4.0 and base["denoise"]["median"] == 12.0 and base["total"]["median"] == 14.0
    assert base["decode"] == {"median": 2.0, "spread": 0.0}
    assert ratios(base, this) == {"step": 4 / 1.5, "denoise": 2.0, "decode": 2.0, "total": 2.0}
    undecoded = seconds([Clip([1.0], 1.0, None, None)] * 3)
    assert "decode" not in undecoded and "decode" not in ratios(undecoded, undecoded)


def test_peak_memory_is_of_a_variant_alone():
    rows = [Clip([1.0], 1.0, None, peak) for peak in (30, 10, 20)]
    assert clips.peak_memory(rows, resident=1000, own=5) == 1025
    assert clips.peak_memory([Clip([1.0], 1.0, None, None)], 1000, 5) is None


def _row(name, median, spread=0.0, **more):
    times = {phase: {"median": median, "spread": spread} for phase in ("step", "denoise", "decode", "total")}
    kernel = {"self": [f"void {name}_kernel<float>(int)"], "cross": []}
    return {"variant": name, "accelerate": None, "seconds": times, "attention": kernel, **more}


def test_statements_name_both_sides_their_kernels_the_clip_and_the_machine():
    settings = {"model": "m", "weights": "random", "height": 480, "width": 832, "frames": 81, "steps": 4}
    result = {
        "provenance": {"device": "cuda", "gpu": "Card"},
        "settings": {**settings, "dtype": "bfloat16", "tokens": 32760},
        "rows": [
            _row("eager", 4.0),
            _row("compile", 3.0),
            _row("ours", 2.0, accelerate={}),
            {"variant": "x", "error": "e"},
        ],
    }
    sentences = said.speed_statements(result)
    assert [sentence.split(":")[0] for sentence in sentences] == [
        "compile against eager",
        "ours against eager",
        "ours against compile",
    ]
    for part in (
        "1.50 × over a clip",
        "ours_kernel against compile_kernel",
        "480×832, 81 frames",
        "bf16",
        "Card",
        "32760",
    ):
        assert part in sentences[2]
    assert "within the spread" not in sentences[2]
    result["rows"] = [_row("eager", 4.0, 2.0), _row("ours", 3.0, 0.1, accelerate={})]
    assert "the same within the spread" in said.speed_statements(result)[0]


# What is refused before a model is loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (Request(rounds=2), UsageError, "--rounds must be 3 or more"),
        (Request(layers=2), UsageError, "--layers needs --random-weights"),
        (Request(layers=0, random_weights=True), UsageError, "--layers must be 1 or more"),
        (
            Request(model="tiny-random-wan", random_weights=True, device="cpu", layers=3),
            UsageError,
            "--layers must be 1 to 2 for tiny-random-wan; got 3",
        ),
        (Request(dtype="bf61"), UsageError, "did you mean 'bf16'?"),
        (Request(steps=0), UsageError, "--steps must be 1 or more"),
        (Request(guidance=-1.0), UsageError, "--guidance"),
        (Request(device="gpu"), UsageError, "--device must be"),
        (Request(variants=("ours:atention=dense",)), ValueOptionError, "did you mean 'attention'?"),
        (Request(model="wan2.1-1.3", random_weights=True, device="cpu"), ModelError, "did you mean 'wan2.1-1.3b'?"),
        (
            Request(model="tiny-random-wan", random_weights=True, device="cpu", height=40),
            UsageError,
            "--height must be a multiple of",
        ),
        (Request(model="tiny", device="cpu", frames=6), UsageError, "--frames must be 4k + 1"),
        (
            Request(model="tiny-random-ltx", random_weights=True, device="cpu", steps=1),
            UsageError,
            "--steps must be at least 2",
        ),
    ],
)
def test_refused_before_any_work(request_, error, words, monkeypatch):
    monkeypatch.setattr(models, "random_pipeline", lambda *_, **__: pytest.fail("a model was built"))
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(error) as caught:
        e2e.run(request_)
    assert words in str(caught.value)


def test_without_diffusers_it_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModelError, match=r"diffusers is not installed: pip install 'pyvideo-kernels\[sampler\]'"):
        e2e.run(TINY)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--ab", "eagr"], Exit.USAGE, "there is no variant 'eagr' (did you mean 'eager'?)"),
        (["--ab", "ours:impl=cudaa"], Exit.USAGE, "(did you mean 'cuda'?)"),
        (["--model", "nowhere/at-all.d", "--device", "cpu"], Exit.MODEL, "nowhere/at-all.d"),
        (
            ["--random-weights", "--model", "tiny-random-wan", "--frames", "6", "--device", "cpu"],
            Exit.USAGE,
            "use 5 or 9",
        ),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, code, words, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = CliRunner().invoke(app, ["e2e", *arguments, "-o", str(tmp_path / "out")])
    assert ran.exit_code == code and words in " ".join(ran.stderr.split()), ran.stderr
    assert ran.stdout == "" and "Traceback" not in ran.stderr


# Sessions -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source():
    source, _ = e2e.load(TINY, CPU, torch.bfloat16)
    return source


@pytest.fixture
def quick(monkeypatch):
    """Ceilings and breakdowns, which have tests of their own, cost nothing."""
    from pyvideo_kernels.benchmarks import profile

    monkeypatch.setattr(e2e, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(e2e, "gemm_rate", lambda device, dtype: 1e11)

    def breakdown(call, *, phase, device):
        call()
        return {"wall": 1.0, "classes": {"other": 1.0}, "attention": {"self": ["k"], "cross": []}, "kernels": []}

    monkeypatch.setattr(profile, "breakdown", breakdown)


def _rows(source, *names, rounds=3, **more):
    events = []
    session_ = Session(
        source, parse_all(names), on_event=lambda name, entry: events.append((name, entry.variant.name)), **more
    )
    session_.run(rounds)
    return {row["variant"]: row for row in session_.rows()}, events


def test_a_session_end_to_end(source, quick):
    rows, events = _rows(source, "ours", "ours:attention=dense")
    order = [name for event, name in events if event == "round"]
    assert [order[i : i + 3] for i in (0, 3, 6)] == [
        turns(["eager", "ours", "ours:attention=dense"], number) for number in range(3)
    ]
    eager, dense = rows["eager"], rows["ours:attention=dense"]
    assert eager["quality"]["identical"] is True and eager["ratio"]["total"] == 1
    assert 0 < eager["quality"]["float32_error"] == dense["quality"]["eager_float32_error"]
    assert 0 < dense["quality"]["float32_error"] < 2 * eager["quality"]["float32_error"]
    assert dense["quality"]["psnr"]["min"] > 20 and len(dense["quality"]["frames"]) == 5
    # Calls are of this variant's one clip, not of the process: 2 steps, with and without the prompt at once, 2 blocks.
    assert sum(dense["calls"]["spacetime_attention"].values()) == 4
    assert "spacetime_attention" not in rows["ours"]["calls"]
    assert dense["evaluation"]["guidance_batch"]["on"] and "evaluation" not in eager
    assert eager["calls"] == {} and dense["fallbacks"] == {}


def test_breakdown_names_the_attention_that_ran(source):
    rows, _ = _rows(source, "eager:backend=_native_math", float32=False)
    for name, kernel in (("eager", "flash"), ("eager:backend=_native_math", "math")):
        row = rows[name]
        assert row["attention"]["self"] and all(kernel in name for name in row["attention"]["self"])
        assert set(row["breakdown"]) == {"denoise", "decode"} and "float32_error" not in row["quality"]
        for part in row["breakdown"].values():
            assert sum(part["classes"].values()) == pytest.approx(part["wall"])


def test_a_broken_op_gets_no_number(source, quick, monkeypatch):
    from pyvideo_kernels.integrations.diffusers import wan_forwards

    monkeypatch.setattr(wan_forwards, "gate_residual", lambda x, y, gate, **_: x * torch.nan)
    rows, events = _rows(source, "ours", "eager:backend=_native_math")
    assert rows["ours"]["error"].startswith("BrokenVideo: black or broken video")
    assert not {"seconds", "quality", "ratio"} & set(rows["ours"])
    assert ("round", "ours") not in events and "seconds" in rows["eager:backend=_native_math"]


def test_an_op_that_is_a_little_wrong_gets_no_speed_and_an_attention_that_approximates_does(source, quick, monkeypatch):
    from pyvideo_kernels.integrations.diffusers import wan_forwards

    right = wan_forwards.gate_residual
    monkeypatch.setattr(wan_forwards, "gate_residual", lambda x, y, gate, **more: right(x, 1.1 * y, gate, **more))
    rows, events = _rows(source, "ours", "ours:attention=window=1x2x2,dense_steps=0")
    assert rows["ours"]["error"].startswith("BrokenVideo: wrong velocity: error ") and "seconds" not in rows["ours"]
    assert ("round", "ours") not in events and e2e.failed({"rows": list(rows.values())}, parse_all(["ours"]))
    assert "seconds" in rows["ours:attention=window=1x2x2,dense_steps=0"]


def test_the_limit_of_an_error_is_twice_eagers_or_the_band_of_float32(monkeypatch):
    quality.check_error("velocity", 2e-3, 1e-3, torch.bfloat16, CPU)
    quality.check_error("velocity", 1e-5, 0.0, torch.float32, CPU)
    for error, base, dtype in (
        (2.01e-3, 1e-3, torch.bfloat16),
        (1.1e-5, 0.0, torch.float32),
        (float("nan"), 1.0, torch.bfloat16),
    ):
        with pytest.raises(quality.BrokenVideo, match="wrong velocity: error"):
            quality.check_error("velocity", error, base, dtype, CPU)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    quality.check_error("velocity", 4e-3, 0.0, torch.float32, torch.device("cuda"))


def test_what_turns_wrong_later_loses_its_numbers(source, quick, monkeypatch):
    passed = []

    def check(what, tensor):
        passed.append(what)
        if len(passed) == 8:  # latents and video of two first clips, then of eager's and ours' second turn
            raise quality.BrokenVideo("turned black")

    monkeypatch.setattr(quality, "check_finite", check)
    rows, _ = _rows(source, "ours", float32=False)
    assert rows["ours"]["error"] == "BrokenVideo: turned black" and "seconds" in rows["eager"]


def test_errors_become_rows_and_the_others_go_on(source, quick, monkeypatch):
    build = session.build

    def failing(pipe, variant):
        if variant.name == "eager:backend=flex":
            raise torch.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate 2 GiB")
        return build(pipe, variant)

    monkeypatch.setattr(session, "build", failing)
    refused = "ours:attention=dense,ops=rms_norm"
    rows, events = _rows(source, refused, "eager:backend=flex", "ours:ops=rms_norm", float32=False)
    assert rows[refused]["error"].startswith("ValueOptionError: accelerate: `attention` dense needs")
    out = rows["eager:backend=flex"]["error"]
    assert out == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert rows["ours:ops=rms_norm"]["rounds"] == 3 and set(rows["ours:ops=rms_norm"]["calls"]) == {"rms_norm"}
    assert ("failed", refused) in events


def test_a_family_of_which_accelerate_knows_the_vae(quick):
    request = Request(model="tiny-random-ltx", random_weights=True, steps=2, device="cpu", dtype="fp32")
    source, settings = e2e.load(request, CPU, torch.float32)
    rows, _ = _rows(source, "ours", rounds=3)
    assert rows["eager"]["rounds"] == rows["ours"]["rounds"] == 3 and settings["pipeline"] == "LTXPipeline"
    assert any(name.startswith("pixel_norm_silu") for name in rows["ours"]["calls"]) and not rows["ours"]["fallbacks"]


def test_the_best_backend_is_found_once_and_named_in_the_row(source, quick, monkeypatch):
    asked = []

    def choose(pipe, call, clock, describe):
        asked.append(call)
        return SimpleNamespace(name="_native_math", note=lambda: "found")

    monkeypatch.setattr(session, "choose", choose)
    rows, _ = _rows(source, "eager:backend=best", "ours:backend=best", float32=False)
    assert len(asked) == 1 and "float32_error" not in rows["eager"]["quality"]
    for name in ("eager:backend=best", "ours:backend=best"):
        assert rows[name]["backend"] == "_native_math" and rows[name]["notes"] == ["found"]


def test_what_ends_too_late_is_left_out_but_eager_is_not(source, quick):
    rows, events = _rows(source, "ours", "compile", float32=False, until=time.monotonic())
    assert rows["eager"]["rounds"] == 3 and rows["eager"]["notes"] == ["no breakdown: it would have ended too late"]
    assert all(rows[name]["error"].startswith(session.LEFT_OUT) for name in ("ours", "compile"))
    assert ("failed", "ours") in events and "breakdown" not in rows["eager"]
    # Between now and in a minute there is time for small clips, and none for a compilation.
    rows, _ = _rows(source, "ours", "compile", float32=False, until=time.monotonic() + 50)
    assert "breakdown" in rows["ours"] and list(rows) == ["eager", "ours", "compile"]
    assert [name for name, row in rows.items() if "error" in row] == ["compile"]


def test_no_float32_model_leaves_the_rest(source, quick, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(quality, "float32_velocity", full)
    rows, _ = _rows(source, "ours")
    assert rows["eager"]["notes"] == ["no error against float32: OutOfMemoryError: full"]
    assert "float32_error" not in rows["ours"]["quality"] and rows["ours"]["quality"]["psnr"]["min"] > 20


def test_without_scikit_image_it_says_so(source, quick, monkeypatch):
    monkeypatch.setattr(quality, "can_compare", lambda: False)
    rows, _ = _rows(source, "ours", float32=False)
    assert "psnr" not in rows["ours"]["quality"] and rows["ours"]["quality"]["max_error"] > 0
    assert "scikit-image" in rows["ours"]["notes"][0] and rows["ours"]["rounds"] == 3


def test_without_decoding_quality_is_of_the_latents(source, quick):
    rows, _ = _rows(Source(**{**vars(source), "decode": None}), "ours", float32=False)
    assert set(rows["ours"]["quality"]) == {"latents_error"} and 0 < rows["ours"]["quality"]["latents_error"] < 0.5
    assert "decode" not in rows["ours"]["seconds"] and set(rows["ours"]["breakdown"]) == {"denoise"}


# The command --------------------------------------------------------------------------------------------------------

_KEYS = {
    "variant", "accelerate", "compile", "seconds", "peak_memory_bytes", "ratio", "breakdown", "attention", "quality",
    "calls", "fallbacks",
}  # fmt: skip
_SETTINGS = {
    "model", "weights", "pipeline", "height", "width", "frames", "steps", "guidance", "dtype", "seed", "rounds",
    "prompt", "tokens",
}  # fmt: skip


def test_command_writes_json_markdown_and_plots(tmp_path, quick, capsys):
    e2e.command(replace(TINY, variants=("ours", "ours:attention=dense,ops=rms_norm")), tmp_path)
    out = capsys.readouterr()
    paths = [Path(line) for line in out.out.split()]
    assert {path.suffix for path in paths} >= {".json", ".md", ".svg"} and all(path.stat().st_size for path in paths)
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # nothing else, no partial file
    result = results.read(paths[0])
    assert paths[0].name == "tiny-random-wan-32x32x5-cpu.json" and result["kind"] == "e2e"
    assert set(result["settings"]) >= _SETTINGS and result["settings"]["tokens"] == 8
    assert result["settings"]["attention_backend"] == "native" and "interrupted" not in result
    good, bad = result["rows"][1], result["rows"][2]
    assert set(good) >= _KEYS and "error" in bad and "seconds" not in bad
    assert set(good["seconds"]) == {"step", "denoise", "decode", "total", "first"}
    assert set(good["quality"]) >= {"max_error", "psnr", "ssim", "frames", "float32_error", "eager_float32_error"}
    assert good["ratio"].keys() == {"step", "denoise", "decode", "total"}
    eager = result["rows"][0]
    for phase, ratio in good["ratio"].items():
        assert ratio == pytest.approx(eager["seconds"][phase]["median"] / good["seconds"][phase]["median"])
    page = paths[1].read_text()
    assert "| ours |" in page and "ours against eager: " in page
    assert "ours: clip 3 of 3" in out.err and "needs spacetime_attention" in out.err


def test_ctrl_c_keeps_what_was_timed(tmp_path, quick, monkeypatch):
    time = Session.time

    def interrupted(self, entry):
        if entry.variant.name == "ours" and len(entry.clips) == 2:
            raise KeyboardInterrupt
        time(self, entry)

    monkeypatch.setattr(Session, "time", interrupted)
    with pytest.raises(Interrupted, match=r"interrupted during the rounds; kept .*partial\.json"):
        e2e.command(TINY, tmp_path)
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert path.name == "tiny-random-wan-32x32x5-cpu.partial.json" and result["interrupted"] is True
    assert {row["variant"]: row["rounds"] for row in result["rows"]} == {"eager": 2, "ours": 2}
    assert all(row["seconds"]["total"]["median"] > 0 and "psnr" in row["quality"] for row in result["rows"])
    assert not results.missing_provenance(result["provenance"])


def test_ctrl_c_before_the_first_clip_keeps_nothing(tmp_path, quick, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "warm", interrupted)
    with pytest.raises(Interrupted, match="interrupted during the first clips; nothing was written"):
        e2e.command(TINY, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", [1, 2])
def test_files_of_a_run_whose_eager_or_everything_is_broken(broken, tmp_path, quick, monkeypatch, capsys):
    seen = []

    def check(what, tensor):
        seen.append(what)
        if len(seen) <= broken:
            raise quality.BrokenVideo("black")

    monkeypatch.setattr(quality, "check_finite", check)
    with pytest.raises(typer.Exit) as caught:
        e2e.command(replace(TINY, float32=False), tmp_path)
    assert caught.value.exit_code == Exit.FAILED
    result = results.read(next(tmp_path.glob("*-cpu.json")))
    eager, ours = result["rows"]
    assert eager["error"] == "BrokenVideo: black" and result["statements"] == []
    assert ("error" in ours) == (broken == 2)
    if broken == 1:  # nothing to hold it against
        assert ours["ratio"] == {} and ours["quality"] == {} and ours["seconds"]["total"]["median"] > 0
    assert "| eager | ERROR |" in next(tmp_path.glob("*.md")).read_text()
    assert capsys.readouterr().out.count("tiny-random-wan") >= 2


@pytest.mark.parametrize(
    ("asked", "errors", "expected"),
    [
        (["ours"], {}, False),
        (["ours", "ours:attention=int8"], {"ours:attention=int8": "UnsupportedError: no"}, False),
        (["ours:attention=int8"], {"ours:attention=int8": "UnsupportedError: no"}, True),
        (["eager", "compile", "ours"], {"compile": "X: y", "ours": "X: y"}, True),
        (["eager", "ours", "compile"], {"ours": "BrokenVideo: black"}, True),
        (["eager", "ours"], {"eager": "OutOfMemoryError"}, True),
        (["eager"], {}, False),
    ],
)
def test_exit_code(asked, errors, expected, tmp_path, monkeypatch):
    names = [variant.name for variant in parse_all(asked)]
    result = {"rows": [{"variant": n, "error": errors[n]} if n in errors else {"variant": n} for n in names]}
    assert e2e.failed(result, parse_all(asked)) is expected
    monkeypatch.setattr(e2e, "run", lambda *_: result)
    monkeypatch.setattr(e2e, "write_all", lambda *_: [])
    monkeypatch.setattr(e2e.Console, "table", lambda *_: None)
    request = Request(variants=tuple(asked), device="cpu")
    if expected:
        with pytest.raises(typer.Exit) as caught:
            e2e.command(request, tmp_path)
        assert caught.value.exit_code == Exit.FAILED
    else:
        e2e.command(request, tmp_path)


def test_without_matplotlib_it_says_so_and_writes_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = {
        "schema": 1, "kind": "e2e", "provenance": {"device": "cuda", "gpu": "Big Card 80GB"}, "statements": ["a"],
        "settings": {"model": "m", "weights": "random", "height": 1, "width": 2, "frames": 3, "steps": 4, "dtype": "b"},
        "rows": [_row("eager", 1.0)],
    }  # fmt: skip
    paths = e2e.write_all(result, tmp_path, e2e.Console(3))
    assert [path.name for path in paths] == ["m-random-1x2x3-big-card-80gb.json", "m-random-1x2x3-big-card-80gb.md"]
    assert "no plots: " in capsys.readouterr().err


def test_a_model_cut_to_a_layer_says_so_in_settings_title_and_file(monkeypatch):
    one = replace(TINY, layers=1, variants=("eager",))
    source, settings = e2e.load(one, CPU, torch.bfloat16)
    assert len(source.pipe.transformer.blocks) == 1 and settings["layers"] == 1
    assert tables.clip(settings).startswith("1 layer of tiny-random-wan with random weights, 32×32, 5 frames, 2 steps")
    assert e2e.stem({"settings": settings, "provenance": {"device": "cpu"}}) == "tiny-random-wan-1-layers-32x32x5-cpu"
    assert e2e.load(TINY, CPU, torch.bfloat16)[1]["layers"] is None


def test_a_hub_id_names_its_architecture():
    assert e2e._architecture_name("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == "wan2.1-1.3b"
    assert e2e._architecture_name("wan2.1-14b") == "wan2.1-14b"


def test_recompiling_in_the_rounds_is_counted(source, quick, monkeypatch):
    counts = iter([0, 2, 2, 2, 2, 5, 5, 5])
    monkeypatch.setattr(session, "_graphs", lambda: {"graphs": next(counts), "graph_breaks": 0})
    monkeypatch.setattr(session, "build", lambda pipe, variant: SimpleNamespace(pipe=pipe, notes=(), report=None))
    rows, _ = _rows(source, "compile", float32=False)
    assert rows["compile"]["compiled"] == {"graphs": 2, "graph_breaks": 0, "recompiles": 3}
    assert parse("compile").compile is not None and rows["compile"]["compile"] is True
