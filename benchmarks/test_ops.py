"""``pytest benchmarks/``: the registry under pytest-benchmark, a group for each op and shape, a case for each side.

Keeps a history (``--benchmark-autosave``, ``--benchmark-compare``) and writes ``--benchmark-json``. A case is one call
with its launch, on inputs that are rotated past the cache; `pyvideo bench ops` measures in turns and takes launches
out, and its ratios are those to quote. ``PYVIDEO_BENCH_DTYPE`` is bf16 (default), fp16 or fp32.
"""

import itertools
import os

import pytest
import torch

from pyvideo_kernels.benchmarks import results
from pyvideo_kernels.benchmarks.backends import backend_for
from pyvideo_kernels.benchmarks.ops import DTYPES, agreement, baselines
from pyvideo_kernels.benchmarks.ops.row import fresh, run_ours, tolerance
from pyvideo_kernels.benchmarks.registry import ENTRIES, weight_of
from pyvideo_kernels.benchmarks.timing import Rotation
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import check_op

pytest.importorskip("pytest_benchmark", reason="pip install pyvideo-kernels[bench]")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if (WANTED := os.environ.get("PYVIDEO_BENCH_DTYPE", "bf16")) not in DTYPES:
    raise pytest.UsageError(f"PYVIDEO_BENCH_DTYPE must be one of {', '.join(DTYPES)}; got {WANTED!r}")
DTYPE = DTYPES[WANTED]
BACKEND = backend_for(DEVICE)


def shapes(entry):
    """On a CPU the first alone: a history needs to be cheap to be kept."""
    return list(entry.shapes(DEVICE).items())[: None if DEVICE.type == "cuda" else 1]


def sides(entry):
    return ["ours", *baselines.OWN, *baselines.peers(entry.op, DEVICE, DTYPE)]


CASES = [
    pytest.param(entry, shape, dict(sizes), side, id=f"{entry.op}-{shape}-{side}")
    for entry in ENTRIES.values()
    for shape, sizes in shapes(entry)
    for side in sides(entry)
]


@pytest.fixture(scope="session", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def provenance():
    return results.provenance(DEVICE)


def ours(entry, sizes, inputs, benchmark):
    """Our op, right on its samples and at this size, or no time."""
    impl, output = run_ours(entry, fresh(entry, inputs))
    benchmark.extra_info["impl"] = impl
    check_op(OPS[entry.op], impl, DEVICE, DTYPE, partial=True)
    expected = entry.eager(**entry.stock(inputs))
    agreement.check_at_size(output, expected, tolerance(entry, sizes, DTYPE, DEVICE, expected))
    return baselines.Baseline(lambda given: entry.ours(**given), lambda given: fresh(entry, given), {})


def external(entry, name, inputs):
    peer = baselines.peers(entry.op, DEVICE, DTYPE)[name]
    if why := peer.why_not or peer.refuses(inputs):
        pytest.skip(f"{name}: {why}")
    baseline = baselines.external(peer)
    agreement.check_peer(baseline.call(baseline.prepare(inputs)), entry.eager(**entry.stock(inputs)))
    return baseline


@pytest.mark.parametrize(("entry", "shape", "sizes", "side"), CASES)
def test_op(benchmark, provenance, entry, shape, sizes, side):
    torch.manual_seed(0)
    inputs = entry.inputs(**sizes, dtype=DTYPE, device=DEVICE)
    if side == "ours":
        run = ours(entry, sizes, inputs, benchmark)
    elif side == "eager":
        run = baselines.eager(entry)
    elif side == "compile":
        run, output = baselines.compiled(entry, inputs)
        agreement.check_peer(output, entry.eager(**entry.stock(inputs)))
    else:
        run = external(entry, side, inputs)
    rotation = Rotation.past_cache(weight_of(inputs), entry.bytes(**sizes, dtype=DTYPE) - weight_of(inputs), BACKEND)
    more = (entry.inputs(**sizes, dtype=DTYPE, device=DEVICE) for _ in range(rotation.sets - 1))
    sets = itertools.cycle([run.prepare(given) for given in itertools.chain([inputs], more)])
    benchmark.group = f"{entry.op} {shape}"
    benchmark.extra_info |= {**run.facts, "dtype": str(DTYPE), "sets": rotation.sets, "provenance": provenance}

    def call():
        output = run.call(next(sets))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)
        return output

    benchmark(call)
