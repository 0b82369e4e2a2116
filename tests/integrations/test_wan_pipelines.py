"""Whole pipelines: what is swapped in them, that they give the stock film, and that copies and files are right."""

import copy

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)

import pyvideo_kernels as pv
from pyvideo_kernels.errors import ModelError
from pyvideo_kernels.integrations import swap

from .helpers import WAN_OPS, Float64, assert_close, tiny, used


def vae():
    torch.manual_seed(3)
    return AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def pipeline(two=False, kind=WanPipeline, **config):
    config = {"in_channels": 16, "out_channels": 16, **config}
    components = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": vae(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "transformer": tiny(**config),
        "transformer_2": tiny(seed=9, **config) if two else None,
        "boundary_ratio": 0.9 if two else None,
    }
    if kind is WanImageToVideoPipeline:
        components |= {"image_processor": None, "image_encoder": None}
    pipe = kind(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def film(pipe, output_type="pt", dtype=torch.float32, **options):
    g = torch.Generator().manual_seed(4)
    embeds = [torch.randn(1, 6, 16, generator=g).to(dtype) for _ in range(2)]
    latents = torch.randn(1, 16, 2, 4, 4, generator=g).to(dtype)
    return pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        latents=latents,
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type=output_type,
        **options,
    ).frames


def film_in_float64(pipe, **options):
    """The stock film in float64; the pipeline's own casts to fp32 between steps are part of every run."""
    pipe = copy.deepcopy(pipe)
    for component in (pipe.transformer, pipe.transformer_2, pipe.vae):
        if component is not None:
            component.double()
    with Float64():
        return film(pipe, **options)


def same_film(frames, eager):
    """What is seen: 8-bit frames, equal but for a value on the edge of a step."""
    levels = [(255 * each).round().to(torch.int16) for each in (frames, eager)]
    assert levels[0].shape == levels[1].shape and levels[1].float().std() > 5
    assert int((levels[0] - levels[1]).abs().max()) <= 1


@pytest.mark.parametrize("two", [False, True])
def test_a_pipeline_gives_the_stock_film(two):
    pipe = pipeline(two)
    eager = film(pipe)
    report = pv.accelerate(pipe)
    same_film(film(pipe), eager)
    assert WAN_OPS <= used(report)
    modules = report.to_dict()["modules"]
    assert {"rms_norm_silu", "causal_conv3d"} <= {op for row in modules.values() for op in row["runs"]}
    names = {name.partition(".")[0] for name in modules}
    assert names == {"transformer", "vae"} | ({"transformer_2"} if two else set())
    if two:  # each expert ran a step
        assert sum(report.calls()["final_layer"].values()) == 4
        assert "transformer_2.blocks.*.norm1 (2)" in str(report)
    pv.restore(pipe)
    assert not any(list(swap.swapped(c)) for c in (pipe.transformer, pipe.transformer_2, pipe.vae) if c is not None)
    assert torch.equal(film(pipe), eager)


@pytest.mark.parametrize("two", [False, True])
def test_its_latents_are_held_against_float64(two):
    """The transformer's own error through two guided steps; the decoder has its own test."""
    pipe = pipeline(two)
    eager, ref64 = film(pipe, output_type="latent"), film_in_float64(pipe, output_type="latent").double()
    pv.accelerate(pipe, attention="dense")
    assert_close(film(pipe, output_type="latent"), ref64, eager)


def test_image_to_video():
    pipe = pipeline(kind=WanImageToVideoPipeline, in_channels=36, image_dim=8, added_kv_proj_dim=32)
    image = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    g = torch.Generator().manual_seed(6)
    embeds = [torch.randn(1, 512, 16, generator=g) for _ in range(2)]
    seen = torch.randn(1, 5, 8, generator=g)
    pipe.encode_image = lambda *args, **kwargs: seen  # in place of a CLIP model

    def run():
        latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(7))
        return pipe(
            image=image,
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            latents=latents,
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(8),
            output_type="pt",
        ).frames

    eager = run()
    report = pv.accelerate(pipe)
    same_film(run(), eager)
    assert WAN_OPS <= used(report) and not report.fallbacks()


def test_save_load_and_deepcopy(tmp_path):
    pipe = pipeline()
    report = pv.accelerate(pipe)
    expected = film(pipe)
    twin = copy.deepcopy(pipe)
    pipe.save_pretrained(tmp_path)
    assert "pyvideo" not in (tmp_path / "model_index.json").read_text()
    loaded = WanPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    loaded.set_progress_bar_config(disable=True)
    assert not list(swap.swapped(loaded.transformer))
    for parameter in [*pipe.transformer.parameters(), *pipe.vae.parameters()]:
        parameter.data.zero_()
    assert torch.equal(film(twin), expected)
    again = pv.accelerate(loaded)
    same_film(film(loaded), expected)
    assert report.to_dict()["modules"] == again.to_dict()["modules"]


@pytest.mark.parametrize("first", ["offload", "accelerate"])
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_the_pipelines_own_offloading(kind, first):
    """With the CPU as the device to compute on; sequential offloading keeps every leaf on the meta device."""
    pipe = pipeline()
    eager = film(pipe)

    def offload():
        if kind == "model":
            pipe.enable_model_cpu_offload(device="cpu")
        else:
            import accelerate

            # What enable_sequential_cpu_offload does, which insists on a device index that a CPU has not.
            for component in (pipe.transformer, pipe.vae):
                accelerate.cpu_offload(component, "cpu", offload_buffers=True)

    steps = [offload, lambda: pv.accelerate(pipe)]
    for step in steps if first == "offload" else reversed(steps):
        step()
    report = pv.accelerate(pipe)
    same_film(film(pipe), eager)
    assert WAN_OPS <= used(report)
    if kind == "sequential":
        assert pipe.transformer.blocks[0].norm2.weight.device.type == "meta"


def test_a_part_that_is_no_wan_model_is_refused():
    pipe = pipeline()
    pipe.register_modules(vae=torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="`vae` must be one of"):
        pv.accelerate(pipe)
    assert not list(swap.swapped(pipe.transformer))


def test_the_scheduler_is_left_alone():
    pipe = pipeline()
    before = dict(pipe.scheduler.__dict__)
    report = pv.accelerate(pipe)
    assert "sampling loop" in report.to_dict()["kept"]["scheduler"]
    assert pipe.scheduler.__dict__ == before and type(pipe.scheduler) is UniPCMultistepScheduler
