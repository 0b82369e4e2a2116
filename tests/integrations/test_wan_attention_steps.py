"""Which steps and layers are dense, in pipelines, caches, copies, files and compiled graphs."""

import copy

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanImageToVideoPipeline, WanTransformer3DModel
from torch._dynamo.testing import CompileCounter

import pyvideo_kernels as pv
from pyvideo_kernels.attention_text import choose
from pyvideo_kernels.benchmarks.e2e import quality
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.integrations import swap
from pyvideo_kernels.integrations.diffusers.steps import past_dense_steps

from .attention_helpers import FIRST_STEP, LATER_STEP, WINDOW, Recorder, inputs, model_of
from .helpers import run
from .test_wan_pipelines import film, pipeline


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


# Steps ------------------------------------------------------------------------------------------------------------


def test_the_first_steps_are_dense(recorder):
    model, arguments = model_of(), inputs()
    report = pv.accelerate(model, attention={"window": WINDOW, "dense_steps": 2, "dense_layers": [1]}, strict=True)
    for step in range(4):
        for name in ("cond", "uncond"):
            with model.cache_context(name, step_index=step, sigma=1.0, num_inference_steps=4):
                run(model, arguments)
        assert recorder.take() == (["dense"] * 4 if step < 2 else [WINDOW, "dense"] * 2)
    assert not report.fallbacks()


@pytest.mark.parametrize(("share", "count", "dense"), [(0.25, 4, 1), (0.25, 5, 2), (1.0, 3, 3), (1e-9, 7, 1)])
def test_a_share_of_the_steps_is_rounded_up(share, count, dense):
    choice = choose({"top_k": 1, "dense_steps": share})
    assert [choice.dense_at(step, count) for step in range(count)] == [step < dense for step in range(count)]
    assert choice.dense_at(0, None) is None and choice.dense_at(torch.tensor(0), count) is None


def test_where_no_step_is_known_attention_is_dense_and_counted(recorder):
    model, arguments = model_of(), inputs()
    choice = {"window": WINDOW, "dense_steps": 1}
    report = pv.accelerate(model, attention=choice)
    run(model, arguments)
    with model.cache_context("cond"):
        run(model, arguments)
    assert recorder.take() == ["dense"] * 4
    (reason,) = report.fallbacks()["spacetime_attention"].items()
    assert "no denoising step is known" in reason[0] and reason[1] == 2
    with model.cache_context("cond", **LATER_STEP):
        run(model, arguments)
    run(model, arguments)  # the step ended with its context
    assert recorder.take() == [WINDOW] * 2 + ["dense"] * 2
    pv.accelerate(model, attention=choice, strict=True)
    with pytest.raises(UnsupportedError, match="no denoising step is known"):
        run(model, arguments)


@pytest.mark.parametrize("two", [False, True])
def test_a_pipeline_says_which_step_it_is(two, recorder):
    pipe = pipeline(two)
    report = pv.accelerate(pipe, attention={"window": (1, 2, 1), "dense_steps": 1}, strict=True)
    film(pipe, output_type="latent")
    # Two steps of a guided prediction through two layers; with two transformers each runs one of the steps.
    assert recorder.take() == ["dense"] * 4 + [(1, 2, 1)] * 4
    assert not report.fallbacks()
    with_steps = film(pipe, output_type="latent")
    pv.accelerate(pipe, attention={"window": (1, 2, 1)}, strict=True)
    always = film(pipe, output_type="latent")
    pv.accelerate(pipe, attention="dense", strict=True)
    never = film(pipe, output_type="latent")
    assert not torch.allclose(with_steps, always) and not torch.allclose(with_steps, never)
    pv.restore(pipe)
    for model in (pipe.transformer, pipe.transformer_2):
        assert model is None or "cache_context" not in model.__dict__


def test_an_image_pipeline_says_no_step_and_its_scheduler_does(recorder):
    pipe = pipeline(kind=WanImageToVideoPipeline, in_channels=36, image_dim=8, added_kv_proj_dim=32)
    g = torch.Generator().manual_seed(6)
    seen = torch.randn(1, 5, 8, generator=g)
    pipe.encode_image = lambda *args, **kwargs: seen  # in place of a CLIP model
    text = [torch.randn(1, 512, 16, generator=g) for _ in range(2)]

    def run_it(pipe, steps=3):
        pipe(
            image=torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32), prompt_embeds=text[0],
            negative_prompt_embeds=text[1], height=32, width=32, num_frames=5, num_inference_steps=steps,
            output_type="latent",
        )  # fmt: skip

    report = pv.accelerate(pipe, attention={"window": (1, 2, 1), "dense_steps": 0.5})
    for _ in range(2):  # a second film starts again
        run_it(pipe)
        assert recorder.take() == ["dense"] * 8 + [(1, 2, 1)] * 4
    assert not report.fallbacks()
    with pipe.transformer.cache_context("cond"):  # the film is done: this call is not one of its steps
        assert swap.mark_of(pipe.transformer).dense_step is None
    other = WanImageToVideoPipeline(**pipe.components, boundary_ratio=None)
    other.encode_image, pipe.transformer = pipe.encode_image, None
    other.set_progress_bar_config(disable=True)
    run_it(other, steps=1)  # not the pipeline that was accelerated
    assert recorder.take() == ["dense"] * 4 and report.fallbacks()["spacetime_attention"].popitem()[1] == 2


def test_caches_hear_of_the_step_too(recorder):
    model, arguments = model_of(3), inputs()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    pv.accelerate(model, attention={"window": WINDOW, "dense_steps": 1}, strict=True)
    for step in (FIRST_STEP, LATER_STEP):
        with model.cache_context("cond", **step):
            run(model, arguments)
    assert recorder.take() == ["dense"] * 3 + [WINDOW] * 3


# Compilation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "layers", "dense_layers"), [(False, 1, 0), (True, 3, 1)])
def test_dense_and_sparse_are_two_graphs_however_many_steps_and_layers(blocks, layers, dense_layers):
    torch._dynamo.reset()
    model, counter, arguments = model_of(layers), CompileCounter(), inputs()
    eager = copy.deepcopy(model)
    choice = {"window": WINDOW, "dense_steps": 2, "dense_layers": dense_layers}
    for each in (model, eager):
        pv.accelerate(each, attention=choice, strict=True)
    if blocks:
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        called = model
    else:
        called = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(4):
        context = {"step_index": step, "num_inference_steps": 4}
        with called.cache_context("cond", **context), eager.cache_context("cond", **context):
            torch.testing.assert_close(run(called, arguments), run(eager, arguments), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


# Configuring, copies and files ----------------------------------------------------------------------------------------


def test_calling_again_reconfigures_and_restore_undoes(recorder):
    model, arguments = model_of(), inputs()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    stock = run(model, arguments)
    pv.accelerate(model, attention={"window": WINDOW, "dense_steps": 1})
    assert "cache_context" in model.__dict__
    pv.accelerate(model, attention={"top_k": 1, "dense_layers": 1})
    run(model, arguments)
    assert recorder.take() == ["dense", 1] and "cache_context" not in model.__dict__
    pv.accelerate(model, attention="dense")
    run(model, arguments)
    pv.accelerate(model)
    run(model, arguments)
    assert recorder.take() == ["dense", "dense"]
    pv.accelerate(model, attention={"window": WINDOW, "dense_steps": 1})
    pv.restore(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == {
        name: set(values) for name, values in before.items()
    }
    assert torch.equal(run(model, arguments), stock)


def test_a_copy_keeps_its_own_step_and_a_file_holds_the_stock_model(recorder, tmp_path):
    model, arguments = model_of(), inputs()
    pv.accelerate(model, attention={"window": WINDOW, "dense_steps": 1})
    copied = copy.deepcopy(model)
    with model.cache_context("cond", **LATER_STEP), copied.cache_context("cond", **FIRST_STEP):
        run(model, arguments)
        assert recorder.take() == [WINDOW] * 2
        run(copied, arguments)
        assert recorder.take() == ["dense"] * 2
    pv.restore(copied)
    with model.cache_context("cond", **LATER_STEP):
        run(model, arguments)
    assert recorder.take() == [WINDOW] * 2
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    model.save_pretrained(tmp_path)
    pv.restore(model)
    for each in (loaded, WanTransformer3DModel.from_pretrained(tmp_path)):
        assert not list(swap.swapped(each))
        with each.cache_context("cond", **LATER_STEP):
            torch.testing.assert_close(run(each, arguments), run(model, arguments), rtol=1e-5, atol=1e-5)


def test_warmup_runs_both_kinds_of_step(recorder):
    model = model_of()
    report = pv.accelerate(model, attention={"window": WINDOW, "dense_steps": 3}, strict=True)
    pv.warmup(model, shapes=(80, 96, 9))
    assert recorder.take() == ["dense"] * 2 + [WINDOW] * 2
    assert not report.fallbacks()


def test_what_is_measured_of_a_step_is_what_most_steps_run(recorder):
    model, arguments = model_of(), inputs()
    report = pv.accelerate(model, attention={"window": WINDOW, "dense_steps": 1}, strict=True)
    with past_dense_steps(model, None):
        run(model, arguments)
        with model.cache_context("cond", **FIRST_STEP):
            run(model, arguments)
        run(model, arguments)
    assert recorder.take() == [WINDOW] * 6 and not report.fallbacks()
    with model.cache_context("cond", **FIRST_STEP):
        run(model, arguments)
    assert recorder.take() == ["dense"] * 2
    quality.velocity(model, ((), arguments | {"return_dict": False}))
    assert recorder.take() == [WINDOW] * 2
