import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch, verdicts
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError, ValueOptionError
from pyvideo_kernels.integrations import upfront
from pyvideo_kernels.ops import linear_gelu_library as library
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close, check_op, samples

from . import helpers

NAME = "linear_gelu"
OP = OPS[NAME]
CARD = torch.device("cuda", 0)


def inputs(dtype=torch.float32, rows=(2, 9), k=40, n=24):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, k, generator=g).to(dtype)
    return x, (torch.randn(n, k, generator=g) * k**-0.5).to(dtype), torch.randn(n, generator=g).to(dtype)


def eager(x, weight, bias=None, approximate="tanh"):
    """The models' two modules."""
    return torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias), approximate=approximate)


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_contract(impl):
    helpers.check_op_contract(NAME, impl=impl)


def test_gradients():
    helpers.check_gradients(NAME)


def test_fullgraph():
    helpers.check_fullgraph(pv.linear_gelu, *inputs())


def test_fullgraph_with_any_number_of_rows():
    torch.compiler.reset()
    compiled = torch.compile(pv.linear_gelu, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in ((2, 9), (3, 14)):
        torch.testing.assert_close(compiled(*inputs(rows=rows)), pv.linear_gelu(*inputs(rows=rows)), rtol=0, atol=0)


def erf_by_hand(u):
    return u / 2 * (1 + torch.erf(u / 2**0.5))


def tanh_by_hand(u):
    return u / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))


@pytest.mark.parametrize(("approximate", "formula"), [("tanh", tanh_by_hand), ("none", erf_by_hand)])
def test_against_the_formula_written_out(approximate, formula):
    x, weight, bias = inputs(torch.float64)
    expected = formula((x[..., None, :] * weight).sum(-1) + bias)
    torch.testing.assert_close(pv.linear_gelu(x, weight, bias, approximate=approximate), expected)
    other = {"tanh": "none", "none": "tanh"}[approximate]
    assert (pv.linear_gelu(x, weight, bias, approximate=other) - expected).abs().max() > 1e-5


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_rounds_once(impl):
    """Two modules round the sum too, and are further from float64 for it."""
    dtype = torch.float16 if impl == "triton" else torch.bfloat16
    device = helpers.DEVICE if impl == "triton" else "cpu"
    args = inputs(dtype, rows=(64,), k=32, n=64)
    exact = eager(*(t.double() for t in args))
    got = pv.linear_gelu(*(t.to(device) for t in args), impl=impl).cpu()

    def rms(y):
        return (y.double() - exact).square().mean().sqrt()

    assert_close(got, exact, exact.to(dtype))
    assert rms(got) < 0.85 * rms(eager(*args))


MISTAKES = {
    "no bias": lambda x, weight, bias, a: oracle(x, weight, None, a),
    "the other form": lambda x, weight, bias, a: oracle(x, weight, bias, "none" if a == "tanh" else "tanh"),
    "no activation": lambda x, weight, bias, a: x @ weight.T if bias is None else x @ weight.T + bias,
    "bias after": lambda x, weight, bias, a: oracle(x, weight, None, a) + (0 if bias is None else bias),
    "a column less": lambda x, weight, bias, a: oracle(x[..., 1:], weight[:, 1:], bias, a),
}


def oracle(*args):
    return dispatch.load(OP, "reference")(*args)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_fails_the_check(mistake):
    with pytest.raises(Mismatch):
        check_op(OP, "reference", "cpu", torch.float32, MISTAKES[mistake])


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_what_is_not_finite_stays_so(impl, approximate):
    """Row by row; and the far ends of GELU, where its pieces overflow."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, -1e4, 0.0])
    x, weight = torch.zeros(7, 16), torch.zeros(3, 16)
    x[:, 0], weight[:, 0] = values, 1
    arguments = [t.to(helpers.DEVICE) if impl == "triton" else t for t in (x, weight)]
    got = pv.linear_gelu(*arguments, approximate=approximate, impl=impl).cpu()
    # GELU of an infinity is 0/0 or not, by the library: torch's own erf form gives NaN for +inf on a CPU, inf on CUDA.
    assert torch.equal(got.isfinite(), values.isfinite()[:, None].expand(7, 3))
    assert torch.equal(got[3:], torch.tensor([1e30, 0.0, 0.0, 0.0])[:, None].expand(4, 3))
    assert got[0].isnan().all() and (approximate == "none" or torch.equal(got[1], torch.full((3,), torch.inf)))


def test_repeats_bit_for_bit():
    for impl, dtype, device in (("triton", torch.float16, helpers.DEVICE), ("cpu", torch.bfloat16, "cpu")):
        args = [t.to(device) for t in inputs(dtype, rows=(70,), k=48, n=80)]
        first, second = (pv.linear_gelu(*args, impl=impl) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(("rows", "n"), [((0,), 8), ((2, 0, 3), 8), ((4,), 0)])
def test_nothing_to_do(impl, rows, n):
    x, weight, bias = (t.to(helpers.DEVICE if impl == "triton" else "cpu") for t in inputs(rows=rows, n=n))
    assert pv.linear_gelu(x, weight, bias, impl=impl).shape == (*rows, n)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(1, 1, 1, 1, 1, 40)}, ShapeError, "`x` must have"),
        ({"x": torch.zeros(2, 0)}, ShapeError, r"`x` must be \[..., K\] with K >= 1"),
        ({"x": torch.zeros(2, 39)}, ShapeError, r"`weight` must be \[N, 39\] for `x` \[2, 39\]"),
        ({"x": torch.zeros(40, 2).T}, ShapeError, "`x` must have a contiguous last dimension"),
        ({"x": torch.zeros(2, 40).int()}, DTypeError, "`x` must be float32"),
        ({"weight": torch.zeros(24, 40).half()}, DTypeError, "`weight` must be torch.float32 like `x`"),
        ({"weight": torch.zeros(40)}, ShapeError, "`weight` must have 2 dimensions"),
        ({"weight": torch.zeros(40, 24).T}, ShapeError, "`weight` must have a contiguous last dimension"),
        ({"bias": torch.zeros(25)}, ShapeError, r"`bias` must be \[24\]"),
        ({"bias": torch.zeros(24, device="meta")}, DeviceError, "`bias` must be on cpu"),
        ({"approximate": "erf"}, ValueOptionError, "`approximate` must be one of tanh, none; got 'erf'"),
        ({"impl": "sdpa"}, UnsupportedError, "no implementation 'sdpa'"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    arguments = {**dict(zip(("x", "weight", "bias"), inputs(), strict=True)), **change}
    with pytest.raises(error, match=words):
        pv.linear_gelu(**arguments)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_backward_is_no_worse_than_autograd_through_eager(approximate):
    args = inputs()
    grad = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1))

    def gradients(dtype, function):
        leaves = [t.to(dtype).requires_grad_() for t in args]
        return torch.autograd.grad(function(*leaves, approximate=approximate), leaves, grad.to(dtype))

    exact = gradients(torch.float64, eager)
    for got, low, ref in zip(
        gradients(torch.bfloat16, pv.linear_gelu), gradients(torch.bfloat16, eager), exact, strict=True
    ):
        assert_close(got, ref, low)


def test_frozen_weights_ask_for_no_gradient():
    x, weight, bias = inputs()
    y = pv.linear_gelu(x.requires_grad_(), weight, bias)
    (dx,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(dx, torch.autograd.grad(eager(x, weight, bias).sum(), [x])[0])


# oneDNN ---------------------------------------------------------------------------------------------------------------


def test_onednns_product_is_the_one_this_was_written_against():
    """A private op: where torch changes it, this fails, and BLAS serves fp32 until the new one is known."""
    assert library._linear_pointwise() is not None


@pytest.fixture
def without_onednn(monkeypatch):
    monkeypatch.setattr(library, "_linear_pointwise", lambda: None)


def test_without_onednn_blas_serves_fp32(without_onednn):
    assert check_op(OP, "cpu", "cpu", torch.float32) == sum(1 for _ in samples(OP, torch.float32))
    args = inputs(torch.bfloat16)
    with pytest.raises(UnsupportedError, match="takes torch.bfloat16 only by oneDNN's product"):
        pv.linear_gelu(*args, impl="cpu")
    assert torch.equal(pv.linear_gelu(*args), pv.linear_gelu(*args, impl="reference"))


def test_another_schema_is_taken_for_none(monkeypatch):
    monkeypatch.setattr(library, "_POINTWISE", (*library._POINTWISE, ("packed", "bool")))
    library._linear_pointwise.cache_clear()
    try:
        assert library._linear_pointwise() is None
    finally:
        library._linear_pointwise.cache_clear()


def test_what_the_cpu_does_not_take():
    x, weight, bias = inputs(torch.bfloat16)
    with pytest.raises(UnsupportedError, match="takes `bias` in the dtype of `x`"):
        pv.linear_gelu(x, weight, bias.float(), impl="cpu")
    with pytest.raises(UnsupportedError, match="oneDNN does not take torch.float16 here"):
        pv.linear_gelu(x.half(), weight.half(), bias.half(), impl="cpu")
    # The contract has both: the oracle serves.
    assert pv.linear_gelu(x, weight, bias.float()).dtype == torch.bfloat16
    assert pv.linear_gelu(x.half(), weight.half(), bias.half()).dtype == torch.float16


# cuBLASLt -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cublas(monkeypatch):
    """A torch with a cuBLAS, whose version a test may change, and a CPU product in the place of its own."""

    class Installed:
        version = "13.1.0.3"
        calls = 0

    def product(bias, rows, weight, use_gelu):
        assert use_gelu and rows.dim() == 2 and weight.shape == (rows.shape[1], bias.shape[0])
        Installed.calls += 1
        u = torch.addmm(bias.float(), rows.float(), weight.float())
        return torch.nn.functional.gelu(u, approximate="tanh").to(rows.dtype)

    monkeypatch.setattr(library, "cublas_version", lambda: Installed.version)
    monkeypatch.setattr(torch, "_addmm_activation", product)
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_90")
    return Installed


def _args(dtype=torch.bfloat16, bias=True, approximate="tanh"):
    x, weight, b = inputs(dtype)
    return OP.bind(x=x, weight=weight, bias=b if bias else None, approximate=approximate)


def test_cublas_is_first_where_its_epilogue_is_the_one(cublas):
    assert dispatch.order(OP, CARD) == ("cublas", "triton", "reference")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert dispatch.order(OP, CARD, dtype, None, _args(dtype)) == ("cublas", "triton", "reference")
    for change, reason in (({"approximate": "none"}, "tanh form"), ({"bias": False}, "comes with a bias")):
        assert dispatch.order(OP, CARD, torch.bfloat16, None, _args(**change)) == ("triton", "reference")
        assert reason in dispatch.explain(OP, CARD, args=_args(**change))[0][2]
        with pytest.raises(UnsupportedError, match=f"{reason}.*; use impl='triton'"):
            library.linear_gelu_cublas(*_args(**change))
    assert dispatch.order(OP, torch.device("cpu")) == ("cpu", "reference")


def test_dispatch_says_why(cublas):
    rows = dispatch.explain(OP, CARD, args=_args())
    assert [row[0] for row in rows] == ["cublas", "triton", "reference"]
    assert rows[0][2].startswith("cuBLASLt 13.1.0.3, first with a bias") and "self-check on first use" in rows[0][2]


def test_a_verdict_on_cublas_is_about_its_version(cublas):
    before = verdicts.digest(OP, "cublas")
    cublas.version = "13.2"
    assert verdicts.digest(OP, "cublas") == "cuBLASLt 13.2" != before
    assert verdicts.needs_check("cublas")


def test_a_wrong_cublas_is_not_used(cublas, monkeypatch, tmp_path):
    """The canary judges what it takes: half of the samples, and none of them by the oracle's own arithmetic."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "_warned", set())
    assert dispatch.self_check(OP, "cublas", torch.device("cpu"), torch.bfloat16) and cublas.calls
    right = torch._addmm_activation
    monkeypatch.setattr(torch, "_addmm_activation", lambda bias, *rest, use_gelu: right(bias * 2, *rest, use_gelu))
    with pytest.warns(RuntimeWarning, match="linear_gelu: impl 'cublas' failed its self-check"):
        assert not dispatch.self_check(OP, "cublas", torch.device("cpu"), torch.bfloat16)


def test_all_that_a_call_may_run_is_checked_up_front(cublas, monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "trusted", lambda op, impl, *_: asked.append(impl) or True)
    rows = upfront.check([NAME], CARD, torch.bfloat16, None)
    assert asked == [row.impl for row in rows] == ["cublas", "triton"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_handed_to_cublas_matches_float64(cublas, dtype):
    """Shapes, strides and refusals, with the CPU's product in the place of cuBLASLt's."""
    served = sum(s["bias"] is not None and s["approximate"] == "tanh" for s in samples(OP, dtype))
    assert served > 2
    assert check_op(OP, "cublas", "cpu", dtype, library.linear_gelu_cublas, partial=True) == served
    assert cublas.calls == served


@pytest.mark.gpu
@pytest.mark.skipif(not helpers.GPU, reason="no CUDA device: cuBLASLt runs on one")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cublas_matches_float64(dtype):
    assert check_op(OP, "cublas", "cuda", dtype, partial=True)


def test_where_there_is_no_cublas(monkeypatch):
    if not helpers.GPU:
        with pytest.raises(DeviceError, match="impl 'cublas' needs CUDA tensors"):
            pv.linear_gelu(*inputs(), impl="cublas")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert library.cublas_version() is None
    with pytest.raises(UnsupportedError, match="built with CUDA; use impl='triton'"):
        library.linear_gelu_cublas(*_args())
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    monkeypatch.setattr(library.importlib.metadata, "version", _only("nvidia-cublas-cu99", "99.1.2"))
    assert library.cublas_version() == "99.1.2"
    monkeypatch.setattr(library.importlib.metadata, "version", _only("", ""))
    assert library.cublas_label() == "cuBLASLt of CUDA 99.1"


def _only(name, version):
    def find(asked):
        if asked != name:
            raise library.importlib.metadata.PackageNotFoundError(asked)
        return version

    return find
