"""The version of a kernel that runs is the one of the instruction set that ``build_info`` names.

Run for every level by tests/build/sanitize.py: without this, those runs could all be of one version.
"""

import pytest
import torch

from pyvideo_kernels import _native

if not _native.available():
    pytest.skip(f"no compiled extension: {_native.why_not()}", allow_module_level=True)
if hasattr(torch.ops.pyvideo_planted, "race"):
    pytest.skip("a sanitizer build has one version of every kernel", allow_module_level=True)


def test_products_are_fused_where_the_level_has_the_instruction():
    level = _native.build_info()["cpu"]
    if level not in ("x86-64", "x86-64-v3", "x86-64-v4"):
        pytest.skip(f"whether a compiler fuses on {level} is not said")
    g = torch.Generator().manual_seed(0)
    x, y, gate = (torch.randn(1, 64, 257, generator=g) for _ in range(3))
    fused, apart = (x.double() + y.double() * gate.double()).float(), x + y * gate
    assert int((fused != apart).sum()) > 1000
    assert torch.equal(_native.gate_residual(x, y, gate), apart if level == "x86-64" else fused)
