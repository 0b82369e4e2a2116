import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.errors import DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, check_op

from . import helpers

NAME = "qk_norm_rope_int8"
OP = OPS[NAME]


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(helpers.DEVICE)


def _video(tokens=140, heads=2, kv_heads=1, head_dim=16, text=9, layout="interleaved"):
    """q, k, weights and tables of a video behind some text."""
    angle = _randn(1, tokens - text, 1, head_dim // 2, seed=5) * 3
    wide = angle.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat((angle, angle), -1)
    args = (_randn(1, tokens, heads, head_dim), _randn(1, tokens, kv_heads, head_dim, seed=1))
    weights = (_randn(head_dim, seed=2), _randn(head_dim, seed=3))
    options = {"norm": "per_head", "layout": layout, "rotary_range": (text, tokens)}
    return (*args, *weights, wide.cos(), wide.sin()), options


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_contract():
    helpers.check_op_contract(NAME)


def test_fullgraph():
    args, options = _video(20)
    helpers.check_fullgraph(pv.qk_norm_rope_int8, *args, **options)


@pytest.mark.parametrize(("impl", "layout"), [("reference", "half"), ("triton", "interleaved")])
def test_is_the_two_ops_in_one(impl, layout):
    args, options = _video(layout=layout)
    got = pv.qk_norm_rope_int8(*args, **options, impl=impl)
    # 131 tokens of video: every second is in the mean, which those of text in front are not.
    expected = pv.quantize_qk(*pv.qk_norm_rope(*args, **options), mean_range=(9, 140))
    for a, b in zip(got[:2], expected[:2], strict=True):
        off = (a.int() - b.int()).abs()
        assert int(off.max()) <= 1 and float((off > 0).float().mean()) < 1e-3
    for a, b in zip(got[2:], expected[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    whole = pv.quantize_qk(*pv.qk_norm_rope(*args, **options))
    assert float((whole[4] - got[4]).abs().max()) > 1e-3


def test_attention_on_its_codes_is_attention():
    args, options = _video(45, head_dim=32)
    v = _randn(1, 45, 1, 32, seed=9)
    q8, k8, q_scale, k_scale, shift = pv.qk_norm_rope_int8(*args, **options, impl="triton")
    where = {"grid": (1, 4, 9), "text_len": 9, "text_side": "prefix", "return_lse": True}
    out, lse = pv.int8_attention(q8, k8, v, q_scale, k_scale, shift, **where)
    rotated = pv.qk_norm_rope(*(x.double() for x in args), **options)
    exact, exact_lse = pv.spacetime_attention(*rotated, v.double(), **where, impl="reference")
    assert float((out.double() - exact).norm() / exact.norm()) < 0.02
    assert float((lse.double() - exact_lse).abs().max()) < 0.03


def test_repeats_bitwise():
    args, options = _video(30)
    first, second = (pv.qk_norm_rope_int8(*args, **options, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_bad_token_stays_alone():
    args, options = _video(30)
    args[0][0, 12, 1, 3] = args[1][0, 20, 0, 3] = float("nan")
    q8, k8, q_scale, k_scale, shift = pv.qk_norm_rope_int8(*args, **options, impl="triton")
    assert q_scale.isnan().nonzero().tolist() == [[0, 1, 12]] and k_scale.isnan().nonzero().tolist() == [[0, 0, 20]]
    assert not q8[0, 12, 1].any() and not k8[0, 20, 0].any()
    assert shift.isnan().nonzero().tolist() == [[0, 1, 12]]


def _wrong(**change):
    triton = dispatch.load(OP, "triton")

    def call(*args):
        values = dict(zip(OP.arguments[:-1], args, strict=True))
        return triton(*OP.bind(**{**values, **{name: f(values) for name, f in change.items()}}))

    return call


@pytest.mark.parametrize(
    "change",
    [
        {"sin": lambda a: None if a["sin"] is None else -a["sin"]},
        {"k_weight": lambda a: None},
        {"k": lambda a: a["k"].flip(1)},
        {"norm_type": lambda a: "rms"},
        {"rotary_start": lambda a: 0},
    ],
    ids=["sense of rotation", "no weight", "token order", "norm", "range"],
)
def test_the_samples_see_a_wrong_kernel(change):
    with pytest.raises((Mismatch, UnsupportedError)):
        check_op(OP, "triton", helpers.DEVICE, torch.float32, call=_wrong(**change))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": torch.zeros(1, 7, 2, 16)}, ShapeError, r"qk_norm_rope_int8: `k` must be \[1, 8, a divisor of 2, 16\]"),
        ({"k": torch.zeros(1, 8, 3, 16)}, ShapeError, r"`k` must be \[1, 8, a divisor of 2, 16\]"),
        ({"q": torch.zeros(1, 8, 2, 16).char()}, DTypeError, "qk_norm_rope_int8: `q` must be float32"),
        ({"norm": "both"}, ValueError, "qk_norm_rope_int8: `norm` must be"),
        ({"q_weight": torch.zeros(3)}, ShapeError, r"`q_weight` must be \[32\]"),
        ({"q": torch.zeros(1, 8, 2, 16, requires_grad=True)}, UnsupportedError, "`q` requires grad"),
        ({"impl": "cpu"}, UnsupportedError, "no implementation 'cpu'"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        pv.qk_norm_rope_int8(**{"q": torch.zeros(1, 8, 2, 16), "k": torch.zeros(1, 8, 2, 16), **change})


def test_triton_refuses_what_it_has_not():
    for head_dim, dtype, words in ((7, torch.float32, "odd head_dim"), (16, torch.float64, "refuses float64")):
        q = torch.zeros(1, 2, 1, head_dim, dtype=dtype, device=helpers.DEVICE)
        with pytest.raises(UnsupportedError, match=words):
            pv.qk_norm_rope_int8(q, q, norm="none", impl="triton")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_empty_batch(impl):
    q = torch.zeros(0, 8, 2, 16, device=helpers.DEVICE)
    assert [x.shape[0] for x in pv.qk_norm_rope_int8(q, q, impl=impl)] == [0] * 5
