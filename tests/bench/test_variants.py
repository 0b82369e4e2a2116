"""What --ab means, and that variants share weights and nothing else."""

from types import SimpleNamespace

import pytest
import torch

from pyvideo_kernels.benchmarks import models
from pyvideo_kernels.benchmarks.e2e import attention_choice, quality
from pyvideo_kernels.benchmarks.e2e.loops import Sampled
from pyvideo_kernels.benchmarks.e2e.variants import (
    BASE,
    Compile,
    Variant,
    build,
    parse,
    parse_all,
    repeated_blocks,
    set_attention_backend,
    sharing_copy,
)
from pyvideo_kernels.error_types import ModelError, UnsupportedError, ValueOptionError
from pyvideo_kernels.integrations.swap import swapped

# The grammar ------------------------------------------------------------------------------------------------------

_CASES = {
    "eager": Variant("eager"),
    "ours:backend=best": Variant("ours:backend=best", accelerate={}, backend="best"),
    "eager:backend=_native_math": Variant("eager:backend=_native_math", backend="_native_math"),
    "compile": Variant("compile", compile=Compile()),
    "compile:mode=max-autotune,scope=blocks,dynamic=false,vae=true": Variant(
        "compile:mode=max-autotune,scope=blocks,dynamic=false,vae=true",
        compile=Compile("blocks", "max-autotune", False, "inductor", True),
    ),
    "ours": Variant("ours", accelerate={}),
    "ours:attention=dense,impl=cpu,strict=yes": Variant(
        "ours:attention=dense,impl=cpu,strict=yes",
        accelerate={"attention": "dense", "impl": "cpu", "strict": True},
    ),
    "ours:ops=rms_norm+gate_residual": Variant(
        "ours:ops=rms_norm+gate_residual", accelerate={"ops": ("rms_norm", "gate_residual")}
    ),
    "ours:attention=none": Variant("ours:attention=none", accelerate={"attention": None}),
    "ours:attention=int8": Variant("ours:attention=int8", accelerate={"attention": "int8"}),
    " ours+compile : attention = dense , compiler = eager ": Variant(
        "compile+ours:attention=dense,compiler=eager",
        accelerate={"attention": "dense"},
        compile=Compile(compiler="eager"),
    ),
}


@pytest.mark.parametrize("text", _CASES)
def test_parse(text):
    assert parse(text) == _CASES[text]
    assert parse(_CASES[text].name) == _CASES[text]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("our", "no variant 'our' (did you mean 'ours'?)"),
        ("", "no variant ''"),
        ("eager+ours", "does not compose"),
        ("ours+ours", "does not compose"),
        ("ours:atention=dense", "no key 'atention' (did you mean 'attention'?)"),
        ("ours:attention=dens", "got 'dens' (did you mean 'dense'?)"),
        ("ours:impl=trition", "did you mean 'triton'?"),
        ("ours:ops=rms_norm+rms_nrm", "got 'rms_nrm' (did you mean 'rms_norm'?)"),
        ("ours:strict=perhaps", "strict must be true or false"),
        ("ours:mode=default", "ours has no key 'mode'"),
        ("compile:attention=dense", "compile has no key 'attention'"),
        ("compile:mode=fast", "mode must be one of default, reduce-overhead"),
        ("compile:mode=default,compiler=eager", "mode is a setting of inductor"),
        ("eager:backend=_native_flsh", "did you mean '_native_flash'?"),
        ("ours:attention", "expected KEY=VALUE"),
        ("ours:", "expected KEY=VALUE"),
        ("ours:impl=cpu,impl=cpu", "impl is given twice"),
    ],
)
def test_what_is_refused(text, words):
    with pytest.raises(ValueOptionError) as error:
        parse(text)
    assert words in str(error.value) and text in str(error.value)


def test_eager_is_first_and_each_variant_once():
    names = [variant.name for variant in parse_all(["ours", "ours+compile", "eager", "compile+ours", "ours"])]
    assert names == [BASE, "ours", "compile+ours"]


def test_values_are_read_before_diffusers_is_needed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers.models.attention_dispatch", None)
    assert parse("ours:attention=dense").accelerate == {"attention": "dense"}
    with pytest.raises(ModelError, match="diffusers"):
        parse("eager:backend=native")


# Building ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    arch = models.architecture("tiny-random-wan")
    return models.random_pipeline(arch, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def inputs(pipe):
    arch = models.architecture("tiny-random-wan")
    clip = arch.clip(32, 32, 5)
    return lambda: {
        **models.prompt_inputs(pipe, arch),
        "latents": models.initial_latents(pipe, clip),
        **models.call_options(clip, steps=2),
    }


def _pointers(pipe):
    return [
        (name, tensor.data_ptr())
        for part in (pipe.transformer, pipe.vae)
        for tensors in (part.named_parameters(), part.named_buffers())
        for name, tensor in tensors
    ]


def test_variants_share_every_parameter_and_buffer_and_no_module(pipe):
    built = [build(pipe, parse(text)).pipe for text in ("eager", "ours")]
    for own in built:
        assert _pointers(own) == _pointers(pipe)
    trees = [set(map(id, (*p.transformer.modules(), *p.vae.modules()))) for p in (pipe, *built)]
    assert not trees[0] & trees[1] and not trees[1] & trees[2]
    assert len({id(p.scheduler) for p in (pipe, *built)}) == 3


def test_accelerating_one_leaves_the_others_stock(pipe, inputs):
    eager = build(pipe, parse("eager"))
    forwards = {type(module): type(module).forward for module in pipe.transformer.modules()}
    ours = build(pipe, parse("ours:attention=dense"))
    assert ours.report is not None and ours.report.complete
    assert any(True for _ in swapped(ours.pipe.transformer)) and any(True for _ in swapped(ours.pipe.vae))
    for stock in (pipe, eager.pipe):
        assert not list(swapped(stock.transformer)) and not list(swapped(stock.vae))
    assert all(kind.forward is forward for kind, forward in forwards.items())
    before = ours.report.calls()
    stock = eager.pipe(**inputs())[0]
    assert ours.report.calls() == before
    torch.testing.assert_close(ours.pipe(**inputs())[0], stock, rtol=1e-3, atol=1e-3)
    assert ours.report.calls()["spacetime_attention"]


def test_ours_is_what_the_sampler_runs_and_the_others_are_the_pipeline(pipe, inputs):
    """By the calls of the transformer, in inference mode or not; the latents are the same."""
    found = {}
    for name in (
        "eager",
        "compile:compiler=eager,scope=blocks",
        "ours",
        "ours:loop=pipeline",
        "compile+ours:compiler=eager",
    ):
        own = build(pipe, parse(name)).pipe
        calls, rope = [], own.transformer.rope
        real = rope.forward

        def forward(x, calls=calls, real=real):
            calls.append((x.shape[0], torch.is_inference_mode_enabled()))
            return real(x)

        rope.forward = forward
        ends = []
        latents = own(**inputs(), callback_on_step_end=lambda pipe, i, t, kwargs, ends=ends: ends.append(i) or {})[0]
        found[name] = calls, ends, latents
    eager = found["eager"][2]
    for name, (calls, ends, latents) in found.items():
        expected = [(2, True)] * 2 if name == "ours" else [(1, False)] * 4
        assert (calls, ends) == (expected, [0, 1]) or "compile" in name, name
        torch.testing.assert_close(latents, eager, rtol=1e-3, atol=1e-3)
    assert not isinstance(build(pipe, parse("ours:loop=pipeline")).pipe, Sampled)
    ours = build(pipe, parse("ours")).pipe

    def stop(running, *_):
        running._interrupt = True
        return {}

    one = ours(**inputs(), callback_on_step_end=stop)[0]
    assert ours.evaluation.guidance_batch.on and not torch.equal(one, ours(**inputs())[0])
    with pytest.raises(TypeError, match="does not know attention_kwargs"):
        ours(**inputs(), attention_kwargs={})
    modes = []
    ours.decode(lambda pipe, x: modes.append((torch.is_inference_mode_enabled(), pipe)) or x, one)
    assert modes == [(True, ours._pipe)]


def test_an_attention_backend_binds_one_copy_and_not_the_process(pipe, inputs):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    active = _AttentionBackendRegistry._active_backend
    own = build(pipe, parse("eager:backend=_native_math")).pipe

    def backends(model):
        return {module.processor._attention_backend for module in model.modules() if hasattr(module, "processor")}

    assert backends(own.transformer) == {AttentionBackendName._NATIVE_MATH} and backends(pipe.transformer) == {None}
    assert _AttentionBackendRegistry._active_backend is active
    torch.testing.assert_close(own(**inputs())[0], pipe(**inputs())[0], rtol=1e-3, atol=1e-3)


def test_a_backend_that_is_not_here_says_so(pipe):
    with pytest.raises(UnsupportedError, match="backend=xformers: .*install"):
        build(pipe, parse("eager:backend=xformers"))


def test_a_backend_where_attention_is_not_dispatched(pipe):
    class Bare:
        transformer = torch.nn.Linear(1, 1)

    with pytest.raises(UnsupportedError, match="attention of Linear does not go through"):
        set_attention_backend(Bare(), "native")


def test_what_accelerate_refuses_is_refused_by_name(pipe):
    with pytest.raises(ValueOptionError, match="`attention` dense needs spacetime_attention among `ops`"):
        build(pipe, parse("ours:attention=dense,ops=rms_norm"))


@pytest.mark.parametrize("scope", ["model", "blocks"])
def test_compiled_once_and_kept_between_calls(pipe, inputs, scope):
    """Through Dynamo without a compiler behind it: seconds instead of a minute."""
    from torch._dynamo.utils import counters

    both = build(pipe, parse(f"compile+ours:compiler=eager,scope={scope}"))
    assert pipe.transformer._compiled_call_impl is None
    compiled = [both.pipe.transformer] if scope == "model" else repeated_blocks(both.pipe.transformer)
    assert compiled and all(module._compiled_call_impl is not None for module in compiled)
    first = both.pipe(**inputs())[0]
    graphs = counters["stats"]["unique_graphs"]
    eager = build(pipe, parse("eager")).pipe(**inputs())[0]
    again = both.pipe(**inputs())[0]
    assert counters["stats"]["unique_graphs"] == graphs > 0
    assert torch.equal(first, again)
    torch.testing.assert_close(again, eager, rtol=1e-3, atol=1e-3)
    assert both.report.calls()["qk_norm_rope"]


def test_outputs_of_cuda_graphs_are_copied(pipe, monkeypatch):
    own = sharing_copy(pipe.transformer)
    buffer = torch.zeros(3)
    monkeypatch.setattr(type(own), "compile", lambda self, **_: setattr(self, "_compiled_call_impl", lambda: (buffer,)))
    from pyvideo_kernels.benchmarks.e2e import variants

    fake = type("Pipe", (), {"transformer": own, "vae": None})()
    variants._compile(fake, Compile(mode="reduce-overhead"))
    first = own()[0]
    buffer.fill_(1)
    assert first.eq(0).all() and own()[0].eq(1).all()


def test_compiling_the_vae_compiles_its_decoder_alone(pipe):
    own = build(pipe, parse("compile:compiler=eager,vae=true")).pipe
    assert own.vae.decoder._compiled_call_impl is not None and own.vae._compiled_call_impl is None
    assert pipe.vae.decoder._compiled_call_impl is None


def test_blocks_of_a_model_without_a_list_of_its_own():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Linear(2, 2)
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])

    model = Plain()
    assert repeated_blocks(model) == list(model.blocks)


# backend=best -----------------------------------------------------------------------------------------------------


def _seconds_by_backend(monkeypatch, seconds):
    """A clock on which a call with a backend takes what the table says."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    clock = SimpleNamespace(now=0.0, synchronize=lambda: None, seconds=lambda a, b: b - a)
    clock.mark = lambda: clock.now
    for backend, function in list(_AttentionBackendRegistry._backends.items()):
        took = seconds.get(backend.value, 1.0)

        def timed(*args, _function=function, _took=took, **kwargs):
            clock.now += _took
            return _function(*args, **kwargs)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, timed)
    return clock


def test_the_best_backend_is_the_fastest_that_predicts_the_same(pipe, inputs, monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    call = quality.first_call(pipe.transformer, lambda: pipe(**inputs()))
    clock = _seconds_by_backend(monkeypatch, {"_native_efficient": 0.001, "_native_flash": 0.1, "native": 0.5})
    wrong = lambda query, **_: torch.zeros_like(query)
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_EFFICIENT, wrong)
    choice = attention_choice.choose(pipe, call, clock)
    assert choice.name == "_native_flash" and choice.seconds["_native_flash"] < choice.seconds["native"]
    assert "predicts something else" in choice.refused["_native_efficient"]
    assert "install" in choice.refused["xformers"]
    assert "backend=best is _native_flash" in choice.note() and "native 1 s" not in choice.note()
    assert all(
        module.processor._attention_backend is None
        for module in pipe.transformer.modules()
        if hasattr(module, "processor")
    )


def test_a_mask_that_a_backend_would_drop_leaves_it_out(pipe, inputs, monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    args, kwargs = quality.first_call(pipe.transformer, lambda: pipe(**inputs()))
    clock = _seconds_by_backend(monkeypatch, {"_native_flash": 0.001})
    names = _AttentionBackendRegistry._supported_arg_names
    flash = AttentionBackendName._NATIVE_FLASH
    monkeypatch.setitem(names, flash, names[flash] - {"attn_mask"})
    assert attention_choice.choose(pipe, (args, kwargs), clock).name == "_native_flash"
    monkeypatch.setattr(attention_choice, "_has_mask", lambda call: True)
    choice = attention_choice.choose(pipe, (args, kwargs), clock)
    assert choice.name != "_native_flash" and "mask" in choice.refused["_native_flash"]


def test_without_any_backend_the_reasons_are_named():
    choice = attention_choice.Choice(refused={"native": "no", "flash": "not installed"})
    with pytest.raises(UnsupportedError, match="native: no; flash: not installed"):
        _ = choice.name
