"""The embedded pipeline directory: small, safe to load, and it does what its sentence says."""

import json
import shutil

import pytest
import torch

from pyvideo_kernels import tiny
from pyvideo_kernels.tiny.checker import Reading, read
from pyvideo_kernels.tiny.evaluate import GATE, choose_scenes, main, passes, score
from pyvideo_kernels.tiny.grammar import parse

pytest.importorskip("diffusers", reason="the sampler extra is not installed")

EXAMPLE = "a red ball moves left on a black background"


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(tiny.MODEL_DIR, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_directory_is_small_and_holds_nothing_but_safetensors_and_text():
    files = [path for path in tiny.MODEL_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


def test_it_is_a_stock_pipeline(pipeline):
    names = {name: type(part).__name__ for name, part in pipeline.components.items() if part is not None}
    assert names["transformer"] == "WanTransformer3DModel" and names["vae"] == "AutoencoderKLWan"
    assert names["text_encoder"] == "UMT5EncoderModel"
    assert pipeline.vae_scale_factor_spatial == 8 and pipeline.vae_scale_factor_temporal == 4
    index = json.loads((tiny.MODEL_DIR / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline" and "_name_or_path" not in index


def test_a_copy_has_the_same_defaults_as_the_embedded_model(tmp_path):
    from pyvideo_kernels.sampler.modeldir import read_model
    from pyvideo_kernels.sampler.models import KNOWN
    from pyvideo_kernels.tiny.build import DEFAULTS

    assert json.loads((tiny.MODEL_DIR / "pyvideo.json").read_text()) == DEFAULTS
    copy = shutil.copytree(tiny.MODEL_DIR, tmp_path / "copy")
    assert read_model(copy, str(copy)).defaults == KNOWN["tiny"].defaults


def test_the_shipped_latent_space_is_the_models(pipeline):
    from pyvideo_kernels.tiny.latents import SHIPPED, LatentSpace

    space, config = LatentSpace.load(SHIPPED), pipeline.vae.config
    assert space.z_dim == config.z_dim == pipeline.transformer.config.in_channels
    torch.testing.assert_close(space.latents_mean, torch.tensor(config.latents_mean))
    torch.testing.assert_close(space.latents_std, torch.tensor(config.latents_std))


def test_the_example_sentence_makes_its_clip(pipeline):
    frames = pipeline(
        EXAMPLE,
        height=tiny.HEIGHT,
        width=tiny.WIDTH,
        num_frames=tiny.FRAMES,
        num_inference_steps=tiny.STEPS,
        guidance_scale=tiny.GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
    assert frames.shape == (17, 64, 64, 3)
    reading, scene = read(frames), parse(EXAMPLE)
    assert all(reading.agrees(scene).values()), reading


def test_the_autoencoder_codes_what_it_decodes(pipeline):
    """Encoder and decoder were trained apart, each against the code: together they must give a clip back."""
    from pyvideo_kernels.tiny.clips import draw_scenes, render

    generator = torch.Generator().manual_seed(5)
    video = render(draw_scenes(2, generator), generator).video()
    with torch.no_grad():
        code = pipeline.vae.encode(video).latent_dist
        back = pipeline.vae.decode(code.mode()).sample
    assert code.mean.shape == (2, 12, 5, 8, 8) and code.std.max() < 0.1
    assert 10 * torch.log10(4 / (back - video).square().mean()) > 22


def test_the_published_evaluation_passed_its_gate():
    result = json.loads((tiny.MODEL_DIR / "evaluation.json").read_text())
    assert result["all"]["prompts"] >= 100 and result["held_out"]["prompts"] >= 30
    assert result["passed"] and passes(result) and result["gate"] == GATE
    assert result["settings"]["steps"] == tiny.STEPS and result["settings"]["guidance"] == tiny.GUIDANCE_SCALE


def test_the_evaluation_counts_right_and_wrong():
    scenes = choose_scenes(9, 0)
    assert sum(scene.held_out for scene in scenes) == 3 and scenes == choose_scenes(9, 0) != choose_scenes(9, 1)
    right = [Reading(s.color, s.shape, s.motion, s.background, s.size) for s in scenes]
    assert passes(score(scenes, right)) and score(scenes, right)["all"]["everything"] == 1
    wrong = [Reading(None, r.shape, r.motion, r.background, r.size) for r in right]
    result = score(scenes, wrong)
    assert result["all"]["color"] == 0 and result["all"]["shape"] == 1 and not passes(result)


def test_the_evaluation_script_writes_its_result(tmp_path, capsys):
    target = tmp_path / "result.json"
    main(["--prompts", "2", "--batch", "2", "--steps", "2", "--threads", "1", "--json", str(target)])
    result = json.loads(target.read_text())
    assert result == json.loads(capsys.readouterr().out) and result["all"]["prompts"] == 2
