import itertools

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import _native, dispatch
from pyvideo_kernels.configs import forced_arch
from pyvideo_kernels.configs.spacetime_attention import select
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.reference import spacetime_attention as oracle
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close, check_op, samples, to_float64

from . import helpers

NAME = "spacetime_attention"
OP = OPS[NAME]


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _qkv(s, heads=2, head_dim=16, kv_heads=None, seed=0, dtype=torch.float32):
    shapes = ((1, s, heads, head_dim), *[(1, s, kv_heads or heads, head_dim)] * 2)
    return [_randn(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("impl", "device", "dtype"), [p for p in helpers.implementations(NAME) if p.values[0] != "sdpa"]
)
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


@pytest.mark.skipif(helpers.GPU, reason="on a card the samples run the variant of that card")
def test_descriptor_variant_matches_float64(monkeypatch):
    from pyvideo_kernels.kernels import spacetime_attention as kernels

    used = []
    monkeypatch.setattr(kernels, "select", lambda *a, **k: used.append(select(*a, **k)) or used[-1])
    with forced_arch("sm_90"):
        check_op(OP, "triton", "cpu", torch.float16)
    # One whose rows cannot be addressed by TMA would be a bug of the samples: all the dense ones go by descriptors.
    assert len(used) == 7 and all(config.descriptors for config in used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_matches_float64_where_it_can_run(dtype):
    ran = 0
    for kwargs in samples(OP, dtype):
        args = OP.bind(**{**kwargs, "return_lse": False})
        refusal = "is dense" if kwargs["window"] else "cannot mask every key" if kwargs["grid"] == (0, 0, 0) else None
        if refusal:
            with pytest.raises(UnsupportedError, match=refusal):
                dispatch.load(OP, "sdpa")(*args)
            continue
        exact, low = (dispatch.load(OP, "reference")(*a)[0] for a in (to_float64(args), args))
        assert_close(dispatch.load(OP, "sdpa")(*args)[0], exact, low)
        ran += 1
    assert ran == 6


def test_contract():
    for kwargs in itertools.islice(samples(OP, torch.float32), 3):
        torch.library.opcheck(getattr(torch.ops.pyvideo, NAME), (*OP.bind(**kwargs), "reference"))


def test_one_graph_serves_every_grid():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda q, grid: pv.spacetime_attention(q, q, q, grid=grid, return_lse=True),
        fullgraph=True, dynamic=True, backend=backend,
    )  # fmt: skip
    for grid in ((4, 4, 4), (3, 5, 7), (2, 3, 4)):
        q = _randn(1, grid[0] * grid[1] * grid[2], 2, 16)
        expected = pv.spacetime_attention(q, q, q, grid=grid, return_lse=True)
        torch.testing.assert_close(compiled(q, grid), expected, rtol=0, atol=0)
    assert len(graphs) == 1


# Triton against torch's own attention, and against itself ------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
def test_triton_agrees_with_torch_on_grouped_heads(kv_heads):
    q, k, v = (t.to(helpers.DEVICE) for t in _qkv(21, heads=6, kv_heads=kv_heads, head_dim=24))
    out = pv.spacetime_attention(q, k, v, grid=(1, 3, 7), impl="triton")
    k, v = (t.repeat_interleave(6 // kv_heads, 2) for t in (k, v))
    exact, eager = (
        torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2).to(dtype) for t in (q, k, v)))
        for dtype in (torch.float64, torch.float32)
    )
    assert_close(out, exact.transpose(1, 2), eager.transpose(1, 2))


def test_triton_repeats_bitwise():
    q, k, v = (t.to(helpers.DEVICE) for t in _qkv(37, heads=1))
    first, second = (pv.spacetime_attention(q, k, v, grid=(1, 1, 37), return_lse=True, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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
    for arch in ("cpu", "sm_90"):
        with forced_arch(arch):
            out, expected = (pv.spacetime_attention(x, x, x, grid=(1, 4, 5), impl="triton") for x in (far, near))
        assert torch.equal(out, expected)


@pytest.mark.parametrize("side", ["suffix", "prefix"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])  # by pointers, by descriptors
@pytest.mark.skipif(helpers.GPU, reason="architectures are forced in the interpreter only")
def test_triton_never_lets_padding_text_in(arch, side):
    q = _randn(1, 9, 1, 16, dtype=torch.float16)
    padding = slice(1, 3) if side == "prefix" else slice(7, 9)
    dirty = q.clone()
    dirty[:, padding] = float("nan")

    def run(kv):
        options = {"grid": (1, 2, 3), "text_len": 3, "text_side": side, "kv_lens": torch.tensor([1])}
        return pv.spacetime_attention(q, kv, kv, **options, impl="triton")

    with forced_arch(arch):
        assert torch.equal(run(dirty), run(q))


@pytest.mark.parametrize("side", ["suffix", "prefix"])
@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton", helpers.CPU])
def test_text_counts_past_either_end_are_clamped(impl, side):
    device = helpers.device_of(impl)
    q = _randn(2, 9, 1, 16).to(device)

    def run(*lens):
        lens = torch.tensor(lens, device=device)
        return pv.spacetime_attention(q, q, q, grid=(1, 2, 3), text_len=3, text_side=side, kv_lens=lens, impl=impl)

    if impl == "sdpa" and helpers.GPU:
        with pytest.raises(UnsupportedError, match="would leave its flash kernels"):
            run(0, 3)
        return
    assert torch.equal(run(-5, 1000), run(0, 3))
    assert not torch.equal(run(-5, 1000), run(1, 3))


@pytest.mark.skipif(helpers.GPU, reason="architectures are forced in the interpreter only")
def test_views_that_descriptors_cannot_address_go_by_pointers():
    from pyvideo_kernels.kernels.spacetime_attention import descriptors_can_address

    q, k, v = _qkv(18, head_dim=36, dtype=torch.float16)  # rows of 72 bytes
    assert not descriptors_can_address(q, k, v)
    assert not descriptors_can_address(_randn(1, 1, 1, 16).expand(1, 4, 1, 16))
    assert descriptors_can_address(_randn(1, 4, 3, 16)[:, :, 1:2])
    with forced_arch("sm_90"):
        out = pv.spacetime_attention(q, k, v, grid=(2, 3, 3), impl="triton")
    exact, low = (
        pv.spacetime_attention(*(t.to(dtype) for t in (q, k, v)), grid=(2, 3, 3), impl="reference")
        for dtype in (torch.float64, torch.float16)
    )
    assert_close(out, exact, low)


# What the samples would miss -----------------------------------------------------------------------------------


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
        {"k": lambda a: a["k"].flip(2)},
        {"v": lambda a: a["k"]},
    ],
    ids=["no lens", "lens off by one", "side", "scale", "head order", "v is k"],
)
def test_the_samples_see_a_wrong_kernel(change):
    with pytest.raises(Mismatch):
        check_op(OP, "triton", helpers.DEVICE, torch.float16, call=_wrong(**change))


def test_oracle_is_the_same_in_chunks(monkeypatch):
    kwargs = next(itertools.islice(samples(OP, torch.float64), 3, None))
    whole = oracle.spacetime_attention(**kwargs)
    monkeypatch.setattr(oracle, "_MAX_SCORES", 700)
    for a, b in zip(oracle.spacetime_attention(**kwargs), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


# Windows and causal time: the oracle against the definition, written out again -----------------------------------


def _axis_keys(i, length, window, stride, causal):
    window = min(window, length)
    if causal:
        block_end = min(i // stride * stride + stride, length) - 1
        return set(range(max(block_end - window + 1, 0), i + 1))
    leader = min(i // stride * stride + stride // 2, length - 1)
    start = min(max(leader - window // 2, 0), length - window)
    return set(range(start, start + window))


@pytest.mark.parametrize(
    ("window", "stride", "causal", "text", "side"),
    [
        ((3, 3, 3), (1, 1, 1), False, 0, "suffix"),
        ((2, 4, 3), (1, 2, 3), False, 2, "suffix"),
        ((9, 2, 2), (2, 2, 2), False, 3, "prefix"),
        ([(1, 2, 5), (4, 4, 4)], (1, 1, 2), False, 0, "suffix"),
        ((2, 3, 3), (1, 1, 1), True, 2, "prefix"),
        ((3, 2, 2), (2, 1, 1), True, 0, "suffix"),
        (None, (1, 1, 1), True, 1, "suffix"),
    ],
)
def test_windows_see_exactly_the_keys_of_the_definition(window, stride, causal, text, side):
    grid = (4, 4, 5)
    cells = list(itertools.product(*map(range, grid)))
    tokens = [None] * text + cells if side == "prefix" else cells + [None] * text
    rows = [window or grid] * 2 if window is None or isinstance(window[0], int) else window
    mask = torch.zeros(2, len(tokens), len(tokens), dtype=torch.bool)
    for head, (i, query), (j, key) in itertools.product(range(2), enumerate(tokens), enumerate(tokens)):
        mask[head, i, j] = query is None or key is None or all(
            key[a] in _axis_keys(query[a], grid[a], rows[head][a], stride[a], causal and a == 0) for a in range(3)
        )  # fmt: skip
    q, k, v = _qkv(len(tokens), dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask)
    options = {"grid": grid, "window": window, "stride": stride, "causal_time": causal}
    got = pv.spacetime_attention(q, k, v, **options, text_len=text, text_side=side)
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


# Merging partial results -----------------------------------------------------------------------------------------


def test_merged_parts_equal_attention_over_all_keys():
    q, k, v, k2, v2 = (
        t.to(helpers.DEVICE) for t in (*_qkv(20, dtype=torch.float16), *_qkv(20, seed=7, dtype=torch.float16)[1:])
    )
    parts = [
        pv.spacetime_attention(q, *kv, grid=(1, 4, 5), return_lse=True, impl=impl)
        for kv, impl in (((k, v), "triton"), ((k2, v2), "reference"))
    ]
    out, lse = pv.merge_attention(*zip(*parts, strict=True))

    def whole(dtype):
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype), torch.cat((k, k2), 1).to(dtype)) * 16**-0.5
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), torch.cat((v, v2), 1).to(dtype))
        return mixed, scores.logsumexp(-1)

    exact, eager = whole(torch.float64), whole(torch.float32)
    assert_close(out, exact[0], eager[0].half())
    torch.testing.assert_close(lse.double(), exact[1], rtol=0, atol=1e-5)
    swapped, _ = pv.merge_attention([parts[0][0], parts[1][0]], [parts[1][1], parts[0][1]])
    with pytest.raises(Mismatch):
        assert_close(swapped, exact[0], eager[0].half())


def test_merging_ignores_parts_without_keys():
    out, lse = _randn(1, 3, 2, 4), _randn(1, 2, 3)
    empty = torch.full_like(lse, -float("inf"))
    merged, merged_lse = pv.merge_attention([torch.full_like(out, float("nan")), out], [empty, lse])
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse)
    merged, merged_lse = pv.merge_attention([out, out], [empty, empty])
    assert not merged.any() and torch.equal(merged_lse, empty)


def test_merge_refuses_mismatched_parts():
    out, lse = _randn(1, 3, 2, 4), _randn(1, 2, 3)
    with pytest.raises(ValueError, match="one for each of the outs"):
        pv.merge_attention([out, out], [lse])
    with pytest.raises(ShapeError, match=r"`lses\[1\]` must be \[1, 2, 3\]"):
        pv.merge_attention([out, out], [lse, lse.transpose(1, 2)])
    with pytest.raises(DTypeError, match=r"`outs\[1\]` must be torch.float32"):
        pv.merge_attention([out, out.half()], [lse, lse])


# Which implementation, and what is refused -----------------------------------------------------------------------


def test_auto_falls_through_to_what_can_run():
    q, k, v = _qkv(8)

    def ran(**options):
        before = dispatch.calls()
        pv.spacetime_attention(q, k, v, grid=(2, 2, 2), **options)
        return {i for (op, i), n in dispatch.calls().items() if op == NAME and n > before.get((op, i), 0)}

    assert ran() == {"sdpa"}
    assert ran(return_lse=True) == ran(window=(1, 1, 1)) == {"cpu" if _native.available() else "reference"}


def test_triton_refuses_what_it_has_not():
    for head_dim, dtype, words in ((257, torch.float32, "head_dim up to 256"), (16, torch.float64, "refuses float64")):
        q, k, v = (t.to(helpers.DEVICE) for t in _qkv(2, head_dim=head_dim, dtype=dtype))
        with pytest.raises(UnsupportedError, match=words):
            pv.spacetime_attention(q, k, v, grid=(1, 1, 2), impl="triton")


_LENS = {"text_len": 2, "grid": (1, 2, 3)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(1, 8, 16)}, ShapeError, "`q` must have 4 dimensions"),
        ({"k": torch.zeros(1, 8, 3, 16)}, ShapeError, r"`k` must be \[1, 8, a divisor of 2, 16\]"),
        ({"v": torch.zeros(1, 8, 1, 16)}, ShapeError, r"`v` must be \[1, 8, 2, 16\]"),
        ({"v": torch.zeros(1, 8, 2, 16).half()}, DTypeError, "`v` must be torch.float32 like `q`"),
        ({"k": torch.zeros(1, 8, 16, 2).transpose(2, 3)}, ShapeError, "`k` must have a contiguous last dim"),
        ({"k": torch.zeros(1, 8, 2, 16, device="meta")}, DeviceError, "`k` must be on cpu"),
        ({"grid": (2, 2, 3)}, ShapeError, r"`q` must be \[B, T\*H\*W \+ text_len"),
        ({"grid": (8,)}, ValueError, "`grid` must be three integers"),
        ({"grid": (2, 2, 2.0)}, ValueError, "`grid` must be three integers"),
        ({"grid": (2, 2, -2)}, ValueError, "`grid` must be three integers"),
        ({"text_len": -1}, ValueError, "`text_len` must be an integer of at least 0"),
        ({"text_side": "left"}, ValueError, "`text_side` must be 'suffix' or 'prefix'"),
        ({"window": (1, 1)}, ValueError, "`window` must be three integers"),
        ({"window": (0, 1, 1)}, ValueError, "`window` must be three integers"),
        ({"window": [(1, 1, 1)] * 3}, ValueError, "one row for each of the 2 heads"),
        ({"stride": (2, 1, 1)}, ValueError, r"`stride` must be \(1, 1, 1\) without a window"),
        ({"window": (1, 2, 2), "stride": (2, 1, 1)}, ValueError, "`stride` must be at most the window"),
        ({"kv_lens": torch.zeros(1, dtype=torch.int32)}, ValueError, "`kv_lens` must be None without text"),
        ({**_LENS, "kv_lens": [1]}, DTypeError, "`kv_lens` must be an int32 or int64 tensor; got list"),
        ({**_LENS, "kv_lens": torch.zeros(2, dtype=torch.int32)}, ShapeError, r"`kv_lens` must be \[1\]"),
        ({"scale": 0.0}, ValueError, "`scale` must be a positive number"),
        ({"scale": float("nan")}, ValueError, "`scale` must be a positive number"),
        ({"precision": "exact"}, ValueError, "`precision` must be 'native', 'int8' or 'fp8'"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
        ({"impl": "sdpa", "return_lse": True}, UnsupportedError, "gives no lse"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    arguments = {"grid": (2, 2, 2), **{n: torch.zeros(1, 8, 2, 16) for n in "qkv"}, **change}
    with pytest.raises(error, match=words):
        pv.spacetime_attention(**arguments)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton", helpers.CPU])
def test_empty_batch(impl):
    q = torch.zeros(0, 8, 2, 16, device=helpers.device_of(impl))
    out, lse = torch.ops.pyvideo.spacetime_attention(
        q, q, q, (2, 2, 2), None, (1, 1, 1), False, 0, "suffix", None, 0.25, False, "native", impl
    )
    assert out.shape == q.shape and lse.shape == (0,)
    if impl not in ("triton", "cpu"):
        none = (None, (1, 1, 1), False, 0, "suffix", None, 0.25, False, "native", impl)
        assert torch.ops.pyvideo.spacetime_attention(*[q.double()] * 3, (2, 2, 2), *none)[1].dtype == torch.float64


@pytest.mark.parametrize("window", [None, (1, 3, 3)])
@pytest.mark.parametrize("impl", ["reference", "triton", helpers.CPU])
def test_a_nan_is_not_taken_for_a_row_that_saw_nothing(impl, window):
    """An lse of -inf would drop the row in a merge, and the NaN with it."""
    q, k, v = (t.to(helpers.device_of(impl)) for t in _qkv(20))
    q[0, 7, 1, 3] = float("nan")
    out, lse = pv.spacetime_attention(q, k, v, grid=(1, 4, 5), window=window, return_lse=True, impl=impl)
    broken = torch.zeros(1, 2, 20, dtype=torch.bool, device=lse.device)
    broken[0, 1, 7] = True
    assert torch.equal(lse.isnan(), broken)
    assert torch.equal(out.isnan().any(-1), broken.transpose(1, 2))
