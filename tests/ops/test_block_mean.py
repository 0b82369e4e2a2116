import itertools

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.errors import DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.reference import block_mean as oracle
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close, check_op, samples

from . import helpers

NAME = "block_mean"
OP = OPS[NAME]


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_contract():
    for kwargs in itertools.islice(samples(OP, torch.float32), 2):
        torch.library.opcheck(torch.ops.pyvideo.block_mean, (*OP.bind(**kwargs), "reference"))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("grid", "tile"), [((3, 5, 6), (2, 4, 4)), ((4, 4, 4), (4, 4, 4)), ((1, 1, 70), (1, 1, 64))])
def test_is_the_mean_of_the_tokens_in_each_box(impl, grid, tile):
    x = _randn(1, grid[0] * grid[1] * grid[2], 2, 16) + 1

    def means(x):
        video = x.unflatten(1, grid)
        boxes = itertools.product(*(range(0, n, side) for n, side in zip(grid, tile, strict=True)))
        a, b, c = tile
        return torch.stack([video[:, i : i + a, j : j + b, k : k + c].flatten(1, 3).mean(1) for i, j, k in boxes], 2)

    got = pv.block_mean(x.to(helpers.DEVICE), grid=grid, tile=tile, impl=impl).cpu()
    assert got.dtype == torch.float32 and got.is_contiguous()
    # The order of a sum is nobody's fault.
    assert_close(got, means(x.double()), means(x), summed=oracle.summed(x.double(), grid, tile)[0])


def test_halves_are_summed_in_fp32():
    # A running sum in fp16 would stop at 2048, and one in bf16 at 256.
    for dtype in (torch.float16, *([torch.bfloat16] if helpers.GPU else [])):
        x = torch.ones(1, 4096, 1, 16, dtype=dtype, device=helpers.DEVICE)
        for impl in ("reference", "triton"):
            assert pv.block_mean(x, grid=(16, 16, 16), tile=(16, 16, 16), impl=impl).unique().tolist() == [1.0]


def test_repeats_bitwise():
    x = _randn(1, 3 * 5 * 7, 2, 24).to(helpers.DEVICE)
    first, second = (pv.block_mean(x, grid=(3, 5, 7), tile=(2, 2, 2), impl="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "change",
    [
        {"tile": lambda a: [a["tile"][0], a["tile"][2], a["tile"][1]]},
        {"grid": lambda a: [a["grid"][0], a["grid"][2], a["grid"][1]]},
        {"x": lambda a: a["x"].flip(2)},
        {"x": lambda a: torch.cat([a["x"][:, 1:], a["x"][:, :1]], 1)},
    ],
    ids=["sides of the tile", "sides of the grid", "head order", "one token off"],
)
def test_the_samples_see_a_wrong_kernel(change):
    triton = dispatch.load(OP, "triton")

    def wrong(*args):
        values = dict(zip(OP.arguments[:-1], args, strict=True))
        changed = OP.bind(**{**values, **{name: f(values) for name, f in change.items()}})
        return triton(*changed)

    with pytest.raises(Mismatch):
        check_op(OP, "triton", helpers.DEVICE, torch.float32, call=wrong)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(1, 8, 16)}, ShapeError, "`x` must have 4 dimensions"),
        ({"x": torch.zeros(1, 8, 2, 16, dtype=torch.int32)}, DTypeError, "`x` must be float32"),
        ({"x": torch.zeros(1, 8, 16, 2).transpose(2, 3)}, ShapeError, "`x` must have a contiguous last dim"),
        ({"grid": (2, 2, 3)}, ShapeError, r"`x` must be \[B, T\*H\*W, heads, head_dim\] for grid \[2, 2, 3\]"),
        ({"grid": (2, 0, 3)}, ValueError, "`grid` must be three integers"),
        ({"tile": (4, 4)}, ValueError, "`tile` must be three integers"),
        ({"tile": (4, True, 4)}, ValueError, "`tile` must be three integers"),
        ({"impl": "sdpa"}, UnsupportedError, "no implementation 'sdpa'"),
        ({"x": torch.zeros(1, 8, 2, 16, requires_grad=True)}, UnsupportedError, "has no backward"),
        ({"x": torch.zeros(1, 8, 2, 16, dtype=torch.float64), "impl": "triton"}, UnsupportedError, "refuses float64"),
        ({"x": torch.zeros(1, 8, 1, 1025), "impl": "triton"}, UnsupportedError, "head_dim up to 1024"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    arguments = {"x": torch.zeros(1, 8, 2, 16), "grid": (2, 2, 2), "tile": (4, 4, 4), **change}
    arguments["x"] = arguments["x"].detach().to(helpers.DEVICE).requires_grad_(arguments["x"].requires_grad)
    with pytest.raises(error, match=words):
        pv.block_mean(**arguments)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_empty_batch(impl):
    x = torch.zeros(0, 8, 2, 16, device=helpers.DEVICE)
    assert pv.block_mean(x, grid=(2, 2, 2), tile=(1, 2, 2), impl=impl).shape == (0, 2, 2, 16)
