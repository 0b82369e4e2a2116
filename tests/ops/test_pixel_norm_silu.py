import numpy as np
import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

NAME = "pixel_norm_silu"
IMPLS = ("auto", "reference", "triton")


def _inputs(*shape, dtype=torch.float32, seed=0):
    """x, weight, and scale and shift by clip."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g).to(dtype)
    weight = (torch.randn(shape[-1], generator=g) * 0.3 + 1).to(dtype)
    scale, shift = ((torch.randn(shape[0], shape[-1], generator=g) * 0.3).to(dtype) for _ in range(2))
    return x, weight, scale, shift


def _run(x, weight=None, scale=None, shift=None, *, impl, **options):
    x, weight, scale, shift = (t if t is None else t.to(helpers.DEVICE) for t in (x, weight, scale, shift))
    return pv.pixel_norm_silu(x, weight, scale=scale, shift=shift, impl=impl, **options).cpu()


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_contract():
    helpers.check_op_contract(NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("silu", [True, False])
def test_matches_the_norm_of_ltx(silu, affine, dtype):
    normalization = pytest.importorskip("diffusers.models.normalization")
    x, weight, scale, shift = _inputs(2, 2, 3, 5, 40, dtype=dtype)
    stock = normalization.RMSNorm(40, eps=1e-8, elementwise_affine=affine)
    clip = x.permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        if affine:
            stock.weight.copy_(weight)

        def eager(to):
            # diffusers' RMSNorm computes its mean square in fp32 whatever comes.
            y = clip.to(to).movedim(1, -1)
            y = stock.to(to)(y).to(to).movedim(-1, 1)
            y = y * (1 + scale.to(to)[:, :, None, None, None]) + shift.to(to)[:, :, None, None, None]
            return (torch.nn.functional.silu(y) if silu else y).permute(0, 2, 3, 4, 1)

        exact, own = eager(torch.float64), eager(dtype)
        for impl in IMPLS if dtype != torch.bfloat16 or helpers.GPU else IMPLS[:2]:
            out = _run(x, weight if affine else None, scale, shift, silu=silu, impl=impl)
            assert_close(out, exact, own, impl)


def test_a_channels_last_clip_is_taken_as_it_lies():
    clip = torch.randn(1, 24, 2, 3, 4).contiguous(memory_format=torch.channels_last_3d)
    view = clip.permute(0, 2, 3, 4, 1)
    assert view.data_ptr() == clip.data_ptr() and view.is_contiguous()
    assert torch.equal(pv.pixel_norm_silu(view), pv.pixel_norm_silu(view.clone()))


def test_one_modulation_serves_every_clip():
    x, weight, scale, shift = _inputs(3, 2, 2, 5, 8)
    for impl in IMPLS:
        one = _run(x, weight, scale[:1], shift[:1], impl=impl)
        assert torch.equal(one, _run(x, weight, scale[:1].expand(3, 8), shift[:1].expand(3, 8), impl=impl)), impl
        mixed = _run(x, weight, scale[:1], shift, impl=impl)
        assert torch.equal(mixed, _run(x, weight, scale[:1].repeat(3, 1), shift, impl=impl)), impl
        mixed = _run(x, weight, scale, shift[:1], impl=impl)
        assert torch.equal(mixed, _run(x, weight, scale, shift[:1].repeat(3, 1), impl=impl)), impl


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("wrong axis", lambda x, w, a, b: pv.pixel_norm_silu(x.transpose(1, 2).contiguous(), w).transpose(1, 2)),
        ("no silu", lambda x, w, a, b: pv.pixel_norm_silu(x, w, scale=a, shift=b, silu=False)),
        ("the sum of squares", lambda x, w, a, b: pv.pixel_norm_silu(x, w / 24**0.5, scale=a, shift=b)),
        ("scale without its 1", lambda x, w, a, b: pv.pixel_norm_silu(x, w, scale=a - 1, shift=b)),
        ("shift before scale", lambda x, w, a, b: pv.pixel_norm_silu(x, w, scale=a, shift=b * (1 + a))),
        ("another clip's modulation", lambda x, w, a, b: pv.pixel_norm_silu(x, w, scale=a.flip(0), shift=b.flip(0))),
        ("eps of the norm", lambda x, w, a, b: pv.pixel_norm_silu(x, w, scale=a, shift=b, eps=0.1)),
    ],
)
def test_the_rule_sees(name, change):
    x, weight, scale, shift = _inputs(2, 24, 24)
    exact = pv.pixel_norm_silu(x.double(), weight.double(), scale=scale.double(), shift=shift.double())
    low = pv.pixel_norm_silu(x, weight, scale=scale, shift=shift, impl="reference")
    assert_close(pv.pixel_norm_silu(x, weight, scale=scale, shift=shift), exact, low)
    with pytest.raises(Mismatch):
        assert_close(change(x, weight, scale, shift), exact, low, name)


def test_any_number_of_channels():
    for channels in (1, 3, 17, 96, 1024, 9000):
        args = _inputs(2, 5, channels)
        exact, low = (_run(*(t.to(to) for t in args), impl="reference") for to in (torch.float64, torch.float32))
        for impl in ("auto", "triton"):
            assert_close(_run(*args, impl=impl), exact, low, f"{impl} {channels}")


def test_a_zero_pixel_stays_zero():
    for impl in IMPLS:
        out = _run(torch.zeros(2, 16), impl=impl)
        assert torch.equal(out, torch.zeros_like(out)), impl


def test_rows_more_than_two_to_the_31_elements_apart(tmp_path):
    # A sparse file gives the addresses without the memory.
    if helpers.GPU:
        pytest.skip("a GPU has no sparse memory; the interpreter checks the addresses")
    rows, stride = 4, 2**30
    storage = np.memmap(tmp_path / "rows", np.float16, "w+", shape=((rows - 1) * stride + 16,))
    far = torch.from_numpy(storage).as_strided((1, rows, 16), (0, stride, 1))
    x, weight, scale, shift = _inputs(1, rows, 16, dtype=torch.float16)
    far.copy_(x)
    for view, near in ((far, x), (far.transpose(0, 1), x.transpose(0, 1))):
        expected = pv.pixel_norm_silu(near, weight, scale=scale, shift=shift, impl="triton")
        assert torch.equal(pv.pixel_norm_silu(view, weight, scale=scale, shift=shift, impl="triton"), expected)


def test_bitwise_repeatable():
    x, weight, scale, shift = (t.to(helpers.DEVICE) for t in _inputs(3, 5, 96))
    for impl in ("auto", "triton"):
        first, second = (pv.pixel_norm_silu(x, weight, scale=scale, shift=shift, impl=impl) for _ in range(2))
        assert torch.equal(first, second)


def test_fullgraph():
    torch.compiler.reset()
    compiled = torch.compile(pv.pixel_norm_silu, fullgraph=True, dynamic=True, backend="aot_eager")
    for frames in (3, 5):
        x, weight, scale, shift = _inputs(1, frames, 4, 16)
        expected = pv.pixel_norm_silu(x, weight, scale=scale, shift=shift)
        assert torch.equal(compiled(x, weight, scale=scale, shift=shift), expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(8)}, ShapeError, "`x` must have"),
        ({"x": torch.zeros(1, 1, 1, 1, 2, 8)}, ShapeError, "`x` must have"),
        ({"x": torch.zeros(2, 8, dtype=torch.int32)}, DTypeError, "`x` must be float32"),
        ({"x": torch.zeros(8, 2).T}, ShapeError, "`x` must have a contiguous last dimension"),
        ({"weight": torch.zeros(7)}, ShapeError, r"`weight` must be \[8\]"),
        ({"weight": 1.0}, DTypeError, "`weight` must be a tensor; got float"),
        ({"scale": torch.zeros(8)}, ShapeError, "`scale` must have 2 dimensions"),
        ({"scale": torch.zeros(3, 8)}, ShapeError, r"`scale` must be \[2, 8\] or \[1, 8\]"),
        ({"shift": torch.zeros(2, 7)}, ShapeError, r"`shift` must be \[2, 8\]"),
        ({"shift": torch.zeros(2, 8, device="meta")}, DeviceError, "`shift` must be on cpu"),
        ({"x": torch.zeros(2, 8, requires_grad=True)}, UnsupportedError, "`x` requires grad"),
        ({"scale": torch.ones(2, 8, requires_grad=True)}, UnsupportedError, "`scale` requires grad"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        pv.pixel_norm_silu(**{"x": torch.zeros(2, 8), **change})


def test_triton_refuses_float64():
    with pytest.raises(UnsupportedError, match="refuses float64"):
        _run(torch.zeros(2, 8).double(), impl="triton")


def test_without_pixels():
    for impl in IMPLS:
        for shape in ((0, 8), (1, 0, 3, 3, 8)):
            assert _run(torch.zeros(*shape), impl=impl).shape == shape
