"""``pyvideo doctor`` and ``collect_env``: what they say of which machine, and which known problems they find there."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pyvideo_kernels import _native, collect_env, known_bad, verdicts
from pyvideo_kernels.known_bad import PROBLEMS, Setup, problems
from pyvideo_kernels.ops import attention_cpu
from pyvideo_kernels.sampler import cli, doctor, kernels
from pyvideo_kernels.sampler.problems import Exit

ROOT = Path(__file__).parents[2]
HOPPER = {"torch": "2.13.0+cu130", "cudnn": "9.20.0", "triton": "3.7.0", "numpy": "2.4.6"}


def names(archs=("sm_90",), interpreting=False, wants=None, **versions):
    return {p.name for p in problems(Setup(HOPPER | versions, archs, interpreting, wants or {}))}


def run(*arguments):
    return CliRunner().invoke(cli.app, ["doctor", *arguments])


# Known problems -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("versions", "wrong", "slow"),
    [
        ({"torch": "2.8.0+cu128", "cudnn": "9.10.2"}, True, False),
        ({"torch": "2.8.0+cu128", "cudnn": "9.7.1"}, False, False),
        ({"torch": "2.9.0+cu128", "cudnn": "9.10.2"}, False, True),
        ({"torch": "2.11.0+cu130", "cudnn": "9.8.0"}, False, True),
        ({"torch": "2.11.0+cu130", "cudnn": "9.14.9"}, False, True),
        ({"torch": "2.11.0+cu130", "cudnn": "9.15.0"}, False, False),
        ({"torch": "2.11.0", "cudnn": None}, False, False),
    ],
)
def test_conv3d_is_wrong_or_slow_by_torch_and_cudnn(versions, wrong, slow):
    found = names(**versions)
    assert ("conv3d-wrong" in found) == wrong
    assert ("conv3d-slow" in found) == ("conv3d-as-patches" in found) == slow


@pytest.mark.parametrize(
    ("versions", "name"),
    [
        ({"torch": "2.8.0+cu128", "cudnn": "9.10.2"}, "conv3d-wrong"),
        ({"torch": "2.8.0+cu128", "cudnn": "9.7.1"}, None),
        # This release avoids every cuDNN; the next one those that are wrong.
        ({"torch": "2.9.0+cu128", "cudnn": "9.10.2"}, "conv3d-2.9.0-slow"),
        ({"torch": "2.9.0+cu128", "cudnn": "9.21.0"}, "conv3d-2.9.0-slow"),
        ({"torch": "2.9.1+cu128", "cudnn": "9.10.2"}, "conv3d-slow"),
        ({"torch": "2.9.1+cu128", "cudnn": "9.15.0"}, None),
        ({"torch": "2.13.0+cu130", "cudnn": None}, None),
        ({}, None),
    ],
)
def test_when_conv3d_is_not_handed_to_cudnn(versions, name):
    found = known_bad.conv3d_trouble(Setup(versions))
    assert (found and found.name) == name
    # One look at the table for each pair of versions.
    before = known_bad._conv3d_trouble.cache_info().hits
    assert known_bad.conv3d_trouble(Setup(versions, ("sm_90",))) is found
    assert known_bad._conv3d_trouble.cache_info().hits == before + 1


def test_the_guard_is_free_of_torch():
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('known_bad', sys.argv[1])\n"
        "module = sys.modules['known_bad'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.conv3d_trouble(module.Setup({'torch': '2.8', 'cudnn': '9.9'})).name, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, known_bad.__file__], capture_output=True, text=True, timeout=60)
    assert done.stdout == "conv3d-wrong False\n", done.stderr


def test_doctor_names_each_trouble_of_conv3d(monkeypatch):
    for versions, wanted in (
        ({"torch": "2.8.0", "cudnn": "9.10.2"}, ("WRONG RESULTS", "bf16 and fp16 clips", "TF32", "issues/163539")),
        ({"torch": "2.9.0", "cudnn": "9.10.2"}, ("TF32", "in any layout", "stride equals its kernel", "pull/163581")),
        ({"torch": "2.9.1", "cudnn": "9.14"}, ("contiguous", "issues/166643", "stride equals its kernel", "168167")),
    ):
        monkeypatch.setattr(collect_env, "setup", lambda archs, versions=versions: Setup(versions, ("sm_90",)))
        out = " ".join(run().stdout.split())
        assert all(words in out for words in wanted), (versions, [words for words in wanted if words not in out])


def test_problems_of_a_gpu_need_one():
    assert names(archs=(), torch="2.8.0", cudnn="9.10.2") == set()
    assert names(archs=("gfx942",), cudnn=None) == set()


def test_problems_of_an_architecture():
    assert "sdpa-cudnn-backward-nan" in names() and "sdpa-cudnn-backward-nan" not in names(archs=("sm_100",))
    assert "sdpa-cudnn-backward-nan" not in names(torch="2.10.1")
    for triton, affected in (("3.5.1", False), ("3.6.0", True), ("3.8.0", True), ("3.9.0", False)):
        assert ("triton-blackwell-accumulator" in names(archs=("sm_120", "sm_103"), triton=triton)) == affected
    assert "triton-blackwell-accumulator" not in names(triton="3.6.0")
    assert "triton-hopper-many-dots" in names(triton="3.7.1") and "triton-hopper-many-dots" not in names(triton="3.6.0")


@pytest.mark.parametrize(
    ("triton", "numpy", "found"),
    [
        ("3.6.0", "2.4.0", {"interpreter-numpy", "interpreter-bf16"}),
        ("3.6.0", "2.3.5", {"interpreter-bf16"}),
        ("3.7.1", "2.4.6", {"interpreter-bf16"}),
        (None, "2.4.6", set()),
    ],
)
def test_problems_of_the_interpreter(triton, numpy, found):
    assert names(archs=(), interpreting=True, triton=triton, numpy=numpy) == found
    assert names(archs=(), interpreting=False, triton=triton, numpy=numpy) == set()


def test_a_triton_that_torch_was_not_built_for():
    assert names(archs=(), wants={"triton": "3.6.0"}) == {"triton-is-not-torchs"}
    assert names(archs=(), wants={"triton": "3.7.0"}) == set()
    assert names(archs=(), triton=None, wants={"triton": "3.7.0"}) == set()
    (problem,) = problems(Setup(HOPPER, (), False, {"triton": "3.6.0"}))
    assert "triton 3.7.0 is installed, and torch 2.13.0+cu130 asks for triton 3.6.0" in problem.what
    assert problem.remedy == "pip install triton==3.6.0"


def test_the_worst_comes_first():
    found = problems(Setup(HOPPER | {"cudnn": "9.10.2", "triton": "3.7.1"}, ("sm_90",), False, {"triton": "3.7.0"}))
    effects = [known_bad.EFFECTS.index(p.effect) for p in found]
    assert effects == sorted(effects) and {p.effect for p in found} == set(known_bad.EFFECTS) - {known_bad.WRONG}


def test_every_row_can_be_looked_up_and_acted_on():
    assert len({p.name for p in PROBLEMS}) == len(PROBLEMS)
    for problem in PROBLEMS:
        assert problem.effect in known_bad.EFFECTS and problem.remedy and problem.what.endswith(".")
        assert problem.sources and all(source.startswith("https://github.com/") for source in problem.sources)
        assert problem.affected()
    by_name = {p.name: p for p in PROBLEMS}
    assert by_name["conv3d-slow"].affected() == "torch >= 2.9; cuDNN >= 9.8, < 9.15"
    table = [line for line in (ROOT / "docs" / "sampler.md").read_text().split("known_bad.py")[1].splitlines() if line]
    rows = [line for line in table if line.startswith("| ")][1:]
    assert len(rows) == len(PROBLEMS) + 1, "the page has a row for each, and one for the mismatch with torch"
    assert by_name["interpreter-bf16"].affected() == "Triton; TRITON_INTERPRET=1"


def test_versions_are_numbers():
    assert known_bad.numbers("2.11.0+cu130") == known_bad.numbers("2.11") == (2, 11)
    assert known_bad.numbers("3.10.0a0+git1") == (3, 10) > known_bad.numbers("3.9.9")
    assert known_bad.numbers("unknown") == ()


# The machine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "text"), [(91501, "9.15.1"), (92000, "9.20.0"), (8902, "8.9.2"), (None, None)])
def test_cudnn_version(number, text, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert collect_env.cudnn_version() == text


def test_what_torch_pins(monkeypatch):
    lines = [
        "filelock",
        'triton==3.6.0; platform_system == "Linux"',
        "triton-kernels==1",
        "nvidia-cudnn-cu13==9.15.1.9",
    ]
    monkeypatch.setattr(collect_env, "_requirements", lambda name: lines if name == "torch" else [])
    found = collect_env.setup(["sm_90"])
    assert found.torch_wants == {"triton": "3.6.0"} and found.archs == ("sm_90",)
    assert found.versions["torch"] == torch.__version__


def smi(tmp_path, monkeypatch, script):
    """An nvidia-smi that runs ``script`` in sh."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


class Properties:
    name, total_memory, uuid = "H100 by torch", 80 << 30, "1234"


@pytest.fixture
def card(monkeypatch):
    """One H100, as far as torch is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


@pytest.mark.parametrize(
    ("archs", "served", "text"),
    [((), None, None), (("80", "90a"), True, "has machine code for it"), (("120",), False, "was NOT built for it")],
)
def test_a_card(archs, served, text, card, tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, 'case "$*" in *--id=GPU-1234*) echo "NVIDIA H100, 580.65, 1980 MHz, 2619 MHz";; esac')
    monkeypatch.setattr(collect_env._native, "cuda_archs", lambda: archs)
    collect_env._native._check_card.cache_clear()
    try:
        (found,) = collect_env.gpus()
    finally:
        collect_env._native._check_card.cache_clear()
    assert found == {
        "arch": "sm_90", "memory": 80 << 30, "extension": served, "gpu": "NVIDIA H100", "driver": "580.65",
        "clock_sm": "1980 MHz", "clock_memory": "2619 MHz",
    }  # fmt: skip
    line = collect_env.card_text(found)
    assert line.startswith("NVIDIA H100 (sm_90, 80 GiB), driver 580.65, clocks now 1980 MHz SM, 2619 MHz memory")
    assert text is None or text in line


def test_a_card_whose_tool_fails(card, tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, "exit 9")
    (found,) = collect_env.gpus()
    assert found["gpu"] == "H100 by torch" and found["driver"] is None
    assert "driver unknown" in collect_env.card_text(found) and "clocks" not in collect_env.card_text(found)


def test_why_there_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    smi(tmp_path, monkeypatch, 'echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"')
    monkeypatch.setattr(torch.version, "cuda", None)
    why = collect_env.why_no_gpu()
    assert why == "this torch was built without CUDA or ROCm; nvidia-smi sees GPU 0: NVIDIA H100"

    def old_driver():
        raise RuntimeError("The NVIDIA driver on your system is\n too old (found version 12040)")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", old_driver)
    assert collect_env.why_no_gpu().startswith("The NVIDIA driver on your system is too old (found version 12040)")


# What is printed -----------------------------------------------------------------------------------------------------


@pytest.fixture
def wrong_pictures(monkeypatch):
    """A machine with the one known pair that decodes wrong pictures."""
    monkeypatch.setattr(collect_env, "setup", lambda archs: Setup({"torch": "2.8.0", "cudnn": "9.10.2"}, ("sm_90",)))


def test_collect_env_needs_torch_alone():
    code = (
        "import sys\n"
        "for name in ('rich', 'typer', 'triton', 'diffusers', 'transformers', 'matplotlib'): sys.modules[name] = None\n"
        "sys.argv = ['collect_env']\n"
        "import runpy; runpy.run_module('pyvideo_kernels.collect_env', run_name='__main__')\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("pyvideo-kernels: ") and lines[1].startswith("python: ")
    assert any(line.startswith("peers: ") for line in lines)
    assert any(line.startswith("extension, cpu: ") for line in lines)


def test_collect_env_marks_wrong_pictures(wrong_pictures, capsys):
    collect_env.main([])
    out = capsys.readouterr().out
    assert "!!! known problem (wrong results; torch < 2.9; cuDNN >= 9.8, < 9.15): " in out
    assert "    remedy: use torch >= 2.9.1" in out and "pytorch/issues/163539" in out


def test_collect_env_as_json(capsys):
    collect_env.main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["pyvideo_kernels"] and facts["cpu"] == collect_env.cpu_name()
    assert {peer["name"] for peer in facts["peers"]} >= {"flash-attn-4", "natten", "sageattention", "fastvideo-kernel"}
    assert all(set(p) == {"name", "effect", "what", "remedy", "sources", "affected"} for p in facts["known_bad"])


def test_doctor_marks_wrong_pictures_and_still_ends_well(wrong_pictures):
    done = run()
    assert done.exit_code == 0
    assert "!!! WRONG RESULTS" in done.stdout and "pytorch/issues/163539" in done.stdout
    assert "remedy: use torch >= 2.9.1" in done.stdout


def test_doctor_as_json():
    done = run("--json")
    facts = json.loads(done.stdout)
    assert done.exit_code == 0 and facts["broken"] == []
    assert set(facts["ops"]) == set(kernels.forward_ops())
    for op in facts["ops"].values():
        assert op["binds"] in {row["impl"] for row in op["why"] if row["usable"]}
    assert facts["self_check"]["record"] == str(verdicts.record_path()) and facts["tuned"]


def test_doctor_says_what_is_broken(monkeypatch):
    real = kernels.binding
    monkeypatch.setattr(
        kernels, "binding", lambda name, *rest: ("none", []) if name == "unipc_step" else real(name, *rest)
    )
    done = run()
    assert done.exit_code == Exit.FAILED
    assert "BROKEN" in done.stdout and "unipc_step: no implementation can be had" in done.stdout


def test_doctor_names_kernels_that_failed_their_check(monkeypatch):
    checked = {"rms_norm triton bfloat16": True, "spacetime_attention triton bfloat16 128": False}
    monkeypatch.setattr(doctor, "_verdicts", lambda device: checked)
    out = run().stdout
    assert "1 passed, 1 failed" in out
    assert "spacetime_attention triton bfloat16 128: auto does not run it here" in out


def test_verdicts_are_those_of_the_present_code(monkeypatch, tmp_path):
    from pyvideo_kernels.schemas import OPS

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu = torch.device("cpu")
    verdicts.remember(verdicts.key_of(OPS["rms_norm"], "triton", "cpu", torch.float16), True)
    verdicts.remember("0.0 an older kernel torch 2 cpu rms_norm triton bfloat16", False)
    assert doctor._verdicts(cpu) == {"rms_norm triton float16": True}


def test_doctor_without_rich(monkeypatch, capsys, wrong_pictures):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert doctor.report() == Exit.OK
    out = capsys.readouterr().out
    assert "!!! known problem" in out and "rms_norm binds" in out and "self-checks: " in out


def test_peers_in_words():
    found = [
        {"name": "natten", "version": "0.21.6", "why_not": None},
        {"name": "xformers", "version": "0.0.29", "why_not": "xformers.ops cannot be imported"},
        {"name": "quack", "version": None, "why_not": "not installed: pip install quack-kernels"},
    ]
    text = collect_env.peers_text(found)
    assert text == "natten 0.21.6, xformers 0.0.29 (xformers.ops cannot be imported); not installed: quack"
    assert collect_env.peers_text(found[2:]) == "none; not installed: quack"


def test_results_of_a_campaign_do_not_make_the_revision_another(tmp_path, monkeypatch):
    files = ["csrc/module.cpp", "kernels/op.py", "pyvideo_kernels/verified.json", "pyvideo_kernels/configs/card.json",
             "benchmarks/results/card/ops.json"]  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(collect_env, "__file__", str(tmp_path / "pyvideo_kernels" / "collect_env.py"))
    for name in files[2:]:
        (tmp_path / name).write_text("2")
    assert collect_env.revision()["dirty"] is False
    (tmp_path / "kernels" / "op.py").write_text("2")
    assert collect_env.revision()["dirty"] is True


def test_dense_attention_on_a_cpu_is_said_for_each_dtype(monkeypatch):
    for multiplies, bound in ((True, "cpu"), (False, "sdpa")):
        monkeypatch.setattr(attention_cpu, "multiplies_bf16", lambda multiplies=multiplies: multiplies)
        rows = {row["dtype"]: row["impl"] for row in doctor._dense_attention(torch.device("cpu"))}
        expected = bound if _native.available() else "sdpa"
        assert rows == {"bfloat16": expected, "float16": "sdpa", "float32": "sdpa"}
