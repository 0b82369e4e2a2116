"""causal_conv3d beyond the clip's edges and past its own result: pad modes, `pad_end`, epilogues, `next_cache`."""

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels.configs import causal_conv3d as configs
from pyvideo_kernels.errors import DTypeError, ShapeError, ValueOptionError
from pyvideo_kernels.ops import causal_conv3d_library as library
from pyvideo_kernels.ops.causal_conv3d import next_cache, pack_weight
from pyvideo_kernels.reference import causal_conv3d as oracle
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

IMPLS = ("auto", "reference", "triton")
REPEATING = ("replicate", "reflect", "first_frame")


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    """fp32 products as the CPU makes them, also on a card."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def same_weights():
    """Stock modules draw theirs from the global generator."""
    torch.manual_seed(0)


def _randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def _on(value, to):
    return {k: v.to(to) if isinstance(v, torch.Tensor) else v for k, v in value.items()}


_DEFAULTS = {
    "bias": None, "cache": None, "stride": [1, 1, 1], "pad_mode": "zeros", "pad_end": 0, "residual": None,
    "epilogue": None, "factor": [1, 1, 1], "norm_weight": None, "norm_eps": 1e-12, "keep": True,
}  # fmt: skip


def _sums(arguments):
    """By output, what `assert_close` grants the order of its sums: a yardstick of few results may be lucky."""
    return oracle.summed(*OPS["causal_conv3d"].bind(**_DEFAULTS | _on(arguments, torch.float64)))


def _judge(module, arguments, after=lambda y: y, impls=IMPLS):
    """Every implementation against a stock module (on [B, C, T, H, W]), in float64 and in its own dtype."""
    dtype = arguments["x"].dtype

    @torch.no_grad()
    def stock(to):
        out = after(module.to(to)(arguments["x"].to(to).permute(0, 4, 1, 2, 3)))
        return [y.permute(0, 2, 3, 4, 1) for y in (out if isinstance(out, tuple) else (out,))]

    exact, own, sums = stock(torch.float64), stock(dtype), _sums(arguments)
    for impl in impls:
        out = pv.causal_conv3d(**_on(arguments, helpers.DEVICE), impl=impl)
        for position, y in enumerate(out if isinstance(out, tuple) else (out,)):
            assert y.is_contiguous()
            assert_close(y.cpu(), exact[position], own[position], f"{impl} output {position}", sums[position])


def _conv_arguments(conv, x, **options):
    return {"x": x, "weight": conv.weight.detach().clone(), "bias": conv.bias.detach().clone(), **options}


# Pad modes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 3])
def test_replicate_is_hunyuan_videos(frames):
    hunyuan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_hunyuan_video")
    module = hunyuan.HunyuanVideoCausalConv3d(16, 20, 3)
    x = _randn(1, frames, 3, 5, 16)
    _judge(module, _conv_arguments(module.conv, x, pad_mode="replicate"))


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("causal", [True, False])
def test_first_frame_and_reflect_are_ltx_videos(padding, causal):
    ltx = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_ltx")
    module = ltx.LTXVideoCausalConv3d(16, 16, 3, padding_mode=padding, is_causal=causal)
    x = _randn(2, 2, 3, 4, 16)
    arguments = _conv_arguments(module.conv, x, pad_mode="first_frame" if padding == "zeros" else "reflect")
    if causal:
        _judge(module, arguments)
    else:
        # Looks one frame ahead: the first frame is its own past, and the last one repeated its own future.
        future = arguments | {"x": x[:, 1:], "cache": x[:, :1], "pad_end": 1}
        exact = module.double()(x.double().permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1).detach()
        own = module.float()(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1).detach()
        sums = _sums(future)[0]
        for impl in IMPLS:
            assert_close(pv.causal_conv3d(**_on(future, helpers.DEVICE), impl=impl).cpu(), exact, own, impl, sums)


def test_first_frame_with_a_cache_is_cog_videos():
    cog = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_cogvideox")
    module = cog.CogVideoXCausalConv3d(16, 16, 3, pad_mode="first")
    x = _randn(1, 4, 3, 4, 16)
    with torch.no_grad():
        first, cache = module(x[:, :2].permute(0, 4, 1, 2, 3))
        second, _ = module(x[:, 2:].permute(0, 4, 1, 2, 3), cache)
    options = _conv_arguments(module.conv, x, pad_mode="first_frame")
    for impl in IMPLS:
        past = None
        for part, expected in ((x[:, :2], first), (x[:, 2:], second)):
            call = _on({**options, "x": part, "cache": past}, helpers.DEVICE)
            got = pv.causal_conv3d(**call, impl=impl)
            torch.testing.assert_close(got.cpu(), expected.permute(0, 2, 3, 4, 1), rtol=1e-5, atol=1e-5)
            past = next_cache(part, past, 2)


@pytest.mark.parametrize("mode", ["replicate", "reflect"])
def test_boxes_inside_by_descriptors_and_those_at_the_edge_by_pointers(mode, monkeypatch):
    kernels = __import__("pyvideo_kernels.kernels.causal_conv3d", fromlist=["select"])
    launched = []
    for name in ("_launch_descriptors", "_launch_pointers"):
        launch = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, _l=launch, _n=name: (launched.append(_n), _l(*a)))
    small = configs.ConvConfig(2, 8, 16, 16, 0, 4, 1)

    def select(arch, *, aligned, **shape):
        return configs.replace(small, descriptors=aligned)

    monkeypatch.setattr(kernels, "select", select)
    # Three rows of boxes and a ragged fourth, two columns of them and a ragged third: boxes of every kind.
    x, weight = _randn(1, 1, 7, 19, 16).to(helpers.DEVICE), _randn(16, 16, 1, 3, 3, scale=0.08).to(helpers.DEVICE)
    out = pv.causal_conv3d(x, weight, pad_mode=mode, impl="triton")
    assert launched == ["_launch_descriptors", "_launch_pointers"]
    expected = pv.causal_conv3d(x, weight, pad_mode=mode, impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    launched.clear()
    pv.causal_conv3d(x[:, :, :3, :8], weight, pad_mode=mode, impl="triton")
    assert launched == ["_launch_pointers"], "every box touches an edge"
    launched.clear()
    pv.causal_conv3d(x, weight[:, :, :, :1, :1], pad_mode=mode, impl="triton")
    assert launched == ["_launch_descriptors"], "one tap looks at no other pixel"


# One frame --------------------------------------------------------------------------------------------------------


def test_one_frame_takes_a_third_of_the_products(monkeypatch):
    """Taps in time that all see the one frame are added up; those that see zeros are left out."""
    taps, conv = [], torch.mkldnn_convolution
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda x, w, *a: (taps.append(w.shape[2]), conv(x, w, *a))[1])
    x, weight = _randn(1, 1, 3, 4, 8), _randn(8, 8, 3, 3, 3)
    for mode in ("zeros", *REPEATING):
        library.causal_conv3d_cpu(x, weight, None, None, [1, 1, 1], mode, 0, None, None, [1, 1, 1], None, 0.0, True)
    assert taps == [1, 1, 1, 1]
    taps.clear()
    for cached in (1, 2):
        pv.causal_conv3d(x, weight, cache=x.expand(1, cached, 3, 4, 8), impl="cpu")
        pv.causal_conv3d(x, weight, cache=x.expand(1, cached, 3, 4, 8), pad_mode="replicate", impl="cpu")
    pv.causal_conv3d(x, weight, pad_end=1, pad_mode="replicate", impl="cpu")
    assert taps == [2, 3, 3, 3, 3]
    kernels, walked = __import__("pyvideo_kernels.kernels.causal_conv3d", fromlist=["launch_fwd"]), []
    monkeypatch.setattr(kernels, "launch_fwd", lambda call, *_: walked.append(call.packed.shape[2]))
    pv.causal_conv3d(x.to(helpers.DEVICE), weight.to(helpers.DEVICE), pad_mode="replicate", impl="triton")
    assert walked == [1]
    monkeypatch.undo()
    # A clip of one frame, which a convolution that looks ahead has taken for its cache.
    single = _on({"x": x[:, :0], "weight": weight, "cache": x}, helpers.DEVICE)
    expected, *others = (pv.causal_conv3d(**single, pad_mode="first_frame", pad_end=1, impl=i) for i in IMPLS[::-1])
    for other in others:
        torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-4)


def test_taps_added_up_keep_the_rule_in_low_precision():
    """bf16 and many channels: the sums of weights are rounded too. Also where taps nearly cancel."""
    x, weight = _randn(1, 1, 6, 7, 192, dtype=torch.bfloat16), _randn(64, 192, 3, 3, 3, scale=0.014)
    cancelling = torch.stack([weight[:, :, 0], -weight[:, :, 0], 0.1 * weight[:, :, 2]], 2)
    for w in (weight, cancelling):
        a = {"x": x, "weight": w.bfloat16(), "pad_mode": "replicate"}
        exact = pv.causal_conv3d(**_on(a, torch.float64))
        for impl in ("cpu", "reference"):
            assert_close(pv.causal_conv3d(**a, impl=impl), exact, pv.causal_conv3d(**a, impl="reference"), impl)


# Epilogues --------------------------------------------------------------------------------------------------------


def test_interleave_is_wans_upsampling_in_time():
    conv = torch.nn.Conv3d(16, 24, (3, 1, 1))
    x = _randn(1, 3, 2, 3, 16)

    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, clip):
            return self.conv(torch.nn.functional.pad(clip, (0, 0, 0, 0, 2, 0)))

    def stock(y):
        b, c, t, h, w = y.shape
        y = y.reshape(b, 2, c // 2, t, h, w)
        return torch.stack((y[:, 0], y[:, 1]), 3).reshape(b, c // 2, t * 2, h, w)

    _judge(Padded(), _conv_arguments(conv, x, epilogue="interleave"), stock)


def test_pixel_shuffle_is_ltx_videos():
    ltx = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_ltx")
    module = ltx.LTXVideoUpsampler3d(16, (2, 2, 2), upscale_factor=4)
    x = _randn(1, 2, 2, 3, 16)
    arguments = _conv_arguments(module.conv.conv, x, pad_mode="first_frame", epilogue="pixel_shuffle", factor=(2, 2, 2))
    # The stock module drops the first frame of the result.
    exact, own = (
        module.to(to)(x.to(to).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1).detach()
        for to in (torch.float64, torch.float32)
    )
    for impl in IMPLS:
        out = pv.causal_conv3d(**_on(arguments, helpers.DEVICE), impl=impl)
        assert out.shape == (1, 4, 4, 6, 4)
        assert_close(out[:, 1:].cpu(), exact, own, impl, _sums(arguments)[0][:, 1:])


@pytest.mark.parametrize("cached", [0, 1])
def test_descriptors_repeat_the_first_and_the_last_frame(cached, monkeypatch):
    """A frame before the oldest or after the last is not there, and a descriptor answers with zeros."""
    kernels = __import__("pyvideo_kernels.kernels.causal_conv3d", fromlist=["select"])
    small = configs.ConvConfig(2, 8, 16, 16, 0, 4, 1, descriptors=True)
    monkeypatch.setattr(kernels, "select", lambda arch, **shape: small)
    monkeypatch.setattr(kernels, "_launch_pointers", None)
    x, weight = _randn(1, 3, 2, 3, 16).to(helpers.DEVICE), _randn(16, 16, 3, 1, 1, scale=0.15).to(helpers.DEVICE)
    cache = _randn(1, cached, 2, 3, 16, seed=1).to(helpers.DEVICE) if cached else None
    out, expected = (
        pv.causal_conv3d(x, weight, cache=cache, pad_mode="first_frame", pad_end=2, impl=impl)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_norms_below_norm_eps_are_not_divided_by():
    """The clamp is on the norm: neither on its square nor added. Here it holds back every second pixel."""
    x = _randn(1, 1, 2, 8, 16) * torch.tensor([0.1, 2.0]).repeat(4).view(8, 1)
    weight = _randn(20, 16, 1, 1, 1, scale=0.25)
    options = {"epilogue": "rms_norm_silu", "norm_weight": torch.ones(20), "norm_eps": 2.0, "keep": False}
    y = torch.nn.functional.conv3d(x.permute(0, 4, 1, 2, 3), weight).permute(0, 2, 3, 4, 1)
    norm = y.norm(dim=-1, keepdim=True)
    assert 0 < int((norm < 2).sum()) < norm.numel()
    expected = torch.nn.functional.silu(y / norm.clamp_min(2.0) * 20**0.5)
    for impl in IMPLS:
        _, z = pv.causal_conv3d(**_on({"x": x, "weight": weight, **options}, helpers.DEVICE), impl=impl)
        torch.testing.assert_close(z.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("out", [20, 48])
def test_rms_norm_silu_is_wans(out):
    wan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    conv, norm = wan.WanCausalConv3d(16, out, (1, 3, 3), padding=(0, 1, 1)), wan.WanRMS_norm(out, images=False)
    norm.gamma.data = 1 + _randn(out, 1, 1, 1, scale=0.3)
    x = _randn(1, 2, 3, 4, 16)

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv, norm

        def forward(self, clip):
            y = self.conv(clip)
            return y, torch.nn.functional.silu(self.norm(y))

    gamma = norm.gamma.detach().flatten().clone()
    _judge(Both(), _conv_arguments(conv, x, epilogue="rms_norm_silu", norm_weight=gamma))


def test_a_norm_of_more_channels_than_a_program_has_is_a_second_pass(monkeypatch):
    kernels = __import__("pyvideo_kernels.kernels.causal_conv3d", fromlist=["select"])
    norms, launch = [], kernels.norm_kernels.launch_fwd
    monkeypatch.setattr(kernels.norm_kernels, "launch_fwd", lambda *a: (norms.append(1), launch(*a)))
    x = _randn(1, 1, 2, 3, 16)
    for out, passes in ((192, 0), (208, 1)):
        a = _on(
            {"x": x, "weight": _randn(out, 16, 1, 1, 1, scale=0.25), "norm_weight": 1 + _randn(out)}, helpers.DEVICE
        )
        for keep in (True, False):
            y, z = pv.causal_conv3d(**a, epilogue="rms_norm_silu", keep=keep, impl="triton")
            expected, normed = pv.causal_conv3d(**a, epilogue="rms_norm_silu", impl="reference")
            torch.testing.assert_close(z, normed, rtol=1e-5, atol=1e-5)
            assert y.shape == (expected.shape if keep else (0,))
        assert len(norms) == 2 * passes
        norms.clear()


def test_both_launches_must_hold_all_channels_for_a_norm_in_registers(monkeypatch):
    """fp32 tables may give the boxes at the edge fewer channels than those inside."""
    kernels = __import__("pyvideo_kernels.kernels.causal_conv3d", fromlist=["select"])
    inside = configs.ConvConfig(2, 8, 16, 32, 0, 4, 1, descriptors=True)
    edge = configs.replace(inside, block_n=16, descriptors=False)
    monkeypatch.setattr(kernels, "select", lambda arch, *, aligned, **_: inside if aligned else edge)
    a = _on({"x": _randn(1, 1, 5, 3, 16), "weight": _randn(32, 16, 1, 3, 1), "norm_weight": _randn(32)}, helpers.DEVICE)
    options = {"pad_mode": "replicate", "epilogue": "rms_norm_silu"}
    for got, expected in zip(
        pv.causal_conv3d(**a, **options, impl="triton"), pv.causal_conv3d(**a, **options, impl="reference"), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("epilogue", ["interleave", "pixel_shuffle"])
def test_rows_are_read_where_they_lie(epilogue, monkeypatch):
    """A packed weight is not copied, however its rows are ordered."""
    kernels = __import__("pyvideo_kernels.kernels.causal_conv3d", fromlist=["launch_fwd"])
    seen = []
    monkeypatch.setattr(kernels, "launch_fwd", lambda call, *_: seen.append(call.packed.data_ptr()))
    weight = pack_weight(_randn(32, 16, 3, 1, 1)).to(helpers.DEVICE)
    factor = (1, 2, 2) if epilogue == "pixel_shuffle" else None
    x = _randn(1, 1, 2, 2, 16).to(helpers.DEVICE)
    pv.causal_conv3d(x, weight, epilogue=epilogue, factor=factor, impl="triton")
    assert seen == [weight.data_ptr()]


def test_keep_false_gives_the_normed_result_alone():
    a = {"x": _randn(1, 1, 2, 3, 8), "weight": _randn(16, 8, 1, 3, 3), "norm_weight": _randn(16)}
    for impl in ("auto", "reference"):
        both = pv.causal_conv3d(**a, epilogue="rms_norm_silu", impl=impl)
        y, z = pv.causal_conv3d(**a, epilogue="rms_norm_silu", keep=False, impl=impl)
        assert y.numel() == 0 and torch.equal(z, both[1])
        assert torch.equal(both[0], pv.causal_conv3d(a["x"], a["weight"], impl=impl))


# What must fail -----------------------------------------------------------------------------------------------------


def _all(a):
    out = pv.causal_conv3d(**a)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize(
    ("name", "options", "change"),
    [
        ("zeros before the first frame", {"pad_mode": "first_frame"}, {"pad_mode": "zeros"}),
        ("zeros around", {"pad_mode": "replicate"}, {"pad_mode": "first_frame"}),
        ("repeated, not mirrored", {"pad_mode": "reflect"}, {"pad_mode": "replicate"}),
        ("halves of the channels swapped", {"epilogue": "interleave"}, lambda a: {"weight": a["weight"].roll(8, 0)}),
        (
            "rows before columns",
            {"epilogue": "pixel_shuffle", "factor": (1, 2, 2)},
            lambda a: {"weight": a["weight"].unflatten(0, (4, 2, 2)).transpose(1, 2).flatten(0, 2)},
        ),
        (
            "places before channels",
            {"epilogue": "pixel_shuffle", "factor": (1, 2, 2)},
            lambda a: {"weight": a["weight"].unflatten(0, (4, 4)).transpose(0, 1).flatten(0, 1)},
        ),
        ("norm without its weight", {"epilogue": "rms_norm_silu"}, lambda a: {"norm_weight": torch.ones(16)}),
        ("another smallest norm", {"epilogue": "rms_norm_silu"}, {"norm_eps": 4.0}),
        ("norm before the residual", {"epilogue": "rms_norm_silu"}, {"residual": None}),
    ],
)
def test_the_rule_sees(name, options, change):
    a = {"x": _randn(1, 2, 3, 4, 16), "weight": _randn(16, 16, 3, 3, 3, scale=0.05), **options}
    if options.get("epilogue") == "rms_norm_silu":
        a |= {"norm_weight": 1 + _randn(16, scale=0.3), "residual": _randn(1, 2, 3, 4, 16, seed=1)}
    exact, low = _all(_on(a, torch.float64)), _all(a)
    assert_close(low[-1], exact[-1], low[-1])
    with pytest.raises(Mismatch):
        assert_close(_all(a | (change(a) if callable(change) else change))[-1], exact[-1], low[-1], name)


def test_frames_past_the_end_are_the_last_one_repeated():
    x, weight = _randn(1, 2, 3, 4, 8), _randn(8, 8, 3, 3, 3)
    for mode in ("zeros", *REPEATING):
        longer = pv.causal_conv3d(torch.cat([x, x[:, -1:], x[:, -1:]], 1), weight, pad_mode=mode)
        for impl in ("auto", "reference"):
            out = pv.causal_conv3d(x, weight, pad_mode=mode, pad_end=2, impl=impl)
            torch.testing.assert_close(out, longer, rtol=1e-5, atol=1e-4)
    strided = pv.causal_conv3d(x, weight, stride=(2, 1, 1), pad_end=1)
    assert strided.shape[1] == 2 and pv.causal_conv3d(x, weight, stride=(2, 1, 1)).shape[1] == 1


# Contract -------------------------------------------------------------------------------------------------------------


def test_fullgraph_with_both_outputs():
    def call(x, weight, norm_weight):
        y, z = pv.causal_conv3d(
            x, weight, pad_mode="replicate", pad_end=1, epilogue="rms_norm_silu", norm_weight=norm_weight
        )
        return y + z, next_cache(x, None, 2)

    helpers.check_fullgraph(call, _randn(1, 3, 2, 3, 8), _randn(8, 8, 3, 3, 3), _randn(8))


_X, _W = torch.zeros(1, 2, 3, 4, 8), torch.zeros(6, 8, 3, 3, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"pad_end": -1}, ValueOptionError, "`pad_end` must be a number of frames"),
        ({"pad_end": 1.0}, ValueOptionError, "`pad_end` must be"),
        ({"x": _X[:, :0], "pad_end": 1}, ShapeError, "for `pad_end` to repeat"),
        ({"x": _X[:, :, :1], "pad_mode": "reflect"}, ShapeError, r"H > 1, W > 1, C\] to be mirrored"),
        ({"epilogue": "relu"}, ValueOptionError, "`epilogue` must be None or one of rms_norm_silu"),
        ({"epilogue": "pixel_shuffle"}, ValueOptionError, "`factor` must be three positive integers"),
        ({"epilogue": "pixel_shuffle", "factor": (1, 0, 2)}, ValueOptionError, "`factor` must be three"),
        ({"epilogue": "pixel_shuffle", "factor": (1, 2, 2)}, ValueOptionError, "a multiple of 4 output channels"),
        ({"epilogue": "interleave", "factor": (2, 1, 1)}, ValueOptionError, "`factor` must be None without"),
        ({"epilogue": "interleave", "weight": _W[:5]}, ValueOptionError, "a multiple of 2 output channels"),
        ({"epilogue": "rms_norm_silu"}, ValueOptionError, r"`norm_weight` must be \[6\]"),
        ({"epilogue": "rms_norm_silu", "norm_weight": torch.ones(5)}, ShapeError, r"`norm_weight` must be \[6\]"),
        ({"epilogue": "rms_norm_silu", "norm_weight": torch.ones(6).long()}, DTypeError, "`norm_weight` must be float"),
        ({"norm_weight": torch.ones(6)}, ValueOptionError, "`norm_weight` must be None without"),
        ({"keep": False}, ValueOptionError, "`keep` must be True without"),
        (
            {"epilogue": "interleave", "residual": torch.zeros(1, 2, 3, 4, 6)},
            ShapeError, r"`residual` must be \[1, 4, 3, 4, 3\]",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        pv.causal_conv3d(**{"x": _X, "weight": _W, **change})
