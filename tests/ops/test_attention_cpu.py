"""The compiled attention of the CPU: every instruction set, threads, addresses, what must not get in."""

import itertools
import math

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import _native, dispatch
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.ops import attention_cpu
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close, check_call, check_op, samples

from . import helpers

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"extension not built: {_native.why_not()}")

NAMES = ("spacetime_attention", "block_sparse_attention")
HALF = torch.bfloat16
LEVELS = [
    pytest.param(level, dtype, id=f"{level}-{dtype}")
    for level, dtype in itertools.product(("generic", "avx2", "avx512", "avx512_bf16"), helpers.CPU_DTYPES)
    if (level, dtype) != ("avx512_bf16", torch.float32)
]


def _level(name, dtype):
    return torch.ops.pyvideo_native.attention_level(torch.empty(0, dtype=dtype), name)


def _at(name, level, dtype):
    """The compiled op of one instruction set."""
    if _level(level, dtype) != level:
        pytest.skip(f"this CPU has no {level}")
    function = getattr(torch.ops.pyvideo_native, name)
    return lambda *args: function(*args, level)


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _dense(s, heads, head_dim, dtype, kv_heads=None, **options):
    shapes = ((1, s, heads, head_dim), *[(1, s, kv_heads or heads, head_dim)] * 2)
    q, k, v = (_randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    rest = {
        "grid": (1, 1, s), "window": None, "stride": (1, 1, 1), "causal_time": False, "text_len": 0,
        "text_side": "suffix", "kv_lens": None, "scale": head_dim**-0.5, "return_lse": True, "precision": "native",
    }  # fmt: skip
    return {"q": q, "k": k, "v": v, **rest, **options}


# Every instruction set ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "dtype"), LEVELS)
@pytest.mark.parametrize("name", [*NAMES, "vae_attention"])
def test_every_instruction_set_matches_float64(name, level, dtype):
    op = OPS[name]
    ran = check_op(op, "cpu", "cpu", dtype, _at(name, level, dtype))
    assert ran == len(list(samples(op, dtype)))


@pytest.mark.parametrize(("level", "dtype"), LEVELS)
@pytest.mark.parametrize(
    ("tokens", "head_dim"), [(1, 1), (67, 3), (131, 32), (300, 40), (129, 64), (97, 96), (259, 128), (70, 256)]
)
def test_tiles_of_every_width(tokens, head_dim, level, dtype):
    # The last tile of queries has 1, 3, 44, ... of 64; the last step of keys the like, odd ones too.
    op = OPS["spacetime_attention"]
    kwargs = _dense(tokens, 2, head_dim, dtype, kv_heads=1)
    check_call(op, "cpu", op.bind(**kwargs), "dense", _at(op.name, level, dtype))


def test_the_plain_one_is_everywhere():
    for dtype in helpers.CPU_DTYPES:
        assert _level("generic", dtype) == "generic" and _level("", dtype) and _level("avx1024", dtype) == ""
    q = torch.zeros(1, 8, 1, 4)
    rest = ([2, 2, 2], None, [1, 1, 1], False, 0, "suffix", None, 0.5, False, "native", "avx1024")
    with pytest.raises(RuntimeError, match="this CPU has no avx1024"):
        torch.ops.pyvideo_native.spacetime_attention(q, q, q, *rest)


@pytest.mark.parametrize("dtype", helpers.CPU_DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_samples_of_a_models_head_dims(name, dtype):
    for head_dim in (64, 128):
        assert check_op(OPS[name], "cpu", "cpu", dtype, head_dim=head_dim)


# Large grids, every box that the kernel may choose -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "window", "stride", "causal", "text"),
    [
        ((5, 12, 17), (3, 5, 7), (1, 1, 1), False, 0),
        ((7, 11, 13), [(3, 4, 5), (7, 2, 13), (1, 11, 1), (4, 4, 4)], (1, 1, 1), False, 70),
        ((6, 16, 24), (3, 8, 12), (3, 4, 6), False, 5),
        ((9, 8, 8), (4, 5, 6), (2, 1, 3), True, 66),
        ((3, 1, 257), (2, 1, 65), (1, 1, 1), False, 0),
        ((67, 2, 3), None, (1, 1, 1), True, 1),
    ],
)
@pytest.mark.parametrize("dtype", helpers.CPU_DTYPES)
def test_windows_on_larger_grids(grid, window, stride, causal, text, dtype):
    op = OPS["spacetime_attention"]
    flat = None if window is None else list(itertools.chain(*window)) if isinstance(window, list) else window
    kwargs = _dense(
        math.prod(grid) + text, 4, 16, dtype, kv_heads=2, grid=grid, window=flat, stride=stride, causal_time=causal,
        text_len=text, text_side="prefix", kv_lens=torch.tensor([text // 2]) if text else None,
    )  # fmt: skip
    check_call(op, "cpu", op.bind(**kwargs), "windowed")


def test_a_wrong_kernel_is_seen():
    op = OPS["spacetime_attention"]
    kwargs = _dense(5 * 12 * 17, 1, 16, torch.float32, grid=(5, 12, 17), window=(3, 5, 7))
    for change in ({"window": (3, 5, 8)}, {"stride": (1, 1, 2)}, {"causal_time": True}, {"scale": 0.26}):

        def wrong(*args, change=change):
            values = dict(zip(op.arguments[:-1], args, strict=True))
            return dispatch.load(op, "cpu")(*op.bind(**{**values, **change}))

        with pytest.raises(Mismatch):
            check_call(op, "cpu", op.bind(**kwargs), "wrong", wrong)


# Threads, addresses ---------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", helpers.CPU_DTYPES)
def test_bitwise_equal_for_any_number_of_threads(dtype, threads):
    q, k, v = (_randn(2, 7 * 9 * 11, 3, 64, seed=i, dtype=dtype) for i in range(3))
    order = torch.rand(2, 3, 11, 11, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :4]
    counts = torch.full((2, 3, 11), 4)

    def run():
        options = {"grid": (7, 9, 11), "return_lse": True, "impl": "cpu"}
        yield from pv.spacetime_attention(q, k, v, **options)
        yield from pv.spacetime_attention(q, k, v, window=(3, 4, 5), causal_time=True, **options)
        yield from pv.block_sparse_attention(q, k, v, order, counts, block_size=64, return_lse=True, impl="cpu")

    threads(1)
    alone = list(run())
    for number in (2, 2, 3):
        threads(number)
        assert all(torch.equal(a, b) for a, b in zip(alone, run(), strict=True))


def test_offsets_pass_two_to_the_31():
    # Samples of a batch, and heads, 2^31 elements apart. Only the pages that hold tokens are ever touched.
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        storage = torch.empty(2**31 + 4096, dtype=HALF)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    lists = torch.zeros(2, 2, 1, 1, dtype=torch.int32), torch.ones(2, 2, 1, dtype=torch.int32)
    for strides, shape in (((2**31, 32, 16, 1), (2, 16, 2, 16)), ((2**31, 16, 2**31 + 64, 1), (1, 16, 2, 16))):
        far = storage.as_strided(shape, strides)
        far.copy_(_randn(*shape))
        near = far.clone()
        for window in (None, (1, 2, 2)):
            options = {"grid": (2, 2, 4), "window": window, "impl": "cpu"}
            assert torch.equal(*(pv.spacetime_attention(x, x, x, **options) for x in (far, near)))
        listed = [x[: shape[0]] for x in lists]
        assert torch.equal(
            *(pv.block_sparse_attention(x, x, x, *listed, block_size=64, impl="cpu") for x in (far, near))
        )


# What must not get in, and what must ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", helpers.CPU_DTYPES)
@pytest.mark.parametrize("window", [None, (1, 2, 3)])
def test_padding_text_never_gets_in(window, dtype):
    q = _randn(1, 15, 2, 16, dtype=dtype)
    dirty = q.clone()
    dirty[:, 13:] = float("nan")
    options = {"grid": (1, 3, 4), "window": window, "text_len": 3, "kv_lens": torch.tensor([1]), "impl": "cpu"}
    assert torch.equal(*(pv.spacetime_attention(q, kv, kv, **options) for kv in (q, dirty)))


@pytest.mark.parametrize("dtype", helpers.CPU_DTYPES)
def test_padding_of_blocks_never_gets_in(dtype):
    q = _randn(1, 96, 1, 16, dtype=dtype)
    dirty = q.clone()
    dirty[:, 40:64] = dirty[:, 94:] = float("nan")
    lists = torch.tensor([[[[1, 0], [0, 1]]]]), torch.full((1, 1, 2), 2)
    options = {"block_size": 64, "kv_block_lens": torch.tensor([40, 30]), "impl": "cpu"}
    assert torch.equal(*(pv.block_sparse_attention(q, kv, kv, *lists, **options) for kv in (q, dirty)))


@pytest.mark.parametrize("dtype", helpers.CPU_DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_not_finite_stays_so(where, bad, dtype):
    tensors = {name: _randn(1, 90, 1, 16, seed=i, dtype=dtype) for i, name in enumerate("qkv")}
    tensors[where][0, 41, 0, 5] = bad
    got, expected = (
        pv.spacetime_attention(*tensors.values(), grid=(1, 9, 10), return_lse=True, impl=impl)
        for impl in ("cpu", "reference")
    )
    for mine, oracle in zip(got, expected, strict=True):
        assert torch.equal(mine.isnan(), oracle.isnan())
        assert torch.equal(mine[mine.isinf()], oracle[oracle.isinf()])


@pytest.mark.parametrize("word", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_a_nan_of_any_bits_is_a_nan(word):
    q, k, v = (_randn(1, 70, 1, 16, seed=i) for i in range(3))
    q.view(torch.int32)[0, 3, 0, 2] = word
    out, lse = pv.spacetime_attention(q, k, v, grid=(1, 7, 10), return_lse=True, impl="cpu")
    assert bool(out[0, 3].isnan().all()) and lse.isnan().nonzero().tolist() == [[0, 0, 3]]


# Contract -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "vae_attention"])
def test_contract(name):
    helpers.check_op_contract(name, impl="cpu", grad=False)


def test_fullgraph():
    q, k, v = (_randn(1, 60, 2, 16, seed=i) for i in range(3))
    helpers.check_fullgraph(
        pv.spacetime_attention, q, k, v, grid=(3, 4, 5), window=(2, 2, 3), return_lse=True, impl="cpu"
    )


def test_gradients_stand_on_its_lse():
    kwargs = _dense(60, 2, 16, torch.float64, kv_heads=1, grid=(3, 4, 5), window=(2, 3, 3))
    options = {name: kwargs[name] for name in ("grid", "window")}

    def gradients(dtype, impl):
        leaves = [kwargs[name].to(dtype).requires_grad_() for name in "qkv"]
        out, lse = pv.spacetime_attention(*leaves, **options, return_lse=True, impl=impl)
        return torch.autograd.grad((out.sin().sum() + lse.cos().sum()), leaves)

    exact, eager = gradients(torch.float64, "reference"), gradients(torch.float32, "reference")
    for mine, reference, low in zip(gradients(torch.float32, "cpu"), exact, eager, strict=True):
        assert_close(mine, reference, low)


def test_other_dtypes_and_codes_are_refused():
    for dtype in (torch.float16, torch.float64):
        q = torch.zeros(1, 8, 1, 4, dtype=dtype)
        with pytest.raises(UnsupportedError, match="takes float32, bfloat16; got"):
            pv.spacetime_attention(q, q, q, grid=(2, 2, 2), impl="cpu")
        assert pv.spacetime_attention(q, q, q, grid=(2, 2, 2), window=(1, 2, 2)).dtype == dtype
    op = OPS["spacetime_attention"]
    with pytest.raises(UnsupportedError, match="'int8' is not built in impl 'cpu'"):
        dispatch.load(op, "cpu")(*op.bind(**_dense(8, 1, 4, torch.float32, precision="int8")))


def test_auto_takes_what_is_faster(monkeypatch):
    op = OPS["spacetime_attention"]

    def first(dtype, **options):
        args = op.bind(**_dense(24, 1, 4, dtype, **options))
        return dispatch.order(op, torch.device("cpu"), dtype, 4, args)[0]

    for has, dense in ((True, "cpu"), (False, "sdpa")):
        monkeypatch.setattr(attention_cpu, "multiplies_bf16", lambda has=has: has)
        frames = torch.zeros(1, 1, 4, 8, dtype=HALF)
        wide = OPS["vae_attention"]
        assert dispatch.order(wide, frames.device, HALF, None, (frames, frames, frames, False, 1.0))[0] == dense
        assert first(HALF) == dense and first(torch.float32) == first(torch.float16) == "sdpa"
        for dtype in (HALF, torch.float32):
            assert (
                first(dtype, grid=(2, 3, 4), window=(1, 3, 4))
                == first(dtype, grid=(2, 3, 4), causal_time=True)
                == "cpu"
            )
            assert first(dtype, grid=(2, 3, 4), window=(2, 3, 4)) == (dense if dtype == HALF else "sdpa")
            padded = {"text_len": 1, "grid": (1, 1, 23), "kv_lens": torch.tensor([0])}
            assert first(dtype, **padded) == "cpu"
    why = dispatch.explain(op, torch.device("cpu"), torch.float32, op.bind(**_dense(24, 1, 4, torch.float32)))
    assert why[0][0] == "sdpa" and why[0][2].endswith("; PyTorch's first for dense attention")


def test_a_scale_below_floats_and_no_tokens():
    x = torch.randn(1, 8, 2, 16)
    out = pv.spacetime_attention(x, x, x, grid=(2, 2, 2), scale=1e-50, impl="cpu")
    assert torch.allclose(out, x.mean(1, keepdim=True).expand_as(x), atol=1e-6)
    empty = torch.randn(1, 3, 0, 5)
    assert pv.vae_attention(empty, empty, empty, impl="cpu").shape == empty.shape
