"""Options, run.yaml, prompts.jsonl, models and plans: everything that needs no torch."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from pyvideo_kernels.error_types import ModelError, UsageError
from pyvideo_kernels.sampler import models
from pyvideo_kernels.sampler.modeldir import Model, read_model
from pyvideo_kernels.sampler.models import KNOWN, Defaults, resolve
from pyvideo_kernels.sampler.plan import make_plan, transformer_tflop
from pyvideo_kernels.sampler.settings import PER_LINE, Settings, lora_file, read_config, read_prompts

WAN_13B = {
    "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "patch_size": [1, 2, 2],
    "in_channels": 16, "out_channels": 16, "rope_max_seq_len": 1024,
}  # fmt: skip
UNIPC = {"_class_name": "UniPCMultistepScheduler"}


def model(**options: Any) -> Model:
    return Model(**({"name": "m", "pipeline": "WanPipeline", "transformer": WAN_13B, "vae": {}, "scheduler": UNIPC}
                    | options))  # fmt: skip


def plan(options: dict[str, Any] | None = None, m: Model | None = None, **more: Any) -> Any:
    return make_plan(Settings(prompt="x", **(options or {})), m or model(), **more)


def test_plan_of_the_published_model_has_the_published_tokens() -> None:
    p = plan()
    assert (p.width, p.height, p.frames, p.steps, p.guidance, p.scheduler) == (832, 480, 81, 50, 5.0, "unipc")
    assert p.grid == (21, 30, 52) and p.tokens == 32_760
    assert plan({"height": 720, "width": 1280}).tokens == 75_600
    # 4·S²·D of attention and the projections, by hand for one layer.
    s, d, f = 32_760, 1536, 8960
    layer = 2 * s * (6 * d * d + 2 * d * f) + 4 * 512 * d * d + 4 * s * s * d + 4 * s * 512 * d
    ends = 2 * s * d * 4 * 32
    assert transformer_tflop(WAN_13B, s) == pytest.approx((30 * layer + ends) / 1e12)
    # 281 TFLOP of decoding, counted on the real decoder.
    assert p.tflop - 100 * transformer_tflop(WAN_13B, s) == pytest.approx(281, rel=0.01)
    line = p.line("bf16", "cuda:0", "13 ops: 13 triton")
    for part in ("m: 832×480", "81 frames at 16 fps", "32,760 tokens", "PFLOP", "bf16 on cuda:0", "50 steps of unipc",
                 "guidance 5", "13 triton"):  # fmt: skip
        assert part in line


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({"height": 100}, ["multiples of 16", "height 100", "--height 96 or 112"]),
        ({"height": 5}, ["--height 16"]),
        ({"height": 490, "width": 840}, ["--height 496 or 480", "--width 832 or 848"]),
        ({"frames": 16}, ["4k + 1", "got 16", "17 or 13"]),
        ({"frames": 80}, ["81 or 77"]),
        ({"frames": 2}, ["1 or 5"]),
        ({"frames": 4 * 1024 + 1}, ["--frames", "at most 4093"]),
        ({"height": 32768}, ["--height", "at most 16384"]),
        ({"image": "x.png"}, ["text alone", "pyvideo models"]),
    ],
)
def test_sizes_that_cannot_be_name_the_nearest_that_can(options: dict[str, Any], wanted: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        plan(options)
    for text in wanted:
        assert text in str(error.value)


def test_defaults_multiples_and_pictures_follow_the_model() -> None:
    five_b = model(vae={"scale_factor_spatial": 16, "patch_size": 2}, expand_timesteps=True)
    with pytest.raises(UsageError, match="multiples of 32"):
        plan({"height": 720, "width": 1280}, five_b)
    assert plan({"height": 704, "width": 1280}, five_b).tokens == 21 * 22 * 40
    i2v = model(pipeline="WanImageToVideoPipeline")
    with pytest.raises(UsageError, match="starts from a picture: add --image"):
        plan({}, i2v)
    tall = plan({"image": "x.png"}, i2v, image_size=(300, 600))
    assert (tall.height % 16, tall.width % 16) == (0, 0)
    assert tall.height / tall.width == pytest.approx(2, rel=0.05)
    assert tall.height * tall.width == pytest.approx(480 * 832, rel=0.05)
    two = model(defaults=Defaults(guidance=4.0, guidance_2=3.0), boundary_ratio=0.9)
    assert plan({}, two).guidance_2 == 3.0 and plan({"guidance": 6.0}, two).guidance_2 is None
    assert not plan({"guidance": 1.0}).guided


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"steps": 0}, "--steps must be at least 1; got 0"),
        ({"height": "64"}, "--height must be of type int; got '64'"),
        ({"seed": True}, "--seed must be of type int; got True"),
        ({"seed": None}, "--seed must be of type int; got None"),
        ({"prompt": 3}, "--prompt must be of type str; got 3"),
        ({"frames": -3}, "--frames"),
        ({"fps": 0.0}, "--fps"),
        ({"guidance": float("nan")}, "--guidance"),
        ({"seed": -1}, "--seed"),
        ({"scheduler": "unipcm"}, "did you mean 'unipc'"),
        ({"dtype": "bf17"}, "did you mean 'bf16'"),
        ({"offload": "all"}, "none, model, group"),
        ({"impl": "trition"}, "did you mean 'triton'"),
        ({"device": "gpu"}, "auto, cpu, cuda or cuda:N"),
        ({"device": "cpu:1"}, "auto, cpu, cuda or cuda:N"),
        ({"upscale": 99}, "--upscale"),
        ({"eager": True, "impl": "triton"}, "--eager"),
        ({"image": "/no/such.png"}, "is not a file"),
        ({"lora": "x.bin"}, "only safetensors is ever loaded"),
        ({"lora": "missing.safetensors:0.5"}, "does not exist"),
    ],
)
def test_each_option_is_checked_by_name(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UsageError, match=wanted.replace("(", r"\(")):
        Settings(**({"prompt": "x"} | options)).check()


def test_lora_takes_a_scale(tmp_path: Path) -> None:
    file = tmp_path / "a:b.safetensors"
    file.touch()
    assert lora_file(str(file)) == (file, 1.0)
    assert lora_file(f"{file}:0.5") == (file, 0.5)
    assert lora_file(f"{file}:-2") == (file, -2.0)
    with pytest.raises(UsageError):
        lora_file(f"{file}:much")


def test_config_keys_are_option_names(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("prompt: a ball\nheight: 64\nguidance: 4\neager: true\nstats: s.json\nimage: null\n")
    assert read_config(file) == {
        "prompt": "a ball", "height": 64, "guidance": 4.0, "eager": True, "stats": "s.json", "image": None,
    }  # fmt: skip
    for text, wanted in (
        ("heigth: 64", "unknown option 'heigth'.*did you mean 'height'"),
        ("height: tall", "height must be of type int; got 'tall'"),
        ("steps: true", "steps must be of type int"),
        ("- a", "name: value"),
        ("a: [", "not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=wanted):
            read_config(file)
    file.write_text("")
    assert read_config(file) == {}
    with pytest.raises(UsageError, match="does not exist"):
        read_config(tmp_path / "none.yaml")


def test_config_takes_a_bare_on_and_off(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("guidance-batch: on\ntext-kv-cache: off\n")
    assert read_config(file) == {"guidance_batch": "on", "text_kv_cache": "off"}


def test_every_setting_is_a_config_key_and_lines_set_a_subset() -> None:
    fields = {f.name for f in dataclasses.fields(Settings)}
    assert set(PER_LINE) < fields
    assert fields - set(PER_LINE) == {
        "model",
        "ops",
        "attention",
        "impl",
        "eager",
        "guidance_batch",
        "text_kv_cache",
        "dtype",
        "device",
        "offload",
        "lora",
    }


def test_prompts_name_the_bad_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": "b", "seed": 3, "guidance": 2}\n')
    assert [(w.rsplit(", ")[-1], o) for w, o in read_prompts(file)] == [
        ("line 1", {"prompt": "a"}),
        ("line 3", {"prompt": "b", "seed": 3, "guidance": 2.0}),
    ]
    for line, wanted in (
        ("nonsense", "line 2 is not JSON"),
        ('{"seed": 1}', "line 2 has no prompt"),
        ('{"prompt": "x", "sed": 1}', "line 2: unknown option 'sed'.*did you mean 'seed'"),
        ('{"prompt": "x", "model": "y"}', "line 2: 'model' holds for the whole run"),
        ('{"prompt": "x", "seed": "1"}', "line 2: seed must be of type int"),
    ):
        file.write_text('{"prompt": "a"}\n' + line + "\n")
        with pytest.raises(UsageError, match=wanted):
            read_prompts(file)
    file.write_text("\n")
    with pytest.raises(UsageError, match="names no film"):
        read_prompts(file)


# Models ----------------------------------------------------------------------------------------------------------


def fake_model(path: Path, kind: str = "WanPipeline") -> Path:
    """A pipeline directory whose weights are headers and zeros."""
    parts = {"scheduler": "UniPCMultistepScheduler", "tokenizer": "T", "text_encoder": "UMT5EncoderModel",
             "transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}  # fmt: skip
    index: dict[str, Any] = {"_class_name": kind, "transformer_2": [None, None]}
    for part, name in parts.items():
        (path / part).mkdir(parents=True)
        index[part] = ["diffusers", name]
        (path / part / "config.json").write_text(json.dumps(WAN_13B))
        if part in ("text_encoder", "transformer", "vae"):
            header = json.dumps({"w": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}}).encode()
            (path / part / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(UNIPC))
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def test_a_directory_is_read_without_its_weights(tmp_path: Path) -> None:
    path = fake_model(tmp_path / "wan")
    (path / "pyvideo.json").write_text('{"height": 64, "steps": 8, "upscale": 4, "scale": 9}')
    m = read_model(path)
    assert (m.name, m.pipeline, m.defaults) == ("wan", "WanPipeline", Defaults(height=64, steps=8, upscale=4))
    assert m.parameters == {"text_encoder": 6, "transformer": 6, "vae": 6} and not m.takes_image


def test_what_a_directory_may_lack(tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return fake_model(tmp_path / name)

    cases = []
    path = broken("bin")
    (path / "vae" / "model.safetensors").rename(path / "vae" / "diffusion_pytorch_model.bin")
    cases.append((path, "only diffusion_pytorch_model.bin.*only safetensors is ever loaded"))
    path = broken("none")
    (path / "vae" / "model.safetensors").unlink()
    cases.append((path, "no .safetensors weights"))
    path = broken("short")
    with (path / "vae" / "model.safetensors").open("r+b") as file:
        file.truncate(90)
    cases.append((path, "not a whole safetensors file"))
    path = broken("shard")
    index = {"weight_map": {"w": "model.safetensors", "v": "model-2.safetensors"}}
    (path / "transformer" / "m.safetensors.index.json").write_text(json.dumps(index))
    cases.append((path, "model-2.safetensors is missing"))
    path = broken("json")
    (path / "vae" / "config.json").write_text("{")
    cases.append((path, "config.json cannot be read"))
    path = broken("index")
    (path / "model_index.json").unlink()
    cases.append((path, r"not a diffusers pipeline \(no model_index.json\)"))
    cases.append((broken("inner") / "vae", "did you mean .*inner"))
    cases.append((fake_model(tmp_path / "hunyuan", "HunyuanVideoPipeline"), "holds a HunyuanVideoPipeline"))
    for path, wanted in cases:
        with pytest.raises(ModelError, match=wanted):
            read_model(path)


def test_names_resolve_to_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve(str(fake_model(tmp_path / "here"))) == tmp_path / "here"
    repo = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert models.looked_for(repo) == (tmp_path / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers", False)
    snapshot = fake_model(tmp_path / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers" / "snapshots" / "abc")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc\n")
    assert resolve(repo) == snapshot and models.looked_for(repo) == (snapshot, True)
    assert read_model(snapshot, repo).defaults == KNOWN[repo].defaults
    (tmp_path / "w.ckpt").touch()
    for name, wanted in (
        ("./nowhere", "there is no such directory"),
        ("/no/such/dir", "there is no such directory"),
        ("tinny", "not known .did you mean 'tiny'.*Wan2.2"),
        (str(tmp_path / "w.ckpt"), "may run code when they are unpickled"),
    ):
        with pytest.raises(ModelError, match=wanted):
            resolve(name)


def test_a_hub_id_that_cannot_be_had_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    said = []
    for error, wanted in (
        (OfflineModeIsEnabled("off"), "the hub is switched off: download it"),
        (ConnectionError("no route"), r"cannot be downloaded \(ConnectionError\)"),
    ):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ModelError, match=wanted):
            resolve("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", said.append)
    assert "not in" in said[0] and "downloading" in said[0]
