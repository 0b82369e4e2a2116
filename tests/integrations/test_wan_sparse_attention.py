"""accelerate(attention=...) on Wan: what is computed, against masks made by the tests; what falls back and is said."""

import copy
import re

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig

import pyvideo_kernels as pv
from pyvideo_kernels import _native
from pyvideo_kernels.attention_text import choose
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.integrations.diffusers import wan_attention
from pyvideo_kernels.schemas import OPS as OPS_TABLE

from .attention_helpers import FIRST_STEP, GRID, LATER_STEP, WINDOW, Masked, inputs, mask_of, masked, model_of
from .helpers import assert_close, run, truth, used
from .test_wan_features import group_offload, leaf_offload

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
    "fp8 windows": ("window=3x3x2,precision=fp8", "spacetime_attention",
                    {"precision": "fp8", "window": WINDOW}),
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
    attends = f"{arguments['precision']}_attention" if "precision" in arguments else "block_sparse_attention"
    compiled = "precision" not in arguments and _native.available()
    assert report.calls()[attends] == {"cpu" if compiled else "reference": 2} and not report.fallbacks()
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
    if "precision" not in arguments:  # rounding earlier may turn a code, and one code is worth more than a rounding
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # Steps of e4m3 are wider, and a code that turns weighs as much.
    assert (ours - dense).abs().max() > (5 if "fp8" in name else 10) * (ours - theirs).abs().max()


def test_int8_quantises_in_the_prologue_where_it_can():
    model, arguments = model_of(), inputs()
    whole = {name for name in OPS_TABLE if not name.endswith("_backward")}
    results = {}
    for ops in (whole, whole - {"qk_norm_rope_int8"}):
        report = pv.accelerate(model, ops=ops, attention={"precision": "int8", "dense_steps": 1}, strict=True)
        with model.cache_context("cond", **LATER_STEP):
            results[len(ops)] = run(model, arguments)
        called = used(report) & {"qk_norm_rope", "qk_norm_rope_int8", "quantize_qk", "int8_attention"}
        modules = report.to_dict()["modules"]
        runs = [set(modules[name]["runs"]) for name in ("blocks.0.attn1", "blocks.0.attn1.norm_k")]
        if ops == whole:
            assert called == {"qk_norm_rope_int8", "int8_attention"}
            # In dense steps q and k are what they are.
            assert runs == [{"int8_attention", "spacetime_attention"}, {"qk_norm_rope", "qk_norm_rope_int8"}]
        else:
            assert called == {"qk_norm_rope", "quantize_qk", "int8_attention"}
            assert runs == [{"quantize_qk", "int8_attention", "spacetime_attention"}, {"qk_norm_rope"}]
        with model.cache_context("cond", **FIRST_STEP):
            dense = run(model, arguments)
        assert used(report) >= {"qk_norm_rope", "spacetime_attention"} and not report.fallbacks()
    one, two = results.values()
    assert (one - dense).abs().max() > 10 * (one - two).abs().max()  # q and k are rounded once less

    report = pv.accelerate(model, attention="int8")
    model.blocks[0].attn1.norm_q.eps = 1e-5
    run(model, arguments)  # what stands in the way is counted once, and the rest still runs
    assert report.fallbacks() == {"qk_norm_rope": {"norm_q and norm_k have different eps": 1}}
    assert report.calls()["int8_attention"] == {"reference": 2} and report.calls()["quantize_qk"] == {"reference": 1}


@pytest.mark.parametrize("choice", [{"top_k": 1}, {"share": 0.4}])
def test_tiles_get_their_means_from_the_prologue_where_it_can(choice):
    model, arguments = model_of(), inputs()
    whole = {name for name in OPS_TABLE if not name.endswith("_backward")}
    results = []
    for ops in (whole, whole - {"qk_norm_rope_means"}):
        report = pv.accelerate(model, ops=ops, attention={**choice, "dense_steps": 1}, strict=True)
        with model.cache_context("cond", **LATER_STEP):
            results.append(run(model, arguments))
        called = used(report) & {"qk_norm_rope", "qk_norm_rope_means", "block_mean", "block_sparse_attention"}
        modules = report.to_dict()["modules"]
        runs = [set(modules[name]["runs"]) for name in ("blocks.0.attn1", "blocks.0.attn1.norm_k")]
        attends = {"block_sparse_attention", "spacetime_attention"}
        if ops == whole:
            assert called == {"qk_norm_rope_means", "block_sparse_attention"}
            assert runs == [attends, {"qk_norm_rope", "qk_norm_rope_means"}]
        else:
            assert called == {"qk_norm_rope", "block_mean", "block_sparse_attention"}
            assert runs == [{"block_mean", *attends}, {"qk_norm_rope"}]
        with model.cache_context("cond", **FIRST_STEP):
            dense = run(model, arguments)
        assert used(report) >= {"qk_norm_rope", "spacetime_attention"} and not report.fallbacks()
    one, two = results
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert (one - dense).abs().max() > 10 * (one - two).abs().max()


def test_a_norm_that_trains_alone_has_the_prologue_with_a_backward():
    model, arguments = model_of(), inputs()
    model.requires_grad_(False)
    weight = model.blocks[0].attn1.norm_q.weight.requires_grad_()
    report = pv.accelerate(model, attention={"top_k": 1})
    model(**arguments).sample.sum().backward()
    assert weight.grad.abs().max() > 0 and "qk_norm_rope_means" not in used(report)


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
