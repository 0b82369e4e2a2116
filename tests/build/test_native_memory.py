"""What the compiled CPU kernels need beside their outputs, as the system sees it: scratch in C++ is no tensor."""

import ctypes
import gc
import re
from pathlib import Path

import pytest
import torch

from pyvideo_kernels import _native, dispatch
from pyvideo_kernels.schemas import OPS

if not _native.available():
    pytest.skip(f"no compiled extension: {_native.why_not()}", allow_module_level=True)
if hasattr(torch.ops.pyvideo_planted, "race"):
    pytest.skip("a sanitizer keeps what is freed, and memory of its own", allow_module_level=True)

from tests.build.native_calls import DTYPES, NAMES, large

SHAPE = (2, 1024, 2048)
# One workspace (group_norm_silu keeps the sums of every part), rows of scratch, pages of the allocator.
SPARE = 3 << 20


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def resident(which):
    """``VmRSS`` (now) or ``VmHWM`` (the highest) of this process, in bytes."""
    return 1024 * int(re.search(rf"^{which}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])


def growth(call):
    """How far memory rises while ``call`` runs, and its results."""
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest becomes what there is now
    except OSError as error:
        pytest.skip(f"the highest memory cannot be reset here: {error}")
    out = call()
    return resident("VmHWM") - before, out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_") and large(name, torch.float32)])
def test_memory_rises_by_the_outputs_alone(name, dtype):
    call = large(name, dtype, SHAPE)
    risen, out = growth(call)
    # Results that are an argument, or a copy in which nothing is to be computed, count as well.
    needed = sum(t.numel() * t.element_size() for t in out)
    assert needed >= SHAPE[1] * SHAPE[2] * 2
    assert 0.9 * needed <= risen <= needed + SPARE, f"{risen / 2**20:.1f} MiB for {needed / 2**20:.1f} MiB of outputs"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_needs_a_workspace_for_each_thread(dtype):
    torch.set_num_threads(2)
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2048, 16, 64, generator=g).to(dtype) for _ in range(3))
    window = {"window": (1, 4, 4), "stride": (1, 1, 1), "causal_time": False, "text_len": 0, "text_side": "suffix"}
    op = OPS["spacetime_attention"]
    args = op.bind(
        q=q, k=k, v=v, scale=0.125, grid=(2, 32, 32), kv_lens=None, return_lse=True, precision="native", **window
    )
    risen, out = growth(lambda: dispatch.load(op, "cpu")(*args))
    needed = sum(t.numel() * t.element_size() for t in out)
    assert 0.9 * needed <= risen <= needed + SPARE, f"{risen / 2**20:.1f} MiB for {needed / 2**20:.1f} MiB of outputs"


def test_scratch_is_seen():
    x = torch.randn(SHAPE)
    risen, out = growth(lambda: (x + 1) * 2)
    assert risen > 1.9 * out.numel() * 4
