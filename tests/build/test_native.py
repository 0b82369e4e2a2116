"""The compiled CPU kernels against float64: odd shapes, strides, threads, rounding and special values.

The samples of each op run through impl="cpu" in tests/ops; here is what those samples do not reach.
"""

import itertools
import zlib

import pytest
import torch

from pyvideo_kernels import _native, dispatch
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.reference.patch_embed3d import patchify
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import assert_close, check_op, to_float64
from tests.ops.helpers import check_op_contract

if not _native.available():
    pytest.skip(f"no compiled extension: {_native.why_not()}", allow_module_level=True)

CPU_OPS = [name for name, devices in _native._KERNELS.items() if "cpu" in devices]
# Ops on rows of [B, S, D]; the others take [B, S, heads, head_dim] and have their own tests below, attention in
# tests/ops/test_attention_cpu.py.
ROW_OPS = [name for name in CPU_OPS if not name.startswith("qk_norm_rope") and "attention" not in name]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True, params=["avx512", "avx512, past the cache", "any CPU"])
def path(request):
    """Every test on each path that a kernel may have: a test cannot wait for results that are larger than a cache."""
    extension, _ = _native._load()
    allowed = extension.allow_avx512(request.param != "any CPU")
    cache = extension.assume_cache_bytes(0 if "past" in request.param else -1)
    yield
    extension.allow_avx512(allowed)
    extension.assume_cache_bytes(cache)


def inputs(name, shape, dtype):
    """Arguments of an op at ``shape``, modulation in fp32 beside ``dtype`` data, as the models have it."""
    g = torch.Generator().manual_seed(zlib.crc32(f"{name} {shape}".encode()))
    b, d = shape[0], shape[-1]

    def new(*size, dtype=dtype):
        return torch.randn(*size, generator=g).to(dtype)

    f32 = torch.float32
    values = {
        "x": new(*shape), "y": new(*shape), "latent": new(*shape), "cond": new(*shape), "uncond": new(*shape),
        "gate": new(b, 1, d, dtype=f32), "scale": new(b, 1, d, dtype=f32), "shift": new(*shape),
        "weight": new(d), "bias": new(d, dtype=f32), "eps": 1e-6, "silu": True,
        "guidance_scale": 4.5, "sigma": 0.9, "sigma_next": 0.75,
        "sample": new(*shape), "last_sample": new(*shape), "history": [new(*shape, dtype=f32), new(*shape)],
        "corrector": [0.9, 0.13, -0.05, 0.02], "predictor": [0.93, 0.11, -0.04, 0.03],
        "groups": 1, "per_frame": False,
    }  # fmt: skip
    if name == "pixel_norm_silu":
        values |= {"scale": new(b, d, dtype=f32), "shift": new(b, d)}
    if name == "group_norm_silu":
        values |= {"scale": None, "shift": None}  # of clips [B, T, H, W, C], which the op's own samples have
    return OPS[name].bind(**{key: values[key] for key in OPS[name].arguments[:-1]})


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def run(name, args):
    return as_tuple(getattr(_native, name)(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CPU_OPS)
def test_samples(name, dtype):
    assert check_op(OPS[name], "cpu", "cpu", dtype) > 0


@pytest.mark.parametrize("name", ["qk_norm_rope_", "unipc_step"])
def test_contract(name):
    # The one that writes over its arguments, and the one that takes a list and returns a copy of an argument.
    check_op_contract(name, impl="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROW_OPS)
def test_odd_shapes(name, dtype):
    # One element, widths around every vector length, primes, and enough rows that threads share them unevenly.
    for shape in ((1, 1, 1), (2, 3, 7), (3, 5, 17), (1, 2, 129), (2, 67, 1537), (1, 911, 96), (2, 19, 256)):
        args = inputs(name, shape, dtype)
        reference = dispatch.load(OPS[name], "reference")
        expected, eager = as_tuple(reference(*to_float64(args))), as_tuple(reference(*args))
        for out, ref64, low in zip(run(name, args), expected, eager, strict=True):
            assert out.is_contiguous()
            assert_close(out, ref64, low, f"{name} {shape}")


@pytest.mark.parametrize("name", ROW_OPS)
def test_no_rows(name):
    for out in run(name, inputs(name, (0, 4, 8), torch.float32)):
        assert out.shape == (0, 4, 8)


@pytest.mark.parametrize("name", ROW_OPS)
def test_same_bits_with_any_number_of_threads(name):
    args = inputs(name, (2, 331, 515), torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(name, args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROW_OPS)
def test_lines_written_whole(name, dtype):
    # Rows of whole cache lines: the only ones that are written past the cache. Of their values no bit may differ.
    args = inputs(name, (2, 331, 256), dtype)
    extension, _ = _native._load()
    before = extension.assume_cache_bytes(1 << 40)
    kept = run(name, args)
    extension.assume_cache_bytes(before)
    for out, other in zip(run(name, args), kept, strict=True):
        assert torch.equal(out, other)


@pytest.mark.parametrize("name", [name for name in ROW_OPS if name != "group_norm_silu"])
def test_nan_stays_in_its_row(name):
    for value in (float("nan"), float("inf")):
        args = inputs(name, (1, 4, 33), torch.float32)
        args[0][0, 2, 5] = value
        for out in run(name, args):
            assert not torch.isfinite(out[0, 2, 5])
            assert torch.isfinite(out[0, [0, 1, 3]]).all()


def test_nan_stays_in_its_group():
    args = list(inputs("group_norm_silu", (2, 40, 12), torch.float32))
    args[OPS["group_norm_silu"].arguments.index("groups")] = 3
    args[0][1, 37, 5] = float("nan")
    (out,) = run("group_norm_silu", args)
    assert out[1, :, 4:8].isnan().all()
    assert torch.isfinite(out[0]).all() and torch.isfinite(out[1][:, [*range(4), *range(8, 12)]]).all()


def rope_inputs(batch, tokens, heads, head_dim, dtype, norm, layout):
    g = torch.Generator().manual_seed(tokens * head_dim + heads)
    q, k = (torch.randn(batch, tokens, heads, head_dim, generator=g).to(dtype) for _ in range(2))
    size = heads * head_dim if norm == "across_heads" else head_dim
    weights = [None if norm == "none" else torch.randn(size, generator=g) for _ in range(2)]
    angle = torch.rand(tokens, head_dim // 2, generator=g) * 6
    angle = angle.repeat_interleave(2, -1) if layout == "interleaved" else angle.repeat(1, 2)
    return (q, k, *weights, None, None, angle.cos(), angle.sin(), norm, "rms", layout, 0, -1, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("norm", ["across_heads", "per_head", "none"])
def test_qk_norm_rope_at_odd_shapes(norm, layout, dtype):
    reference = dispatch.load(OPS["qk_norm_rope"], "reference")
    for shape in (
        (1, 1, 1, 2),
        (2, 3, 5, 6),
        (1, 67, 3, 34),
        (1, 411, 2, 48),
        (1, 9, 3, 128),
        (0, 3, 2, 8),
        (2, 0, 2, 8),
    ):
        args = rope_inputs(*shape, dtype, norm, layout)
        for out, ref64, low in zip(_native.qk_norm_rope(*args), reference(*to_float64(args)), reference(*args)):
            assert out.is_contiguous() and out.shape == shape
            assert_close(out, ref64, low, f"{norm} {layout} {shape}")


def test_qk_norm_rope_has_the_same_bits_with_any_number_of_threads():
    args = rope_inputs(2, 331, 4, 64, torch.bfloat16, "across_heads", "interleaved")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(_native.qk_norm_rope(*args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("norm", ["across_heads", "per_head", "none"])
def test_qk_norm_rope_in_place_is_bitwise_the_op_out_of_place(norm, layout, dtype):
    for shape in ((1, 1, 1, 2), (2, 3, 5, 6), (1, 67, 3, 34), (2, 331, 4, 64), (0, 3, 2, 8), (2, 0, 2, 8)):
        for weighted in (True, False):
            q, k, *rest = rope_inputs(*shape, dtype, norm, layout)
            if not weighted:
                rest[:2] = None, None
            expected = _native.qk_norm_rope(q, k, *rest)
            assert _native.qk_norm_rope_(q, k, *rest) is None
            assert torch.equal(q, expected[0]) and torch.equal(k, expected[1]), shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["across_heads", "per_head"])
def test_qk_norm_rope_in_place_writes_only_where_its_views_are(norm, dtype):
    # Views of one buffer that starts off any vector boundary: packed, planar, tokens first, heads apart.
    heads, head_dim = 3, 34
    for order in ((0, 1, 2, 3, 4), (0, 2, 1, 3, 4), (1, 0, 2, 3, 4), (0, 3, 1, 2, 4)):
        sizes = [2, 5, 3, heads, head_dim]  # batch, tokens, (q, k, v), heads, head_dim
        buffer = torch.randn(1 + 2 * 5 * 3 * heads * head_dim).to(dtype)
        packed = buffer[1:].view([sizes[i] for i in order]).permute([order.index(i) for i in range(5)])
        _, _, q_weight, k_weight, _, _, cos, sin = rope_inputs(2, 5, heads, head_dim, dtype, norm, "interleaved")[:8]
        rest = q_weight, k_weight, None, None, cos[1:4], sin[1:4], norm, "rms", "interleaved", 1, 4, 1e-6
        expected = packed.clone()
        expected[:, :, 0], expected[:, :, 1] = _native.qk_norm_rope(packed[:, :, 0], packed[:, :, 1], *rest)
        first = buffer[0].item()
        _native.qk_norm_rope_(packed[:, :, 0], packed[:, :, 1], *rest)
        assert torch.equal(packed, expected), order
        assert buffer[0].item() == first


def test_qk_norm_rope_in_place_has_the_same_bits_with_any_number_of_threads():
    args = rope_inputs(2, 331, 4, 64, torch.bfloat16, "across_heads", "interleaved")
    expected = _native.qk_norm_rope(*args)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            q, k = args[0].clone(), args[1].clone()
            _native.qk_norm_rope_(q, k, *args[2:])
            assert torch.equal(q, expected[0]) and torch.equal(k, expected[1]), threads
    finally:
        torch.set_num_threads(before)


def unipc_inputs(n, history, dtypes, *, uncond=True, last=True):
    """A step over n values; ``dtypes`` are taken in turn by the tensors, in the order of the schema."""
    g = torch.Generator().manual_seed(n + history)
    turn = itertools.cycle(dtypes)

    def new():
        return torch.randn(n, generator=g).to(next(turn))

    sample, cond = new(), new()
    guide, previous = new() if uncond else None, new() if last else None
    predictor = [0.9, 0.2, -0.07, 0.03, 0.02, -0.01, 0.004][: 2 + history]
    corrector = [0.95, 0.1, -0.04, 0.05, -0.02, 0.01, 0.003][: 2 + history] if last else []
    return sample, cond, guide, previous, [new() for _ in range(history)], 5.0, 0.8, corrector, predictor


@pytest.mark.parametrize("history", [0, 1, 2, 3, 5])
def test_unipc_step_of_any_order_in_any_mixture_of_dtypes(history):
    reference = dispatch.load(OPS["unipc_step"], "reference")
    f32, bf16 = DTYPES
    for dtypes in ((f32,), (bf16,), (f32, bf16, bf16), (bf16, f32)):
        for options in ({}, {"uncond": False}, {"last": False}, {"uncond": False, "last": False}):
            args = unipc_inputs(1025, history, dtypes, **options)
            got, exact = _native.unipc_step(*args), reference(*to_float64(args))
            for out, ref64, low in zip(got, exact, reference(*args), strict=True):
                assert out.dtype == dtypes[0] and out.is_contiguous()
                assert_close(out, ref64, low, f"{dtypes} {options}")
            # Lengths around the blocks that the kernel works in: a value does not depend on its place in one.
            for n in (0, 1, 127, 129, 300):
                part = [a[:n] if isinstance(a, torch.Tensor) else a for a in args]
                part[4] = [h[:n] for h in args[4]]
                for out, whole in zip(_native.unipc_step(*part), got, strict=True):
                    assert torch.equal(out, whole[:n]), f"{n} {dtypes} {options}"


def test_unipc_step_reads_misaligned_and_permuted_inputs_and_leaves_them_alone():
    reference = dispatch.load(OPS["unipc_step"], "reference")
    args = unipc_inputs(1 + 6 * 35, 2, DTYPES)

    def view(t):
        return t[1:].view(5, 6, 7).permute(2, 0, 1)

    args = (*map(view, args[:4]), [view(t) for t in args[4]], *args[5:])
    before = to_float64(args)
    out = _native.unipc_step(*args)
    for got, exact, low in zip(out, reference(*before), reference(*args), strict=True):
        assert_close(got, exact, low)
    for now, then in zip((*args[:4], *args[4]), (*before[:4], *before[4]), strict=True):
        assert torch.equal(now.double(), then)


def test_unipc_step_without_a_corrector_ignores_its_infinities():
    args = list(unipc_inputs(130, 1, DTYPES[:1], last=False))
    args[4][0][3] = float("inf")
    prev, _, corrected = _native.unipc_step(*args)
    assert torch.equal(corrected, args[0])
    assert prev[3].isinf() and torch.isfinite(prev[4:]).all()


def test_unipc_step_refuses_a_history_of_another_dtype():
    args = list(unipc_inputs(8, 1, DTYPES))
    args[4] = [args[4][0].half()]
    with pytest.raises(UnsupportedError, match=r"unipc_step.*float32, bfloat16.*float16"):
        _native.unipc_step(*args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patchify_packs_any_patch_of_any_view(dtype):
    pack = _native.part("patchify")
    g = torch.Generator().manual_seed(11)
    for patch in ((1, 1, 1), (1, 2, 2), (2, 3, 1), (3, 1, 4), (2, 2, 5)):
        for tokens in ((1, 1, 1), (2, 3, 5), (3, 1, 7), (1, 0, 2)):
            sizes = [2, 3, *(n * side for n, side in zip(tokens, patch, strict=True))]
            base = torch.randn(*(s + 1 for s in sizes), generator=g).to(dtype)
            cut = base[1:, :-1, 1:, :-1, 1:]
            for video in (cut, cut.contiguous(), cut.to(memory_format=torch.channels_last_3d), cut.transpose(3, 4)):
                shape = patch if video.shape == cut.shape else (patch[0], patch[2], patch[1])
                assert torch.equal(pack(video, shape), patchify(video, shape)), (patch, tokens, video.stride())


def test_a_part_that_is_not_there_is_none(monkeypatch):
    assert _native.part("no_such_part") is None
    monkeypatch.setattr(_native, "why_not", lambda device="cpu": "not built")
    assert _native.part("patchify") is None


def test_rows_of_a_permuted_and_sliced_view():
    base = torch.randn(4, 3, 5, 2, 40)
    x = base.permute(3, 1, 0, 2, 4)[:, :, 1:3, :, 8:31]
    got = _native.rms_norm(x, None, 1e-6)
    assert_close(got, dispatch.load(OPS["rms_norm"], "reference")(x.double(), None, 1e-6), x.contiguous())


def test_bfloat16_round_trip_is_the_identity():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = _native.guidance_step(every, torch.zeros_like(every), None, 1.0, 0.5, 0.5)
    nan = every.isnan()
    assert torch.equal(out.isnan(), nan)
    # Adding a zero step turns -0 into 0 and leaves every other value alone.
    assert torch.equal(out[~nan], every[~nan])


def test_float32_to_bfloat16_rounds_as_torch_does():
    g = torch.Generator().manual_seed(3)
    words = torch.randint(-(2**31), 2**31, (1, 1, 1 << 16), generator=g, dtype=torch.int64).to(torch.int32)
    # Ties, the largest finite values, denormals: the low half decides.
    words.view(-1)[: 1 << 15] = (words.view(-1)[: 1 << 15] & ~0xFFFF) | 0x8000
    y = words.view(torch.float32)
    out = _native.gate_residual(torch.zeros_like(y, dtype=torch.bfloat16), y, None)
    expected = (y + 0).to(torch.bfloat16)
    assert torch.equal(out.isnan(), expected.isnan())
    keep = ~expected.isnan()
    assert torch.equal(out[keep], expected[keep])


def test_silu_over_the_whole_range():
    # Rows of equal values normalise to 1, so the weight is the argument of SiLU.
    w = torch.cat([torch.linspace(-110, 110, 200_001), torch.tensor([-1e30, 1e30, 0.0, -0.0, 1e-30])])
    got = _native.rms_norm_silu(torch.ones(1, w.numel()), w, 1e-12, True)[0].double()
    exact = torch.nn.functional.silu(w.double())
    # Relative to the result, down to the smallest normal number of float32.
    error = (got - exact).abs() / exact.abs().clamp_min(1.2e-38)
    assert float(error[w.abs() < 85].max()) < 6 * torch.finfo(torch.float32).eps
    assert float((got - exact).abs()[w < -85].max()) < 1e-35


def test_other_dtypes_are_refused_by_name():
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=r"rms_norm.*float32, bfloat16.*float64"):
        _native.rms_norm(x, None, 1e-6)


def test_ops_without_a_kernel_are_refused_by_name():
    with pytest.raises(UnsupportedError, match="no compiled cuda kernel"):
        _native.op("rms_norm", "cuda")
    with pytest.raises(AttributeError):
        _native.no_such_op  # noqa: B018


@pytest.mark.parametrize(
    "arch, capability, serves",
    [
        ("80", (8, 0), True), ("80", (8, 9), True), ("80", (9, 0), False), ("89", (8, 6), False),
        ("90a", (9, 0), True), ("90a", (10, 0), False), ("100a", (10, 3), False), ("120a", (12, 0), True),
    ],
)  # fmt: skip
def test_which_cards_machine_code_serves(arch, capability, serves):
    assert _native._serves(arch, capability) is serves
