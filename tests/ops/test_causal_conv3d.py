import dataclasses

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels.configs import causal_conv3d as configs
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError, ValueOptionError
from pyvideo_kernels.ops.causal_conv3d import pack_weight
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close, samples

from . import helpers

NAME = "causal_conv3d"


def _inputs(b=1, t=2, h=3, w=4, c=16, out=16, kernel=(3, 3, 3), cached=2, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    fan_in = c * kernel[0] * kernel[1] * kernel[2]
    return {
        "x": randn(b, t, h, w, c),
        "weight": randn(out, c, *kernel, scale=fan_in**-0.5),
        "bias": randn(out),
        "cache": randn(b, cached, h, w, c) if cached else None,
        "residual": randn(b, t, h, w, out),
    }


def _to(arguments, target):
    return {name: value.to(target) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def _kernels():
    return __import__("pyvideo_kernels.kernels.causal_conv3d", fromlist=["select"])


@pytest.fixture
def descriptors(monkeypatch):
    """Interpret the descriptor variant wherever a descriptor can address the tensors; counts its launches."""
    kernels, used = _kernels(), []

    def select(arch, *, aligned, **shape):
        config = dataclasses.replace(configs.select(arch, aligned=aligned, **shape), descriptors=aligned)
        used.append(config.descriptors)
        return config

    monkeypatch.setattr(kernels, "select", select)
    return used


@pytest.fixture
def no_tf32(monkeypatch):
    """fp32 products as the CPU makes them, also on a card: TF32 rounds to three digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_descriptor_variant_matches_float64(descriptors):
    helpers.check_implementation(NAME, "triton", helpers.DEVICE, torch.float16)
    # All samples but those of 3, 12 and 20 channels, whose rows are no multiple of 16 bytes, and the one of no frame.
    count = sum(1 for _ in samples(OPS[NAME], torch.float16))
    assert descriptors.count(True) == count - 4


def test_contract():
    """opcheck on samples of every form of result; it takes a second each."""
    op, forms = OPS[NAME], {}
    for kwargs in samples(op, torch.float32):
        x, epilogue = kwargs["x"], kwargs["epilogue"]
        strided = kwargs["stride"] != [1, 1, 1]
        form = (epilogue, kwargs["keep"], strided, x.is_contiguous(), x.numel() > 0, kwargs["pad_end"])
        forms.setdefault(form, kwargs)
    assert len(forms) == 9
    for kwargs in forms.values():
        torch.library.opcheck(getattr(torch.ops.pyvideo, NAME), (*op.bind(**kwargs), "reference"))


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 3, 3), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_diffusers_module(kernel, dtype, no_tf32):
    wan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    arguments = _inputs(c=12, out=20, kernel=kernel, cached=1 if kernel[0] > 1 else 0, dtype=dtype)
    residual = arguments.pop("residual")
    stock = wan.WanCausalConv3d(12, 20, kernel, padding=tuple(k // 2 for k in kernel))
    with torch.no_grad():
        stock.load_state_dict({"weight": arguments["weight"], "bias": arguments["bias"]})

        def eager(to):
            past = arguments["cache"]
            past = None if past is None else past.to(to).permute(0, 4, 1, 2, 3)
            y = stock.to(to)(arguments["x"].to(to).permute(0, 4, 1, 2, 3), past)
            return y.permute(0, 2, 3, 4, 1) + residual.to(to)

        exact, own = eager(torch.float64), eager(dtype)
        impls = ["auto", "reference"]
        if helpers.GPU or (dtype == torch.float32 and kernel == (3, 3, 3)):
            impls.append("triton")
        for impl in impls:
            out = pv.causal_conv3d(**_to({**arguments, "residual": residual}, helpers.DEVICE), impl=impl)
            assert_close(out.cpu(), exact, own, impl)


def test_strided_time_convolution_of_the_encoder(no_tf32):
    """Without padding in time: the head of the clip is its own past."""
    a = _inputs(t=5, kernel=(3, 1, 1), cached=0)
    x, weight, bias = a["x"], a["weight"], a["bias"]
    expected = torch.nn.functional.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, stride=(2, 1, 1))
    for impl in ("auto", "reference", "triton"):
        out = pv.causal_conv3d(
            *(t.to(helpers.DEVICE) for t in (x[:, 2:], weight, bias)),
            cache=x[:, :2].to(helpers.DEVICE), stride=(2, 1, 1), impl=impl,
        )  # fmt: skip
        torch.testing.assert_close(out.cpu().permute(0, 4, 1, 2, 3), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
def test_spatial_stride(impl, no_tf32):
    a = _to(_inputs(t=1, h=5, w=4, kernel=(1, 3, 3), cached=0), helpers.DEVICE)
    expected = torch.nn.functional.conv2d(
        a["x"][:, 0].permute(0, 3, 1, 2), a["weight"][:, :, 0], a["bias"], stride=(2, 3), padding=1
    )
    out = pv.causal_conv3d(a["x"], a["weight"], a["bias"], stride=(1, 2, 3), impl=impl)
    torch.testing.assert_close(out[:, 0].permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("chunks", [(1, 1, 2), (2, 2)])
def test_chunks_with_their_cache_equal_the_whole_clip(chunks, impl):
    a = _inputs(t=4, h=2, w=3, cached=0)
    x, weight, bias = (a[name].to(helpers.DEVICE) for name in ("x", "weight", "bias"))
    whole = pv.causal_conv3d(x, weight, bias, impl=impl)
    parts, start = [], 0
    for frames in chunks:
        cache = x[:, max(0, start - 2) : start] if start else None
        parts.append(pv.causal_conv3d(x[:, start : start + frames], weight, bias, cache=cache, impl=impl))
        start += frames
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dropped cache", lambda a: {**a, "cache": None}),
        ("newest cached frame only", lambda a: {**a, "cache": a["cache"][:, 1:]}),
        ("cache in the wrong order", lambda a: {**a, "cache": a["cache"].flip(1)}),
        ("anti-causal", lambda a: {**a, "weight": a["weight"].flip(2)}),
        ("rows and columns swapped", lambda a: {**a, "weight": a["weight"].transpose(3, 4)}),
        ("dropped residual", lambda a: {**a, "residual": None}),
        ("dropped bias", lambda a: {**a, "bias": None}),
    ],
)
def test_the_rule_sees(name, change):
    arguments = _inputs()
    exact = pv.causal_conv3d(**_to(arguments, torch.float64))
    low = pv.causal_conv3d(**arguments, impl="reference")
    assert_close(pv.causal_conv3d(**arguments), exact, low)
    with pytest.raises(Mismatch):
        assert_close(pv.causal_conv3d(**change(arguments)), exact, low, name)


def test_the_future_is_not_seen():
    a = _inputs(t=3)
    changed = {**a, "x": a["x"].clone()}
    changed["x"][:, 2] += 1
    for impl in ("auto", "reference"):
        before, after = pv.causal_conv3d(**a, impl=impl), pv.causal_conv3d(**changed, impl=impl)
        assert torch.equal(before[:, :2], after[:, :2]) and not torch.equal(before[:, 2], after[:, 2])


def test_packed_weight_is_the_same_weight():
    a = _inputs()
    packed = pack_weight(a["weight"])
    assert torch.equal(packed, a["weight"]) and packed.permute(0, 2, 3, 4, 1).is_contiguous()
    assert pack_weight(packed).data_ptr() == packed.data_ptr()
    for impl in ("auto", "reference", "triton"):
        on = _to(a, helpers.DEVICE)
        expected = pv.causal_conv3d(**on, impl=impl)
        out = pv.causal_conv3d(**{**on, "weight": pack_weight(on["weight"])}, impl=impl)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("o", "split"), [(3, (16, 0)), (48, (32, 16)), (96, (64, 32)), (160, (128, 64)), (192, (128, 64)),
                     (256, (128, 0)), (384, (128, 64)), (640, (128, 0))]
)  # fmt: skip
def test_output_channels_are_split_into_powers_of_two(o, split):
    assert configs.split_channels(o) == split


def test_a_configuration_for_the_norm_holds_all_channels_of_a_pixel():
    key = {"c": 96, "o": 96, "itemsize": 2, "aligned": True}
    narrow = configs.ConvConfig(8, 16, 32, 64, 0, 4, 3, descriptors=True)
    assert configs.select.illegal(narrow, "sm_90", **key) is None
    assert "64 + 0 channels do not hold the norm of 96" in configs.select.illegal(narrow, "sm_90", **key, norm=True)
    for arch in ("sm_80", "sm_90", "gfx942"):
        found = configs.candidates(arch, **{**key, "aligned": arch == "sm_90"}, norm=True)
        assert len(found) > 10 and all(config.block_n + config.block_n2 >= 96 for config in found)


def test_tf32_follows_either_of_torchs_flags(monkeypatch):
    x, flags = torch.zeros(1), torch.backends.cudnn
    monkeypatch.setattr(_kernels(), "arch_for", lambda _: "sm_90")
    for old in (True, False):
        with flags.flags(enabled=True, allow_tf32=old):
            assert _kernels()._precision(x) == ("tf32" if old else "tf32x3")
    before = flags.conv.fp32_precision
    try:
        # Of one operator alone: torch then refuses to answer through the older flag.
        for new, expected in (("tf32", "tf32"), ("ieee", "tf32x3")):
            flags.conv.fp32_precision = new
            assert _kernels()._precision(x) == expected
    finally:
        flags.conv.fp32_precision = before
    assert _kernels()._precision(x.half()) == "tf32"


def test_bitwise_repeatable():
    a = _to(_inputs(), helpers.DEVICE)
    for impl in ("auto", "triton"):
        assert torch.equal(pv.causal_conv3d(**a, impl=impl), pv.causal_conv3d(**a, impl=impl))


def test_fullgraph():
    a = _inputs()
    helpers.check_fullgraph(
        lambda x, weight, bias, cache, residual: pv.causal_conv3d(x, weight, bias, cache=cache, residual=residual),
        *a.values(),
    )
    torch.compiler.reset()
    compiled = torch.compile(pv.causal_conv3d, fullgraph=True, dynamic=True, backend="aot_eager")
    for h in (3, 5):
        a = _inputs(h=h)
        assert torch.equal(compiled(**a), pv.causal_conv3d(**a))


_X, _W = torch.zeros(1, 2, 3, 4, 8), torch.zeros(5, 8, 3, 3, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 3, 4, 8)}, ShapeError, "`x` must have 5 dimensions"),
        ({"x": torch.zeros(1, 8, 2, 3, 4).permute(0, 2, 3, 4, 1)}, ShapeError, "`x` must have a contiguous last"),
        ({"weight": torch.zeros(5, 7, 3, 3, 3)}, ShapeError, r"`weight` must be \[O, 8, kt, kh, kw\]"),
        ({"weight": torch.zeros(5, 8, 3, 2, 3)}, ShapeError, "with odd kh and kw"),
        ({"weight": _W.bfloat16()}, DTypeError, "`weight` must be torch.float32 like `x`"),
        ({"bias": torch.zeros(4)}, ShapeError, r"`bias` must be \[5\]"),
        ({"cache": torch.zeros(1, 3, 3, 4, 8)}, ShapeError, r"n <= 2 \(kt - 1\)"),
        ({"cache": torch.zeros(1, 2, 6, 8, 8)}, ShapeError, r"`cache` must be \[1, n, 3, 4, 8\]"),
        ({"cache": torch.zeros(1, 2, 3, 4, 8).half()}, DTypeError, "`cache` must be torch.float32"),
        ({"cache": torch.zeros(1, 2, 3, 4, 8, device="meta")}, DeviceError, "`cache` must be on cpu"),
        ({"residual": torch.zeros(1, 2, 3, 4, 8)}, ShapeError, r"`residual` must be \[1, 2, 3, 4, 5\]"),
        ({"stride": (1, 1)}, ValueOptionError, "`stride` must be a positive integer or three"),
        ({"stride": 0}, ValueOptionError, "`stride` must be"),
        ({"stride": None}, ValueOptionError, "`stride` must be"),
        ({"x": _X[..., :0], "weight": _W[:, :0]}, ShapeError, "with C >= 1"),
        ({"pad_mode": "circular"}, ValueOptionError, "`pad_mode` must be one of"),
        ({"x": _X.clone().requires_grad_()}, UnsupportedError, "`x` requires grad"),
        ({"weight": _W.clone().requires_grad_()}, UnsupportedError, "`weight` requires grad"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
        ({"impl": "cpu", "x": _X.double(), "weight": _W.double()}, UnsupportedError, "oneDNN does not take"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        pv.causal_conv3d(**{"x": _X, "weight": _W, **change})


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
def test_without_frames(impl):
    x, weight = _X[:, :0].to(helpers.DEVICE), _W.to(helpers.DEVICE)
    assert pv.causal_conv3d(x, weight, impl=impl).shape == (1, 0, 3, 4, 5)
