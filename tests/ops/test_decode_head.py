import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import pyvideo_kernels as pv
from pyvideo_kernels.configs import decode_head as configs
from pyvideo_kernels.configs import forced_config
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError, ValueOptionError
from pyvideo_kernels.ops.causal_conv3d import pack_weight
from pyvideo_kernels.sampler.loop import to_bytes, to_pixels
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

NAME = "decode_head_"
IMPLS = ("auto", "reference", "triton")


def _inputs(b=1, t=2, h=3, w=4, c=16, out=3, kernel=(3, 3, 3), cached=2, dtype=torch.float32, seed=0):
    """Activations whose pixels fill [-1, 1] and go past it now and then."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    return {
        "x": randn(b, t, h, w, c),
        "weight": randn(out, c, *kernel, scale=0.6 * (c * kernel[0] * kernel[1] * kernel[2]) ** -0.5),
        "bias": randn(out, scale=0.2),
        "cache": randn(b, cached, h, w, c) if cached else None,
    }


def _to(arguments, target):
    return {name: value.to(target) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def _channels_last(clip):
    return clip.permute(0, 2, 3, 4, 1).contiguous()


def _kernels():
    return __import__("pyvideo_kernels.kernels.decode_head", fromlist=["select"])


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    """fp32 products as the CPU makes them, also on a card: TF32 rounds to three digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_contract():
    helpers.check_op_contract(NAME)


# Against the models' own layers -----------------------------------------------------------------------------------


def _judge(stock, ours, dtype, label):
    """``stock(dtype)`` is the model's code; float64 is exact, the dtype's own error the yardstick."""
    with torch.no_grad():
        exact, low = stock(torch.float64), stock(dtype)
        impls = ["auto", "reference"]
        if helpers.GPU or dtype == torch.float32:
            impls.append("triton")
        for impl in impls:
            assert_close(ours(impl).cpu(), exact, low, f"{label} {impl}")


@pytest.mark.parametrize("patch", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_wans_decoder(patch, dtype):
    wan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    a = _inputs(h=3, w=5, out=3 * (patch or 1) ** 2, cached=1, dtype=dtype)
    norm, conv = wan.WanRMS_norm(16, images=False), wan.WanCausalConv3d(16, a["weight"].shape[0], 3, padding=1)
    gamma = torch.linspace(0.5, 1.5, 16).to(dtype)

    def stock(to):
        norm.load_state_dict({"gamma": gamma.view(16, 1, 1, 1)})
        conv.load_state_dict({"weight": a["weight"], "bias": a["bias"]})
        clip, past = (a[name].to(to).permute(0, 4, 1, 2, 3) for name in ("x", "cache"))
        y = conv.to(to)(nn.functional.silu(norm.to(to)(clip)), past)
        return torch.clamp(wan.unpatchify(y, patch) if patch else y, -1, 1)

    sizes = (1, patch or 1, patch or 1)
    on = _to({**a, "norm_weight": gamma}, helpers.DEVICE)
    _judge(stock, lambda impl: pv.decode_head(**on, norm="rms", patch=sizes, impl=impl), dtype, "Wan")


@pytest.mark.parametrize(("timestep", "is_causal"), [(False, True), (True, False)])
def test_matches_ltx_videos_decoder(timestep, is_causal):
    """The end of the decoder's own forward: its first layers stand aside."""
    ltx = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_ltx")
    torch.manual_seed(0)
    decoder = ltx.LTXVideoDecoder3d(
        in_channels=8, block_out_channels=(16,), spatio_temporal_scaling=(False,), layers_per_block=(1, 1),
        inject_noise=(False, False), upsample_residual=(False,), upsample_factor=(1,), is_causal=is_causal,
        timestep_conditioning=timestep,
    )  # fmt: skip
    x = torch.randn(2, 2, 2, 3, 16)
    temb = torch.tensor([0.05, 0.02])
    layer = decoder.conv_out.conv

    def stock(to):
        decoder.to(to)
        decoder.conv_in, decoder.mid_block, decoder.up_blocks = nn.Identity(), lambda hidden, _: hidden, []
        return decoder(x.to(to).permute(0, 4, 1, 2, 3), temb.to(to) if timestep else None)

    del decoder._modules["mid_block"], decoder._modules["up_blocks"]
    z = {}
    if timestep:
        embedded = decoder.time_embedder(
            timestep=temb * decoder.timestep_scale_multiplier, resolution=None, aspect_ratio=None, batch_size=2,
            hidden_dtype=x.dtype,
        ).unflatten(1, (2, -1)) + decoder.scale_shift_table  # fmt: skip
        z = {"shift": embedded[:, 0].detach(), "scale": embedded[:, 1].detach()}

    weights = {"weight": layer.weight.detach().clone(), "bias": layer.bias.detach().clone()}

    def ours(impl):
        on = _to({"x": x, **weights, **z}, helpers.DEVICE)
        options = {"pad_mode": "first_frame", "patch": (1, 4, 4), "clamp": False, "impl": impl}
        if is_causal:
            return pv.decode_head(**on, norm="pixel", **options)
        # A convolution over the whole clip, not causal: its first frame is the past of the second.
        normed = pv.pixel_norm_silu(on.pop("x"), scale=on.pop("scale", None), shift=on.pop("shift", None))
        return pv.decode_head(normed[:, 1:], **on, cache=normed[:, :1], pad_end=1, **options)

    _judge(stock, ours, torch.float32, "LTX")


@pytest.mark.parametrize("family", ["hunyuan_video", "cogvideox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_other_causal_convolutions(family, dtype):
    module = pytest.importorskip(f"diffusers.models.autoencoders.autoencoder_kl_{family}")
    a = _inputs(t=3, cached=0, dtype=dtype)
    a.pop("cache")
    if family == "hunyuan_video":
        layer, pad_mode = module.HunyuanVideoCausalConv3d(16, 3, 3), "replicate"
    else:
        layer, pad_mode = module.CogVideoXCausalConv3d(16, 3, 3), "first_frame"

    def stock(to):
        layer.conv.load_state_dict({"weight": a["weight"], "bias": a["bias"]})
        y = layer.to(to)(a["x"].to(to).permute(0, 4, 1, 2, 3))
        return y[0] if isinstance(y, tuple) else y

    on = _to(a, helpers.DEVICE)
    _judge(stock, lambda impl: pv.decode_head(**on, pad_mode=pad_mode, clamp=False, impl=impl), dtype, family)


# Bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_are_those_of_the_float_frames(impl, dtype):
    if impl == "triton" and dtype == torch.bfloat16 and not helpers.GPU:
        pytest.skip("the interpreter multiplies the raw words of bf16")
    a = _to(_inputs(h=4, w=7, out=12, dtype=dtype), helpers.DEVICE)
    frames = pv.decode_head(**a, patch=(1, 2, 2), impl=impl)
    got = pv.decode_head(**a, patch=(1, 2, 2), dtype=torch.uint8, impl=impl)
    assert got.dtype == torch.uint8 and got.shape == frames.shape
    assert np.array_equal(got[0].permute(1, 2, 3, 0).cpu().numpy(), to_bytes(to_pixels(frames)))


@pytest.mark.parametrize("impl", IMPLS)
def test_every_byte_and_the_halves_between(impl):
    """A pixel passed through: the middles of two bytes go to the even one, what is past the range to its ends."""
    halves = torch.arange(511, dtype=torch.float64) / 255 - 1
    x = torch.cat([halves, torch.tensor([-1.01, 1.01, -1e30, 1e30, torch.nan, torch.inf, -torch.inf])]).float()
    columns = -(-len(x) // 8)
    x = torch.cat([x, torch.zeros(8 * columns - len(x))]).view(1, 1, 8, columns, 1).to(helpers.DEVICE)
    weight = torch.ones(1, 1, 1, 1, 1, device=helpers.DEVICE)
    got = pv.decode_head(x, weight, dtype=torch.uint8, impl=impl).flatten().cpu()
    wanted = torch.from_numpy(to_bytes(to_pixels(x.cpu().nan_to_num(-1, 1e30, -1e30).permute(0, 4, 1, 2, 3)))).flatten()
    assert torch.equal(got, wanted)
    assert sorted(set(got[:511].tolist())) == list(range(256))
    assert got[511:518].tolist() == [0, 255, 0, 255, 0, 255, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_nan_in_floats(impl):
    a = _to(_inputs(), helpers.DEVICE)
    a["x"] = a["x"].clone()
    a["x"][0, 1, 0, 0, 3] = torch.nan
    out = pv.decode_head(**a, impl=impl)
    assert out[:, :, 0].isfinite().all()
    assert out[0, :, 1, :2, :2].isnan().all() and out[0, :, 1, 2].isfinite().all()


# Where frames go ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
@pytest.mark.parametrize("layout", ["planar", "channels-last", "frames of bytes"])
def test_a_slice_of_a_clip_is_written_and_nothing_else(impl, kind, layout):
    a = _to(_inputs(out=12, t=2), helpers.DEVICE)
    expected = pv.decode_head(**a, patch=(1, 2, 2), dtype=kind, impl="reference")
    clip = torch.full((1, 3, 6, 8, 10), 77, dtype=kind, device=helpers.DEVICE)
    if layout == "channels-last":
        clip = clip.contiguous(memory_format=torch.channels_last_3d)
    elif layout == "frames of bytes":  # as a file takes them, [T, H, W, C]
        clip = torch.full((1, 6, 8, 10, 3), 77, dtype=kind, device=helpers.DEVICE).permute(0, 4, 1, 2, 3)
    out = clip[:, :, 3:5, 1:7, 1:9]
    got = pv.decode_head(**a, patch=(1, 2, 2), out=out, impl=impl)
    assert got is out
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1 if kind == torch.uint8 else 1e-5)
    before = clip.clone()
    before[:, :, 3:5, 1:7, 1:9] = 77
    assert (before == 77).all()


def test_the_form_in_place_is_the_same():
    a = _to(_inputs(out=12), helpers.DEVICE)
    out = torch.empty(1, 3, 2, 6, 8, device=helpers.DEVICE)
    assert pv.decode_head_(out, **a, patch=(1, 2, 2)) is out
    assert torch.equal(out, pv.decode_head(**a, patch=(1, 2, 2)))
    with pytest.raises(DTypeError, match="`out` must be a tensor; got NoneType"):
        pv.decode_head_(None, **a)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chunks", [(1, 1, 2), (1, 3)])
def test_chunks_with_their_cache_fill_what_the_whole_clip_does(chunks, impl):
    a = _to(_inputs(t=4, h=2, cached=0), helpers.DEVICE)
    x, options = a["x"], {"norm": "rms", "norm_weight": torch.ones(16, device=helpers.DEVICE), "impl": impl}
    whole = pv.decode_head(x, a["weight"], a["bias"], **options)
    clip, cache, start = torch.full_like(whole, torch.nan), None, 0
    for frames in chunks:
        _, cache = pv.decode_head(
            x[:, start : start + frames], a["weight"], a["bias"], cache=cache, out=clip[:, :, start : start + frames],
            return_cache=True, **options,
        )  # fmt: skip
        start += frames
        assert cache.shape[1] == min(2, start)
    torch.testing.assert_close(clip, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [{"run": 1}, {"run": 4}, {"channels": 5, "block_n": 16, "block_n2": 0}])
def test_programs_that_share_frames_or_channels_agree_bitwise(cut):
    a = _to(_inputs(t=3, h=2, w=3, out=12, cached=1), helpers.DEVICE)
    options = {"patch": (1, 2, 2), "pad_end": 1, "impl": "triton"}
    expected = pv.decode_head(**a, **options)
    arch = "cpu" if not helpers.GPU else "sm_90"
    config = dataclasses.replace(configs.select(arch, c=16, o=12, kt=3, itemsize=4), **cut)
    with forced_config(NAME, config):
        assert torch.equal(pv.decode_head(**a, **options), expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dropped cache", lambda a: {**a, "cache": None}),
        ("cache in the wrong order", lambda a: {**a, "cache": a["cache"].flip(1)}),
        ("anti-causal", lambda a: {**a, "weight": a["weight"].flip(2)}),
        ("rows and columns swapped", lambda a: {**a, "weight": a["weight"].transpose(3, 4)}),
        ("row before column in a patch", lambda a: {
            **a, **{n: a[n].unflatten(0, (3, 2, 2)).transpose(1, 2).flatten(0, 2) for n in ("weight", "bias")}}),
        ("patches for channels", lambda a: {
            **a, **{n: a[n].unflatten(0, (3, 4)).transpose(0, 1).flatten(0, 1) for n in ("weight", "bias")}}),
        ("dropped bias", lambda a: {**a, "bias": None}),
        ("not clamped", lambda a: {**a, "clamp": False}),
        ("no norm", lambda a: {**a, "norm": None, "norm_weight": None}),
        ("first frame for zeros", lambda a: {**a, "cache": a["cache"][:, 1:], "pad_mode": "first_frame"}),
        ("edges for zeros", lambda a: {**a, "pad_mode": "replicate"}),
    ],
)  # fmt: skip
def test_the_rule_sees(name, change):
    a = {**_inputs(out=12), "norm": "rms", "norm_weight": torch.linspace(1, 2, 16), "patch": (1, 2, 2)}
    exact = pv.decode_head(**_to(a, torch.float64))
    assert (exact.abs() == 1).any()
    low = pv.decode_head(**a, impl="reference")
    assert_close(pv.decode_head(**a), exact, low)
    with pytest.raises(Mismatch):
        assert_close(pv.decode_head(**change(a)), exact, low, name)


def test_packed_weight_is_the_same_weight():
    a = _to(_inputs(), helpers.DEVICE)
    for impl in IMPLS:
        expected = pv.decode_head(**a, impl=impl)
        torch.testing.assert_close(pv.decode_head(**{**a, "weight": pack_weight(a["weight"])}, impl=impl), expected)


# Addresses ---------------------------------------------------------------------------------------------------------


def test_frames_more_than_two_to_the_31_elements_apart(tmp_path):
    if helpers.GPU:
        pytest.skip("a GPU has no sparse memory; the interpreter checks the addresses")
    # Sparse files give the addresses without the memory; each stride fits 32 bits, three frames of it do not.
    a = _inputs(t=4, h=1, w=2, out=2, kernel=(3, 1, 1), dtype=torch.float16)
    stride = 2**30
    expected = pv.decode_head(**a, impl="triton")
    read = np.memmap(tmp_path / "read", np.float16, "w+", shape=(3 * stride + 32,))
    far = torch.from_numpy(read).as_strided((1, 4, 1, 2, 16), (stride, stride, 32, 16, 1))
    far.copy_(a["x"])
    assert torch.equal(pv.decode_head(**{**a, "x": far}, impl="triton"), expected)
    written = np.memmap(tmp_path / "written", np.float16, "w+", shape=(3 * stride + 64,))
    for strides in ((64, 4, stride, 2, 1), (64, 3 * stride, 4, 2, 1)):
        out = torch.from_numpy(written).as_strided((1, 2, 4, 1, 2), strides)
        assert torch.equal(pv.decode_head(**a, out=out, impl="triton"), expected)


def test_a_tile_beyond_32_bit_offsets_is_refused():
    kernels = _kernels()
    x = torch.empty_strided((1, 1, 64, 4, 16), (0, 0, 2**28, 16, 1), device="meta")
    weight = torch.empty(3, 16, 1, 3, 3, device="meta")
    out = torch.empty(1, 3, 1, 64, 4, device="meta")
    with pytest.raises(UnsupportedError, match=r"within 2\^31 elements"):
        kernels.decode_head_(out, x, weight, None, None, "zeros", 0, (1, 1, 1), True)
    near = torch.empty(1, 81, 720, 1280, 96, device="meta")  # 7e9 elements, whose tiles are small
    assert kernels.tile_span(near, configs.select("sm_90", c=96, o=3, kt=3, itemsize=2)) < 2**31


@pytest.mark.parametrize(
    ("columns", "split"), [(3, (16, 0)), (9, (16, 0)), (36, (32, 16)), (48, (32, 16)), (72, (64, 16)), (144, (128, 16))]
)
def test_columns_are_split_into_powers_of_two(columns, split):
    assert configs.split_columns(columns) == split


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("o", [3, 12, 48, 192])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_candidate_covers_its_columns(arch, o, itemsize):
    shape = {"c": 128, "o": o, "kt": 3, "itemsize": itemsize}
    rule = configs.select(arch, **shape)
    found = configs.select.candidates(arch, **shape)
    assert found[0] == rule and len(found) > 3
    assert all(configs.select.illegal(config, arch, **shape) is None for config in found)
    narrow = dataclasses.replace(rule, channels=rule.block_n + rule.block_n2)
    assert "must cover" in configs.select.illegal(narrow, arch, **shape)


def test_bitwise_repeatable():
    a = _to(_inputs(), helpers.DEVICE)
    for impl in ("auto", "triton"):
        assert torch.equal(pv.decode_head(**a, impl=impl), pv.decode_head(**a, impl=impl))


def test_fullgraph():
    a = _inputs()

    def into(x, weight, bias, cache):
        out = torch.zeros(1, 3, 4, 3, 4)
        frames, kept = pv.decode_head(x, weight, bias, cache=cache, out=out[:, :, 1:3], return_cache=True)
        return out, frames + 0, kept

    torch.compiler.reset()
    compiled = torch.compile(into, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*a.values()), into(*a.values()), strict=True):
        assert torch.equal(got, expected)
    torch.compiler.reset()
    compiled = torch.compile(pv.decode_head, fullgraph=True, dynamic=True, backend="aot_eager")
    for h in (3, 5):
        a = _inputs(h=h)
        assert torch.equal(compiled(**a), pv.decode_head(**a))


@pytest.mark.parametrize("impl", IMPLS)
def test_without_frames(impl):
    x, weight = torch.zeros(1, 0, 3, 4, 8, device=helpers.DEVICE), torch.zeros(12, 8, 3, 3, 3, device=helpers.DEVICE)
    assert pv.decode_head(x, weight, patch=(1, 2, 2), impl=impl).shape == (1, 3, 0, 6, 8)


_X, _W = torch.zeros(1, 2, 3, 4, 8), torch.zeros(12, 8, 3, 3, 3)
_V = torch.zeros(8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 3, 4, 8)}, ShapeError, "`x` must have 5 dimensions"),
        ({"x": torch.zeros(1, 8, 2, 3, 4).permute(0, 2, 3, 4, 1)}, ShapeError, "`x` must have a contiguous last"),
        ({"weight": torch.zeros(12, 7, 3, 3, 3)}, ShapeError, r"`weight` must be \[O, 8, kt, kh, kw\]"),
        ({"weight": torch.zeros(12, 8, 3, 2, 3)}, ShapeError, "with odd kh and kw"),
        ({"weight": _W.half()}, DTypeError, "`weight` must be torch.float32 like `x`"),
        ({"patch": (1, 5, 1)}, ShapeError, r"O a multiple of the patch \(1, 5, 1\)"),
        ({"patch": (1, 2)}, ShapeError, "`patch` must be three sizes"),
        ({"bias": torch.zeros(3)}, ShapeError, r"`bias` must be \[12\]"),
        ({"cache": torch.zeros(1, 3, 3, 4, 8)}, ShapeError, r"n <= 2 \(kt - 1\)"),
        ({"cache": torch.zeros(1, 2, 6, 8, 8)}, ShapeError, r"`cache` must be \[1, n, 3, 4, 8\]"),
        ({"cache": torch.zeros(1, 2, 3, 4, 8).half()}, DTypeError, "`cache` must be torch.float32"),
        ({"cache": torch.zeros(1, 2, 3, 4, 8, device="meta")}, DeviceError, "`cache` must be on cpu"),
        ({"pad_mode": "circular"}, ValueOptionError, "`pad_mode` must be one of"),
        ({"x": _X[:, :, :1], "pad_mode": "reflect"}, ShapeError, r"H > 1, W > 1, C\] to be mirrored"),
        ({"pad_end": -1}, ValueOptionError, "`pad_end` must be a number of frames"),
        ({"x": _X[:, :0], "pad_end": 1}, ShapeError, "at least one frame, or a cache of one, for `pad_end`"),
        ({"x": _X[:, :0], "cache": _X[:, :0], "pad_end": 1}, ShapeError, "at least one frame"),
        ({"weight": _W[:, :, :0]}, ShapeError, r"`weight` must be \[O, 8, kt, kh, kw\]"),
        ({"norm": "group"}, ValueOptionError, "`norm` must be None, 'rms' or 'pixel'"),
        ({"norm": "rms"}, ValueOptionError, r"`norm_weight` must be \[8\] with norm='rms'"),
        ({"norm": "rms", "norm_weight": torch.zeros(7)}, ShapeError, r"`norm_weight` must be \[8\]"),
        ({"norm_weight": _V}, ValueOptionError, "`norm_weight` must be None without a norm"),
        ({"eps": 1e-6}, ValueOptionError, "`eps` must be None without a norm"),
        ({"norm": "pixel", "eps": -1.0}, ValueOptionError, "`eps` must be a number of at least 0"),
        ({"scale": torch.zeros(1, 8)}, ValueOptionError, "`scale` must be None unless norm='pixel'"),
        ({"norm": "pixel", "shift": torch.zeros(2, 8)}, ShapeError, r"`shift` must be \[1, 8\]"),
        ({"out": torch.zeros(1, 12, 3, 3, 4)}, ShapeError, r"`out` must be \[1, 12, 2, 3, 4\]"),
        ({"out": torch.zeros(1, 12, 2, 3, 4).half()}, DTypeError, "`out` must be torch.uint8, or torch.float32"),
        ({"out": torch.zeros(1, 12, 1, 3, 4).expand(1, 12, 2, 3, 4)}, ShapeError, "without broadcast dimensions"),
        ({"out": torch.zeros(1, 12, 2, 3, 4), "dtype": torch.uint8}, DTypeError, "`out` must be torch.uint8 like"),
        ({"out": torch.zeros(1, 12, 2, 3, 4, device="meta")}, DeviceError, "`out` must be on cpu"),
        ({"out": [1]}, DTypeError, "`out` must be a tensor; got list"),
        ({"dtype": torch.bfloat16}, DTypeError, "`dtype` must be torch.uint8, or torch.float32 like `x`"),
        ({"x": _X.clone().requires_grad_()}, UnsupportedError, "`x` requires grad"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
        ({"impl": "cpu", "x": _X.double(), "weight": _W.double()}, UnsupportedError, "oneDNN does not take"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        pv.decode_head(**{"x": _X, "weight": _W, **change})
