"""How a run evaluates its model: one batch or two calls, what is kept of the text, inference mode; and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanImageToVideoPipeline

from pyvideo_kernels import accelerate, restore
from pyvideo_kernels.errors import UsageError
from pyvideo_kernels.integrations.text_cache import _current
from pyvideo_kernels.sampler import Interrupted, Result, evaluation, sample
from pyvideo_kernels.sampler.evaluation import Choice, Evaluation, planned, settle
from pyvideo_kernels.sampler.settings import Settings

from . import pipes
from .test_loop import PROMPT, SIZE, check_picture, psnr, stock
from .test_settings import WAN_13B, model, plan

CPU = torch.device("cpu")
ON, OFF = {"guidance_batch": "on", "text_kv_cache": "on"}, {"guidance_batch": "off", "text_kv_cache": "off"}


def film(pipe: Any, **options: Any) -> Result:
    return sample(PROMPT, model=pipe, as_float=True, **(SIZE | options))


def latents(pipe: Any, **options: Any) -> np.ndarray:
    """Clean ones; the random VAE multiplies what differs by more than ten."""
    seen: list[torch.Tensor] = []
    film(pipe, callback=lambda i, n, x: seen.append(x.clone()), **options)
    return seen[-1].numpy()


@pytest.fixture
def batches(pipe: Any) -> Any:
    """Batch sizes of the transformer's calls, without a hook: a hook would be respected."""
    seen: list[int] = []
    own = pipe.transformer.rope.forward
    pipe.transformer.rope.forward = lambda x: seen.append(x.shape[0]) or own(x)
    yield seen
    del pipe.transformer.rope.forward


@pytest.mark.parametrize("options", [
    {}, {"guidance_batch": "on"}, {"text_kv_cache": "on"}, ON, {"scheduler": "euler"}, {"negative": "a blue square"},
])  # fmt: skip
def test_the_same_film_within_rounding(pipe: Any, options: dict[str, Any]) -> None:
    rest = {key: value for key, value in options.items() if key not in ON}
    np.testing.assert_allclose(latents(pipe, **options), latents(pipe, **rest, **OFF), atol=1e-5)
    assert psnr(film(pipe, **options).frames, film(pipe, **rest, eager=True).frames) > 60


def test_two_calls_or_one(pipe: Any, batches: list[int]) -> None:
    on = film(pipe)
    assert batches == [2] * SIZE["steps"]
    assert on.stats["evaluation"]["guidance_batch"] == {"on": True, "why": "12 tokens, at most 512"}
    batches.clear()
    film(pipe, guidance_batch="off")
    assert batches == [1] * 2 * SIZE["steps"]
    batches.clear()
    film(pipe, guidance=1.0)
    assert batches == [1] * SIZE["steps"]
    batches.clear()
    assert film(pipe, eager=True).stats["evaluation"]["text_kv_cache"] == {"on": False, "why": "--eager"}
    assert batches == [1] * 2 * SIZE["steps"]


def test_experts_keep_their_own_and_a_new_clip_sees_new_weights() -> None:
    pipe = pipes.wan(boundary_ratio=0.9)
    np.testing.assert_allclose(latents(pipe, **ON), latents(pipe, **OFF), atol=1e-5)
    accelerate(pipe)
    before = latents(pipe, **ON)
    with torch.no_grad():
        for model in (pipe.transformer, pipe.transformer_2):
            for block in model.blocks:
                block.attn2.to_v.weight.data.mul_(-3)  # leaves no trace in a version
    after = latents(pipe, **ON)
    np.testing.assert_allclose(after, latents(pipe, **OFF), atol=1e-5)
    assert np.abs(after - before).max() > 1e-3


def test_ti2v_and_picture_embeddings(tmp_path: Any) -> None:
    pipe = pipes.wan(expand_timesteps=True)
    np.testing.assert_allclose(latents(pipe, **ON), latents(pipe, **OFF), atol=1e-5)
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    vision = CLIPVisionConfig(
        hidden_size=8, projection_dim=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, intermediate_size=8,
        patch_size=8,
    )  # fmt: skip
    parts = pipes.components(in_channels=12, out_channels=4, image_dim=8, added_kv_proj_dim=32)
    embedding = {"image_encoder": CLIPVisionModel(vision).eval(),
                 "image_processor": CLIPImageProcessor(crop_size=32, size=32)}  # fmt: skip
    for more in ({"expand_timesteps": True}, embedding):
        base = pipe.components if "expand_timesteps" in more else parts
        images = WanImageToVideoPipeline(**{**base, **more})
        check_picture(images, tmp_path)
        picture = str(tmp_path / "first.png")
        np.testing.assert_allclose(
            latents(images, image=picture, **ON), latents(images, image=picture, **OFF), atol=1e-5
        )


# Rules -------------------------------------------------------------------------------------------------------------


def settings(**options: Any) -> Settings:
    return Settings(prompt="x", **options).check()


def test_the_rules_and_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_free_memory", lambda device: 20_000_000_000)
    small = plan({"height": 64, "width": 64, "frames": 17})
    large = plan()
    cuda = torch.device("cuda", 0)
    found = planned(settings(), small, CPU, 4)
    assert found.guidance_batch == Choice(True, "80 tokens, at most 512")
    assert found.text_kv_cache.on and found.words() == "guidance in one batch, text K/V computed once"
    found = planned(settings(), large, cuda, 2)
    assert found.guidance_batch == Choice(False, "32,760 tokens, more than 512")
    assert found.text_kv_cache == Choice(False, "0.05% of a call's products, less than 1%") and found.words() == ""
    assert planned(settings(), large, CPU, 2).text_kv_cache.on, "a CPU saves the attention to padding as well"
    forced = planned(settings(**ON), large, cuda, 2)
    assert forced == Evaluation(Choice(True, "as asked"), Choice(True, "as asked"))
    assert planned(settings(**OFF), small, CPU, 4).words() == ""
    assert planned(settings(eager=True), small, CPU, 4).words() == ""
    assert planned(settings(), plan({"guidance": 1.0}), CPU, 4).guidance_batch == Choice(False, "no guidance")
    # Keys and values of 30 layers and the projection, of two texts, in bf16.
    assert large.text_kv_bytes(2) == 61 * 512 * 1536 * 2 * 2
    monkeypatch.setattr(evaluation, "_free_memory", lambda device: 1_000_000_000)
    tight = planned(settings(), small, CPU, 4).text_kv_cache
    assert not tight.on and tight.why == "0.384 GB of 1 GB that are free, more than 10%"
    assert (
        plan({}, model(transformer=WAN_13B))
        .line("bf16", "cpu", "9 ops", "text K/V computed once")
        .endswith("guidance 5; text K/V computed once; 9 ops")
    )


@pytest.mark.parametrize("option", ["guidance_batch", "text_kv_cache"])
def test_options_are_refused_by_name(option: str) -> None:
    name = option.replace("_", "-")
    with pytest.raises(UsageError, match=f"--{name} must be one of auto, on, off; got 'onn' .did you mean 'on'"):
        settings(**{option: "onn"})
    with pytest.raises(UsageError, match="--eager evaluates as diffusers does"):
        settings(eager=True, **{option: "on"})
    assert settings(eager=True, **{option: "off"})


def test_hooks_and_caches_get_the_two_calls_they_know(pipe: Any) -> None:
    transformer, asked = pipe.transformer, planned(settings(), plan({"height": 64, "width": 64, "frames": 17}), CPU, 4)
    assert settle(asked, pipe, settings()) == asked

    def why() -> str:
        assert settle(asked, pipe, settings(guidance_batch="on")).guidance_batch.on
        found = settle(asked, pipe, settings())
        assert not found.guidance_batch.on and found.text_kv_cache == asked.text_kv_cache
        return found.guidance_batch.why

    handle = transformer.blocks[1].register_forward_hook(lambda *_: None)
    assert why() == "two calls: blocks.1 has a hook"
    handle.remove()
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        assert why() == "two calls: a cache of steps is enabled"
        assert isinstance(evaluation.evaluating(pipe), torch.no_grad)
        cached, calls = film(pipe), []
        handle = transformer.patch_embedding.register_forward_hook(lambda *_: calls.append(1))
        np.testing.assert_array_equal(film(pipe, guidance_batch="off").frames, cached.frames)
        handle.remove()
        assert len(calls) == 2 * SIZE["steps"]
    finally:
        transformer.disable_cache()
    transformer.compile(backend="eager")
    try:
        assert why() == "two calls: the model is compiled"
        assert isinstance(evaluation.evaluating(pipe), torch.no_grad)
    finally:
        transformer._compiled_call_impl = None
    block = transformer.blocks[0]
    transformer.blocks[0] = torch.compile(block, backend="eager")
    try:
        assert why() == "two calls: the model is compiled"
        assert isinstance(evaluation.evaluating(pipe), torch.no_grad)
    finally:
        transformer.blocks[0] = block
    processor = transformer.blocks[0].attn2.processor
    transformer.blocks[0].attn2.processor = type("Mine", (), {"__call__": lambda self, attn, x, *_: x})()
    assert why() == "two calls: blocks.0.attn2 has a Mine"
    transformer.blocks[0].attn2.processor = processor
    assert settle(asked, pipe, settings()) == asked


# Inference mode ----------------------------------------------------------------------------------------------------


def test_a_run_is_in_inference_mode_and_leaves_no_such_tensor_behind(pipe: Any) -> None:
    modes: list[tuple[bool, bool]] = []
    accelerate(pipe)
    try:
        for _ in range(2):
            film(pipe, callback=lambda i, n, x: modes.append((torch.is_inference_mode_enabled(), x.is_inference())))
        assert modes == [(True, True)] * 2 * SIZE["steps"] and not torch.is_inference_mode_enabled()
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
            assert not any(x.is_inference() for x in (*part.parameters(), *part.buffers()))
        # Weights that were packed meanwhile serve a call that records gradients.
        latents = torch.randn(1, 4, 1, 4, 6, requires_grad=True)
        pipe.vae.decode(latents, return_dict=False)[0].sum().backward()
        assert latents.grad is not None and latents.grad.abs().max() > 0
        out = pipe.transformer(
            torch.randn(1, 4, 1, 4, 6), torch.tensor([5]), torch.randn(1, 512, 16), return_dict=False
        )[0]
        out.sum().backward()
        assert pipe.transformer.blocks[0].attn2.to_k.weight.grad is not None
    finally:
        pipe.transformer.zero_grad()
        pipe.vae.zero_grad()
        restore(pipe)


def test_eager_in_inference_mode_is_the_pipelines_call_to_the_bit(pipe: Any) -> None:
    expected = stock(pipe, generator=torch.Generator().manual_seed(7))
    modes: list[bool] = []
    got = film(pipe, seed=7, eager=True, callback=lambda *_: modes.append(torch.is_inference_mode_enabled()))
    np.testing.assert_array_equal(got.frames, expected)
    assert modes == [True] * SIZE["steps"]


def test_interrupted_and_failed_runs_drop_what_they_kept(pipe: Any) -> None:
    for error, raised in ((KeyboardInterrupt, Interrupted), (ZeroDivisionError, ZeroDivisionError)):

        def stop(*_: Any, error: type[BaseException] = error) -> None:
            assert _current() is not None
            raise error

        with pytest.raises(raised):
            film(pipe, callback=stop, **ON)
        assert _current() is None and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
