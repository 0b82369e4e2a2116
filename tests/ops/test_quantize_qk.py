import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close, check_op

from . import helpers

NAME = "quantize_qk"
OP = OPS[NAME]


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _triton(q, k, **options):
    return pv.quantize_qk(q.to(helpers.DEVICE), k.to(helpers.DEVICE), **options, impl="triton")


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


@pytest.mark.skipif(helpers.GPU, reason="on a card bf16 is among the dtypes above")
def test_bfloat16_is_read_right():
    # No matrix product here: the interpreter has bf16.
    assert check_op(OP, "triton", "cpu", torch.bfloat16) == 6


def test_contract():
    helpers.check_op_contract(NAME)


def test_fullgraph():
    helpers.check_fullgraph(pv.quantize_qk, _randn(1, 9, 2, 16), _randn(1, 9, 1, 16))


# What the numbers mean, not taken from the oracle ----------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_codes_stand_for_the_rows_less_one_constant(impl):
    q, k = _randn(2, 150, 4, 24).to(helpers.DEVICE), _randn(2, 150, 2, 24, seed=1).to(helpers.DEVICE)
    k[..., 5] += 30.0
    q8, k8, q_scale, k_scale, shift = pv.quantize_qk(q, k, impl=impl)
    for codes, scale in ((q8, q_scale), (k8, k_scale)):
        assert int(codes.abs().amax(-1).min()) == int(codes.abs().amax(-1).max()) == 127
        assert scale.shape == (codes.shape[0], codes.shape[2], codes.shape[1])
    step = q_scale.transpose(1, 2).unsqueeze(-1)
    assert bool(((q - q8 * step).abs() <= 0.5001 * step).all())
    # The constant is where all of k's rounding errors are centred.
    step = k_scale.transpose(1, 2).unsqueeze(-1)
    off = k - k8 * step
    constant = (off.amax(1) + off.amin(1)) / 2
    assert bool(((off - constant[:, None]).abs() <= 0.51 * step.amax(1, keepdim=True)).all())
    assert bool(((constant - k.mean(1)).abs() < 0.5).all())
    expected = torch.einsum("bshd,bhd->bhs", q, constant.repeat_interleave(2, 1))
    # Each channel of the constant is known to a fraction of a step.
    assert float((shift - expected).abs().max()) < 24**0.5 * float(q.abs().max()) * float(step.max())
    # An offset that all keys have is not paid for in steps.
    assert float(k_scale.max()) < 8.0 / 127


def test_e4m3_rounds_as_torch_does():
    # Rows whose largest number is 448, so that the scale is one: all sizes, every tie, what rounds to zero.
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (grid[1:] + grid[:-1]) / 2
    numbers = torch.cat([grid, ties, ties.nextafter(grid[1:]), ties.nextafter(grid[:-1]), _randn(195).exp()])
    numbers = torch.cat([numbers, -numbers]).view(-1, 14)
    q = torch.nn.functional.pad(numbers, (0, 2), value=448.0)[None, :, None]
    codes, _, scale, _, shift = _triton(q, q, mean_range=(0, 0), precision="fp8")
    assert codes.dtype == torch.float8_e4m3fn and bool((scale == 1).all()) and not shift.any()
    assert torch.equal(codes.cpu().float(), q.to(torch.float8_e4m3fn).float())
    for impl in ("reference", "triton"):
        q[0, 3, 0, 2] = float("nan")
        codes, _, scale, _, _ = pv.quantize_qk(q.to(helpers.DEVICE), q.to(helpers.DEVICE), precision="fp8", impl=impl)
        assert scale[0, 0].isnan().nonzero().flatten().tolist() == [3] and not codes[0, 3].float().any()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rows_of_zeros_have_a_scale(impl):
    q = torch.zeros(1, 5, 1, 16, device=helpers.DEVICE)
    # Numbers too small for their reciprocal, and the largest.
    q[0, 1, 0, 0], q[0, 2, 0, 0], q[0, 3, 0, 0] = 1e-40, 1e-30, 3e38
    q8, k8, q_scale, k_scale, shift = pv.quantize_qk(q, torch.zeros_like(q), impl=impl)
    assert bool((q_scale > 0).all()) and bool((k_scale > 0).all()) and bool(q_scale.isfinite().all())
    assert q8[0, :, 0, 0].tolist() == [0, 0, 127, 127, 0] and not k8.any() and not shift.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_what_is_not_finite_stays_visible_and_stays_alone(impl, bad):
    q, k = _randn(1, 70, 1, 16).to(helpers.DEVICE), _randn(1, 70, 1, 16, seed=1).to(helpers.DEVICE)
    clean = pv.quantize_qk(q, k, impl=impl)
    q[0, 3, 0, 2] = k[0, 5, 0, 7] = bad
    q8, k8, q_scale, k_scale, shift = pv.quantize_qk(q, k, impl=impl)
    assert q_scale[0, 0].isnan().nonzero().flatten().tolist() == [3]
    assert k_scale[0, 0].isnan().nonzero().flatten().tolist() == [5]
    assert not q8[0, 3].any() and not k8[0, 5].any()
    # The other rows of q are what they were; those of k feel that one sample of 70 is missing.
    rest = [n for n in range(70) if n != 3]
    assert torch.equal(q8[:, rest], clean[0][:, rest]) and bool(shift[0, 0, rest].isfinite().all())
    assert int((k8[:, 6:].int() - clean[1][:, 6:].int()).abs().max()) < 12


def test_the_mean_is_that_of_its_range():
    q, k = _randn(1, 40, 1, 16), _randn(1, 40, 1, 16, seed=1)
    k[:, :8] = 1e30  # padding
    k[:, 8:, :, 3] += 100.0
    with_padding, without = _triton(q, k), _triton(q, k, mean_range=(8, 40))
    assert float(with_padding[4].abs().max()) > 1e20
    assert float(without[4].abs().max()) < 1e4 and float(without[3][0, 0, 8:].max()) < 10.0 / 127
    assert not _triton(q, k, mean_range=(0, 0))[4].any()


# The kernel ------------------------------------------------------------------------------------------------------


def test_repeats_bitwise():
    q, k = _randn(1, 70, 2, 24), _randn(1, 70, 1, 24, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(_triton(q, k), _triton(q, k), strict=True))


@pytest.mark.skipif(helpers.GPU, reason="on a card the self-check covers its own variant")
def test_offsets_pass_two_to_the_31():
    # Heads 2^31 elements apart. Only the pages that hold tokens are ever touched.
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        storage = torch.empty(2**31 + 4096, dtype=torch.float16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    far = storage.as_strided((1, 20, 2, 16), (2**31, 16, 2**31 + 64, 1))
    far.copy_(_randn(1, 20, 2, 16))
    near = far.clone()
    for a, b in zip(_triton(far, far), _triton(near, near), strict=True):
        assert torch.equal(a, b)


def _wrong(**change):
    triton = dispatch.load(OP, "triton")

    def call(*args):
        values = dict(zip(OP.arguments[:-1], args, strict=True))
        return triton(*OP.bind(**{**values, **{name: f(values) for name, f in change.items()}}))

    return call


@pytest.mark.parametrize(
    "change",
    [
        {"k": lambda a: a["k"] * 1.02},
        {"q": lambda a: a["q"].flip(2)},
        {"k": lambda a: a["k"].flip(1)},
        {"mean_start": lambda a: 0},
        {"mean_stop": lambda a: a["q"].shape[1]},
        {"precision": lambda a: "fp8"},
    ],
    ids=["k off by 2 %", "head order", "token order", "mean from the start", "mean to the end", "precision"],
)
def test_the_samples_see_a_wrong_kernel(change):
    with pytest.raises(Mismatch):
        check_op(OP, "triton", helpers.DEVICE, torch.float32, call=_wrong(**change))


def test_codes_off_by_one_are_for_ties_alone():
    exact = torch.arange(-100, 100, dtype=torch.int8)

    def moved(where, by):
        return torch.where(where, exact + by, exact).to(torch.int8)

    assert_close(moved(exact == 7, 1), exact, exact)
    with pytest.raises(Mismatch, match="1 codes off by up to 2"):
        assert_close(moved(exact == 7, 2), exact, exact)
    with pytest.raises(Mismatch, match="40 codes off by up to 1"):
        assert_close(moved(exact % 5 == 0, 1), exact, exact)


# What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(1, 8, 16)}, ShapeError, "`q` must have 4 dimensions"),
        ({"q": torch.zeros(1, 8, 2, 16).char()}, DTypeError, "`q` must be float32"),
        ({"k": torch.zeros(1, 8, 3, 16)}, ShapeError, r"`k` must be \[1, 8, a divisor of 2, 16\]"),
        ({"k": torch.zeros(1, 8, 2, 16).half()}, DTypeError, "`k` must be torch.float32 like `q`"),
        ({"k": torch.zeros(1, 8, 16, 2).transpose(2, 3)}, ShapeError, "`k` must have a contiguous last dim"),
        ({"k": torch.zeros(1, 8, 2, 16, device="meta")}, DeviceError, "`k` must be on cpu"),
        ({"mean_range": (0, 9)}, ValueError, r"`mean_range` must be \(start, stop\) within 0 and 8"),
        ({"mean_range": (5, 2)}, ValueError, "`mean_range` must be"),
        ({"q": torch.zeros(1, 8, 2, 16, requires_grad=True)}, UnsupportedError, "`q` requires grad"),
        ({"precision": "e5m2"}, ValueError, "`precision` must be 'int8' or 'fp8'; got 'e5m2'"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
        ({"impl": "sdpa"}, UnsupportedError, "no implementation 'sdpa'"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    arguments = {**{n: torch.zeros(1, 8, 2, 16) for n in "qk"}, **change}
    with pytest.raises(error, match=words):
        pv.quantize_qk(**arguments)


def test_triton_refuses_what_it_has_not():
    for head_dim, dtype, words in ((257, torch.float32, "head_dim up to 256"), (16, torch.float64, "refuses float64")):
        q = torch.zeros(1, 2, 1, head_dim, dtype=dtype)
        with pytest.raises(UnsupportedError, match=words):
            _triton(q, q)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_empty_batch(impl):
    q = torch.zeros(0, 8, 2, 16, device=helpers.DEVICE)
    out = pv.quantize_qk(q, q, impl=impl)
    assert [x.shape for x in out] == [q.shape, q.shape, (0, 2, 8), (0, 2, 8), (0, 2, 8)]
