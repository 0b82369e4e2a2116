import itertools

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.configs import forced_arch
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, check_op, samples

from . import helpers

NAME = "int8_attention"
OP = OPS[NAME]


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _qkv(s, heads=2, head_dim=32, kv_heads=None, seed=0, dtype=torch.float32):
    shapes = ((1, s, heads, head_dim), *[(1, s, kv_heads or heads, head_dim)] * 2)
    return [_randn(*shape, seed=seed + i, dtype=dtype).to(helpers.DEVICE) for i, shape in enumerate(shapes)]


def _attend(q, k, v, impl="triton", **options):
    return pv.spacetime_attention(q, k, v, **options, precision="int8", impl=impl)


def _relative(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


@pytest.mark.skipif(helpers.GPU, reason="on a card the samples run the variant of that card")
def test_descriptor_variant_matches_float64(monkeypatch):
    from pyvideo_kernels.kernels import int8_attention as kernels

    used = []
    for name in ("select", "select_windowed"):
        select = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, _s=select, **k: used.append(_s(*a, **k)) or used[-1])
    with forced_arch("sm_90"):
        check_op(OP, "triton", "cpu", torch.float16)
    # All but head dims 40 and 96, which are padded, and text alone.
    assert [config.descriptors for config in used] == [True, True, True, False, True, True, False, False]


def test_contract():
    for kwargs in itertools.islice(samples(OP, torch.float32), 1, 6, 2):
        torch.library.opcheck(getattr(torch.ops.pyvideo, NAME), (*OP.bind(**kwargs), "reference"))


def test_one_graph_serves_every_grid():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda q, grid: _attend(q, q, q, grid=grid, return_lse=True, impl="auto"),
        fullgraph=True, dynamic=True, backend=backend,
    )  # fmt: skip
    for grid in ((4, 4, 4), (3, 5, 7), (2, 3, 4)):
        q = _randn(1, grid[0] * grid[1] * grid[2], 2, 16)
        expected = _attend(q, q, q, grid=grid, return_lse=True, impl="auto")
        torch.testing.assert_close(compiled(q, grid), expected, rtol=0, atol=0)
    assert len(graphs) == 1


# Against attention in float64 that knows nothing of codes --------------------------------------------------------


def _drawn(kind):
    q, k, v = (x.half() for x in _qkv(130, heads=1, head_dim=64))
    if kind == "wide":
        # Logits to ±60 and more.
        q, k = q * 5.0, k * 3.0
    if kind == "offset":
        k[..., 5] += 40.0
        k[..., 60] -= 25.0
    if kind == "constant":
        k[..., ::16] = 7.0
        q[..., ::16] = 3.0
    if kind == "outlier":
        q[..., 7] *= 10.0
        k[..., 7] *= 10.0
    return q, k, v


# Relative error of the output (RMS) and largest of the LSE; docs/ops/spacetime_attention.md has those at 1,000 keys.
_LEVELS = {
    "normal": (0.012, 0.01), "offset": (0.012, 0.01), "constant": (0.012, 0.01), "outlier": (0.05, 0.5),
    "wide": (0.06, 0.8),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(_LEVELS))
def test_error_levels_against_dense_float64(kind):
    q, k, v = _drawn(kind)
    scores = torch.einsum("bqhd,bkd->bhqk", q.double(), k[:, :, 0].double()) * 64**-0.5
    exact = torch.einsum("bhqk,bkd->bqhd", scores.softmax(-1), v[:, :, 0].double())
    out, lse = _attend(q, k, v, grid=(2, 5, 13), return_lse=True)
    level, lse_level = _LEVELS[kind]
    assert _relative(out, exact) < level
    assert float((lse.double() - scores.logsumexp(-1)).abs().max()) < lse_level
    if kind == "wide":
        assert float(scores.abs().max()) > 55
    if kind == "offset":
        # What the constant taken off the keys is good for, and what becomes of the LSE without it.
        q8, k8, q_scale, k_scale, _ = torch.ops.pyvideo.quantize_qk(q, k, 0, 0, "int8", "triton")
        raw = pv.int8_attention(q8, k8, v, q_scale, k_scale, grid=(2, 5, 13), impl="triton")
        assert _relative(raw, exact) > 3 * level
        q8, k8, q_scale, k_scale, _ = pv.quantize_qk(q, k, impl="triton")
        _, raw = pv.int8_attention(q8, k8, v, q_scale, k_scale, grid=(2, 5, 13), return_lse=True, impl="triton")
        assert float((raw.double() - scores.logsumexp(-1)).abs().max()) > 1.0


_WINDOWED = {"grid": (3, 4, 5), "window": (2, 3, 3), "text_len": 3, "text_side": "prefix"}


@pytest.mark.parametrize(
    "change", [{}, {"stride": (2, 1, 3)}, {"causal_time": True}, {"window": [(1, 2, 5), (3, 4, 2)]}]
)
def test_windows_are_those_of_the_native_precision(change):
    q, k, v = _qkv(63)
    options = {**_WINDOWED, **change, "kv_lens": torch.tensor([2], device=helpers.DEVICE), "return_lse": True}
    exact, exact_lse = pv.spacetime_attention(*(x.double() for x in (q, k, v)), **options, impl="reference")
    out, lse = _attend(q, k, v, **options)
    assert _relative(out, exact) < 0.015 and float((lse.double() - exact_lse).abs().max()) < 0.02
    other, _ = pv.spacetime_attention(
        *(x.double() for x in (q, k, v)), **{**options, "window": (2, 3, 4), "stride": (1, 1, 1)}, impl="reference"
    )
    assert _relative(out, other) > 0.05


def test_parts_in_both_precisions_merge():
    q, k, v = _qkv(20)
    _, k2, v2 = _qkv(20, seed=7)
    parts = [
        pv.spacetime_attention(q, *kv, grid=(1, 4, 5), return_lse=True, impl="triton", precision=precision)
        for kv, precision in (((k + 2.0, v), "int8"), ((k2, v2), "native"))
    ]
    out, _ = pv.merge_attention(*zip(*parts, strict=True))
    every = [torch.cat(pair, 1).double() for pair in ((k + 2.0, k2), (v, v2))]
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q.double(), *every)))
    assert _relative(out, exact.transpose(1, 2)) < 0.015


# What must not happen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"grid": (2, 3, 6)}, {"grid": (2, 3, 6), "window": (1, 3, 3)}])
def test_a_bad_token_is_seen_and_no_further(options):
    q, k, v = _qkv(36, heads=1)
    clean = _attend(q, k, v, **options)
    bad = q.clone()
    bad[0, 7, 0, 3] = float("nan")
    got = _attend(bad, k, v, **options)
    assert bool(got[0, 7].isnan().all())
    rest = [n for n in range(36) if n != 7]
    assert torch.equal(got[:, rest], clean[:, rest])
    bad = k.clone()
    bad[0, 35, 0, 3] = float("inf")
    out, lse = _attend(q, bad, v, **options, return_lse=True)
    seen = torch.ones(36, dtype=torch.bool)
    if "window" in options:
        # The last token: of its frame, and rows and columns within reach.
        seen = torch.tensor([t == 1 and w >= 4 for t, h, w in itertools.product(range(2), range(3), range(6))])
    assert torch.equal(out[0, :, 0].isnan().any(-1).cpu(), seen) and torch.equal(lse[0, 0].isnan().cpu(), seen)


@pytest.mark.parametrize("window", [None, (1, 2, 2)])
@pytest.mark.parametrize("side", ["suffix", "prefix"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])  # by pointers, by descriptors
@pytest.mark.skipif(helpers.GPU, reason="architectures are forced in the interpreter only")
def test_padding_text_never_gets_in(arch, side, window):
    q = _randn(1, 9, 1, 32, dtype=torch.float16)
    padding = slice(1, 3) if side == "prefix" else slice(7, 9)

    def run(fill):
        kv = q.clone()
        kv[:, padding] = fill
        options = {"grid": (1, 2, 3), "text_len": 3, "text_side": side, "kv_lens": torch.tensor([1])}
        return _attend(q, kv, kv, **options, window=window)

    with forced_arch(arch):
        expected = run(0.0)
        assert torch.equal(run(float("nan")), expected) and torch.equal(run(6e4), expected)


@pytest.mark.parametrize("side", ["suffix", "prefix"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_text_counts_past_either_end_are_clamped(impl, side):
    q = _randn(2, 9, 1, 16).to(helpers.DEVICE)

    def run(*lens):
        lens = torch.tensor(lens, device=helpers.DEVICE)
        return _attend(q, q, q, impl, grid=(1, 2, 3), text_len=3, text_side=side, kv_lens=lens)

    assert torch.equal(run(-5, 1000), run(0, 3))
    assert not torch.equal(run(-5, 1000), run(1, 3))


@pytest.mark.parametrize("window", [None, (1, 2, 3)])
@pytest.mark.skipif(helpers.GPU, reason="on a card the self-check covers its own variant")
def test_offsets_pass_two_to_the_31(window):
    # Heads 2^31 elements apart. Only the pages that hold tokens are ever touched.
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        storage = torch.empty(2**31 + 4096, dtype=torch.int8)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    far = storage.as_strided((1, 20, 2, 32), (2**31, 32, 2**31 + 128, 1))
    codes, _, scale, _, _ = pv.quantize_qk(*[_randn(1, 20, 2, 32)] * 2)
    far.copy_(codes)
    v = _randn(1, 20, 2, 32, seed=1, dtype=torch.float16)
    for arch in ("cpu", "sm_90"):
        with forced_arch(arch):
            got, expected = (
                pv.int8_attention(x, x, v, scale, scale, grid=(1, 4, 5), window=window, impl="triton")
                for x in (far, codes)
            )
        assert torch.equal(got, expected)


@pytest.mark.parametrize("window", [None, (1, 2, 3)])
def test_repeats_bitwise(window):
    q, k, v = _qkv(37, heads=1)
    first, second = (_attend(q, k, v, grid=(1, 1, 37), window=window, return_lse=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# What the samples would miss -------------------------------------------------------------------------------------


def _wrong(**change):
    """The Triton kernel with one argument changed on its way in."""
    triton = dispatch.load(OP, "triton")

    def call(*args):
        values = dict(zip(OP.arguments[:-1], args, strict=True))
        return triton(*OP.bind(**{**values, **{name: f(values) for name, f in change.items()}}))

    return call


@pytest.mark.parametrize(
    "change",
    [
        {"kv_lens": lambda a: None},
        {"kv_lens": lambda a: None if a["kv_lens"] is None else a["kv_lens"] + 1},
        {"text_side": lambda a: "suffix"},
        {"scale": lambda a: a["scale"] * 1.01},
        {"k_scale": lambda a: a["k_scale"].flip(2)},
        {"q_scale": lambda a: a["q_scale"].roll(1, 2)},
        {"lse_shift": lambda a: None},
        {"k8": lambda a: a["k8"].flip(1)},
        {"window": lambda a: a["window"] and [3] * len(a["window"])},
        {"causal_time": lambda a: False},
    ],
    ids=["no lens", "lens off by one", "side", "scale", "key scales", "query scales", "no shift", "key order", "window",
         "not causal"],
)  # fmt: skip
def test_the_samples_see_a_wrong_kernel(change):
    with pytest.raises(Mismatch):
        check_op(OP, "triton", helpers.DEVICE, torch.float16, call=_wrong(**change))


# What is refused, and by whom ------------------------------------------------------------------------------------


def test_int8_is_two_ops_and_has_no_backward():
    q, k, v = (x.cpu() for x in _qkv(8))
    before = dispatch.calls()
    pv.spacetime_attention(q, k, v, grid=(2, 2, 2), precision="int8")
    ran = {op for (op, impl), n in dispatch.calls().items() if n > before.get((op, impl), 0)}
    assert ran == {"quantize_qk", NAME}
    with pytest.raises(UnsupportedError, match="no implementation 'sdpa'"):
        pv.spacetime_attention(q, k, v, grid=(2, 2, 2), precision="int8", impl="sdpa")
    with pytest.raises(UnsupportedError, match="in precision 'int8': `v` requires grad"):
        pv.spacetime_attention(q, k, v.requires_grad_(), grid=(2, 2, 2), precision="int8")
    with torch.no_grad():
        assert pv.spacetime_attention(q, k, v, grid=(2, 2, 2), precision="int8").shape == q.shape


def test_triton_refuses_what_it_has_not():
    for head_dim, dtype, words in ((257, torch.float32, "head_dim up to 256"), (16, torch.float64, "refuses float64")):
        codes = torch.zeros(1, 2, 1, head_dim, dtype=torch.int8, device=helpers.DEVICE)
        scale = torch.ones(1, 1, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        scale = scale.to(helpers.DEVICE)
        with pytest.raises(UnsupportedError, match=words):
            pv.int8_attention(codes, codes, codes.to(dtype), scale, scale, grid=(1, 1, 2), impl="triton")


_CODES = torch.zeros(1, 8, 2, 16, dtype=torch.int8)
_SCALES = torch.ones(1, 2, 8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q8": _CODES.float()}, DTypeError, "`q8` must be an int8 tensor; got torch.float32"),
        ({"k8": None}, DTypeError, "`k8` must be an int8 tensor; got NoneType"),
        ({"q8": _CODES[0]}, ShapeError, r"`q8` must be \[B, S, heads, head_dim\]"),
        ({"k8": torch.zeros(1, 8, 3, 16).char()}, ShapeError, r"`k8` must be \[1, 8, a divisor of 2, 16\]"),
        ({"v": torch.zeros(1, 8, 1, 16)}, ShapeError, r"`v` must be \[1, 8, 2, 16\]"),
        ({"v": _CODES}, DTypeError, "`v` must be float32"),
        ({"k8": torch.zeros(1, 8, 16, 2).char().transpose(2, 3)}, ShapeError, "`k8` must have a contiguous last dim"),
        ({"q_scale": torch.ones(1, 8, 2)}, ShapeError, r"`q_scale` must be \[1, 2, 8\], contiguous"),
        ({"k_scale": torch.ones(1, 8, 2).mT}, ShapeError, r"`k_scale` must be \[1, 2, 8\], contiguous"),
        ({"k_scale": _SCALES.half()}, DTypeError, "`k_scale` must be torch.float32 with `v`"),
        ({"lse_shift": _SCALES[:, :1]}, ShapeError, r"`lse_shift` must be \[1, 2, 8\]"),
        ({"q_scale": torch.ones(1, 2, 8, device="meta")}, DeviceError, "`q_scale` must be on cpu"),
        ({"grid": (2, 2, 3)}, ShapeError, r"`q8` must be \[B, T\*H\*W \+ text_len"),
        ({"stride": (2, 1, 1)}, ValueError, r"int8_attention: `stride` must be \(1, 1, 1\) without a window"),
        ({"kv_lens": torch.zeros(1, dtype=torch.int32)}, ValueError, "int8_attention: `kv_lens` must be None"),
        ({"scale": 0.0}, ValueError, "`scale` must be a positive number"),
        ({"v": torch.zeros(1, 8, 2, 16, requires_grad=True)}, UnsupportedError, "`v` requires grad"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    arguments = {
        "grid": (2, 2, 2), "q8": _CODES, "k8": _CODES, "v": _CODES.float(), "q_scale": _SCALES, "k_scale": _SCALES,
        **change,
    }  # fmt: skip
    with pytest.raises(error, match=words):
        pv.int8_attention(**arguments)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_empty_batch(impl):
    q = torch.zeros(0, 8, 2, 16, device=helpers.DEVICE)
    out, lse = _attend(q, q, q, impl, grid=(2, 2, 2), return_lse=True)
    assert out.shape == q.shape and lse.shape == (0, 2, 8)
