"""The goals for CPUs: their rows name what is measured, and each verdict is that of the result's own numbers."""

import copy

import pytest
import torch

from pyvideo_kernels.benchmarks import e2e, goals, models, numbers, vae
from pyvideo_kernels.benchmarks.e2e.variants import parse
from pyvideo_kernels.benchmarks.registry import ENTRIES
from pyvideo_kernels.benchmarks.report import tables
from pyvideo_kernels.schemas import OPS

CPU = torch.device("cpu")


# The table --------------------------------------------------------------------------------------------------------


def test_every_goal_is_about_something_that_is_measured():
    for goal in goals.goals():
        assert goal.kind in ("ops", "e2e", "vae") and goal.against in ("eager", "compile") and goal.needed >= 1
        if goal.kind == "ops":
            assert set(goal.where) == {"op", "shape"}
            assert goal.where["shape"] in ENTRIES[goal.where["op"]].shapes(CPU), goal
    rows = [(goal.what, goal.where.get("shape"), goal.against) for goal in goals.goals()]
    assert len(set(rows)) == len(rows)


def test_ops_are_judged_that_move_memory_and_have_a_kernel_here():
    listed = {goal.where["op"] for goal in goals.goals() if goal.kind == "ops" and not goal.shown}
    assert listed == set(goals.memory_bound()) and listed >= {
        "layer_norm_modulate", "gate_residual", "gate_residual_norm_modulate", "rms_norm", "qk_norm_rope",
        "rms_norm_silu", "group_norm_silu", "guidance_step",
    }  # fmt: skip
    for op in listed:
        assert "cpu" in OPS[op].impls and not any(ENTRIES[op].flops(**sizes) for sizes in ENTRIES[op].cpu.values())
    both = {(g.where["op"], g.where["shape"]): set() for g in goals.goals() if g.kind == "ops" and not g.shown}
    for goal in goals.goals():
        if goal.kind == "ops" and not goal.shown:
            both[goal.where["op"], goal.where["shape"]].add((goal.against, goal.needed))
    assert all(found == {("eager", 2.0), ("compile", 1.0)} for found in both.values())


def test_shapes_are_judged_from_4096_tokens_of_1536_on():
    for op in goals.memory_bound():
        entry = ENTRIES[op]
        large = goals.large_shapes(entry)
        for name, sizes in entry.shapes(CPU).items():
            inputs = entry.inputs(**sizes, dtype=torch.bfloat16, device=CPU)
            elements = max(value.numel() for value in inputs.values() if isinstance(value, torch.Tensor))
            assert (name in large) == (elements >= 4096 * 1536), (op, name)


def test_windows_leave_out_nine_tenths_of_the_pairs():
    from pyvideo_kernels import spacetime_attention_cost

    windows = [goal for goal in goals.goals() if goal.shown]
    assert windows and all(goal.against == "eager" and goal.needed == 4.0 for goal in windows)
    for goal in windows:
        sizes = dict(ENTRIES["spacetime_attention"].shapes(CPU)[goal.where["shape"]])
        assert 0.895 <= spacetime_attention_cost(**sizes).sparsity < 0.905


def test_clips_blocks_and_decoder_are_what_their_models_take():
    e2e.Request(**goals.CLIP).check()
    e2e.Request(**goals.BLOCKS, random_weights=True).check()
    vae.Request(**goals.DECODER).check()
    where = goals.BLOCKS
    arch = models.architecture(where["model"]).cut(where["layers"])
    clip = arch.clip(where["height"], where["width"], where["frames"])
    assert clip.tokens == 4096 and clip.latent == (4, 64, 64)
    assert (arch.text.tokens, arch.text.width) == (512, 4096) and arch.transformer.config["num_layers"] == 2
    where = goals.DECODER
    assert models.architecture(where["model"]).clip(where["height"], where["width"], where["frames"]).frames == 17


# Verdicts ---------------------------------------------------------------------------------------------------------

OP = goals.Goal("rms_norm", "ops", {"op": "rms_norm", "shape": "s"}, "eager", 2.0)


def op_result(ratio=2.5, spread=0.0, rounds=7, dtype="bfloat16", **row):
    eager = {"seconds": ratio * 1e-3, "spread": spread * 1e-3, "ratio": ratio}
    found = {
        "op": "rms_norm", "shape": "s", "dtype": dtype, "impl": "cpu", "seconds": 1e-3, "spread": 0.0,
        "rounds": rounds, "baselines": {"eager": eager},
    }  # fmt: skip
    provenance = {"device": "cpu", "cpu": "Imaginary CPU", "threads": 2}
    return {"kind": "ops", "provenance": provenance, "settings": {"dtype": dtype}, "rows": [found | row]}


def of(goal, *results):
    return list(goals._outcomes(goal, list(results)))


@pytest.mark.parametrize(
    ("ratio", "spread", "reached"),
    [(2.0, 0.0, "yes"), (2.5, 0.9, "yes"), (1.9, 0.11, "within spread"), (1.9, 0.09, "no"), (0.5, 0.0, "no")],
)
def test_a_verdict_is_that_of_the_median_and_its_spread(ratio, spread, reached):
    (found,) = of(OP, op_result(ratio, spread))
    assert found.ratio == pytest.approx(ratio) and found.spread == pytest.approx(spread) and found.reached == reached


def test_the_spread_of_a_ratio_has_both_sides():
    result = op_result(2.0, 0.06)
    result["rows"][0]["spread"] = 4e-5  # 3 % of the baseline's time, 4 % of ours
    (found,) = of(OP, result)
    assert found.spread == pytest.approx(2.0 * 0.05)


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (op_result(rounds=4), "4 rounds, and 5 are needed"),
        (op_result(error="rms_norm: 3 of 64 beyond the bound"), "wrong: rms_norm: 3 of 64"),
        (op_result(baselines={"eager": {"error": "RuntimeError: no"}}), "eager: RuntimeError: no"),
        (op_result(baselines={"eager": {"skipped": "not here"}}), "eager: not here"),
        (op_result(baselines={}), "eager: not asked for"),
        (op_result(shape="other"), "no result has it"),
    ],
)
def test_what_was_not_measured_says_why_and_has_no_number(result, why):
    (found,) = of(OP, result)
    assert found.ratio is None and found.reached == "not measured" and found.why_not.startswith(why)


def test_a_goal_without_a_shape_says_so():
    goal = goals.Goal("x", "ops", {"op": "x", "shape": ""}, "eager", 2.0)
    assert of(goal, op_result())[0].why_not == "the benchmark has no shape of this kind for a CPU"
    assert not of(goal, clip_result(dict(goals.CLIP), eager=3.0))[0].measurable  # ops were not run


def test_ops_are_judged_in_the_dtype_that_the_sampler_runs_in():
    half, full = op_result(3.0), op_result(1.0, dtype="float32")
    assert [found.dtype for found in of(OP, full, half)] == ["bf16"]
    for result in (half, full):
        result["settings"]["sampler_dtype"] = "float32"
    assert [(found.dtype, found.ratio) for found in of(OP, half, full)] == [("fp32", 1.0)]


def test_the_dtype_is_the_samplers(monkeypatch):
    asked = []
    monkeypatch.setattr(goals, "pick_dtype", lambda *given: asked.append(given) or torch.float32)
    assert goals.sampler_dtype(CPU) == torch.float32 and asked == [("auto", CPU, 1536)]


def clip_result(settings, rounds=5, **seconds):
    rows = [
        {"variant": name, "rounds": rounds, "seconds": {"total": {"median": value, "spread": 0.0}}}
        if isinstance(value, float)
        else {"variant": name, "error": value}
        for name, value in seconds.items()
    ]
    where = {"device": "cpu", "cpu": "Imaginary CPU", "threads": 2}
    return {"kind": "e2e", "provenance": where, "settings": {"dtype": "float32", **settings}, "rows": rows}


CLIP = goals.Goal("clip", "e2e", goals.CLIP, "eager", 1.5)
COMPILED = goals.Goal("clip", "e2e", goals.CLIP, "compile", 1.0)


def test_clips_are_judged_whole_and_against_the_fastest_way_to_compile():
    settings = dict(goals.CLIP) | {"layers": None}
    result = clip_result(settings, eager=3.0, compile=2.0, ours=1.5)
    result["rows"].append(
        {"variant": "compile:vae=true", "rounds": 5, "seconds": {"total": {"median": 1.2, "spread": 0}}}
    )
    result["rows"].append({"variant": "compile+ours", "rounds": 5, "seconds": {"total": {"median": 0.1, "spread": 0}}})
    (eager,), (compiled,) = of(CLIP, result), of(COMPILED, result)
    assert eager.ratio == 2.0 and eager.reached == "yes" and (eager.shape, eager.dtype) == ("64×64×17, 8 steps", "fp32")
    assert compiled.ratio == pytest.approx(0.8) and compiled.reached == "no"


def test_clips_that_differ_are_another_measurement():
    for change in ({"model": "other"}, {"height": 32}, {"decode": False}, {"layers": 2}, {"steps": 4}):
        settings = dict(goals.CLIP) | change
        assert of(CLIP, clip_result(settings, eager=3.0, ours=1.0))[0].why_not == "no result has it"
    blocks = goals.Goal("blocks", "e2e", goals.BLOCKS, "eager", 1.3)
    assert of(blocks, clip_result(dict(goals.BLOCKS), eager=3.0, ours=2.0))[0].ratio == 1.5
    (accelerated,) = {goal.ours for goal in goals.goals() if goal.where is goals.BLOCKS}
    assert parse(accelerated).exact and not parse(accelerated).sampled and parse(accelerated).name == accelerated
    alone = goals.Goal("blocks", "e2e", goals.BLOCKS, "eager", 1.3, ours=accelerated)
    result = clip_result(dict(goals.BLOCKS), eager=3.0, ours=1.0)
    assert of(alone, result)[0].why_not == f"{accelerated}: was not asked for"
    result["rows"] += clip_result({}, **{accelerated: 2.0})["rows"]
    assert of(alone, result)[0].ratio == 1.5
    whole = dict(goals.BLOCKS) | {"layers": None}
    assert of(blocks, clip_result(whole, eager=3.0, ours=2.0))[0].ratio is None


@pytest.mark.parametrize(
    ("seconds", "why"),
    [
        ({"eager": 3.0, "ours": "BrokenVideo: black"}, "ours: BrokenVideo: black"),
        ({"eager": "OutOfMemoryError: x", "ours": 1.0}, "eager: OutOfMemoryError: x"),
        ({"eager": 3.0}, "ours: was not asked for"),
        ({"eager": 3.0, "ours": 1.0, "rounds": 3}, "3 rounds, and 5 are needed"),
    ],
)
def test_a_clip_that_was_not_measured_says_why(seconds, why):
    rounds = seconds.pop("rounds", 5)
    (found,) = of(CLIP, clip_result(dict(goals.CLIP), rounds, **seconds))
    assert found.ratio is None and found.why_not == why


def test_decoders_are_judged_by_their_rows():
    rows = [
        {"variant": "eager", "seconds": 26.0, "spread": 0.0, "rounds": 5},
        {"variant": "ours", "seconds": 20.0, "spread": 0.0, "rounds": 5},
    ]
    result = {"kind": "vae", "settings": dict(goals.DECODER) | {"dtype": "bfloat16"}, "rows": rows}
    goal = goals.Goal("decoder", "vae", goals.DECODER, "eager", 1.3)
    (found,) = of(goal, result)
    assert found.ratio == 1.3 and found.reached == "yes" and found.shape == "256×256×17" and found.dtype == "bf16"
    wrong = copy.deepcopy(result)
    wrong["rows"][1] = {"variant": "ours", "error": "BrokenVideo: wrong frames", "wrong": True}
    assert of(goal, wrong)[0].reached == "not measured"


# Shown ------------------------------------------------------------------------------------------------------------


def test_the_table_and_its_summary():
    found = [
        goals.Outcome(OP, "s", "bf16", 2.5, 0.1),
        goals.Outcome(OP, "t", "bf16", 1.95, 0.1),
        goals.Outcome(OP, "u", why_not="no result has it"),
        goals.Outcome(goals.Goal("attention", "ops", {}, "eager", 4.0, shown="masked SDPA"), "w", "bf16", 3.0, 0.1),
    ]
    made = goals.table(found)
    assert made.rows[0] == ("rms_norm", "s", "bf16", "eager", "2.00", "2.50", "0.10", "yes")
    assert made.rows[1][-1] == "within spread" and made.rows[2][5:] == ("–", "–", "not measured")
    assert made.rows[3][3] == "masked SDPA" and made.rows[3][-1] == "no"
    assert made.notes == ("rms_norm u: no result has it",)
    assert goals.summary(found) == "1 of 4 goals reached, 1 within spread, 1 not reached, 1 not measured"


def test_every_cpu_of_the_committed_results_is_judged_and_no_gpu(tmp_path):
    found = numbers.load(numbers.ROOT / "benchmarks" / "results")
    page = numbers.render(drawn=tmp_path)
    for result in found:
        assert (f"### {tables.machine(result)}\n" in page) == (result["provenance"]["device"] == "cpu")
    assert page.count("## Goals on CPUs") == 1 and "× |" not in page.partition("## Goals on CPUs")[0]
    with_gpu = [result | {"provenance": result["provenance"] | {"device": "cuda", "gpu": "A"}} for result in found]
    assert not list(numbers._goals(with_gpu))
