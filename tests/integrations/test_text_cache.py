"""What a model makes of its prompt alone is kept for the steps of one film: the same film, and nothing stale."""

import threading

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName
from peft import LoraConfig
from torch import nn
from torch._dynamo.testing import CompileCounter

import pyvideo_kernels as pv
from pyvideo_kernels.integrations import text_cache as module
from pyvideo_kernels.integrations.text_cache import once, shortened, text_cache

from .helpers import assert_close, inputs, run, tiny, truth

TEXT = ("attn2.to_k", "attn2.to_v", "text_embedder.linear_1")
IMAGE = {"added_kv_proj_dim": 32, "image_dim": 8}


def prompts(batch=2, words=(20, 5), seed=3, dtype=torch.float32):
    """As Wan pads them: zeros behind the words."""
    text = torch.randn(batch, 512, 16, generator=torch.Generator().manual_seed(seed))
    for row, count in zip(text, words, strict=False):
        row[count:] = 0
    return text.to(dtype)


def accelerated(**config):
    model = tiny(**config)
    pv.accelerate(model)
    return model


def count_text_layers(model, monkeypatch):
    """A list that gets the name of each layer that is called on the text."""
    names = {layer: name for name, layer in model.named_modules() if name.endswith(TEXT)}
    calls, real = [], nn.Linear.forward

    def forward(self, x):
        calls.extend([names[self]] if self in names else [])
        return real(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, IMAGE], ids=["text", "image"])
def test_the_same_prediction_and_the_second_step_makes_nothing(config, dtype, monkeypatch):
    model, arguments = tiny(**config), inputs() | {"encoder_hidden_states": prompts()}
    if config:
        arguments["encoder_hidden_states_image"] = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1))
    ref64 = truth(model, arguments)
    model = model.to(dtype)
    arguments = {name: value.to(dtype) if value.is_floating_point() else value for name, value in arguments.items()}
    eager = run(model, arguments)
    pv.accelerate(model)
    constants = [arguments["encoder_hidden_states"], arguments.get("encoder_hidden_states_image")]
    calls = count_text_layers(model, monkeypatch)
    with text_cache(*constants) as cache:
        first = run(model, arguments)
        assert len(calls) == 2 * 2 + 1 and cache.bytes > 0
        second = run(model, arguments)
        assert len(calls) == 2 * 2 + 1
    assert torch.equal(first, second)
    assert_close(first, ref64, eager)
    run(model, arguments)
    assert len(calls) == 2 * (2 * 2 + 1), "outside, every call makes its own"
    assert cache.bytes == 0 and not cache._made and not cache._constants, "nothing is held afterwards"


def test_within_a_rounding_of_two_calls_without_it():
    model, arguments = accelerated(), inputs() | {"encoder_hidden_states": prompts()}
    apart = torch.cat([run(model, {name: value[i : i + 1] for name, value in arguments.items()}) for i in range(2)])
    with text_cache(arguments["encoder_hidden_states"]):
        torch.testing.assert_close(run(model, arguments), apart, rtol=1e-5, atol=1e-5)


def test_padding_counts_for_as_many_rows_as_there_were():
    text = prompts()
    with text_cache(text):
        kept, mask = shortened(text)
        assert kept == 32 and mask.shape == (1, 1, 1, 32) and (mask[..., :20] == 0).all()
        # exp of the mask counts rows: all 512.
        torch.testing.assert_close(mask.exp().sum(), torch.tensor(512.0))
        full = prompts(words=(512, 5))
        assert shortened(full) == (512, None), "not a constant of this loop"
    with text_cache(full := prompts(words=(512, 5))):
        assert shortened(full) == (512, None), "one of the prompts fills it"
    with text_cache(odd := prompts(words=(495, 1))):
        assert shortened(odd)[0] == 496
    with text_cache(empty := torch.zeros(1, 512, 16)):
        kept, mask = shortened(empty)
        assert kept == 16 and float(mask.exp().sum()) == pytest.approx(512)
    poisoned = prompts()
    poisoned[0, 300, 3] = float("nan")
    with text_cache(poisoned):
        assert shortened(poisoned)[0] == 304, "NaN in the padding is not padding"
    assert shortened(text) == (512, None)


def test_a_backend_that_drops_masks_gets_every_row():
    model, arguments = tiny(), inputs() | {"encoder_hidden_states": prompts()}
    ref64, eager = truth(model, arguments), run(model, arguments)
    pv.accelerate(model)
    for block in model.blocks:
        block.attn2.processor._attention_backend = AttentionBackendName._NATIVE_MATH
    with text_cache(arguments["encoder_hidden_states"]) as cache:
        out = run(model, arguments)
        assert any(isinstance(made[2], tuple) and made[2][0].shape[1] == 512 for made in cache._made.values())
    assert_close(out, ref64, eager)


# Nothing stale ---------------------------------------------------------------------------------------------------


def test_another_prompt_and_a_changed_copy_are_made_anew():
    model, arguments = accelerated(), inputs() | {"encoder_hidden_states": prompts()}
    other = arguments | {"encoder_hidden_states": prompts(seed=4)}
    expected = run(model, other)
    with text_cache(arguments["encoder_hidden_states"]):
        run(model, arguments)
        assert torch.equal(run(model, other), expected), "not a constant: computed as ever"
    with text_cache(arguments["encoder_hidden_states"], other["encoder_hidden_states"]):
        run(model, arguments)
        torch.testing.assert_close(run(model, other), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["in place", "replaced", "loaded"])
def test_weights_that_change_inside_are_seen(how):
    model, arguments = accelerated(), inputs() | {"encoder_hidden_states": prompts()}
    with text_cache(arguments["encoder_hidden_states"]):
        before = run(model, arguments)
        layer = model.blocks[1].attn2.to_v
        with torch.no_grad():
            if how == "in place":
                layer.weight.mul_(2)
            elif how == "replaced":
                layer.weight = nn.Parameter(layer.weight * 2)
            else:
                layer.load_state_dict({"weight": layer.weight * 2, "bias": layer.bias})
        inside = run(model, arguments)
    assert (inside - before).abs().max() > 1e-3
    torch.testing.assert_close(inside, run(model, arguments), rtol=1e-5, atol=1e-5)


def test_a_lora_and_its_scale_are_never_kept():
    model, arguments = accelerated(), inputs() | {"encoder_hidden_states": prompts()}
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    with text_cache(arguments["encoder_hidden_states"]) as cache:
        one = run(model, arguments | {"attention_kwargs": {"scale": 1.0}})
        two = run(model, arguments | {"attention_kwargs": {"scale": 3.0}})
        assert not any(key[0] == id(block.attn2) for block in model.blocks for key in cache._made)
    assert (one - two).abs().max() > 1e-4
    torch.testing.assert_close(two, run(model, arguments | {"attention_kwargs": {"scale": 3.0}}), rtol=1e-5, atol=1e-5)


def test_hooks_see_every_call():
    model, arguments = accelerated(), inputs() | {"encoder_hidden_states": prompts()}
    seen = []
    handle = model.blocks[0].attn2.to_k.register_forward_hook(lambda *_: seen.append(1))
    with text_cache(arguments["encoder_hidden_states"]):
        run(model, arguments), run(model, arguments)
    handle.remove()
    assert len(seen) == 2
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with text_cache(arguments["encoder_hidden_states"]), model.cache_context("cond"):
        out = run(model, arguments)
    model.disable_cache()
    torch.testing.assert_close(out, run(model, arguments), rtol=1e-5, atol=1e-5)


def test_gradients_are_recorded_through_it():
    model, arguments = accelerated(), inputs() | {"encoder_hidden_states": prompts()}
    with text_cache(arguments["encoder_hidden_states"]) as cache:
        for _ in range(2):
            model(**arguments).sample.sum().backward()
        assert not cache._made
    assert model.blocks[0].attn2.to_k.weight.grad.abs().max() > 0


def test_compiled_blocks_keep_nothing():
    model, arguments = accelerated(layers=1), inputs() | {"encoder_hidden_states": prompts()}
    expected = run(model, arguments)
    counter = CompileCounter()
    model.blocks[0].compile(backend=counter, fullgraph=True)
    with text_cache(arguments["encoder_hidden_states"]) as cache:
        out = run(model, arguments), run(model, arguments)
        assert not any(key[0] == id(model.blocks[0].attn2) for key in cache._made)
    assert counter.frame_count == 1
    for each in out:
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_dropped_on_errors_and_only_this_threads(error):
    text = prompts()
    layer = nn.Linear(16, 16)
    with pytest.raises(error), text_cache(text) as cache, torch.no_grad():
        kept = once(layer, (text,), (layer,), lambda: layer(text))
        assert once(layer, (text,), (layer,), lambda: layer(text)) is kept
        found = []
        thread = threading.Thread(target=lambda: found.append(module._current()))
        thread.start()
        thread.join()
        assert found == [None]
        with text_cache(torch.zeros(1)):
            assert once(layer, (text,), (layer,), lambda: layer(text)) is not kept
        assert once(layer, (text,), (layer,), lambda: layer(text)) is kept
        raise error
    assert module._current() is None and not cache._constants and not cache._made


def test_somebodys_layer_is_never_kept():
    class Mine(nn.Linear):
        pass

    text = prompts()
    with text_cache(text), torch.no_grad():
        for layer in (Mine(16, 16), nn.Linear(16, 16)):
            if type(layer) is nn.Linear:
                layer.forward = lambda x: x
            assert once(layer, (text,), (layer,), lambda: text * 1) is not once(layer, (text,), (layer,), lambda: text)
