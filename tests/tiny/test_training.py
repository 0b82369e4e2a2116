"""The training scripts: they resume exactly, and the run they leave builds a pipeline."""

import json

import pytest
import torch

pytest.importorskip("diffusers", reason="the sampler extra is not installed")
pytest.importorskip("transformers", reason="the sampler extra is not installed")

from pyvideo_kernels.tiny import train_dit, train_vae
from pyvideo_kernels.tiny.architecture import MAX_PROMPT_TOKENS, build_tokenizer
from pyvideo_kernels.tiny.clips import draw_scenes, render
from pyvideo_kernels.tiny.grammar import all_scenes
from pyvideo_kernels.tiny.latents import LatentSpace


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    LatentSpace.fit(12, clips=100).save(folder / "latent_space.safetensors")
    return folder


def _weights(run, name):
    return torch.load(run / name / "checkpoint.pt", weights_only=True)


def _same(first, second):
    return all(torch.equal(first["average"][k], second["average"][k]) for k in first["average"])


def test_the_transformer_resumes_where_it_stopped(run):
    common = ["--run", str(run), "--batch", "2", "--layers", "1", "--heads", "2", "--threads", "1", "--warmup", "1"]
    train_dit.main([*common, "--name", "whole", "--steps", "4"])
    train_dit.main([*common, "--name", "parts", "--steps", "2"])
    half = _weights(run, "parts")
    train_dit.main([*common, "--name", "parts", "--steps", "4"])
    whole, parts = _weights(run, "whole"), _weights(run, "parts")
    assert whole["step"] == parts["step"] == 4 and half["step"] == 2
    assert _same(whole, parts) and not _same(whole, half)


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_the_autoencoder_resumes_where_it_stopped(run, part, tmp_path):
    common = [part, "--batch", "1", "--latents", "2", "--cells", "2", "--threads", "1", "--warmup", "1"]
    for name, stops in {"whole": ["2"], "parts": ["1", "2"]}.items():
        (tmp_path / name).mkdir()
        (run / "latent_space.safetensors").replace(tmp_path / name / "latent_space.safetensors")
        for stop in stops:
            train_vae.main([*common, "--run", str(tmp_path / name), "--steps", stop])
        (tmp_path / name / "latent_space.safetensors").replace(run / "latent_space.safetensors")
    assert _same(_weights(tmp_path / "whole", part), _weights(tmp_path / "parts", part))


def test_one_weighted_padding_key_equals_the_pipelines_padding(run):
    """Training attends to one padding key instead of some five hundred: the velocity must not change."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = train_dit.TextToLatent(len(tokenizer), num_layers=2, num_attention_heads=2).eval()
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    prompts = ["a red ball moves left on a black background", ""]
    short = tokenizer(prompts, padding="max_length", max_length=MAX_PROMPT_TOKENS, return_tensors="pt")
    noisy, sigma = torch.randn(2, 12, 2, 4, 4), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        ours = model(noisy, sigma, short.input_ids, short.attention_mask)
        text = model.text_encoder(short.input_ids, short.attention_mask).last_hidden_state
        padded = torch.zeros(2, 512, text.shape[-1])
        padded[:, :MAX_PROMPT_TOKENS] = text * short.attention_mask[..., None]
        _stock_attention(model.transformer)
        stock = model.transformer(noisy, sigma * 1000, padded, return_dict=False)[0]
    assert (ours - stock).abs().max() < 1e-4 * stock.abs().max()


def _stock_attention(transformer):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    for block in transformer.blocks:
        block.attn1.set_processor(WanAttnProcessor())
        block.attn2.set_processor(WanAttnProcessor())


def test_the_tokenizer_knows_the_grammar_and_survives_everything_else():
    tokenizer = build_tokenizer()
    for scene in list(all_scenes())[::97]:
        ids = tokenizer(scene.prompt).input_ids
        assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
        assert len(ids) <= MAX_PROMPT_TOKENS
    assert tokenizer("A RED ball, moves left!").input_ids == tokenizer("a red ball moves left").input_ids
    assert tokenizer.unk_token_id in tokenizer("ein Zebra \U0001f993 fliegt").input_ids
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


def test_latents_are_normalised_and_give_the_clip_back(run):
    space = LatentSpace.load(run / "latent_space.safetensors")
    generator = torch.Generator().manual_seed(3)
    clips = render(draw_scenes(64, generator), generator)
    z = space.encode(clips)
    assert z.shape == (64, 12, 5, 8, 8)
    assert (z.std((0, 2, 3, 4)) - 1).abs().max() < 0.25 and z.mean((0, 2, 3, 4)).abs().max() < 0.25
    error = (space.draft(z) - clips.video()).square().mean()
    assert 10 * torch.log10(4 / error) > 25


def test_a_run_keeps_a_log(run):
    common = ["--run", str(run), "--name", "logged", "--batch", "1", "--layers", "1", "--heads", "2"]
    train_dit.main([*common, "--threads", "1", "--steps", "50"])
    rows = [json.loads(line) for line in (run / "logged" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50] and rows[0]["loss"] > 0
