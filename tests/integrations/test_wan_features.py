"""What diffusers does around a model: each feature with the stock model and with the accelerated one."""

import copy

import accelerate
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    WanTransformer3DModel,
)
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

import pyvideo_kernels as pv
from pyvideo_kernels.integrations import swap
from pyvideo_kernels.testing.compare import to_float64

from .helpers import WAN_OPS, Float64, assert_close, double, inputs, run, tiny, truth, used


def same_as_stock(model, stock, arguments, ref64=None):
    """``model``, accelerated, against ``stock`` with the same weights and features; judged by float64."""
    ref64 = truth(stock, arguments) if ref64 is None else ref64
    assert_close(run(model, arguments), ref64, run(stock, arguments))


# Saving ----------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    model, arguments = tiny(), inputs()
    keys = list(model.state_dict())
    pv.accelerate(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert not list(swap.swapped(loaded))
    same_as_stock(model, loaded, arguments)
    model.load_state_dict({name: value + 0.01 for name, value in loaded.state_dict().items()})
    loaded.load_state_dict(model.state_dict())
    same_as_stock(model, loaded, arguments)


# LoRA ------------------------------------------------------------------------------------------------------------

LORA = LoraConfig(
    r=2,
    target_modules=["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "proj_out"],
    init_lora_weights=False,
)


def add_lora(model):
    torch.manual_seed(5)
    model.add_adapter(LORA)
    return model


@pytest.mark.parametrize("first", ["lora", "accelerate"])
def test_lora_before_and_after(first):
    arguments = inputs()
    stock, model = add_lora(tiny()), tiny()
    plain = run(model, arguments)
    if first == "lora":
        report = pv.accelerate(add_lora(model))
        assert "peft Linear, not a plain Linear" in report.to_dict()["modules"]["proj_out"]["left"]["final_layer"]
    else:
        report = pv.accelerate(model)
        add_lora(model)
    assert (run(stock, arguments) - plain).abs().max() > 0.01  # the adapter does something
    same_as_stock(model, stock, arguments)
    # Two blocks, each with an adapter on its feed-forward network.
    assert report.fallbacks() == {
        "final_layer": {"proj_out is a Linear that is not swapped": 1},
        "linear_gelu": {"proj is a Linear that is not swapped": 2},
    }
    assert used(report) == WAN_OPS - {"final_layer", "linear_gelu"}

    scaled = {**arguments, "attention_kwargs": {"scale": 0.5}}
    same_as_stock(model, stock, scaled)
    assert not torch.allclose(run(model, scaled), run(model, arguments))


def test_lora_fused_unfused_and_unloaded():
    model, stock, arguments = tiny(), tiny(), inputs()
    plain = run(stock, arguments)
    report = pv.accelerate(model)
    for each in (model, stock):
        add_lora(each).fuse_lora(lora_scale=0.7)
    fused = run(stock, arguments)
    assert not torch.allclose(fused, plain)
    same_as_stock(model, stock, arguments)
    for each in (model, stock):
        each.unfuse_lora()
    same_as_stock(model, stock, arguments)
    for each in (model, stock):
        each.unload_lora()
    before = report.calls()
    same_as_stock(model, stock, arguments)
    for name in ("final_layer", "linear_gelu"):
        assert report.calls()[name] != before.get(name)  # proj_out and the feed-forward networks are ours again
    pv.restore(model)
    assert not list(swap.swapped(model))


# Hooks of torch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_somebody_watches_the_projection_of_a_feed_forward_network(kind):
    """It takes and returns what it does in the stock model, and a hook may change that."""
    model, stock, arguments = tiny(), tiny(), inputs()
    report = pv.accelerate(model)
    seen = []

    def hook(module, args, *rest):
        seen.append(args)
        if kind != "full_backward_hook":
            return 2 * (rest[0] if rest else args[0])

    for each in (model, stock):
        getattr(each.blocks[1].ffn.net[0].proj, f"register_{kind}")(hook)
    same_as_stock(model, stock, arguments)
    assert report.fallbacks() == {"linear_gelu": {"somebody's hooks look at proj": 1}}
    assert report.calls()["linear_gelu"].popitem()[1] == 1
    assert bool(seen) == (kind != "full_backward_hook")


def test_another_feed_forward_network_is_left():
    model, stock, arguments = tiny(), tiny(), inputs()
    for each in (model, stock):
        each.blocks[0].ffn = torch.nn.Linear(32, 32)
        each.blocks[0].ffn.weight.data.fill_(0.01)
        each.blocks[0].ffn.bias.data.zero_()
    report = pv.accelerate(model)
    assert report.to_dict()["modules"]["blocks.0.ffn"]["left"] == {
        "linear_gelu": "it is a torch Linear, not a plain GELU"
    }
    same_as_stock(model, stock, arguments)
    assert report.calls()["linear_gelu"].popitem()[1] == 1 and not report.fallbacks()


# Weights in other dtypes and places ----------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["casting", "accelerate"])
def test_layerwise_casting_to_fp8(first):
    model, stock, arguments = tiny().bfloat16(), tiny().bfloat16(), inputs(torch.bfloat16)

    def cast(each):
        each.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    cast(stock)
    weights = {name: value.double() for name, value in stock.state_dict().items()}
    in_float64 = tiny().double()
    in_float64.load_state_dict(weights)
    steps = [cast, lambda each: pv.accelerate(each, strict=True)]
    for step in steps if first == "casting" else reversed(steps):
        step(model)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    report = pv.accelerate(model)
    same_as_stock(model, stock, arguments, truth(in_float64, arguments))
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert used(report) == WAN_OPS and not report.fallbacks()


def leaf_offload(model, path):
    """Every leaf's weights are on the meta device outside its own forward."""
    accelerate.cpu_offload(model, execution_device="cpu")


def model_offload(model, path):
    accelerate.cpu_offload_with_hook(model, execution_device="cpu")


def group_offload(kind):
    def apply(model, path):
        """Weights live in files; in memory there is garbage outside the owner's forward."""
        options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(
            model,
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            offload_to_disk_path=str(path),
            **options,
        )

    return apply


OFFLOADS = {
    "leaf": leaf_offload,
    "model": model_offload,
    "group blocks": group_offload("block_level"),
    "group leaves": group_offload("leaf_level"),
}


@pytest.mark.parametrize("first", ["offload", "accelerate"])
@pytest.mark.parametrize("kind", OFFLOADS)
def test_offloading(kind, first, tmp_path):
    """A weight read outside its owner's forward would be a meta tensor or garbage."""
    model, stock, arguments = tiny(), tiny(), inputs()
    steps = [lambda each: OFFLOADS[kind](each, tmp_path), lambda each: pv.accelerate(each, strict=True)]
    for step in steps if first == "offload" else reversed(steps):
        step(model)
    report = pv.accelerate(model)
    if kind == "leaf":
        assert model.blocks[0].norm2.weight.device.type == "meta"
    same_as_stock(model, stock, arguments)
    same_as_stock(model, stock, arguments)
    assert used(report) == WAN_OPS and not report.fallbacks()


# Caches ----------------------------------------------------------------------------------------------------------

TAYLOR = {"cache_interval": 2, "disable_cache_before_step": 1, "taylor_factors_dtype": torch.float32}
# Name -> configuration, and an op that runs once in each of the parts that the cache skips.
CACHES = {
    "first block": (lambda: FirstBlockCacheConfig(threshold=0.4), "gate_residual"),
    "mag": (
        lambda: MagCacheConfig(mag_ratios=[1.0] * 6, num_inference_steps=6, max_skip_steps=2),
        "gate_residual",
    ),
    "taylorseer": (
        lambda: TaylorSeerCacheConfig(**TAYLOR, cache_identifiers=[r"blocks\.\d+\.(attn1|ffn)"]),
        "qk_norm_rope",
    ),
    # Blocks are skipped and proj_out is extrapolated, which returns a video here and tokens in the stock model.
    "taylorseer lite": (lambda: TaylorSeerCacheConfig(**TAYLOR, use_lite_mode=True), "final_layer"),
    "pyramid": (
        lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=("blocks",),
            current_timestep_callback=lambda: 500,
        ),
        "qk_norm_rope",
    ),
}


def steps_of(model, arguments, count=6):
    """A short denoising: the latent drifts, and the cache decides which blocks run."""
    with torch.no_grad(), model.cache_context("cond"):
        latent, out = arguments["hidden_states"], None
        for step in range(count):
            timestep = torch.full_like(arguments["timestep"], 900 - 20 * step)
            out = model(latent, timestep, arguments["encoder_hidden_states"]).sample
            latent = latent - 0.05 * out
    return out


@pytest.mark.parametrize("first", ["cache", "accelerate"])
@pytest.mark.parametrize("name", CACHES)
def test_caches(name, first):
    arguments = inputs()
    config, skipped = CACHES[name]
    stock, model, in_float64 = tiny(3), tiny(3), tiny(3).double()
    plain = steps_of(tiny(3), arguments)
    for each in (stock, in_float64):
        each.enable_cache(config())
    steps = [lambda each: each.enable_cache(config()), pv.accelerate]
    for step in steps if first == "cache" else reversed(steps):
        step(model)
    report = pv.accelerate(model)
    with Float64():
        ref64 = steps_of(in_float64, {key: double(value) for key, value in arguments.items()})
    assert_close(steps_of(model, arguments), ref64, steps_of(stock, arguments))
    assert not torch.allclose(ref64.float(), plain)  # the cache skipped something
    assert 0 < report.calls()[skipped].popitem()[1] < (6 if skipped == "final_layer" else 18)
    model.disable_cache()
    report = pv.accelerate(model)
    same_as_stock(model, tiny(3), arguments)
    assert report.calls()["gate_residual"].popitem()[1] == 3


# Attention ---------------------------------------------------------------------------------------------------------


def test_fused_qkv_projections():
    model, stock, arguments = tiny(), tiny(), inputs()
    report = pv.accelerate(model)
    for each in (model, stock):
        each.fuse_qkv_projections()
    same_as_stock(model, stock, arguments)
    assert used(report) == WAN_OPS and not report.fallbacks()


def test_the_models_own_attention_backend_stays():
    from diffusers.models import attention_dispatch

    model, stock, arguments = tiny(), tiny(), inputs()
    active = attention_dispatch._AttentionBackendRegistry._active_backend
    try:
        pv.accelerate(model)
        model.set_attention_backend("_native_math")
        processors = {id(p) for p in model.attn_processors.values()}
        same_as_stock(model, stock, arguments)
        pv.restore(model)
        assert {id(p) for p in model.attn_processors.values()} == processors
        assert model.blocks[0].attn1.processor._attention_backend == "_native_math"
    finally:
        attention_dispatch._AttentionBackendRegistry._active_backend = active


def test_a_foreign_processor_is_called_and_counted():
    model, arguments = tiny(), inputs()
    stock_processor = type(model.blocks[0].attn1.processor)

    class Doubling(stock_processor):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    stock = copy.deepcopy(model)
    report = pv.accelerate(model, attention="dense")
    for each in (model, stock):
        each.blocks[0].attn1.set_processor(Doubling())
    same_as_stock(model, stock, arguments)
    assert report.fallbacks()["qk_norm_rope"] == {"processor Doubling": 1}
    report = pv.accelerate(model)
    assert "a Doubling, not the stock" in report.to_dict()["modules"]["blocks.0.attn1"]["left"]["qk_norm_rope"]


# Compilation, precision, training -------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [None, "dense"])
def test_compile_whole_and_by_repeated_blocks(attention):
    """One graph without breaks, and one for all blocks: instance forwards must not be told apart."""
    arguments = inputs()
    stock = tiny(3)
    for blocks in (False, True):
        torch._dynamo.reset()
        model, counter = tiny(3), CompileCounter()
        report = pv.accelerate(model, attention=attention)
        if blocks:
            model.compile_repeated_blocks(fullgraph=True, backend=counter)
            same_as_stock(model, stock, arguments)
        else:
            compiled = torch.compile(model, fullgraph=True, backend=counter)
            assert_close(run(compiled, arguments), truth(stock, arguments), run(stock, arguments))
        assert counter.frame_count == 1
        assert used(report) == WAN_OPS | ({"spacetime_attention"} if attention else set())


def test_a_fallback_inside_a_graph_breaks_nothing_and_is_counted_when_traced():
    torch._dynamo.reset()
    arguments, counter = inputs(), CompileCounter()
    model, stock = tiny(1), tiny(1)
    report = pv.accelerate(model)
    for each in (model, stock):
        torch.manual_seed(5)
        each.add_adapter(LoraConfig(r=2, target_modules=["proj_out"], init_lora_weights=False))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        assert_close(run(compiled, arguments), truth(stock, arguments), run(stock, arguments))
    assert counter.frame_count == 1
    assert report.fallbacks() == {"final_layer": {"proj_out is a Linear that is not swapped": 1}}


def test_accelerating_a_compiled_model_recompiles_and_restoring_does_too():
    torch._dynamo.reset()
    model, stock, arguments = tiny(), tiny(), inputs()
    model.compile(backend="eager")
    eager = run(model, arguments)
    report = pv.accelerate(model)
    same_as_stock(model, stock, arguments)
    assert used(report) == WAN_OPS
    before = report.calls()
    pv.restore(model)
    torch.testing.assert_close(run(model, arguments), eager, rtol=0, atol=0)
    assert report.calls() == before


def test_autocast():
    model, stock, arguments = tiny(), tiny(), inputs()
    report = pv.accelerate(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, eager = run(model, arguments), run(stock, arguments)
    assert ours.dtype == eager.dtype == torch.bfloat16
    assert_close(ours, truth(stock, arguments), eager)
    reason = {"autocast chooses the dtype of the projection": 1}
    each_block = {"autocast chooses the dtype of the projection": 2}
    assert report.fallbacks() == {"final_layer": reason, "linear_gelu": each_block, "patch_embed3d": reason}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_training_step_has_the_stock_gradients(checkpointing, per_token):
    arguments = inputs(per_token=per_token)
    model, stock, in_float64 = tiny(), tiny(), tiny().double()
    report = pv.accelerate(model, attention="dense")
    for each in (model, stock):
        if checkpointing:
            each.enable_gradient_checkpointing()
        each.train()
    target = torch.linspace(-1, 1, arguments["hidden_states"].numel()).view_as(arguments["hidden_states"])

    def gradients(each, values, target):
        loss = (each(**values).sample - target).square().mean()
        loss.backward()
        return {name: parameter.grad for name, parameter in each.named_parameters()}

    ours = gradients(model, arguments, target)
    eager = gradients(stock, arguments, target)
    with Float64():
        ref64 = gradients(in_float64, {key: double(value) for key, value in arguments.items()}, target.double())
    assert set(ours) == set(eager) and all(value is not None for value in ours.values())
    # One yardstick for all: a gradient that is nearly zero has an eager error that may be zero by luck.
    flat = [torch.cat([grads[name].flatten() for name in ours]) for grads in (ours, ref64, eager)]
    assert_close(*flat)
    for name in ours:
        assert (ours[name] - ref64[name]).norm() <= 1e-4 * ref64[name].norm() + 1e-7, name
    backwards = {name for name in used(report) if name.endswith("_backward")}
    assert backwards == {f"{name}_backward" for name in WAN_OPS | {"spacetime_attention"}}
    assert not report.fallbacks()


def test_float16_and_float64_activations():
    model = tiny().half()
    arguments = inputs(torch.float16)
    report = pv.accelerate(model)
    same_as_stock(model, tiny().half(), arguments)
    assert used(report) == WAN_OPS
    model = tiny().double()
    arguments = to_float64(tuple(arguments.values()))
    stock = model(*arguments).sample
    report = pv.accelerate(model)
    torch.testing.assert_close(model(*arguments).sample, stock)
    assert not used(report) and {"activation dtype float64"} == {r for c in report.fallbacks().values() for r in c}
