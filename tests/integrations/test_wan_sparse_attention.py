"""accelerate(attention=...) on Wan: what each layer and step runs, against masks made here, and what is refused."""

import copy
import re

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

import pyvideo_kernels as pv
from pyvideo_kernels.attention_text import choose
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.integrations import swap
from pyvideo_kernels.integrations.diffusers import wan_attention

from .helpers import assert_close, run, tiny, truth, used
from .test_wan_features import group_offload, leaf_offload
from .test_wan_pipelines import film, pipeline

GRID = (3, 5, 6)
WINDOW = (3, 3, 2)
FIRST_STEP = {"step_index": 0, "num_inference_steps": 4}
LATER_STEP = {"step_index": 1, "num_inference_steps": 4}


def inputs(batch=1, grid=GRID):
    g = torch.Generator().manual_seed(1)
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w, generator=g),
        "timestep": torch.tensor([37, 905][:batch]),
        "encoder_hidden_states": torch.randn(batch, 7, 16, generator=g),
    }


def model_of(layers=2, **config):
    """As tiny(), with attention sharp enough that it matters which keys are seen."""
    model = tiny(layers, **config)
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.norm_q.weight.mul_(2)
    return model


# An independent mask ---------------------------------------------------------------------------------------------


def axis_mask(n, window, stride=1):
    """[n, n]: the run of `window` keys around each query's leader, pushed inside the axis."""
    window = min(window, n)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        leader = min(i // stride * stride + stride // 2, n - 1)
        start = min(max(leader - window // 2, 0), n - window)
        mask[i, start : start + window] = True
    return mask


def mask_of(window, grid=GRID, stride=(1, 1, 1)):
    t, h, w = (axis_mask(n, k, s) for n, k, s in zip(grid, window, stride, strict=True))
    n = grid[0] * grid[1] * grid[2]
    return torch.einsum("ab,cd,ef->acebdf", t.int(), h.int(), w.int()).reshape(n, n).bool()


class Masked(WanAttnProcessor):
    """The stock processor with a mask [heads, S, S] in self-attention."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        mask = self.mask if encoder_hidden_states is None else attention_mask
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


def masked(model, masks):
    """A stock copy of ``model`` whose block i sees ``masks[i]`` (None: everything)."""
    model = copy.deepcopy(model)
    pv.restore(model)
    for block, mask in zip(model.blocks, masks, strict=True):
        if mask is not None:
            block.attn1.set_processor(Masked(mask[None]))
    return model


class Recorder:
    """What the attention ops were asked for, in order: "dense", or the window, or the tiles."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("spacetime_attention", "video_sparse_attention"):
            monkeypatch.setattr(wan_attention, name, self.recording(getattr(wan_attention, name)))

    def recording(self, op):
        def call(*args, **kwargs):
            key = {"spacetime_attention": "window", "video_sparse_attention": "top_k"}[op.__name__]
            asked = kwargs.get(key)
            self.calls.append("dense" if asked is None else tuple(asked) if isinstance(asked, list) else asked)
            return op(*args, **kwargs)

        return call

    def take(self):
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


# What is computed -------------------------------------------------------------------------------------------------


CASES = {
    "tokens": ({"window": WINDOW}, [mask_of(WINDOW)] * 2),
    "shares": ("window=0.67x0.5x0.3", [mask_of((3, 3, 2))] * 2),  # 2.01, 2.5 and 1.8 tokens, rounded up
    "stride": ({"window": (3, 4, 3), "stride": (1, 2, 3)}, [mask_of((3, 4, 3), stride=(1, 2, 3))] * 2),
    "a window larger than an axis": ({"window": (9, 1, 9)}, [mask_of((3, 1, 6))] * 2),
    "by head": ({"window": [(1, 3, 6), (3, 5, 1)]}, [torch.stack([mask_of((1, 3, 6)), mask_of((3, 5, 1))])] * 2),
    "a dense layer": ({"window": WINDOW, "dense_layers": 1}, [None, mask_of(WINDOW)]),
    "a dense layer by index": ("window=3x3x2,dense_layers=1+1", [mask_of(WINDOW), None]),
    "layers of their own": (
        {"window": WINDOW, "layers": {1: {"window": (1, 5, 6)}}},
        [mask_of(WINDOW), mask_of((1, 5, 6))],
    ),
    "only some layers": ({"layers": {range(1, 2): {"window": WINDOW}}}, [None, mask_of(WINDOW)]),
}


@pytest.mark.parametrize("name", CASES)
def test_windows_are_those_of_an_independent_mask(name):
    choice, masks = CASES[name]
    masks = [mask if mask is None or mask.ndim == 3 else mask[None] for mask in masks]
    model, arguments = model_of(), inputs()
    stock = masked(model, masks)
    dense = run(model, arguments)
    report = pv.accelerate(model, attention=choice, strict=True)
    eager = run(stock, arguments)
    assert_close(run(model, arguments), truth(stock, arguments), eager)
    assert (eager - dense).abs().max() > 0.02  # the mask does something
    assert "spacetime_attention" in used(report) and not report.fallbacks()


@pytest.mark.parametrize(
    "choice",
    ["dense", "window=1.0x1.0x1.0", "window=3x5x6", "window=99x99x99", "top_k=1.0", "top_k=99", "share=1.0",
     {"window": [(3, 5, 6)] * 2}, {"layers": {0: "dense"}}],
)  # fmt: skip
def test_all_of_it_is_dense(choice):
    model, arguments = model_of(), inputs()
    stock = copy.deepcopy(model)
    report = pv.accelerate(model, attention=choice, strict=True)
    assert_close(run(model, arguments), truth(stock, arguments), run(stock, arguments))
    assert not report.fallbacks() and used(report) & {"spacetime_attention", "block_sparse_attention"}


OPS = {
    "tiles": ({"top_k": 1}, "video_sparse_attention", {"top_k": 1}),
    "a share of the tiles": ({"top_k": 0.5}, "video_sparse_attention", {"top_k": 2}),
    "other tiles": ("top_k=0.25,tile=1x8x8", "video_sparse_attention", {"tile": (1, 8, 8), "top_k": 1}),
    "mass": ("share=0.4", "video_sparse_attention", {"select": "threshold", "share": 0.4}),
    "int8": ("int8", "spacetime_attention", {"precision": "int8"}),
    "int8 windows": ("window=3x3x2,precision=int8", "spacetime_attention",
                     {"precision": "int8", "window": WINDOW}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_it_is_what_the_op_gives(name):
    """The same model with the op in the stock processor's place; what the op computes is its own tests' matter."""
    choice, op, arguments = OPS[name]
    model, video = model_of(), inputs()
    stock = copy.deepcopy(model)
    dense = run(stock, video)
    report = pv.accelerate(model, attention=choice, strict=True)
    ours = run(model, video)
    attends = {"video_sparse_attention": "block_sparse_attention", "spacetime_attention": "int8_attention"}[op]
    assert report.calls()[attends] == {"reference": 2} and not report.fallbacks()
    wanted = getattr(pv, op)

    class OfTheOp(WanAttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            if encoder_hidden_states is not None:
                return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            q, k, v = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
            q, k = (norm(x).unflatten(2, (attn.heads, -1)) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
            q, k = (wan_attention._stock_rotate(x, *rotary_emb) for x in (q, k))
            return attn.to_out[0](wanted(q, k, v.unflatten(2, (attn.heads, -1)), grid=GRID, **arguments).flatten(2))

    for block in stock.blocks:
        block.attn1.set_processor(OfTheOp())
    theirs = run(stock, video)
    if "int8" not in name:  # where rounding earlier may turn a code, and one code is worth more than a rounding
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - dense).abs().max() > 10 * (ours - theirs).abs().max()


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


# What diffusers does around a model ------------------------------------------------------------------------------


def fp8_storage(model, path):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def lora(model, path):
    torch.manual_seed(5)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))


def fused_projections(model, path):
    model.fuse_qkv_projections()


AROUND = {
    "leaf offload": leaf_offload,
    "group offload": group_offload("leaf_level"),
    "fp8 storage": fp8_storage,
    "lora": lora,
    "fused projections": fused_projections,
}


@pytest.mark.parametrize("first", ["feature", "accelerate"])
@pytest.mark.parametrize("name", AROUND)
def test_features_around_the_model_do_not_notice(name, first, tmp_path):
    model, arguments = model_of(), inputs()
    stock = masked(model, [None, mask_of(WINDOW)[None]])
    if name == "fused projections":
        stock.fuse_qkv_projections()
    elif name in ("fp8 storage", "lora"):
        AROUND[name](stock, tmp_path)
    choice = {"window": WINDOW, "dense_steps": 1, "dense_layers": 1}
    steps = [lambda: AROUND[name](model, tmp_path), lambda: pv.accelerate(model, attention=choice)]
    for step in steps if first == "feature" else reversed(steps):
        step()
    report = pv.accelerate(model, attention=choice)
    with model.cache_context("cond", **LATER_STEP):
        ours = run(model, arguments)
    torch.testing.assert_close(ours, run(stock, arguments), rtol=1e-4, atol=1e-4)
    with model.cache_context("cond", **FIRST_STEP):
        assert (run(model, arguments) - ours).abs().max() > 0.02
    assert report.calls()["spacetime_attention"] and not report.fallbacks()


# What falls back ----------------------------------------------------------------------------------------------------


def test_guards_fall_back_to_the_models_own_attention_and_are_counted():
    arguments = inputs()
    model, choice = model_of(), {"window": WINDOW}
    stock = copy.deepcopy(model)
    report = pv.accelerate(model, attention=choice)
    block = model.blocks[0]
    x = torch.randn(1, 90, 32)
    rotary = model.rope(arguments["hidden_states"])
    mask = torch.ones(90, 90, dtype=torch.bool)
    with torch.no_grad():
        own = stock.blocks[0].attn1(x, None, None, rotary)
        torch.testing.assert_close(block.attn1(x, None, None, rotary), own, rtol=1e-5, atol=1e-5)
        block.attn1(x, None, mask, rotary, GRID, choose(choice).base)
        block.attn1(x, None, None, rotary, (3, 5, 5), choose(choice).base)
        block.attn1.processor._parallel_config = object()
        with pytest.raises(AttributeError):  # the stock path, which wants a real one
            block.attn1(x, None, None, rotary, GRID, choose(choice).base)
    assert report.fallbacks() == {
        "spacetime_attention": {
            "called outside the accelerated transformer, which knows the grid": 1,
            "bool attention mask": 1,
            "the sequence is not the whole grid": 1,
            "context parallelism": 1,
        }
    }


def test_windows_train():
    model, arguments = model_of(), inputs()
    stock = masked(model, [None, mask_of(WINDOW)[None]])
    report = pv.accelerate(model, attention={"window": WINDOW, "dense_layers": 1}, strict=True)
    for each in (model, stock):
        each(**arguments).sample.square().mean().backward()
    ours, theirs = (dict(each.named_parameters()) for each in (model, stock))
    for name, parameter in theirs.items():
        assert (ours[name].grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-7, name
    assert sum(report.calls()["spacetime_attention_backward"].values()) == 2


def test_tiles_have_no_backward_and_say_so():
    model, arguments = model_of(), inputs()
    report = pv.accelerate(model, attention={"top_k": 1})
    model(**arguments).sample.sum().backward()
    assert report.fallbacks() == {
        "block_sparse_attention": {"gradients are wanted and the op has no backward": 2},
    }
    assert model.blocks[0].attn1.to_q.weight.grad.abs().max() > 0


def test_a_foreign_processor_keeps_its_attention():
    model = model_of()
    model.blocks[1].attn1.set_processor(Masked(mask_of(WINDOW)[None, None]))
    report = pv.accelerate(model, attention={"window": WINDOW})
    left = report.to_dict()["modules"]["blocks.1.attn1"]
    assert "a Masked, not the stock" in left["left"]["spacetime_attention"] and "attention" not in left
    with pytest.raises(UnsupportedError, match="a Masked, not the stock"):
        pv.accelerate(model, attention={"window": WINDOW}, strict=True)


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


# What the report says ---------------------------------------------------------------------------------------------


def test_the_report_says_what_each_module_runs():
    model = model_of(3)
    choice = {"window": (3, 3, 0.5), "dense_layers": 1, "dense_steps": 2}
    report = pv.accelerate(model, attention=choice)
    assert report.to_dict()["attention"] == {"window": [3, 3, 0.5], "dense_layers": 1, "dense_steps": 2}
    modules = report.to_dict()["modules"]
    assert modules["blocks.0.attn1"]["attention"] == "dense"
    assert modules["blocks.1.attn1"]["attention"] == "window 3×3×0.5; first 2 steps dense"
    assert "attention" not in modules["blocks.1"]
    with model.cache_context("cond", **LATER_STEP):
        run(model, inputs())
    assert report.to_dict()["modules"]["blocks.2.attn1"]["attention"] == (
        "window 3×3×3 of 3×5×6, 70 % sparse; first 2 steps dense"
    )
    plain = report.plain()
    assert re.search(r"blocks\.0\.attn1 +runs +spacetime_attention; dense;", plain)
    assert re.search(r"blocks\.1-2\.attn1 \(2\) +runs +spacetime_attention; window 3×3×3 of 3×5×6, 70 % sparse", plain)
    assert "blocks.*.norm2 (3)" in plain
    report = pv.accelerate(model, attention="top_k=0.3,dense_layers=1-1")
    assert report.to_dict()["modules"]["blocks.0.attn1"]["attention"] == "top 0.3 of the tiles of 4×4×4"
    assert report.to_dict()["attention"] == {"top_k": 0.3, "tile": [4, 4, 4], "dense_layers": [1]}
    assert pv.accelerate(model, attention="dense").to_dict()["attention"] == "dense"
    assert pv.accelerate(model).to_dict()["attention"] is None
