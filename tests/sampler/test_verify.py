"""``pyvideo verify`` on whole models, and the checks that accelerate() and warmup() make before a first call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch, verdicts
from pyvideo_kernels.errors import DTypeError, UsageError, ValueOptionError
from pyvideo_kernels.integrations import upfront
from pyvideo_kernels.ops.rms_norm_silu import rms_norm_silu as public_rms_norm_silu
from pyvideo_kernels.reference import qk_norm_rope, rms_norm, rms_norm_silu
from pyvideo_kernels.sampler import verify as module
from pyvideo_kernels.sampler.cli import app
from pyvideo_kernels.sampler.settings import Settings
from pyvideo_kernels.sampler.verify import KeepFloat64, higher_precision, verify

from . import pipes

CARD = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify", *arguments])


# The command ----------------------------------------------------------------------------------------------------


def test_a_right_model_passes_and_the_result_says_what_was_checked(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "verify.json"
    result = run("--model", str(model_dir), "--attention", "dense", "--json", str(out))
    assert "Everything holds: " in result.stdout
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["kind"] == "correctness" and found["ok"] and found["settings"]["plan"]["frames"] == 5
    checked = {row["op"] for row in found["rows"] if row["check"] == "canary"}
    assert {"rms_norm", "qk_norm_rope", "spacetime_attention", "causal_conv3d", "rms_norm_silu"} <= checked
    assert {row["head_dim"] for row in found["rows"] if row["op"] == "spacetime_attention"} == {16}
    assert [clip["stage"] for clip in found["clip"]] == ["latents", "pixels"]
    for clip in found["clip"]:
        assert 0 < clip["error"] <= 3 * clip["eager_error"] < 1e-4, "far from eager, or nothing was compared"
        assert float(clip["psnr"]) > 90
    assert "PSNR" in result.output and "causal_conv3d" in result.output


def off_by_one_in_the_last_column(x: torch.Tensor, weight: torch.Tensor, eps: float, silu: bool) -> torch.Tensor:
    out = rms_norm_silu.rms_norm_silu(x, weight, eps, silu)
    out[..., -1] += 1
    return out


def leaves_the_tail_unwritten(x: torch.Tensor, weight: torch.Tensor, eps: float, silu: bool) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    out[..., :-1] = rms_norm_silu.rms_norm_silu(x, weight, eps, silu)[..., :-1]
    return out


@pytest.mark.parametrize("wrong", [off_by_one_in_the_last_column, leaves_the_tail_unwritten])
def test_a_wrong_kernel_fails_by_name(monkeypatch: pytest.MonkeyPatch, model_dir: Path, wrong: Any) -> None:
    monkeypatch.setitem(dispatch._functions, ("rms_norm_silu", "cpu"), wrong)
    result = run("--model", str(model_dir))
    assert result.exit_code == 1
    failures = [line for line in result.output.splitlines() if line.startswith("FAILED")]
    assert failures and failures[0].startswith("FAILED rms_norm_silu: impl 'cpu' in float32 is wrong in its canary")
    assert "leave it out" in failures[0]
    if wrong is off_by_one_in_the_last_column:
        assert not any("causal_conv3d" in line for line in failures), "it is right on what it was given"


def test_a_kernel_wrong_at_the_models_shape_alone_passes_its_canary_and_fails(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path
) -> None:
    def wrong(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Any:
        new_q, new_k = qk_norm_rope.qk_norm_rope(q, k, *rest)
        return (new_q * 1.001 if q.shape[1] == 12 else new_q), new_k

    monkeypatch.setitem(dispatch._functions, ("qk_norm_rope", "cpu"), wrong)
    result = run("--model", str(model_dir))
    assert result.exit_code == 1
    assert "FAILED qk_norm_rope: impl 'cpu' in float32, head_dim 16, is wrong in its call, q 2×12×2×16" in result.output


def test_what_the_ops_do_not_explain_fails_in_the_clip(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    """Every op holds, and what goes between them does not."""
    from pyvideo_kernels.integrations.diffusers import wan_vae_forwards

    def bent(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        out: torch.Tensor = public_rms_norm_silu(x, *rest, **options)
        return out * 1.0001

    monkeypatch.setattr(wan_vae_forwards, "rms_norm_silu", bent)
    monkeypatch.setattr(module, "clip_settings", small)
    found = verify(Settings(prompt="x"), pipe=pipe)
    assert not found.ok and not any(row.failed for row in found.rows)
    latents, pixels = found.clips
    assert not latents.problem and "error" in pixels.problem
    assert [problem for problem in found.problems() if "every op held" in problem]

    def nan(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return public_rms_norm_silu(x, *rest, **options) * torch.nan

    monkeypatch.setattr(wan_vae_forwards, "rms_norm_silu", nan)
    found = verify(Settings(prompt="x"), pipe=pipe)
    assert "NaN" in found.clips[1].problem and not found.ok


def small(settings: Settings, model: Any) -> Settings:
    return module.dataclasses.replace(settings, prompt="a ball", height=32, width=48, frames=5, steps=2)


@pytest.mark.parametrize("options", [{"boundary_ratio": 0.9}, {"expand_timesteps": True}])
def test_other_pipelines_pass_and_come_back_as_they_were(
    monkeypatch: pytest.MonkeyPatch, quiet: None, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(module, "clip_settings", small)
    pipe = pipes.wan(**options)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    found = verify(Settings(prompt="x", attention="dense"), pipe=pipe)
    assert found.ok, found.problems()
    assert not module.is_accelerated(pipe)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())
    pv.accelerate(pipe)
    with pytest.raises(UsageError, match="restore"):
        verify(Settings(prompt="x"), pipe=pipe)


def test_mistakes_have_their_sentences_and_codes(model_dir: Path, tmp_path: Path) -> None:
    for arguments, code, message in (
        (["--model", "no-such-model"], 3, "not known"),
        (["--model", str(tmp_path)], 3, "model_index.json"),
        (["--dtype", "fp8"], 2, "--dtype must be one of"),
        (["--device", "tpu"], 2, "--device"),
        (["--model", str(model_dir), "--attention", "sparse"], 2, "--attention must be one of dense"),
        (["--json", str(tmp_path)], 5, "folder"),
        (["--model", "ltx", "--random-weights"], 3, "LTXPipeline"),
        (["--model", "wan2.1", "--random-weights"], 3, "did you mean"),
    ):
        result = run(*arguments)
        assert result.exit_code == code and message in result.output, (arguments, result.output)


def test_a_model_of_random_weights_is_verified_without_a_text_encoder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "clip_settings", small)
    out = tmp_path / "verify.json"
    arguments = ("--random-weights", "--dtype", "bf16", "--attention", "dense", "--json", str(out), "--quiet")
    result = run("--model", "tiny-random-wan", *arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["settings"]["model"] == "tiny-random-wan" and found["settings"]["weights"] == "random"
    assert "bfloat16" in {row["dtype"] for row in found["rows"] if row["op"] == "spacetime_attention"}


# Precision ------------------------------------------------------------------------------------------------------


def test_a_model_runs_wider_and_is_given_back_to_the_bit() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4).bfloat16(), torch.nn.LayerNorm(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), higher_precision(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        raise KeyError
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())
    with higher_precision(torch.nn.Linear(4, 4)) as nothing, KeepFloat64():
        assert nothing is None
        x = torch.zeros(2, dtype=torch.float64)
        assert {x.float().dtype, x.to(torch.float32).dtype, x.to(dtype=torch.float32).dtype} == {torch.float64}
        assert torch.zeros(2, dtype=torch.bfloat16).float().dtype == torch.float32
        assert x.to(torch.bfloat16).dtype == torch.bfloat16


# Up front -------------------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """A model on the CPU whose execution device is said to be a card; what would be checked there."""
    asked: list[tuple[Any, ...]] = []

    def trusted(op: Any, impl: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> bool:
        assert device == CARD
        asked.append((op.name, impl, dtype, head_dim))
        return op.name != "rms_norm"

    monkeypatch.setattr(dispatch, "trusted", trusted)
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(upfront, "execution_device", lambda target: CARD)
    monkeypatch.setattr("pyvideo_kernels.integrations.execution_device", lambda target: CARD)
    yield asked


def test_accelerate_checks_what_it_installs_where_the_model_runs(card: list[tuple[Any, ...]], pipe: Any) -> None:
    try:
        pv.accelerate(pipe)
        assert {row for row in card if row[1] == "triton"} == {
            (name, "triton", torch.float32, 16 if name == "qk_norm_rope" else None)
            for name in ("patch_embed3d", "final_layer", "layer_norm_modulate", "gate_residual", "qk_norm_rope",
                         "gate_residual_norm_modulate", "rms_norm", "linear_gelu", "causal_conv3d", "rms_norm_silu",
                         "upsample_conv2d", "decode_head_")
        }  # fmt: skip
        # Where a library may be taken it is checked too; PyTorch's attention, for the VAE's, needs none.
        assert {row[:2] for row in card if row[1] != "triton"} == {
            ("linear_gelu", "cublas"),
            ("causal_conv3d", "cudnn"),
            ("upsample_conv2d", "cudnn"),
        }
        card.clear()
        pv.accelerate(pipe, ops=["gate_residual"])
        assert card == [("gate_residual", "triton", torch.float32, None)]
        card.clear()
        pv.accelerate(pipe, impl="reference")
        assert not card, "an explicit choice runs as it is"
        pipe.transformer.to(torch.bfloat16)
        pv.accelerate(pipe.transformer, ops=["qk_norm_rope", "spacetime_attention"], attention="dense")
        # An installed FlashAttention stands first and is checked; PyTorch's attention needs no check.
        assert [row for row in card if row[1] != "flash"] == [("qk_norm_rope", "triton", torch.bfloat16, 16)]
    finally:
        pipe.transformer.to(torch.float32)
        pv.restore(pipe)


def test_warmup_says_what_auto_will_run(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    monkeypatch.setattr(dispatch, "trusted", lambda op, *rest: op.name != "rms_norm")
    checked = pv.warmup(pipe, device=CARD)  # where the weights are not yet: checked there, and not run
    verdict = {(row.op, row.impl): row.trusted for row in checked}
    assert verdict["rms_norm", "triton"] is False and verdict["rms_norm", "reference"] is True
    assert verdict["rms_norm_silu", "triton"] is True and ("rms_norm_silu", "reference") not in verdict
    (row,) = [row for row in checked if row.op == "qk_norm_rope"]
    assert str(row).startswith("qk_norm_rope triton float32 16 on cuda:0: trusted")


def test_on_a_cpu_nothing_is_checked_and_warmup_runs_the_model(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    monkeypatch.setattr(dispatch, "trusted", lambda *_: pytest.fail("nothing needs a check on a CPU"))
    try:
        report = pv.accelerate(pipe)
        assert not report.calls()
        checked = pv.warmup(pipe, shapes=(32, 48, 5))
        calls = report.calls()
        assert {"patch_embed3d", "final_layer", "qk_norm_rope", "causal_conv3d"} <= set(calls)
        assert {row.op for row in checked} >= {"rms_norm", "causal_conv3d"} and all(row.trusted for row in checked)
        pv.warmup(pipe.vae, shapes=[(32, 48, 5), (32, 32, 1)])
        assert sum(report.calls()["causal_conv3d"].values()) > sum(calls["causal_conv3d"].values())
    finally:
        pv.restore(pipe)


def test_warmup_of_ops_by_name() -> None:
    x = torch.randn(3, 24)
    before = dispatch.calls()
    names = ["rms_norm", "spacetime_attention"]
    checked = pv.warmup(names, device="cpu", shapes={"rms_norm": [{"x": x, "weight": None, "eps": 1e-6}]})
    assert {(row.op, row.head_dim) for row in checked} == {
        ("rms_norm", None), ("spacetime_attention", 64), ("spacetime_attention", 128),
    }  # fmt: skip
    assert sum(dispatch.calls().values()) == sum(before.values()) + 1
    assert {row.op for row in pv.warmup("gate_residual", device="cpu", dtype=torch.bfloat16)} == {"gate_residual"}


def test_warmup_names_what_is_wrong(pipe: Any) -> None:
    for arguments, error, message in (
        ({"target": "rms_nrom"}, ValueOptionError, "unknown op rms_nrom"),
        ({"target": ["rms_norm"], "shapes": (1, 2, 3)}, ValueOptionError, "`shapes` of ops"),
        ({"target": ["rms_norm"], "dtype": torch.int32}, DTypeError, "`dtype`"),
        ({"target": pipe, "dtype": torch.bfloat16}, ValueOptionError, "None for a model"),
        ({"target": pipe, "shapes": (480, 832)}, ValueOptionError, "height, width, frames"),
        ({"target": pipe, "shapes": "480x832x81"}, ValueOptionError, "height, width, frames"),
    ):
        with pytest.raises(error, match=message):
            pv.warmup(**arguments)  # type: ignore[arg-type]


def test_where_a_model_runs_is_read_under_its_hooks(quiet: None) -> None:
    model = pipes.transformer()
    assert upfront.execution_device(model) == torch.device("cpu")
    with torch.device("meta"):
        assert upfront.execution_device(pipes.transformer()) is None
    for said, expected in (("meta", torch.device("cpu")), (3, torch.device("cuda", 3)), (CARD, CARD)):
        model._hf_hook = SimpleNamespace(execution_device=said)
        assert upfront.execution_device(model) == expected
    grouped = pipes.transformer()
    grouped.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert upfront.execution_device(grouped) == torch.device("cpu")


def test_verify_writes_the_verdicts_that_auto_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card; here its kernel is a Python function and the check runs on the CPU."""
    from pyvideo_kernels import verify as ops
    from pyvideo_kernels.schemas import OPS

    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_90")
    real = ops.check_op
    monkeypatch.setattr(ops, "check_op", lambda op, impl, device, dtype, **o: real(op, impl, "cpu", dtype, **o))
    op = OPS["rms_norm"]
    for kernel, verdict in (
        (rms_norm.rms_norm, True),
        (lambda x, weight, eps: rms_norm.rms_norm(x, weight, eps) * 1.1, False),
    ):
        monkeypatch.setitem(dispatch._functions, ("rms_norm", "triton"), kernel)
        row = ops.canary(op, "triton", CARD, torch.float32)
        assert row.ok is verdict and list(verdicts.read().values()) == [verdict]
        assert dispatch.trusted(op, "triton", CARD, torch.float32) is verdict
        dispatch.forget()
        assert dispatch.trusted(op, "triton", CARD, torch.float32) is verdict
