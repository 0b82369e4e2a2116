"""bf16 or fp32 on a CPU: the rule, and where it is said."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pyvideo_kernels.sampler import cli, cpu_dtype, sample
from pyvideo_kernels.sampler.loading import pick_dtype, transformer_width

CPU = torch.device("cpu")


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CPU of which a test says how fast it is: ``cpu(bf16=..., fp32=...)``, or that it has no bf16."""

    def make(bf16: float, fp32: float, supported: bool = True) -> None:
        monkeypatch.setattr(cpu_dtype, "measured", lambda: (bf16, fp32))
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)

    return make


@pytest.mark.parametrize(
    ("bf16", "fp32", "supported", "expected"),
    [
        (1e-3, 2.2e-3, True, torch.bfloat16),
        (1e-3, 1.1e-3, True, torch.float32),
        (9e-3, 1e-3, True, torch.float32),
        (1e-3, 2.2e-3, False, torch.float32),
    ],
)
def test_a_wide_model_runs_in_what_multiplies_faster(
    cpu: Any, bf16: float, fp32: float, supported: bool, expected: torch.dtype
) -> None:
    cpu(bf16, fp32, supported)
    assert pick_dtype("auto", CPU, 1536) == pick_dtype("auto", CPU, 512) == expected
    for width in (128, 511, None):
        assert pick_dtype("auto", CPU, width) == torch.float32, "a narrow model gains nothing"
    assert pick_dtype("bf16", CPU, 128) == torch.bfloat16 and pick_dtype("fp32", CPU, 1536) == torch.float32
    why = cpu_dtype.choose(1536).why
    assert ("oneDNN has no bf16" in why) != supported
    if supported:
        assert f"takes {bf16 * 1e3:.2g} ms in bf16 and {fp32 * 1e3:.2g} ms in fp32" in why


def test_what_is_measured_is_two_times_and_only_once() -> None:
    cpu_dtype.measured.cache_clear()
    first = cpu_dtype.measured()
    assert all(0 < seconds < 5 for seconds in first) and cpu_dtype.measured() is first


def test_width_of_a_transformer() -> None:
    assert transformer_width({"num_attention_heads": 12, "attention_head_dim": 128}) == 1536
    assert transformer_width({}) is None


def test_a_run_says_which_and_why_and_the_doctor_does(cpu: Any, model_dir: Any, tmp_path: Any) -> None:
    cpu(1e-3, 2e-3)
    out, stats = tmp_path / "a.gif", tmp_path / "s.json"
    options = ["--model", str(model_dir), "--device", "cpu", "-o", str(out)]
    ran = CliRunner().invoke(cli.app, ["sample", "a red ball", *options, "--stats", str(stats)])
    assert ran.exit_code == 0 and "fp32 on this CPU: width 32, less than 512" in " ".join(ran.output.split())
    assert json.loads(stats.read_text())["runs"][0]["dtype_why"].startswith("width 32")
    ran = CliRunner().invoke(cli.app, ["sample", "a red ball", *options, "--dtype", "fp32"])
    assert "on this CPU" not in ran.output
    found = json.loads(CliRunner().invoke(cli.app, ["doctor", "--json"]).stdout)["cpu_dtype"]
    assert [row["dtype"] for row in found] == ["bf16", "fp32"] and "2 ms in fp32, 2 times as long" in found[0]["why"]


def test_eager_runs_in_the_same(model_dir: Any, cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(1e-3, 2e-3)
    monkeypatch.setattr(cpu_dtype, "NARROW", 16)
    dtypes = {
        sample("a red ball", model=str(model_dir), device="cpu", eager=eager).stats["dtype"] for eager in (True, False)
    }
    assert dtypes == {"bf16"}
