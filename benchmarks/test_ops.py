"""``pytest benchmarks/``: the same entries under pytest-benchmark, one group an op and shape."""

import pytest
import torch

from pyvideo_kernels.benchmarks.ops import bound_impl
from pyvideo_kernels.benchmarks.registry import ENTRIES
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import check_op

pytest.importorskip("pytest_benchmark", reason="pip install pyvideo-kernels[bench]")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    pytest.param(entry, dict(sizes), side, id=f"{entry.op}-{shape}-{side}")
    for entry in ENTRIES.values()
    for shape, sizes in (entry.gpu if DEVICE.type == "cuda" else entry.cpu).items()
    for side in ("ours", "eager")
]


@pytest.mark.parametrize(("entry", "sizes", "side"), CASES)
def test_op(benchmark, entry, sizes, side):
    torch.manual_seed(0)
    inputs = entry.inputs(**sizes, dtype=torch.bfloat16, device=DEVICE)
    benchmark.group = f"{entry.op} {sizes}"

    def call():
        getattr(entry, side)(**inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        if side == "ours":
            impl = bound_impl(entry, inputs)
            benchmark.extra_info["impl"] = impl
            check_op(OPS[entry.op], impl, DEVICE, torch.bfloat16, partial=True)  # a red check prints no speed
        benchmark(call)
