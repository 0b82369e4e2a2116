"""Architectures at true size, small random models of every family, and loading of real weights."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="video models are diffusers pipelines")

from pyvideo_kernels.benchmarks import models
from pyvideo_kernels.benchmarks.models.architecture import FOLDER
from pyvideo_kernels.benchmarks.models.families import FAMILIES
from pyvideo_kernels.benchmarks.models.random_weights import fill, skeleton, weight_bytes
from pyvideo_kernels.errors import ModelError, UsageError, ValueOptionError
from pyvideo_kernels.sampler import loading
from pyvideo_kernels.sampler.problems import OutOfMemoryError
from tests.sampler import pipes

CPU = torch.device("cpu")
TINY = {family: f"tiny-random-{family}" for family in FAMILIES}
BIG = [name for name in models.ARCHITECTURES if name not in TINY.values()]

# Billions of parameters as their authors state them, and the VAE's millions; heads, head_dim, layers.
PUBLISHED = {
    "wan2.1-1.3b": (1.42, 127, 12, 128, 30),
    "wan2.1-14b": (14.3, 127, 40, 128, 40),
    "wan2.2-5b": (5.0, 705, 24, 128, 30),
    "hunyuanvideo": (12.8, 246, 24, 128, 20),
    "ltx": (1.92, 419, 32, 64, 28),
    "ltx-0.9.5": (1.92, 1247, 32, 64, 28),
    "cogvideox-2b": (1.69, 216, 30, 64, 30),
    "cogvideox-5b": (5.57, 216, 48, 64, 42),
}


@pytest.fixture(scope="module")
def built() -> dict[str, tuple[Any, models.Clip]]:
    """A float32 pipeline and its clip for every family, made once; nothing may change them."""
    out = {}
    for family, name in TINY.items():
        arch = models.architecture(name)
        out[family] = models.random_pipeline(arch, dtype=torch.float32, device="cpu"), arch.clip()
    return out


def denoise(pipe: Any, clip: models.Clip, **changes: Any) -> Any:
    inputs = models.prompt_inputs(pipe, clip.arch) | models.call_options(clip, steps=2) | changes
    return pipe(**inputs, latents=models.initial_latents(pipe, clip))[0]


# Architectures -----------------------------------------------------------------------------------------------------


def test_every_file_is_an_architecture_and_lies_beside_its_module() -> None:
    assert FOLDER.parent == Path(models.__file__).resolve().parent
    assert set(PUBLISHED) == set(BIG) and set(models.ARCHITECTURES) == set(BIG) | set(TINY.values())
    for name in models.ARCHITECTURES:
        data = json.loads((FOLDER / f"{name}.json").read_text())
        assert data["name"] == name and FAMILIES[data["family"]].pipeline == data["pipeline"]["class"]
        assert (data["source"] is None) == name.startswith("tiny-random-")


@pytest.mark.parametrize("name", BIG)
def test_a_cut_model_has_so_many_blocks_of_each_kind(name: str) -> None:
    arch = models.architecture(name)
    cut = arch.cut(1)
    before, after = arch.transformer.config, cut.transformer.config
    assert {key for key in after if after[key] != before[key]} == {
        key for key in ("num_layers", "num_single_layers") if key in before
    }
    assert cut.layers == 1 and cut.clip() == replace(arch.clip(), arch=cut) and not cut.parameters
    with pytest.raises(UsageError, match=f"--layers must be 1 to {arch.layers} for {name}"):
        arch.cut(arch.layers + 1)


@pytest.mark.parametrize("name", BIG)
def test_parameters_are_those_published(name: str) -> None:
    arch = models.architecture(name)
    modules = {"transformer": skeleton(arch.transformer), "vae": skeleton(arch.vae)}
    counts = {key: sum(p.numel() for p in module.parameters()) for key, module in modules.items()}
    assert all(p.is_meta for module in modules.values() for p in module.parameters())
    assert counts == arch.parameters
    billions, vae_millions, heads, head_dim, layers = PUBLISHED[name]
    assert counts["transformer"] == pytest.approx(billions * 1e9, rel=0.02)
    assert counts["vae"] == pytest.approx(vae_millions * 1e6, rel=0.02)
    config = arch.transformer.config
    assert (config["num_attention_heads"], config["attention_head_dim"], config["num_layers"]) == (
        heads, head_dim, layers,
    )  # fmt: skip
    # Nothing in the file that this diffusers does not know, and nothing left to its defaults.
    for part, module in ((arch.transformer, modules["transformer"]), (arch.vae, modules["vae"])):
        known = {key for key in module.config if not key.startswith("_")}
        assert known == set(part.config)


@pytest.mark.parametrize("name", BIG)
def test_the_page_says_the_same(name: str) -> None:
    arch, page = models.architecture(name), Path(__file__).parents[2] / "docs" / "benchmarks.md"
    (row,) = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")]
    vae_dtype = torch.float32 if arch.vae_dtype == "float32" else torch.bfloat16
    size = weight_bytes({"": skeleton(arch.transformer, torch.bfloat16), "vae": skeleton(arch.vae, vae_dtype)})
    clip, counts = arch.clip(), arch.parameters
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        f"`{name}`",
        str(arch.source),
        f"{counts['transformer'] / 1e9:.2f}",
        f"{counts['vae'] / 1e6:.0f}",
        f"{size / 1e9:.1f}",
        f"{clip.height}×{clip.width}×{clip.frames}",
        f"{clip.tokens:,}",
    ]


def test_tokens_of_the_clips_that_papers_name() -> None:
    wan = models.architecture("wan2.1-14b")
    assert models.num_tokens(wan, 480, 832, 81) == 32_760
    assert models.num_tokens(wan, 720, 1280, 81) == models.num_tokens(wan) == 75_600
    assert models.architecture("wan2.2-5b").clip().grid == (31, 22, 40)
    assert models.architecture("hunyuanvideo").clip().tokens == 33 * 45 * 80
    assert models.architecture("ltx").clip().latent == (21, 16, 22)
    assert models.architecture("cogvideox-5b").clip().tokens == 13 * 30 * 45


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("wan2.1-1.3b", (480, 832, 80), "--frames must be 4k + 1 for wan2.1-1.3b; got 80: use 77 or 81"),
        ("wan2.2-5b", (720, 1280, 81), "--height must be a multiple of 32 for wan2.2-5b; got 720: use 704 or 736"),
        ("hunyuanvideo", (720, 1288, 129), "--width must be a multiple of 16"),
        ("ltx", (512, 704, 165), "--frames must be 8k + 1 for ltx; got 165: use 161 or 169"),
        ("ltx", (16, 704, 161), "--height must be a multiple of 32 for ltx; got 16: use 32 or 64"),
        ("cogvideox-2b", (480, 728, 49), "--width must be a multiple of 16"),
        ("cogvideox-2b", (480, 720, 53), "--frames must be 8k + 1 for cogvideox-2b; got 53: use 49 or 57"),
        ("wan2.1-1.3b", (480, 832, -3), "--frames must be 4k + 1 for wan2.1-1.3b; got -3: use 1 or 5"),
    ],
)
def test_sizes_a_pipeline_would_round_are_refused(name: str, size: tuple[int, int, int], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        models.architecture(name).clip(*size)
    assert sentence in str(caught.value)


def test_unknown_names_are_answered_with_the_closest() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'wan2.1-14b'\?\): give one of cogvideox-2b"):
        models.architecture("wan21-14b")


# Random weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TINY)
def test_clips_of_every_family_without_a_text_encoder(
    family: str, dtype: torch.dtype, built: dict[str, tuple[Any, models.Clip]]
) -> None:
    pipe, clip = built[family]
    if dtype != torch.float32:
        pipe = models.random_pipeline(clip.arch, dtype=dtype, device="cpu")
    assert all(getattr(pipe, key, None) is None for key in ("text_encoder", "text_encoder_2", "tokenizer"))
    video = models.decode(pipe, denoise(pipe, clip), clip)
    assert video.shape == (1, 3, clip.frames, clip.height, clip.width) and video.dtype == torch.float32
    assert video.isfinite().all() and video.abs().max() <= 1
    # Neither flat nor clipped away, and something moves.
    assert 0.15 < video.std() < 0.7 and (video.abs() == 1).float().mean() < 0.15
    assert video.diff(dim=2).std() > 0.02


@pytest.mark.parametrize("family", TINY)
def test_decode_is_the_pipelines_own(family: str, built: dict[str, tuple[Any, models.Clip]]) -> None:
    pipe, clip = built[family]
    step = {"decode_timestep": 0.05, "decode_noise_scale": 0.025} if family == "ltx" else {}
    own = denoise(pipe, clip, output_type="pt", **step)
    ours = models.decode(pipe, denoise(pipe, clip), clip)
    assert torch.equal(own.transpose(1, 2), ours * 0.5 + 0.5)


VARIANTS = {
    "a time for every token": ("wan", {"pipeline_options": {"expand_timesteps": True}}, {}, {}),
    "embedded positions": ("cogvideox", {}, {"use_rotary_positional_embeddings": False}, {}),
    "patches of two frames": ("cogvideox", {}, {"patch_size_t": 2, "patch_bias": False}, {}),
    "a decoder that does not denoise": ("ltx", {}, {}, {"timestep_conditioning": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_families_decode_as_their_pipelines_do(variant: str) -> None:
    family, changes, transformer, vae = VARIANTS[variant]
    arch = models.architecture(TINY[family])
    arch = replace(
        arch,
        transformer=models.Part(arch.transformer.kind, {**arch.transformer.config, **transformer}),
        vae=models.Part(arch.vae.kind, {**arch.vae.config, **vae}),
        **changes,
    )
    pipe = models.random_pipeline(arch, dtype=torch.float32, device="cpu")
    latents = denoise(pipe, arch.clip())
    video = models.decode(pipe, latents, arch.clip())
    assert video.shape[2] == arch.defaults.frames and video.std() > 0.15
    assert torch.equal(denoise(pipe, arch.clip(), output_type="pt").transpose(1, 2), video * 0.5 + 0.5)


@pytest.mark.parametrize("name", BIG)
def test_pipelines_of_true_size_are_put_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "fill", lambda module, *_: module)  # parameters stay on the meta device
    monkeypatch.setattr(models, "check_fits", lambda *_: None)
    arch = models.architecture(name)
    pipe = models.random_pipeline(arch, dtype=torch.bfloat16, device="cpu")
    assert type(pipe).__name__ == arch.pipeline and type(pipe.scheduler).__name__ == arch.scheduler.kind
    assert {key: pipe.scheduler.config[key] for key in arch.scheduler.config} == arch.scheduler.config
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == (torch.float32 if name.startswith("wan") else torch.bfloat16)
    assert bool(getattr(pipe.config, "expand_timesteps", False)) == (name == "wan2.2-5b")
    geometry = arch.family.geometry(arch)
    if arch.family_name == "ltx":
        factors = pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio
    else:
        factors = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    assert factors == (geometry.spatial, geometry.temporal)
    latents, text = models.initial_latents(pipe, arch.clip()), models.prompt_inputs(pipe, arch)
    assert latents.numel() == arch.clip().tokens * math.prod(arch.clip().patch) * pipe.transformer.config.in_channels
    assert text["prompt_embeds"].shape == (1, arch.text.tokens, arch.text.width)
    assert arch.family.text_widths(arch.transformer.config) == (arch.text.width, arch.text.pooled_width)


@pytest.mark.parametrize("family", TINY)
def test_prompts_and_seeds_change_the_clip_and_repeat_it(
    family: str, built: dict[str, tuple[Any, models.Clip]]
) -> None:
    pipe, clip = built[family]
    first = denoise(pipe, clip)
    again = models.random_pipeline(clip.arch, dtype=torch.float32, device="cpu")
    assert torch.equal(denoise(again, clip), first)
    far = lambda other: float((other - first).norm() / first.norm()) > 0.01
    assert far(denoise(pipe, clip, **models.prompt_inputs(pipe, clip.arch, seed=1)))
    assert far(denoise(pipe, clip, guidance_scale=2.0))
    other = models.random_pipeline(clip.arch, dtype=torch.float32, device="cpu", seed=1)
    assert far(denoise(other, clip))
    assert not torch.equal(models.initial_latents(pipe, clip), models.initial_latents(pipe, clip, seed=1))


@pytest.mark.parametrize("family", TINY)
def test_two_prompts_at_once(family: str, built: dict[str, tuple[Any, models.Clip]]) -> None:
    pipe, clip = built[family]
    inputs = models.prompt_inputs(pipe, clip.arch, batch=2) | models.call_options(clip, steps=2)
    latents = pipe(**inputs, latents=models.initial_latents(pipe, clip, batch=2))[0]
    assert models.decode(pipe, latents, clip).shape[0] == 2


@pytest.mark.parametrize("family", TINY)
def test_dtypes_are_those_of_from_pretrained(family: str, tmp_path: Path) -> None:
    arch = models.architecture(TINY[family])
    pipe = models.random_pipeline(arch, dtype=torch.bfloat16, device="cpu")
    everything = lambda module: dict([*module.named_parameters(), *module.named_buffers()])
    for key in ("transformer", "vae"):
        module = getattr(pipe, key)
        module.save_pretrained(tmp_path / key)
        dtype = torch.float32 if key == "vae" and family == "wan" else torch.bfloat16
        with loading.quiet_libraries():
            loaded = type(module).from_pretrained(tmp_path / key, dtype=dtype)
        ours, theirs = everything(module), everything(loaded)
        assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert not module.training
    kept = {p.dtype for p in pipe.transformer.parameters()}
    assert kept == ({torch.float32, torch.bfloat16} if family == "wan" else {torch.bfloat16})


def test_dtypes_round_the_same_weights(built: dict[str, tuple[Any, models.Clip]]) -> None:
    pipe, clip = built["wan"]
    half = models.random_pipeline(clip.arch, dtype=torch.float16, device="cpu", vae_dtype=torch.bfloat16)
    assert half.vae.dtype == torch.bfloat16
    for (name, exact), rounded in zip(pipe.transformer.named_parameters(), half.transformer.parameters()):
        assert torch.equal(exact.to(rounded.dtype), rounded), name


@pytest.mark.parametrize("family", TINY)
def test_activations_stay_of_order_one_through_forty_layers(family: str) -> None:
    arch = models.architecture(TINY[family])
    deep = dict(arch.transformer.config) | {"num_layers": 40, "num_attention_heads": 4}
    if family == "ltx":
        deep["cross_attention_dim"] = 64
    if family == "hunyuanvideo":
        deep |= {"num_layers": 20, "num_single_layers": 40}
    module = fill(skeleton(models.Part(arch.transformer.kind, deep)), "transformer", CPU, seed=0)
    spread: list[float] = []
    blocks = [m for m in module.modules() if type(m).__name__.endswith("Block") and "Refiner" not in type(m).__name__]
    for block in blocks:
        block.register_forward_hook(
            lambda _m, _i, out: spread.append(float((out[0] if isinstance(out, tuple) else out).std()))
        )
    pipe = models.random_pipeline(arch, dtype=torch.float32, device="cpu")
    pipe.transformer = module
    latents = denoise(pipe, arch.clip(), guidance_scale=1.0)
    assert len(spread) >= 2 * 40 and 0.3 < min(spread) and max(spread) < 6
    assert 0.2 < (latents - models.initial_latents(pipe, arch.clip())).std() < 6


def test_attention_looks_somewhere(built: dict[str, tuple[Any, models.Clip]]) -> None:
    """Scores of a fresh model spread too little: a softmax over thousands of them would average the video away."""
    pipe, _ = built["wan"]
    attention = pipe.transformer.blocks[0].attn1
    x = torch.randn(1, 512, attention.norm_q.weight.numel(), generator=torch.Generator().manual_seed(0))
    q, k = attention.norm_q(attention.to_q(x)), attention.norm_k(attention.to_k(x))
    scores = torch.einsum("bihd,bjhd->bhij", *(t.unflatten(-1, (attention.heads, -1)) for t in (q, k)))
    assert 2 < (scores / scores.new_tensor(q.shape[-1] / attention.heads).sqrt()).std() < 4


def test_weights_that_do_not_fit_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "fill", lambda *a, **k: pytest.fail("weights were made"))
    monkeypatch.setattr(loading, "host_memory", lambda: int(20e9))
    arch = models.architecture("wan2.1-14b")
    with pytest.raises(OutOfMemoryError, match=r"wan2.1-14b needs 57.7 GB .* cpu has 20 GB free: use --dtype bf16 or "):
        models.random_pipeline(arch, dtype=torch.float32, device="cpu")
    monkeypatch.setattr(loading, "pick_device", lambda name: torch.device(name, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(25e9), int(80e9)))
    with pytest.raises(OutOfMemoryError, match=r"needs 29.1 GB for its weights and cuda:0 has 25 GB free: use a small"):
        models.random_pipeline(arch, dtype=torch.bfloat16, device="cuda")


def test_running_out_of_memory_all_the_same_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(models, "fill", full)
    with pytest.raises(OutOfMemoryError, match="cpu ran out of memory for the weights of tiny-random-wan: stop what"):
        models.random_pipeline(models.architecture("tiny-random-wan"), dtype=torch.float32, device="cpu")


def test_bytes_of_weights_count_what_stays_in_float32() -> None:
    arch = models.architecture("wan2.1-14b")
    half, full = (weight_bytes({"": skeleton(arch.transformer, t)}) for t in (torch.bfloat16, torch.float32))
    assert full == 4 * arch.parameters["transformer"]
    assert 2 * arch.parameters["transformer"] < half < 2.01 * arch.parameters["transformer"]


def test_wrong_requests_name_the_argument() -> None:
    arch = models.architecture("tiny-random-wan")
    with pytest.raises(ValueOptionError, match=r"random_pipeline: `dtype` must be .* got torch.float64"):
        models.random_pipeline(arch, dtype=torch.float64, device="cpu")
    with pytest.raises(ValueOptionError, match=r"`vae_dtype` must be"):
        models.random_pipeline(arch, dtype=torch.float32, device="cpu", vae_dtype=torch.int8)
    pipe = models.random_pipeline(arch, dtype=torch.float32, device="cpu")
    with pytest.raises(UsageError, match="tiny-random-wan has no text encoder"):
        models.encode_prompt(pipe, arch, "a red ball")
    # One step would be NaN.
    with pytest.raises(UsageError, match="--steps must be at least 2 for ltx; got 1"):
        models.call_options(models.architecture("ltx").clip(), steps=1)
    with pytest.raises(UsageError, match="--steps must be at least 1 for wan2.1-1.3b; got 0"):
        models.call_options(models.architecture("wan2.1-1.3b").clip(), steps=0)


# Real weights ------------------------------------------------------------------------------------------------------


def save(family: str, pipe: Any, path: Path) -> Path:
    """``pipe`` with small text encoders, as its authors would publish it."""
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, T5Config, T5EncoderModel

    words = pipes.tokenizer()
    small = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    if family == "hunyuanvideo":
        text = {
            "tokenizer": words,
            "text_encoder": LlamaModel(LlamaConfig(**small, num_hidden_layers=3)),
            "tokenizer_2": pipes.tokenizer(),
            "text_encoder_2": CLIPTextModel(
                CLIPTextConfig(**small | {"hidden_size": 8}, num_hidden_layers=1, pad_token_id=0, eos_token_id=1)
            ),
        }
    else:
        t5 = T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        text = {"tokenizer": words, "text_encoder": T5EncoderModel(t5)}
    with loading.quiet_libraries():
        type(pipe)(transformer=pipe.transformer, vae=pipe.vae, scheduler=pipe.scheduler, **text).save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["hunyuanvideo", "ltx", "cogvideox"])
def test_directories_of_other_families_are_loaded(
    family: str, built: dict[str, tuple[Any, models.Clip]], tmp_path: Path
) -> None:
    original, clip = built[family]
    path = save(family, original, tmp_path / "model")
    pipe, arch = models.load_pipeline(str(path), dtype=torch.bfloat16, device="cpu")
    assert arch.name == "model" and arch.family is clip.arch.family
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    assert arch.transformer.config["num_layers"] == 2
    assert (arch.text.width, arch.text.pooled_width) == (clip.arch.text.width, clip.arch.text.pooled_width)
    prompt = models.encode_prompt(pipe, arch, "a red ball moves left")
    assert set(prompt) == set(models.prompt_inputs(pipe, arch))
    models.drop_text_encoders(pipe)
    assert pipe.text_encoder is None and getattr(pipe, "text_encoder_2", None) is None
    size = arch.clip(clip.height, clip.width, clip.frames)
    latents = pipe(**prompt, **models.call_options(size, steps=2), latents=models.initial_latents(pipe, size))[0]
    assert models.decode(pipe, latents, size).isfinite().all()


def test_tiny_is_loaded_with_its_own_defaults() -> None:
    pipe, arch = models.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    assert (arch.name, arch.family_name, arch.defaults.frames, arch.defaults.steps) == ("tiny", "wan", 17, 8)
    assert pipe.transformer.config.num_layers == arch.transformer.config["num_layers"]
    for key in ("transformer", "vae", "text_encoder"):
        assert sum(p.numel() for p in getattr(pipe, key).parameters()) == arch.parameters[key]
    prompt = models.encode_prompt(pipe, arch, "a red ball moves left on a black background")
    assert prompt["prompt_embeds"].shape == (1, arch.text.tokens, arch.text.width)


def test_what_cannot_be_loaded_is_said_before_any_weight_is_read(
    built: dict[str, tuple[Any, models.Clip]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    load = lambda name: models.load_pipeline(str(name), dtype=torch.float32, device="cpu")
    with pytest.raises(ModelError, match="tiny-random-ltx has no weights anywhere.*--random-weights"):
        load("tiny-random-ltx")
    with pytest.raises(ModelError, match="there is no such directory"):
        load("./nothing-here")
    path = save("ltx", built["ltx"][0], tmp_path / "model")
    monkeypatch.setattr(loading, "host_memory", lambda: 1000)
    with pytest.raises(
        OutOfMemoryError,
        match="model needs 0.00.* GB for its weights and cpu has 1e-06 GB free: use --dtype bf16 or a smaller",
    ):
        load(path)
    weights = path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match="holds only diffusion_pytorch_model.bin, which may run code"):
        load(path)
    config = path / "transformer" / "config.json"
    weights.with_suffix(".bin").rename(weights)
    config.write_text(config.read_text().replace("LTXVideoTransformer3DModel", "WanTransformer3DModel"))
    with pytest.raises(ModelError, match="transformer is a WanTransformer3DModel; a LTXPipeline has a LTXVideoTr"):
        load(path)
    index = path / "model_index.json"
    index.write_text(index.read_text().replace("LTXPipeline", "StableDiffusionPipeline"))
    with pytest.raises(ModelError, match="holds a StableDiffusionPipeline; what runs here is WanPipeline, Hunyuan"):
        load(path)
