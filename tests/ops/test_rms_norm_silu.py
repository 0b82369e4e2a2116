import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import pyvideo_kernels as pv
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.kernels.launch import merged_rows
from pyvideo_kernels.kernels.rms_norm_silu import row_offsets
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

NAME = "rms_norm_silu"


def _inputs(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g).to(dtype)
    return x, (torch.randn(shape[-1], generator=g) * 0.3 + 1).to(dtype)


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_contract():
    helpers.check_op_contract(NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("silu", [True, False])
def test_matches_diffusers_norm(silu, dtype):
    wan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    x, weight = _inputs(1, 2, 3, 5, 40, dtype=dtype)
    stock = wan.WanRMS_norm(40, images=False)
    with torch.no_grad():
        stock.gamma.copy_(weight.view(-1, 1, 1, 1))
        clip = x.permute(0, 4, 1, 2, 3)

        def eager(to):
            y = stock.to(to)(clip.to(to))
            return (torch.nn.functional.silu(y) if silu else y).permute(0, 2, 3, 4, 1)

        exact, own = eager(torch.float64), eager(dtype)
        for impl in ("auto", "reference", "triton"):
            out = pv.rms_norm_silu(x.to(helpers.DEVICE), weight.to(helpers.DEVICE), silu=silu, impl=impl)
            assert_close(out.cpu(), exact, own, impl)


def test_a_channels_last_clip_is_taken_as_it_lies():
    clip = torch.randn(1, 24, 2, 3, 4).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.rand(24)
    view = clip.permute(0, 2, 3, 4, 1)
    assert view.data_ptr() == clip.data_ptr() and view.is_contiguous()
    expected = pv.rms_norm_silu(view.clone(), weight)
    assert torch.equal(pv.rms_norm_silu(view, weight), expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("wrong axis", lambda x, w: pv.rms_norm_silu(x.transpose(1, 2).contiguous(), w).transpose(1, 2)),
        ("no silu", lambda x, w: pv.rms_norm_silu(x, w, silu=False)),
        ("no sqrt(C)", lambda x, w: pv.rms_norm_silu(x, w * 24**-0.5)),
        ("eps inside the root", lambda x, w: pv.rms_norm_silu(x, w, eps=10.0)),
    ],
)
def test_the_rule_sees(name, change):
    x, weight = _inputs(2, 24, 24)
    exact, low = pv.rms_norm_silu(x.double(), weight.double()), pv.rms_norm_silu(x, weight, impl="reference")
    assert_close(pv.rms_norm_silu(x, weight), exact, low)
    with pytest.raises(Mismatch):
        assert_close(change(x, weight), exact, low, name)


def test_a_zero_pixel_stays_zero():
    for impl in ("auto", "reference", "triton"):
        x = torch.zeros(2, 16, device=helpers.DEVICE)
        out = pv.rms_norm_silu(x, torch.ones(16, device=helpers.DEVICE), impl=impl)
        assert torch.equal(out, torch.zeros_like(out)), impl


def test_rows_more_than_two_to_the_31_elements_apart(tmp_path):
    # A sparse file gives the addresses without the memory.
    rows, stride = 4, 2**30
    storage = np.memmap(tmp_path / "rows", np.float16, "w+", shape=((rows - 1) * stride + 16,))
    far = torch.from_numpy(storage).as_strided((rows, 16), (stride, 1))
    x, weight = _inputs(rows, 16, dtype=torch.float16)
    far.copy_(x)
    if helpers.GPU:
        pytest.skip("a GPU has no sparse memory; the interpreter checks the addresses")
    assert torch.equal(pv.rms_norm_silu(far, weight, impl="triton"), pv.rms_norm_silu(x, weight, impl="triton"))


@triton.jit
def _offsets(out_ptr, block, d, n1, n2, n3, s0, s1, s2, s3, ROWS: tl.constexpr):
    rows = (tl.program_id(0) + block).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(out_ptr + tl.arange(0, ROWS), row_offsets(rows, n1, n2, n3, s0, s1, s2, s3))
    tl.store(out_ptr + ROWS + tl.arange(0, ROWS), rows * d)


@pytest.mark.parametrize("first", [0, 1])
def test_addresses_of_the_last_rows_of_a_whole_clip(first):
    """81 frames of 480p at 1024 channels, all of them or a part: 30 * 2**31 elements, of which none is allocated."""
    x = torch.empty(2, 81, 480, 832, 1024, dtype=torch.bfloat16, device="meta")[:, first:]
    sizes, strides = merged_rows(x)
    rows = x.numel() // 1024
    out = torch.zeros(2, 4, dtype=torch.int64, device=helpers.DEVICE)
    _offsets[(1,)](out, rows // 4 - 1, 1024, *sizes[1:], *strides, 4)
    last = sum((n - 1) * s for n, s in zip(x.shape[:4], x.stride()[:4], strict=True))
    assert last > 2**35
    assert out[0].tolist() == [last - 1024 * i for i in (3, 2, 1, 0)]
    assert out[1].tolist() == [(rows - 1 - i) * 1024 for i in (3, 2, 1, 0)]


def test_any_number_of_channels():
    for channels in (1, 3, 17, 384, 1024, 9000):
        x, weight = _inputs(2, 3, channels)
        exact, low = (pv.rms_norm_silu(x.to(to), weight.to(to), impl="reference") for to in (torch.float64, x.dtype))
        for impl in ("auto", "triton"):
            out = pv.rms_norm_silu(x.to(helpers.DEVICE), weight.to(helpers.DEVICE), impl=impl)
            assert_close(out.cpu(), exact, low, f"{impl} {channels}")


def test_bitwise_repeatable():
    x, weight = (t.to(helpers.DEVICE) for t in _inputs(3, 5, 96))
    for impl in ("auto", "triton"):
        assert torch.equal(pv.rms_norm_silu(x, weight, impl=impl), pv.rms_norm_silu(x, weight, impl=impl))


def test_fullgraph():
    helpers.check_fullgraph(pv.rms_norm_silu, *_inputs(2, 3, 32))
    torch.compiler.reset()
    compiled = torch.compile(pv.rms_norm_silu, fullgraph=True, dynamic=True, backend="aot_eager")
    for frames in (3, 5):
        x, weight = _inputs(1, frames, 4, 16)
        assert torch.equal(compiled(x, weight), pv.rms_norm_silu(x, weight))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(1, 1, 1, 1, 2, 8)}, ShapeError, "`x` must have"),
        ({"x": torch.zeros(2, 8, dtype=torch.int32)}, DTypeError, "`x` must be float32"),
        ({"x": torch.zeros(8, 2).T}, ShapeError, "`x` must have a contiguous last dimension"),
        ({"weight": torch.zeros(8, 1, 1, 1)}, ShapeError, "`weight` must have 1 dimensions"),
        ({"weight": torch.zeros(7)}, ShapeError, r"`weight` must be \[8\]"),
        ({"weight": None}, DTypeError, "`weight` must be a tensor; got NoneType"),
        ({"weight": torch.zeros(8, device="meta")}, DeviceError, "`weight` must be on cpu"),
        ({"x": torch.zeros(2, 8, requires_grad=True)}, UnsupportedError, "`x` requires grad"),
        ({"weight": torch.ones(8, requires_grad=True)}, UnsupportedError, "`weight` requires grad"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        pv.rms_norm_silu(**{"x": torch.zeros(2, 8), "weight": torch.ones(8), **change})


def test_triton_refuses_float64():
    x, weight = (t.double().to(helpers.DEVICE) for t in _inputs(2, 8))
    with pytest.raises(UnsupportedError, match="refuses float64"):
        pv.rms_norm_silu(x, weight, impl="triton")


def test_without_pixels():
    assert pv.rms_norm_silu(torch.zeros(1, 0, 3, 3, 8), torch.ones(8)).shape == (1, 0, 3, 3, 8)
    assert pv.rms_norm_silu(torch.zeros(0, 8, device=helpers.DEVICE), torch.ones(8, device=helpers.DEVICE),
                            impl="triton").shape == (0, 8)  # fmt: skip
