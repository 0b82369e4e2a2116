"""The registry covers the ops, both sides of every entry compute the same, and what is wrong gets no speed."""

import json

import pytest
import torch

from pyvideo_kernels.benchmarks import ops as bench
from pyvideo_kernels.benchmarks import results
from pyvideo_kernels.benchmarks.registry import ENTRIES, Entry, moved_bytes
from pyvideo_kernels.schemas import OPS

CPU = torch.device("cpu")
SMALL = {
    "tokens": 6,
    "width": 32,
    "heads": 2,
    "grid": (2, 3, 4),
    "channels": 8,
    "head_dim": 16,
    "shape": (1, 4, 2, 4, 4),
}


def _small(entry):
    """The entry's inputs with each size made small."""
    sizes = next(iter(entry.cpu.values()))
    return entry.inputs(**{name: SMALL[name] for name in sizes}, dtype=torch.float32, device=CPU)


def test_every_forward_op_is_registered():
    public = {n for n in OPS if not n.endswith(("_", "_backward"))}
    assert public == set(ENTRIES)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_both_sides_compute_the_same(name):
    torch.manual_seed(0)
    inputs = _small(ENTRIES[name])
    torch.testing.assert_close(ENTRIES[name].ours(**inputs), ENTRIES[name].eager(**inputs), rtol=1e-4, atol=1e-4)


def test_bytes_count_inputs_and_outputs_once():
    x = torch.zeros(4, 8, dtype=torch.bfloat16)
    assert moved_bytes({"x": x, "eps": 1e-6, "history": [x, x]}, (x, None)) == 4 * 4 * 8 * 2


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_every_entry_is_checked_and_measured(name):
    entry = ENTRIES[name]
    sizes = {key: SMALL[key] for key in next(iter(entry.cpu.values()))}
    row = bench.measure(entry, "tiny", sizes, CPU, torch.bfloat16, 1, {"copy": 1.0, "gemm": 1.0})
    assert "error" not in row and row["seconds"] > 0


def test_a_wrong_kernel_gets_no_speed(monkeypatch):
    entry = ENTRIES["gate_residual"]
    monkeypatch.setattr(bench, "check_op", lambda *_, **__: (_ for _ in ()).throw(bench.Mismatch("off by one")))
    sizes = {"tokens": 4, "width": 16, "heads": 1}
    row = bench.measure(entry, "tiny", sizes, CPU, torch.float32, 3, {"copy": 1.0, "gemm": 1.0})
    assert row["error"] == "off by one" and "seconds" not in row
    assert "WRONG" in bench.format_row(row)


def test_a_raising_baseline_is_not_dropped():
    def broken(**_):
        raise RuntimeError("baseline broke")

    base = ENTRIES["gate_residual"]
    entry = Entry("gate_residual", base.gpu, base.cpu, base.inputs, broken)
    with pytest.raises(RuntimeError, match="baseline broke"):
        bench.measure(
            entry, "tiny", {"tokens": 4, "width": 16, "heads": 1}, CPU, torch.float32, 3, {"copy": 1.0, "gemm": 1.0}
        )


def test_command_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "copy_bandwidth", lambda *_: 1e10)
    monkeypatch.setattr(bench, "gemm_rate", lambda *_: 1e11)
    entry = ENTRIES["gate_residual"]
    small = Entry(entry.op, entry.gpu, {"tiny": {"tokens": 8, "width": 32, "heads": 1}}, entry.inputs, entry.eager)
    monkeypatch.setitem(bench.ENTRIES, "gate_residual", small)
    out = tmp_path / "result.json"
    assert bench.main(["--op", "gate_residual", "--device", "cpu", "--rounds", "3", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["rows"][0]["ratio_to_eager"] > 0
    assert not results.missing_provenance(result["provenance"])
    assert "x eager" in capsys.readouterr().out
