"""``pyvideo`` as a user meets it: films, files, exit codes, one sentence an error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from pyvideo_kernels.sampler import doctor, kernels, loading, loop, video
from pyvideo_kernels.sampler.cli import app
from pyvideo_kernels.sampler.video import read_metadata
from pyvideo_kernels.sampler.writer import FilmWriter

PROMPT = "a red ball moves left on a black background"


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def fails(*args: object, code: int) -> str:
    """The one sentence of a run that fails; nothing but the plan may come before it."""
    result = run("sample", *args, code=code)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("plan:", "note:", "warning:"))]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def decoded(path: Path | str) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# Films -----------------------------------------------------------------------------------------------------------


def test_a_film_its_plan_its_stats_and_its_path(model_dir: Path, tmp_path: Path) -> None:
    out, stats = tmp_path / "sub" / "film.mp4", tmp_path / "stats.json"
    result = run(
        "sample", PROMPT, "--model", model_dir, "-o", out, "--seed", 3, "--stats", stats, "--preview", "--upscale", 2
    )
    assert result.stdout == f"{out}\n"
    lines = result.stderr.splitlines()
    assert lines[0].startswith("plan: random-wan: 48×32 ×2, 5 frames at 8 fps, 12 tokens, ≈ ")
    for part in ("TFLOP", "fp32 on c", "3 steps of unipc, guidance 3;", " ops: "):
        assert part in lines[0]
    phases = [line.split(":")[0] for line in lines[1:]]
    assert [p for p in phases if p not in ("note", "warning")][:5] == [
        "load the model", "read the prompt", "denoise", "decode", "write the film",
    ]  # fmt: skip
    assert "s a step" in next(line for line in lines if line.startswith("denoise"))
    assert lines[-1].startswith(f"film {out}; seed 3; time start ")

    assert decoded(out).shape == (5, 64, 96, 3) and decoded(out).std() > 10
    meta = read_metadata(out)
    assert meta["generator"].startswith("pyvideo-kernels ")
    expected = {"prompt": PROMPT, "seed": 3, "model": "random-wan", "height": 32, "width": 48, "frames": 5, "fps": 8}
    assert meta == meta | expected | {"steps": 3, "guidance": 3.0, "scheduler": "unipc", "dtype": "fp32"}
    assert str(model_dir) not in json.dumps(meta)

    (entry,) = json.loads(stats.read_text())["runs"]
    assert set(entry["seconds"]) == {"start", "load", "text", "denoise", "decode", "write", "total"}
    assert entry["seconds"]["total"] == pytest.approx(sum(entry["seconds"].values()) / 2, abs=1e-3)
    assert entry["seconds_per_step"] == pytest.approx(entry["seconds"]["denoise"] / 3, abs=1e-3)
    assert sum(entry["calls"]["unipc_step"].values()) == 3 and entry["steps_by"] == "pyvideo"
    assert entry["versions"]["torch"] == torch.__version__ and entry["peak_memory_bytes"] > 1e6
    assert entry["plan"]["tokens"] == 12 and entry["path"] == str(out)

    with Image.open(tmp_path / "sub" / "film.preview.png") as preview:
        # Two latent frames side by side, each 4×6 latents of 32 pixels.
        assert preview.size == (2 * 6 * 32, 4 * 32) and np.asarray(preview).std() > 0
    assert sorted(p.name for p in out.parent.iterdir()) == ["film.mp4", "film.preview.png"]


def test_same_seed_same_file_whatever_the_format(model_dir: Path, tmp_path: Path) -> None:
    for suffix in (".mp4", ".gif"):
        for name in "ab":
            run("sample", PROMPT, "--model", model_dir, "-o", tmp_path / (name + suffix), "--quiet")
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    run("sample", PROMPT, "--model", model_dir, "-o", tmp_path / "frames/", "--eager", "-q", "--seed", 1)
    assert len(list((tmp_path / "frames").glob("*.png"))) == 5
    assert read_metadata(tmp_path / "frames")["kernels"] == "diffusers"


def test_quiet_prints_the_path_alone(model_dir: Path, tmp_path: Path) -> None:
    result = run("sample", PROMPT, "--model", model_dir, "-o", tmp_path / "a.gif", "-q")
    assert (result.stdout, result.stderr) == (f"{tmp_path / 'a.gif'}\n", "")


def test_a_config_file_and_the_line_over_it(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(f"prompt: {PROMPT}\nmodel: {model_dir}\nsteps: 2\nseed: 9\nwidth: 32\nstats: s.json\n")
    result = run("sample", "--config", config, "--seed", 4)
    assert result.stdout == "a-red-ball-moves-left-on-a-black-background.mp4\n"
    meta = read_metadata(result.stdout.strip())
    assert (meta["steps"], meta["seed"], meta["width"]) == (2, 4, 32)
    assert Path("s.json").is_file()
    # A name made from the prompt overwrites nothing.
    again = run("sample", "--config", config)
    assert again.stdout == "a-red-ball-moves-left-on-a-black-background-2.mp4\n"
    config.write_text("sede: 1\n")
    assert "unknown option 'sede' (did you mean 'seed'?)" in fails(PROMPT, "--config", config, code=2)


def test_a_batch_loads_once(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    real = loading.load_pipeline
    monkeypatch.setattr(loading, "load_pipeline", lambda *a, **k: loads.append(1) or real(*a, **k))
    lines = [
        {"prompt": PROMPT},
        {"prompt": "a blue square", "seed": 5, "width": 32, "steps": 2},
        {"prompt": "green", "output": str(tmp_path / "own.gif")},
    ]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    out, stats = tmp_path / "films", tmp_path / "s.json"
    result = run("sample", "--prompts", prompts, "--model", model_dir, "-o", out, "--stats", stats, "--steps", 3)
    paths = [Path(line) for line in result.stdout.splitlines()]
    first = out / "000-a-red-ball-moves-left-on-a-black-background.mp4"
    assert paths == [first, out / "001-a-blue-square.mp4", tmp_path / "own.gif"]
    assert len(loads) == 1
    metas = [read_metadata(path) for path in paths]
    assert [(m["seed"], m["width"], m["steps"]) for m in metas] == [(0, 48, 3), (5, 32, 2), (0, 48, 3)]
    runs = json.loads(stats.read_text())["runs"]
    assert [r["prompt"] for r in runs] == [line["prompt"] for line in lines] and runs[1]["seconds"]["load"] == 0
    # The same film alone is the same film.
    run(
        "sample",
        "a blue square",
        "--seed",
        5,
        "--width",
        32,
        "--steps",
        2,
        "--model",
        model_dir,
        "-o",
        tmp_path / "x.mp4",
    )
    assert (tmp_path / "x.mp4").read_bytes() == paths[1].read_bytes()


def test_a_bad_line_stops_the_batch_before_it_starts(model_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    for line, wanted in (
        ('{"prompt": "b", "frames": 6}', "line 2: --frames must be 4k + 1"),
        ('{"prompt": "b", "steps": 0}', "line 2: --steps must be at least 1"),
        ('{"prompt": "b"', "line 2 is not JSON"),
        ('{"prompt": "b", "output": "x.avi"}', "line 2: --output x.avi"),
    ):
        prompts.write_text('{"prompt": "a"}\n' + line)
        code = 5 if "avi" in line else 2
        assert wanted in fails("--prompts", prompts, "--model", model_dir, "-o", tmp_path / "films", code=code)
    same = json.dumps({"prompt": "a", "output": str(tmp_path / "a.mp4")})
    prompts.write_text(f"{same}\n{same}")
    assert "line 2 writes" in fails("--prompts", prompts, "--model", model_dir, code=2)
    assert not list(tmp_path.glob("**/*.mp4"))
    assert "not both" in fails(PROMPT, "--prompts", prompts, code=2)


def test_euler_dtype_and_unknown_words(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    result = run(
        "sample", "a red zebra", "--model", model_dir, "-o", out, "--scheduler", "euler", "--dtype", "bf16",
        "--offload", "model", "--device", "cpu",
    )  # fmt: skip
    meta = read_metadata(out)
    assert (meta["scheduler"], meta["dtype"]) == ("euler", "bf16")
    assert "warning: the model's tokenizer does not know zebra" in result.stderr
    assert "note: --offload model does nothing on cpu" in result.stderr


# What goes wrong -------------------------------------------------------------------------------------------------


def test_each_mistake_has_its_sentence_and_its_code(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model", model_dir, "-o", tmp_path / "a.mp4")
    (tmp_path / "w.pt").touch()
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "torn.safetensors").write_text("torn")
    save_file({"transformer.blocks.9.x.lora_A.weight": torch.ones(2, 2)}, str(tmp_path / "l.safetensors"))
    monkeypatch.setattr(loading, "load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    for code, wanted, args in (
        (2, "say what the film shall show", ()),
        (2, "the prompt is empty", (" ", *model)),
        (2, "multiples of 16", (PROMPT, *model, "--height", 100)),
        (2, "use 5 or 9", (PROMPT, *model, "--frames", 6)),
        (2, "did you mean 'euler'", (PROMPT, *model, "--scheduler", "eular")),
        (2, "there is no op 'rms_nrom' (did you mean 'rms_norm'?)", (PROMPT, *model, "--ops", "rms_nrom")),
        (2, "--attention must be one of", (PROMPT, *model, "--attention", "flash")),
        (2, "--device cuda:99", (PROMPT, *model, "--device", "cuda:99")),
        (2, "makes films from text alone", (PROMPT, *model, "--image", tmp_path / "notes.txt")),
        (2, "only safetensors is ever loaded", (PROMPT, *model, "--lora", tmp_path / "w.pt")),
        (2, "does not exist", (PROMPT, *model, "--config", tmp_path / "none.yaml")),
        (3, "has no place for transformer.blocks.9.x", (PROMPT, *model, "--lora", tmp_path / "l.safetensors")),
        (3, "is not a whole safetensors file", (PROMPT, *model, "--lora", tmp_path / "torn.safetensors")),
        (5, "choose another --stats", (PROMPT, *model, "--stats", tmp_path / "w.pt" / "s.json")),
        (5, "is a folder; name a file in it", (PROMPT, *model, "--stats", tmp_path)),
        (3, "there is no such directory", (PROMPT, "--model", tmp_path / "none")),
        (3, "is not a diffusers pipeline", (PROMPT, "--model", tmp_path)),
        (3, "did you mean 'tiny'", (PROMPT, "--model", "tinny")),
        (3, "may run code when they are unpickled", (PROMPT, "--model", tmp_path / "w.pt")),
        (5, "is not a format this writes", (PROMPT, *model[:2], "-o", tmp_path / "a.avi")),
        (5, "cannot be written", (PROMPT, *model[:2], "-o", tmp_path / "w.pt" / "a.mp4")),
    ):
        assert wanted in fails(*args, code=code), args
    if not torch.cuda.is_available():
        assert "use --device cpu" in fails(PROMPT, *model, "--device", "cuda", code=2)
        assert "needs CUDA tensors" in fails(PROMPT, *model, "--impl", "cuda", code=2)
    # An explicit implementation never falls back: what cannot run so is named before loading, with what can.
    cpu = (PROMPT, *model, "--device", "cpu", "--impl", "cpu")
    codes = ("--attention", "int8")
    sentence = fails(*cpu, *codes, code=2)
    assert "int8_attention" in sentence and "cannot run so; add --ops layer_norm_mod" in sentence
    only = fails(*cpu, *codes, "--ops", "int8_attention", code=2)
    assert "--impl cpu: int8_attention cannot run so; use --impl auto" in only
    kernels.check("all", None, "cpu", torch.device("cpu"))
    assert not (tmp_path / "a.mp4").exists()
    assert CliRunner().invoke(app, ["sample", PROMPT, "--stepps", "3"]).exit_code == 2


def test_weights_that_the_config_calls_for_and_no_file_holds(model_dir: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    config = broken / "transformer" / "config.json"
    layers = json.loads(config.read_text())
    config.write_text(json.dumps(layers | {"num_layers": layers["num_layers"] + 1}))
    sentence = run("sample", PROMPT, "--model", broken, "-o", tmp_path / "a.mp4", code=3).stderr.splitlines()[-1]
    assert f"transformer holds no weights for blocks.{layers['num_layers']}." in sentence and "and " in sentence
    assert not (tmp_path / "a.mp4").exists()


def test_no_codec_is_said_before_the_model_is_loaded(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_has_encoder", lambda av, name: False)
    monkeypatch.setattr(loading, "load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    assert "no encoder for .mp4" in fails(PROMPT, "--model", model_dir, "-o", tmp_path / "a.mp4", code=5)


def test_no_memory_names_the_remedy(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = (PROMPT, "--model", model_dir, "-o", tmp_path / "a.mp4", "--device", "cpu")
    monkeypatch.setattr(loading, "host_memory", lambda: 1000)
    assert "use --dtype bf16 (now fp32) or a smaller model" in fails(*args, code=4)
    monkeypatch.undo()

    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 1 TB")

    monkeypatch.setattr(loop, "denoise", out_of_memory)
    error = run("sample", *args, code=4).stderr.splitlines()[-1]
    assert "cpu ran out of memory during denoise: try smaller --height and --width, or fewer --frames" in error
    assert not (tmp_path / "a.mp4").exists()


def test_a_decoder_without_memory_goes_on_in_tiles(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loading.load_pipeline
    widths: list[int] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        pipe = real(*args, **kwargs)
        before = pipe.vae.decoder.conv_in.register_forward_pre_hook

        def scarce(_module: Any, given: Any) -> None:
            widths.append(given[0].shape[-1])
            # The first frame is delivered; the next ones find no room for whole frames.
            if given[0].shape[-1] > 4 and len(widths) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

        before(scarce)
        return pipe

    monkeypatch.setattr(loading, "load_pipeline", load)
    result = run("sample", PROMPT, "--model", model_dir, "-o", tmp_path / "a.mp4")
    assert "note: vae decode: not enough memory after 1 frames: decoding again in tiles of" in result.stderr
    assert widths[:2] == [6, 6] and set(widths[2:]) <= {2, 3, 4}
    assert decoded(tmp_path / "a.mp4").shape == (5, 32, 48, 3)


def test_diffusers_decoder_without_memory_goes_on_in_tiles(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKLWan

    real = AutoencoderKLWan.decode
    tiling = []

    def decode(self: Any, *args: Any, **kwargs: Any) -> Any:
        tiling.append(self.use_tiling)
        if not self.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKLWan, "decode", decode)
    result = run("sample", PROMPT, "--model", model_dir, "-o", tmp_path / "a.mp4", "--eager")
    assert tiling == [False, True] and "decoding in tiles" in result.stderr
    assert decoded(tmp_path / "a.mp4").shape == (5, 32, 48, 3)


def interrupt_at(calls: int) -> Any:
    count = 0

    def hit(*_: Any, **__: Any) -> None:
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt

    return hit


def test_ctrl_c_while_denoising_keeps_the_old_film_and_the_preview(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyvideo_kernels.sampler import preview

    out = tmp_path / "a.mp4"
    run("sample", PROMPT, "--model", model_dir, "-o", out)
    before, real = out.read_bytes(), preview.write_strip
    stop = interrupt_at(2)
    monkeypatch.setattr(preview, "write_strip", lambda *a: (stop(), real(*a)))
    result = run("sample", PROMPT, "--model", model_dir, "-o", out, "--preview", "--seed", 2, code=130)
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == f"interrupted during denoise; kept {tmp_path / 'a.preview.png'}"
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "a.preview.png"]


@pytest.mark.parametrize("eager", [False, True])
def test_ctrl_c_while_decoding_keeps_the_frames_there_are(
    eager: bool, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = interrupt_at(2)
    if eager:
        real = loop.decode
        monkeypatch.setattr(
            loop, "decode", lambda pipe, x, on_frames: real(pipe, x, lambda pixels: (stop(), on_frames(pixels)))
        )
    else:
        arrive = loop.arrive
        monkeypatch.setattr(loop, "arrive", lambda pieces: ((stop(), each)[1] for each in arrive(pieces)))
    out = tmp_path / "a.mp4"
    result = run("sample", PROMPT, "--model", model_dir, "-o", out, *(["--eager"] if eager else []), code=130)
    assert result.stderr.splitlines()[-1] == f"interrupted during decode; kept {tmp_path / 'a.partial.mp4'}"
    assert [p.name for p in tmp_path.iterdir()] == ["a.partial.mp4"]
    assert decoded(tmp_path / "a.partial.mp4").shape == (1, 32, 48, 3)
    assert read_metadata(tmp_path / "a.partial.mp4")["prompt"] == PROMPT


def test_ctrl_c_while_writing_and_in_a_batch(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, stop = FilmWriter.finish, interrupt_at(2)
    monkeypatch.setattr(FilmWriter, "finish", lambda self: (stop(), real(self))[1])
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "red"}\n{"prompt": "ball"}')
    args = ("--prompts", prompts, "--model", model_dir, "-o", tmp_path / "films", "--stats", tmp_path / "s.json")
    result = run("sample", *args, code=130)
    first = tmp_path / "films" / "000-a.mp4"
    assert result.stdout == f"{first}\n"
    assert f"note: finished before the interruption: {first}" in result.stderr
    # Every frame was there: the film is whole, under the name of one that was cut short.
    kept = tmp_path / "films" / "001-red.partial.mp4"
    assert result.stderr.splitlines()[-1] == f"interrupted during write; kept {kept}"
    assert set((tmp_path / "films").iterdir()) == {first, kept}
    assert decoded(kept).shape == decoded(first).shape
    assert len(json.loads((tmp_path / "s.json").read_text())["runs"]) == 1


def test_frames_go_to_the_file_while_later_ones_are_decoded(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second latent is not decoded before the frame of the first is with the encoder."""
    encoded, arrive = threading.Event(), loop.arrive
    real = video._write_av

    def write(path: Any, images: Any, *rest: Any) -> None:
        def noted() -> Any:
            for image in images:
                encoded.set()
                yield image

        real(path, noted(), *rest)

    def slowly(pieces: Any) -> Any:
        for each in arrive(pieces):
            yield each
            assert encoded.wait(30), "nothing was written while there was something to decode"

    monkeypatch.setattr(video, "_write_av", write)
    monkeypatch.setattr(loop, "arrive", slowly)
    result = run("sample", PROMPT, "--model", model_dir, "-o", tmp_path / "a.mp4")
    assert decoded(tmp_path / "a.mp4").shape == (5, 32, 48, 3)
    line = next(line for line in result.stderr.splitlines() if line.startswith("write the film: "))
    assert " s of it after decode" in line


def test_a_full_disk_stops_the_decoding(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any, images: Any, *rest: Any) -> None:
        next(images)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "_write_av", full)
    error = run("sample", PROMPT, "--model", model_dir, "-o", tmp_path / "a.mp4", code=5).stderr.splitlines()[-1]
    assert "No space left on device" in error and "free some space" in error
    assert list(tmp_path.iterdir()) == []


# The other commands ----------------------------------------------------------------------------------------------


def test_models_says_what_is_known_and_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    out = run("models").stdout
    for text in ("tiny", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "1280×704", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "4/3"):
        assert text in out


def test_doctor_says_what_each_op_binds() -> None:
    from pyvideo_kernels import _native
    from pyvideo_kernels.schemas import OPS

    out = run("doctor").stdout
    assert torch.__version__ in out and ("built" if _native.available() else _native.why_not()[:20]) in out
    for name in OPS:
        assert name.endswith("_backward") or name in out
    conv = doctor.facts()["ops"]["causal_conv3d"]
    if not torch.cuda.is_available():
        assert conv["binds"] == "cpu" and conv["why"][0]["why"] == "PyTorch's oneDNN"


def test_help_and_mistakes_cost_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pyvideo_kernels.sampler import cli\n"
        "for args in (['--help'], ['sample', '--help'], ['models'], ['sample', 'x', '--model', './none'],\n"
        "             ['sample', 'x', '--dtype', 'b'], ['sample']):\n"
        "    sys.argv = ['pyvideo', *args]\n"
        "    try: cli.main()\n"
        "    except SystemExit as end: print('exit', end.code)\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules and m != 'numpy'])\n"
    )
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("exit ")] == ["exit 0", "exit 0", "exit 0", "exit 3", "exit 2",
                                                                   "exit 2"], done.stderr  # fmt: skip
    assert lines[-1] == "[]"
