import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

import pyvideo_kernels as pv
from pyvideo_kernels import collect_env, dispatch
from pyvideo_kernels.configs import upsample_conv2d as configs
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError, ValueOptionError
from pyvideo_kernels.ops import upsample_conv2d as ops
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close, samples

from . import helpers

NAME = "upsample_conv2d"


def _randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def _inputs(t=1, h=3, w=4, c=16, out=16, kt=3, time_factor=2, cached=1, pad_mode="replicate", dtype=torch.float32):
    first = cached == 0
    frames = t if time_factor == 1 else 2 * t - first
    kernel = (3, 3) if kt == 0 else (kt, 3, 3)
    return {
        "x": _randn(1, t, h, w, c, dtype=dtype),
        "weight": _randn(out, c, *kernel, dtype=dtype, seed=1, scale=(9 * max(kt, 1) * c) ** -0.5),
        "bias": _randn(out, dtype=dtype, seed=2),
        "cache": _randn(1, cached, h, w, c, dtype=dtype, seed=3) if cached else None,
        "residual": _randn(1, frames, 2 * h, 2 * w, out, dtype=dtype, seed=4),
        "time_factor": time_factor,
        "first": first,
        "pad_mode": pad_mode,
    }


def _to(arguments, target):
    return {name: value.to(target) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def _kernels():
    return __import__("pyvideo_kernels.kernels.upsample_conv2d", fromlist=["select"])


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
    # All samples but that of 20 channels, whose rows are no multiple of 16 bytes.
    assert descriptors.count(True) == 8 and len(descriptors) == sum(1 for _ in samples(OPS[NAME], torch.float16))


@pytest.mark.parametrize("pad_mode", ["zeros", "replicate"])
def test_boxes_inside_and_at_the_edges(pad_mode, descriptors):
    """Three boxes either way: with repeated edges those in the middle alone take the descriptors."""
    x, weight = _randn(1, 1, 9, 17, 16, dtype=torch.float16), _randn(8, 16, 3, 3, dtype=torch.float16, seed=1)
    on = (x.to(helpers.DEVICE), weight.to(helpers.DEVICE))
    exact = pv.upsample_conv2d(x.double(), weight.double(), pad_mode=pad_mode)
    low = pv.upsample_conv2d(x, weight, pad_mode=pad_mode, impl="reference")
    assert_close(pv.upsample_conv2d(*on, pad_mode=pad_mode, impl="triton").cpu(), exact, low)
    assert descriptors == [True]


def test_contract():
    helpers.check_op_contract(NAME)


def _modules():
    """diffusers' own upsamplers, how they are called here, and the frames they are given."""
    wan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    hunyuan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_hunyuan_video")
    cogvideox = pytest.importorskip("diffusers.models.upsampling")
    torch.manual_seed(0)
    resample = wan.WanResample(16, "upsample2d")
    yield resample, resample.resample[1], {}, (3,)
    for factor in ((1, 2, 2), (2, 2, 2)):
        up = hunyuan.HunyuanVideoUpsampleCausal3D(16, 24, upsample_factor=factor)
        yield up, up.conv.conv, {"time_factor": factor[0], "pad_mode": "replicate"}, (1, 3)
    up = cogvideox.CogVideoXUpsample3D(16, 12, compress_time=True)
    # An even number of frames is a later batch of a clip: all of them are doubled.
    yield up, up.conv, {"time_factor": 2, "first": True}, (1, 3)
    yield up, up.conv, {"time_factor": 2, "first": False}, (2,)
    up = cogvideox.CogVideoXUpsample3D(16, 12)
    yield up, up.conv, {}, (2,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_diffusers_modules(dtype, no_tf32):
    for stock, conv, options, lengths in _modules():
        name = f"{type(stock).__name__} {options}"
        for t in lengths:
            x = _randn(1, 16, t, 3, 5, dtype=dtype)
            with torch.no_grad():
                own = stock.to(dtype)(x).permute(0, 2, 3, 4, 1)
                weight, bias = (p.to(helpers.DEVICE, copy=True) for p in (conv.weight, conv.bias))
                exact = stock.double()(x.double()).permute(0, 2, 3, 4, 1)
                packed = pv.pack_upsample_weight(weight, options.get("time_factor", 1))
                clip = x.to(helpers.DEVICE, memory_format=torch.channels_last_3d).permute(0, 2, 3, 4, 1)
                for impl in ("auto", "reference", *(["triton"] if helpers.GPU else [])):
                    out = pv.upsample_conv2d(clip, weight, bias, packed=packed, **options, impl=impl)
                    assert_close(out.cpu(), exact, own, f"{name}, {t} frames, {impl}")


def _phases_by_hand(weight, time_factor):
    """Where each tap of the original lands, counted out pixel by pixel."""
    wide = weight if weight.dim() == 5 else weight[:, :, None]
    o, c, kt = wide.shape[:3]
    doubled = time_factor == 2 and kt == 3
    out = torch.zeros(8 if doubled else 4, o, 8 if doubled else 4 * kt, c, dtype=wide.dtype)
    for s, p, q in itertools.product(range(2 if doubled else 1), (0, 1), (0, 1)):
        for i, j, k in itertools.product(range(kt), range(3), range(3)):
            # Doubled pixel 2 * 10 + p + (j - 1) is small pixel 10 + a - 1 + p.
            a, b = ((20 + phase + offset - 1) // 2 - 10 + 1 - phase for phase, offset in ((p, j), (q, k)))
            age = (20 + s + i - 2) // 2 - 10 + 1 if doubled else i
            out[(s * 2 + p) * 2 + q, :, (age * 2 + a) * 2 + b] += wide[:, :, i, j, k]
    return out


@pytest.mark.parametrize(("kt", "time_factor"), [(0, 1), (0, 2), (1, 1), (3, 1), (3, 2)])
def test_packed_weights(kt, time_factor):
    # Small integers: every sum is exact, also in bfloat16.
    weight = torch.randint(-8, 9, (5, 6, 3, 3) if kt == 0 else (5, 6, kt, 3, 3)).float()
    packed = pv.pack_upsample_weight(weight, time_factor)
    assert packed.is_contiguous() and packed.shape == ops.packed_shape(weight, time_factor)
    phases = ops.as_phases(packed)
    assert torch.equal(phases, _phases_by_hand(weight, time_factor))
    assert torch.equal(ops.as_transposed(phases), packed)
    # On a GPU they are phases.
    assert phases.shape == pv.pack_upsample_weight(weight.to("meta"), time_factor).shape
    assert torch.equal(pv.pack_upsample_weight(weight.bfloat16(), time_factor).float(), packed)
    # The work that is saved: products a small pixel, against those of its doubled pixels.
    frames = 2 if time_factor == 2 else 1
    ratio = 9 * max(kt, 1) * 4 * frames / (phases.shape[0] * phases.shape[2])
    assert ratio == {(0, 1): 9 / 4, (0, 2): 9 / 2, (1, 1): 9 / 4, (3, 1): 9 / 4, (3, 2): 27 / 8}[kt, time_factor]


def test_packed_weights_are_those_of_the_call():
    a = _to(_inputs(kt=0, time_factor=1, cached=0), helpers.DEVICE)
    packed = pv.pack_upsample_weight(a["weight"])
    for impl in ("auto", "triton"):
        expected = pv.upsample_conv2d(**a, impl=impl)
        assert torch.equal(pv.upsample_conv2d(**a, packed=packed, impl=impl), expected)
        other = pv.upsample_conv2d(**a, packed=2 * packed, impl=impl)
        assert not torch.allclose(other, expected), "they are what is multiplied"


def _hard_case(kt, dtype):
    """Filters that sum to zero on a slowly changing image: the answer is a small difference of large products."""
    image = functional.interpolate(_randn(1, 48, 5, 5), size=(24, 24), mode="bicubic", align_corners=True)
    weight = _randn(32, 48, max(kt, 1), 3, 3, seed=2, scale=0.05)
    weight = weight - weight.mean((2, 3, 4), keepdim=True)
    return image.permute(0, 2, 3, 1)[:, None].to(dtype).contiguous(), (weight if kt else weight[:, :, 0]).to(dtype)


@pytest.mark.parametrize(("kt", "time_factor"), [(0, 1), (3, 1), (3, 2)])
def test_sums_are_rounded_together(kt, time_factor, monkeypatch):
    x, weight = _hard_case(kt, torch.bfloat16)
    options = {"time_factor": time_factor, "pad_mode": "replicate"}
    x = x.expand(1, 2, *x.shape[2:]) if kt else x
    exact = pv.upsample_conv2d(x.double(), weight.double(), **options)
    low = pv.upsample_conv2d(x, weight, **options, impl="reference")
    assert_close(pv.upsample_conv2d(x, weight, **options, impl="cpu"), exact, low)
    if kt:  # an image, whose taps in time are summed too
        assert_close(pv.upsample_conv2d(x[:, :1], weight, **options, impl="cpu"), exact[:, :1], low[:, :1])
    # One by one they are further from float64 than the rule allows.
    monkeypatch.setattr(ops, "_round_together", lambda sums, dtype: sums.to(dtype))
    with pytest.raises(Mismatch, match="rms error"):
        assert_close(pv.upsample_conv2d(x, weight, **options, impl="cpu"), exact, low)


@pytest.mark.parametrize(
    ("impl", "kt", "time_factor", "chunks"),
    [("auto", 3, 1, (1, 2)), ("auto", 3, 2, (1, 1, 2)), ("auto", 0, 2, (1, 2)), ("triton", 3, 2, (1, 1))],
)
def test_chunks_with_their_cache_equal_the_whole_clip(impl, kt, time_factor, chunks):
    a = _to(_inputs(t=sum(chunks), h=2, w=3, kt=kt, time_factor=time_factor, cached=0), helpers.DEVICE)
    x, rest = a["x"], {**a, "residual": None, "impl": impl}
    whole = pv.upsample_conv2d(**rest)
    keep, parts, start = {3: 3 - time_factor, 0: 0}[kt], [], 0
    for frames in chunks:
        cache = x[:, max(0, start - keep) : start] if start and keep else None
        chunk = {**rest, "x": x[:, start : start + frames], "cache": cache, "first": not start}
        parts.append(pv.upsample_conv2d(**chunk))
        start += frames
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dropped cache", lambda a: {**a, "cache": None}),
        ("zeros around", lambda a: {**a, "pad_mode": "first_frame"}),
        ("anti-causal", lambda a: {**a, "weight": a["weight"].flip(2)}),
        ("rows and columns swapped", lambda a: {**a, "weight": a["weight"].transpose(3, 4)}),
        ("mirrored", lambda a: {**a, "weight": a["weight"].flip(3)}),
        ("dropped residual", lambda a: {**a, "residual": None}),
        ("dropped bias", lambda a: {**a, "bias": None}),
        ("phases of another order", lambda a: {**a, "packed": pv.pack_upsample_weight(a["weight"], 2).flip(3)}),
    ],
)
def test_the_rule_sees(name, change):
    arguments = _inputs()
    exact = pv.upsample_conv2d(**_to(arguments, torch.float64))
    low = pv.upsample_conv2d(**arguments, impl="reference")
    assert_close(pv.upsample_conv2d(**arguments), exact, low)
    with pytest.raises(Mismatch):
        assert_close(pv.upsample_conv2d(**change(arguments)), exact, low, name)


def test_mirrored_edges_of_a_doubled_image_are_repeated_ones():
    a = _inputs(kt=0, time_factor=1, cached=0)
    big = a["x"][0].permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = functional.conv2d(functional.pad(big, (1, 1, 1, 1), mode="reflect"), a["weight"], a["bias"])
    for impl in ("cpu", "reference"):
        y = pv.upsample_conv2d(a["x"], a["weight"], a["bias"], pad_mode="reflect", impl=impl)
        torch.testing.assert_close(y[0].permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_descriptors", [False, True])
def test_frames_more_than_two_to_the_31_elements_apart(tmp_path, monkeypatch, use_descriptors):
    if helpers.GPU:
        pytest.skip("a GPU has no sparse memory; the interpreter checks the addresses")
    if use_descriptors:
        replaced = lambda arch, **shape: dataclasses.replace(configs.select(arch, **shape), descriptors=True)
        monkeypatch.setattr(_kernels(), "select", replaced)
    # A sparse file gives the addresses without the memory; each stride fits 32 bits, three frames of it do not.
    x, weight = _randn(1, 4, 1, 2, 16, dtype=torch.float16), _randn(8, 16, 3, 3, dtype=torch.float16, seed=1)
    residual = _randn(1, 4, 2, 4, 8, dtype=torch.float16, seed=2)
    stride = 2**30
    storage = np.memmap(tmp_path / "frames", np.float16, "w+", shape=(3 * stride + 512,))
    far = torch.from_numpy(storage).as_strided((1, 4, 1, 2, 16), (stride, stride, 32, 16, 1))
    far_residual = torch.from_numpy(storage[256:]).as_strided((1, 4, 2, 4, 8), (stride, stride, 32, 8, 1))
    far.copy_(x)
    far_residual.copy_(residual)
    expected = pv.upsample_conv2d(x, weight, residual=residual, impl="triton")
    assert torch.equal(pv.upsample_conv2d(far, weight, residual=far_residual, impl="triton"), expected)


def test_a_box_beyond_32_bit_offsets_is_refused():
    kernels = _kernels()
    config = configs.select("sm_80", c=16, o=16, itemsize=2, aligned=False)
    x = torch.empty_strided((1, 1, 64, 4, 16), (0, 0, 2**28, 16, 1), device="meta")
    assert kernels.box_span(x, config) >= 2**31
    near = torch.empty(1, 161, 720, 1280, 96, device="meta")  # 1.4e10 elements, whose boxes are small
    assert kernels.box_span(near, config, 2) < 2**31
    weight = torch.empty(16, 16, 3, 3, device="meta")
    with pytest.raises(UnsupportedError, match=r"within 2\^31 elements"):
        kernels.upsample_conv2d(x, weight, None, None, 1, None, True, "zeros", None)


def test_bitwise_repeatable():
    a = _to(_inputs(h=2, w=2), helpers.DEVICE)
    for impl in ("auto", "triton"):
        assert torch.equal(pv.upsample_conv2d(**a, impl=impl), pv.upsample_conv2d(**a, impl=impl))


def test_fullgraph():
    a = _inputs(cached=0)
    options = {name: a.pop(name) for name in ("time_factor", "first", "pad_mode")}
    helpers.check_fullgraph(
        lambda x, weight, bias, residual: pv.upsample_conv2d(x, weight, bias, residual=residual, **options),
        *(a[name] for name in ("x", "weight", "bias", "residual")),
    )
    torch.compiler.reset()
    compiled = torch.compile(pv.upsample_conv2d, fullgraph=True, dynamic=True, backend="aot_eager")
    for h in (3, 5):
        a = _inputs(h=h)
        assert torch.equal(compiled(**a), pv.upsample_conv2d(**a))


_X, _W = torch.zeros(1, 2, 3, 4, 8), torch.zeros(5, 8, 3, 3)
_W3 = torch.zeros(5, 8, 3, 3, 3)
_DOUBLED = {"weight": _W3, "time_factor": 2, "pad_mode": "replicate"}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 3, 4, 8)}, ShapeError, "`x` must have 5 dimensions"),
        ({"x": torch.zeros(1, 8, 2, 3, 4).permute(0, 2, 3, 4, 1)}, ShapeError, "`x` must have a contiguous last"),
        ({"weight": torch.zeros(5, 7, 3, 3)}, ShapeError, r"`weight` must be \[O, 8, 3, 3\]"),
        ({"weight": torch.zeros(5, 8, 2, 3, 3)}, ShapeError, r"\[O, 8, kt, 3, 3\], kt 1 or 3"),
        ({"weight": torch.zeros(5, 8, 1, 1)}, ShapeError, "`weight` must be"),
        ({"weight": torch.zeros(5, 8, 3)}, ShapeError, r"`weight` must have \(4, 5\) dimensions"),
        ({"weight": _W.bfloat16()}, DTypeError, "`weight` must be torch.float32 like `x`"),
        ({"bias": torch.zeros(4)}, ShapeError, r"`bias` must be \[5\]"),
        ({"packed": torch.zeros(8, 5, 3, 4, 4)}, ShapeError, r"`packed` must be \[8, 5, 1, 4, 4\], contiguous"),
        ({"packed": torch.zeros(5, 8, 1, 4, 4).transpose(0, 1)}, ShapeError, "`packed` must be"),
        ({"packed": torch.zeros(8, 5, 1, 4, 4).half()}, DTypeError, "`packed` must be torch.float32"),
        ({**_DOUBLED, "packed": torch.zeros(8, 5, 3, 4, 4)}, ShapeError, r"`packed` must be \[8, 5, 4, 4, 4\]"),
        ({"time_factor": 3}, ValueOptionError, "`time_factor` must be 1 or 2"),
        ({"cache": torch.zeros(1, 1, 3, 4, 8)}, ShapeError, r"n <= 0"),
        ({**_DOUBLED, "cache": torch.zeros(1, 2, 3, 4, 8)}, ShapeError, r"\[1, n, 3, 4, 8\] with n <= 1"),
        ({"weight": _W3, "cache": torch.zeros(1, 2, 6, 8, 8)}, ShapeError, r"`cache` must be \[1, n, 3, 4, 8\]"),
        ({"weight": _W3, "cache": torch.zeros(1, 2, 3, 4, 8).half()}, DTypeError, "`cache` must be torch.float32"),
        ({"weight": _W3, "cache": torch.zeros(1, 2, 3, 4, 8, device="meta")}, DeviceError, "`cache` must be on cpu"),
        ({**_DOUBLED, "cache": torch.zeros(1, 1, 3, 4, 8), "first": True}, ValueOptionError, "`first` must be False"),
        ({**_DOUBLED, "x": _X[:, :0]}, ShapeError, r"`x` must be \[B, T >= 1, H, W, C\] where a clip begins"),
        ({"first": "no"}, ValueOptionError, "`first` must be True, False or None"),
        ({"time_factor": 2.0}, ValueOptionError, "`time_factor` must be 1 or 2"),
        ({"weight": _W[:0]}, ShapeError, "O and C >= 1"),
        ({**_DOUBLED, "pad_mode": "zeros"}, ValueOptionError, "`pad_mode` must be 'first_frame', 'replicate'"),
        ({"residual": torch.zeros(1, 2, 3, 4, 5)}, ShapeError, r"`residual` must be \[1, 2, 6, 8, 5\]"),
        ({"time_factor": 2, "residual": torch.zeros(1, 4, 6, 8, 5)}, ShapeError, r"must be \[1, 3, 6, 8, 5\]"),
        ({"pad_mode": "circular"}, ValueOptionError, "`pad_mode` must be one of"),
        ({"x": _X.clone().requires_grad_()}, UnsupportedError, "`x` requires grad"),
        ({"weight": _W.clone().requires_grad_()}, UnsupportedError, "`weight` requires grad"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
        ({"impl": "cpu", "x": _X.double(), "weight": _W.double()}, UnsupportedError, "oneDNN does not take"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        pv.upsample_conv2d(**{"x": _X, "weight": _W, **change})


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_a_residual_of_any_strides(impl, no_tf32):
    x, weight = _randn(1, 1, 2, 3, 16).to(helpers.DEVICE), _randn(16, 16, 3, 3).to(helpers.DEVICE)
    wide = _randn(1, 1, 5, 8, 24).to(helpers.DEVICE)
    expected = pv.upsample_conv2d(x, weight, impl=impl) + wide[:, :, 1:, 2:, 4:20]
    out = pv.upsample_conv2d(x, weight, residual=wide[:, :, 1:, 2:, 4:20], impl=impl)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_triton_refuses_float64():
    with pytest.raises(UnsupportedError, match="refuses float64"):
        pv.upsample_conv2d(_X.double().to(helpers.DEVICE), _W.double().to(helpers.DEVICE), impl="triton")


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
def test_without_frames(impl):
    x, weight = _X[:, :0].to(helpers.DEVICE), _W.to(helpers.DEVICE)
    assert pv.upsample_conv2d(x, weight, impl=impl).shape == (1, 0, 6, 8, 5)


def test_cudnn_stands_in_for_the_kernel(monkeypatch):
    """What is handed to cuDNN, multiplied here by oneDNN; and when ``auto`` does not."""
    if not helpers.GPU:
        with pytest.raises(DeviceError, match="impl 'cudnn' needs CUDA tensors"):
            pv.upsample_conv2d(_X, _W, impl="cudnn")
        with pytest.raises(UnsupportedError, match="upsample_conv2d: impl 'cudnn' needs a torch that is built with"):
            dispatch.load(OPS[NAME], "cudnn")(*OPS[NAME].bind(**next(samples(OPS[NAME], torch.float32))))
    if not helpers.GPU:
        monkeypatch.setattr(collect_env, "cudnn_version", lambda: "9.15.1")
    helpers.check_implementation(NAME, "cudnn", helpers.DEVICE, torch.float32)
    monkeypatch.setattr(collect_env, "cudnn_version", lambda: "9.15.1")
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    images, clips = (OPS[NAME].bind(**s) for s in itertools.islice(samples(OPS[NAME], torch.bfloat16), 1, 3))
    order = lambda args: dispatch.order(OPS[NAME], torch.device("cuda", 0), torch.bfloat16, None, args)
    assert order(images) == order(clips) == ("triton", "cudnn", "reference")
    monkeypatch.setattr(collect_env, "cudnn_version", lambda: "9.10.2")
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    assert order(images) == ("triton", "cudnn", "reference") and order(clips) == ("triton", "reference")
