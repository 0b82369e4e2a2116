"""The loop against WanPipeline.__call__, and our ops against the stock modules."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyvideo_kernels import accelerate, restore
from pyvideo_kernels.errors import ModelError, UsageError
from pyvideo_kernels.sampler import Interrupted, Result, loop, sample
from pyvideo_kernels.sampler.kernels import is_accelerated

from . import pipes

PROMPT = "a red ball moves left"
SIZE: dict[str, Any] = {"height": 32, "width": 48, "frames": 5, "steps": 4, "guidance": 3.0}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(1 / np.mean((a.astype(np.float64) - b) ** 2)))


def noise(pipe: Any, seed: int = 0) -> torch.Tensor:
    shape = (1, 4, 2, 4, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stock(pipe: Any, **options: Any) -> np.ndarray:
    size = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 3.0}
    out = pipe(prompt=PROMPT, output_type="np", **size, **options)
    return out.frames[0]


def ours(pipe: Any, **options: Any) -> Result:
    return sample(PROMPT, model=pipe, as_float=True, **(SIZE | options))


def test_eager_is_the_pipelines_own_call_to_the_bit(pipe: Any) -> None:
    expected = stock(pipe, generator=torch.Generator().manual_seed(7))
    got = ours(pipe, seed=7, eager=True)
    assert expected.std() > 0.05
    np.testing.assert_array_equal(got.frames, expected)
    assert got.stats["steps_by"] == "diffusers" and got.stats["calls"] == {} and not is_accelerated(pipe)


def test_negative_prompt_and_no_guidance(pipe: Any) -> None:
    expected = stock(pipe, generator=torch.Generator().manual_seed(7), negative_prompt="a blue square")
    np.testing.assert_array_equal(ours(pipe, seed=7, eager=True, negative="a blue square").frames, expected)
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    try:
        ours(pipe, guidance=1.0)
    finally:
        handle.remove()
    assert len(calls) == SIZE["steps"]


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_our_ops_agree_with_stock_modules(pipe: Any, scheduler: str) -> None:
    accelerated, eager = ours(pipe, scheduler=scheduler), ours(pipe, scheduler=scheduler, eager=True)
    assert psnr(accelerated.frames, eager.frames) > 60
    step = {"unipc": "unipc_step", "euler": "guidance_step"}[scheduler]
    assert sum(accelerated.stats["calls"][step].values()) == SIZE["steps"]
    assert accelerated.stats["steps_by"] == "pyvideo"
    assert accelerated.stats["accelerate"]["complete"]
    assert not is_accelerated(pipe), "a pipeline that was passed in comes back as it was"


def test_euler_is_diffusers_euler(pipe: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    own = pipe.scheduler
    try:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        expected = stock(pipe, generator=torch.Generator().manual_seed(0))
    finally:
        pipe.scheduler = own
    np.testing.assert_array_equal(ours(pipe, scheduler="euler", eager=True).frames, expected)
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"


def test_other_schedulers_take_their_own_steps(pipe: Any) -> None:
    from diffusers import DPMSolverMultistepScheduler

    own = pipe.scheduler
    try:
        pipe.scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        )
        expected = stock(pipe, generator=torch.Generator().manual_seed(0))
        got = ours(pipe)
    finally:
        pipe.scheduler = own
    assert got.stats["steps_by"] == "diffusers"
    assert psnr(got.frames, expected) > 60


def test_two_experts_switch_at_the_boundary() -> None:
    pipe = pipes.wan(boundary_ratio=0.9)
    expected = stock(pipe, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(ours(pipe, eager=True).frames, expected)
    pipe.transformer_2 = pipe.transformer
    assert psnr(ours(pipe, eager=True).frames, expected) < 60, "the second expert was never asked"


def test_ti2v_from_text_and_from_a_picture(tmp_path: Path) -> None:
    from diffusers import WanImageToVideoPipeline

    pipe = pipes.wan(expand_timesteps=True)
    expected = stock(pipe, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(ours(pipe, eager=True).frames, expected)
    assert psnr(ours(pipe).frames, expected) > 60
    image_pipe = WanImageToVideoPipeline(**{**pipe.components, "expand_timesteps": True})
    check_picture(image_pipe, tmp_path)


def check_picture(pipe: Any, folder: Path) -> None:
    # The I2V pipeline of diffusers 0.42 calls ftfy whether it is installed or not; ours does without.
    from diffusers.pipelines.wan import pipeline_wan_i2v

    pipeline_wan_i2v.__dict__.setdefault("ftfy", SimpleNamespace(fix_text=str))
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8))
    expected = stock(pipe, image=picture, generator=torch.Generator().manual_seed(0))
    picture.save(folder / "first.png")
    got = ours(pipe, image=str(folder / "first.png"), eager=True)
    np.testing.assert_array_equal(got.frames, expected)
    assert got.stats["image"] == "first.png"


def test_image_to_video_with_and_without_picture_embedding(tmp_path: Path) -> None:
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    check_picture(WanImageToVideoPipeline(**pipes.components(in_channels=12, out_channels=4)), tmp_path)
    vision = CLIPVisionConfig(
        hidden_size=8, projection_dim=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, intermediate_size=8,
        patch_size=8,
    )  # fmt: skip
    parts = pipes.components(in_channels=12, out_channels=4, image_dim=8, added_kv_proj_dim=32)
    check_picture(
        WanImageToVideoPipeline(
            **parts,
            image_encoder=CLIPVisionModel(vision).eval(),
            image_processor=CLIPImageProcessor(crop_size=32, size=32),
        ),
        tmp_path,
    )


def test_given_latents_are_the_noise(pipe: Any) -> None:
    latents = noise(pipe, 3)
    expected = stock(pipe, latents=latents)
    np.testing.assert_array_equal(ours(pipe, latents=latents, eager=True).frames, expected)


def test_same_seed_same_frames_and_another_seed_another_film(pipe: Any) -> None:
    a, b, c = (ours(pipe, seed=seed).frames for seed in (5, 5, 6))
    np.testing.assert_array_equal(a, b)
    assert psnr(a, c) < 40


def test_callback_sees_every_step_and_may_interrupt(pipe: Any) -> None:
    seen = []

    def stop(index: int, total: int, latents: torch.Tensor) -> None:
        seen.append((index, total, tuple(latents.shape)))
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="denoise; nothing was written"):
        ours(pipe, callback=stop)
    assert seen == [(0, 4, (1, 4, 2, 4, 6)), (1, 4, (1, 4, 2, 4, 6))]
    assert not is_accelerated(pipe)


def test_uint8_frames_are_the_rounded_floats(pipe: Any) -> None:
    exact, rounded = ours(pipe).frames, sample(PROMPT, model=pipe, **SIZE).frames
    assert rounded.dtype == np.uint8 and rounded.shape == (5, 32, 48, 3)
    np.testing.assert_array_equal(rounded, np.round(exact * 255).astype(np.uint8))


def test_frames_are_decoded_as_the_vae_and_the_ops_say(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed: list[Any] = []
    real = loop.decode_stream
    monkeypatch.setattr(loop, "decode_stream", lambda *a, **k: streamed.append(k["dtype"]) or real(*a, **k))
    expected = ours(pipe, eager=True).frames
    assert psnr(ours(pipe, ops="rms_norm").frames, expected) > 60 and not streamed, "diffusers' decoder was kept"
    whole = ours(pipe).frames
    assert streamed == [None]
    sample(PROMPT, model=pipe, **SIZE)
    assert streamed == [None, torch.uint8]
    # Tiles that the pipeline's owner has asked for.
    pipe.vae.enable_tiling(24, 24, 16, 16)
    try:
        tiled, theirs = ours(pipe).frames, ours(pipe, eager=True).frames
    finally:
        pipe.vae.disable_tiling()
    assert psnr(tiled, theirs) > 60 > psnr(tiled, whole)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_frames_arrive_on_the_host_in_order(device: str) -> None:
    made: list[int] = []

    def pieces(dtype: torch.dtype) -> Any:
        for index, count in enumerate((1, 4, 0, 4)):
            made.append(index)
            frames = torch.arange(count * 24, device=device).reshape(1, 3, count, 2, 4) + index
            yield frames.to(dtype) if dtype == torch.uint8 else (frames / 50 - 1).to(dtype)

    for dtype in (torch.uint8, torch.bfloat16):
        made.clear()
        expected = torch.cat(list(pieces(dtype)), 2)[0].permute(1, 2, 3, 0).cpu()
        made.clear()
        arrived, ahead = [], []
        for frames in loop.arrive(pieces(dtype)):
            arrived.append(frames)
            ahead.append(len(made) - len(arrived))
        got = np.concatenate(arrived)
        if dtype == torch.uint8:
            np.testing.assert_array_equal(got, expected.numpy())
        else:
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, (expected.float() / 2 + 0.5).clamp(0, 1).numpy(), atol=1e-6)
        # On a GPU the next piece is under way before one is handed over.
        assert ahead == ([1, 1, 1, 0] if device == "cuda" else [0, 0, 0, 0])


def test_a_loaded_pipeline_keeps_its_own_placement(pipe: Any) -> None:
    for options in ({"dtype": "bf16"}, {"device": "cpu"}, {"offload": "model"}):
        with pytest.raises(UsageError, match="loaded already"):
            ours(pipe, **options)
    with pytest.raises(UsageError, match="no option 'stepps'"):
        ours(pipe, stepps=3)
    with pytest.raises(ModelError, match="got a object"):
        sample(PROMPT, model=object())


def test_an_accelerated_pipeline_is_used_as_it_is(pipe: Any) -> None:
    expected = ours(pipe).frames
    accelerate(pipe)
    try:
        np.testing.assert_array_equal(ours(pipe).frames, expected)
        assert is_accelerated(pipe), "it was accelerated before, so it stays so"
        with pytest.raises(UsageError, match="restore"):
            ours(pipe, eager=True)
        accelerate(pipe, attention={"window": (1, 2, 3), "dense_steps": 1})
        sparse = ours(pipe)
        assert sparse.stats["attention"] == {"window": [1, 2, 3], "dense_steps": 1}
        assert np.abs(sparse.frames - expected).max() > 1e-3
    finally:
        restore(pipe)
    assert ours(pipe, attention="top_k=1.0,dense_layers=1").stats["attention"] == {
        "top_k": 1.0, "tile": [4, 4, 4], "dense_layers": 1,
    }  # fmt: skip
