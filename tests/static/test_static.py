"""The compiled kernels hold to the committed tables. Needs no GPU; compiles in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvideo_kernels.testing import static

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def _run(*arguments):
    # The tests interpret Triton; the compiler needs a process where that is off.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "pyvideo_kernels.testing.static", "--folder", str(FOLDER), *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip


def test_every_triton_op_has_a_spec():
    from pyvideo_kernels.schemas import OPS

    with_triton = {
        op.impls["triton"].partition(":")[0].rpartition(".")[2] for op in OPS.values() if "triton" in op.impls
    }
    specs = set(static.all_ops(FOLDER))
    assert with_triton <= specs
    # A kernel family that an op's launcher calls has a spec and a table of its own.
    assert {name for name in specs - with_triton if not (ROOT / "kernels" / f"{name}.py").is_file()} == set()


def test_kernels_hold_to_the_table():
    done = _run()
    assert done.returncode == 0, done.stdout + done.stderr


def _reading(**change):
    values = {"kernel": "k", "num_warps": 4, "registers": 64, "spills": 0, "stack": 0, "shared": 1024,
              "matrix": {"HGMMA": 8}, "tma_loads": 2, "vector_loads": 4, **change}  # fmt: skip
    return static.Reading(**values)


@pytest.mark.parametrize(
    ("change", "arch", "words"),
    [
        ({"spills": 3}, "sm_80", "3 spills"),
        ({"stack": 40}, "sm_80", "40 bytes of stack"),
        ({"shared": 101 * 1024}, "sm_120", "shared memory"),
        ({"matrix": {}}, "sm_80", "no matrix instructions"),
        ({"matrix": {"HMMA": 8}}, "sm_90", "no wgmma"),
        ({"tma_loads": 0}, "sm_90", "no TMA loads"),
    ],
)
def test_a_bad_kernel_is_refused(change, arch, words):
    case = static.Case("c", lambda: None, matrix=True, tma=True)
    assert not static.judge(case, "sm_90", [_reading()])
    assert any(words in text for text in static.judge(case, arch, [_reading(**change)]))


@pytest.mark.parametrize("change", [{"registers": 65}, {"vector_loads": 3}, {"tma_loads": 1}, {"matrix": {"HMMA": 8}}])
def test_a_regression_against_the_table_is_seen(change):
    from dataclasses import asdict

    assert not static.compare([asdict(_reading())], [_reading()])
    assert static.compare([asdict(_reading())], [_reading(**change)])
