"""AutoencoderKLLTXVideo through our ops: parity with diffusers, whole and in pieces, layout, hooks, what is left."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKLLTXVideo
from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoCausalConv3d, LTXVideoDecoder3d
from diffusers.models.normalization import RMSNorm
from torch import nn

import pyvideo_kernels as pv
from pyvideo_kernels.errors import ModelError, UnsupportedError
from pyvideo_kernels.integrations.diffusers import ltx_vae, sources
from pyvideo_kernels.integrations.diffusers import ltx_vae_forwards as forwards
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from .helpers import instance_dicts
from .ltx_helpers import ENCODER_OPS, KINDS, ONE_LEVEL, VAE_OPS, conditioned, decode, stream, tiny
from .vae_helpers import DEVICE, assert_equal_to_1e5, encode, full_width, latents, truth, video, watch_layout


@pytest.fixture
def noise_of_any_dtype(monkeypatch):
    """torch.randn that draws the same numbers for every dtype."""
    randn = torch.randn

    def draw(*size, dtype=None, **options):
        return randn(*size, **options).to(dtype or torch.float32)

    monkeypatch.setattr(torch, "randn", draw)


# Parity ---------------------------------------------------------------------------------------------------------


def test_full_width_of_the_first_release():
    vae = full_width(AutoencoderKLLTXVideo)
    assert tuple(vae.config.decoder_block_out_channels) == (128, 256, 512, 512)
    z = latents(5, 1, 1, channels=128)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert stock.shape[2:] == (33, 32, 32) and set(report.calls()) == VAE_OPS and not report.fallbacks()


def test_full_width_with_timesteps_and_noise():
    config = {"decoder_block_out_channels": (256, 512), "decoder_layers_per_block": (1, 1, 1)}
    config |= {"decoder_inject_noise": (True,) * 3, "decoder_spatio_temporal_scaling": (True, True)}
    config |= {"timestep_conditioning": True, "upsample_residual": (True, True), "upsample_factor": (2, 2)}
    vae = full_width(AutoencoderKLLTXVideo, **config)
    vae.decoder.timestep_scale_multiplier.fill_(1000)
    z = latents(3, 1, 3, channels=128)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert_equal_to_1e5(torch.cat(stream(vae, z, 1), 2), stock)
    assert set(report.calls()) == VAE_OPS and not report.fallbacks()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_decode_equals_diffusers_in_float32(kind, frames):
    vae, z = tiny(kind), latents(frames, batch=2 if frames == 2 else 1)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    for chunk in (1, 2, 5):
        assert_equal_to_1e5(torch.cat(stream(vae, z, chunk), 2), stock)
    assert stock.shape[2] == 8 * frames - 7 and set(report.calls()) == VAE_OPS and not report.fallbacks()


@pytest.mark.parametrize("kind", KINDS)
def test_81_frames(kind):
    vae, z = tiny(kind), latents(11, 1, 2)
    stock = decode(vae, z)
    pv.accelerate(vae, strict=True)
    assert stock.shape[2] == 81
    assert_equal_to_1e5(torch.cat(stream(vae, z, 2), 2), stock)


@pytest.mark.parametrize("kind", [*KINDS, "strided and not causal"])
@pytest.mark.parametrize("frames", [1, 9])
def test_encode_equals_diffusers_in_float32(kind, frames):
    vae = tiny(kind) if kind in KINDS else tiny("0.9.0", encoder_causal=False)
    clip = video(frames, 32, 48)
    stock = encode(vae, clip)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(encode(vae, clip), stock)
    assert set(report.calls()) == ENCODER_OPS and not report.fallbacks()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_no_further_from_float64_than_diffusers(kind, noise_of_any_dtype):
    vae = tiny(kind).to(torch.bfloat16)
    for function, x in ((decode, latents(3)), (encode, video(9, 32, 32))):
        x = x.bfloat16()
        exact, stock = truth(function, vae, x), function(vae, x)
        pv.accelerate(vae, strict=True)
        assert_close(function(vae, x), exact, stock, function.__name__)
        if function is decode:
            assert_close(torch.cat(stream(vae, x, 2), 2), exact, stock, "stream")
        pv.restore(vae)


def test_every_implementation_gives_the_same_clip():
    vae, z = tiny("0.9.5"), latents(2)
    stock = decode(vae, z)
    report = pv.accelerate(vae, impl="reference")
    assert_equal_to_1e5(torch.cat(stream(vae, z, 1), 2), stock)
    assert {impl for impls in report.calls().values() for impl in impls} == {"reference"}


def test_the_triton_kernels_decode(noise_of_any_dtype):
    small = {**ONE_LEVEL, "decoder_layers_per_block": (0, 1), "decoder_spatio_temporal_scaling": (False,)}
    small |= {"upsample_factor": (1,)}
    vae, z = tiny("0.9.5", **small).to(DEVICE), latents(2, 1, 1).to(DEVICE)
    exact, stock = truth(decode, vae, z), decode(vae, z)
    report = pv.accelerate(vae, impl="triton", strict=True)
    assert_close(decode(vae, z), exact, stock)
    assert {impl for impls in report.calls().values() for impl in impls} == {"triton"}


@pytest.mark.parametrize("op", sorted(VAE_OPS))
def test_one_op_alone(op):
    vae, z = tiny("0.9.5"), latents(3)
    stock = decode(vae, z)
    report = pv.accelerate(vae, ops={op}, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert_equal_to_1e5(torch.cat(stream(vae, z, 2), 2), stock)
    assert set(report.calls()) == {op}


def _without(*names):
    return lambda op: lambda *args, **options: op(*args, **options | dict.fromkeys(names))


def _with(**changes):
    return lambda op: lambda *args, **options: op(*args, **options | changes)


def _old_frames_swapped(op):
    def wrong(*args, cache=None, **options):
        return op(*args, cache=None if cache is None else cache.flip(1), **options)

    return wrong


def _scale_for_shift(op):
    return lambda *args, scale, shift, **options: op(*args, scale=shift, shift=scale, **options)


def _sub_pixels_in_another_order(op):
    def wrong(*args, epilogue=None, **options):
        y = op(*args, epilogue=epilogue, **options)
        return y if epilogue is None else y.unflatten(2, (-1, 2)).flip(3).flatten(2, 3)

    return wrong


def _rows_for_columns(op):
    def wrong(*args, **options):
        frames = op(*args, **options).unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
        return frames.transpose(4, 6).flatten(5, 6).flatten(3, 4)

    return wrong


@pytest.mark.parametrize(
    ("op", "mistake"),
    [
        ("causal_conv3d", _with(pad_mode="zeros")),
        ("causal_conv3d", _without("residual")),
        ("causal_conv3d", _old_frames_swapped),
        ("causal_conv3d", _sub_pixels_in_another_order),
        ("pixel_norm_silu", _without("scale")),
        ("pixel_norm_silu", _scale_for_shift),
        ("pixel_norm_silu", _with(silu=False)),
        ("pixel_norm_silu", _with(eps=0.1)),
        ("decode_head", _rows_for_columns),
        ("decode_head", _with(clamp=True)),
    ],
)
def test_parity_sees_a_mistake(op, mistake, monkeypatch, noise_of_any_dtype):
    vae, z = tiny("0.9.5"), latents(3)
    exact, stock = truth(decode, vae, z), decode(vae, z)
    pv.accelerate(vae)
    monkeypatch.setattr(forwards, op, mistake(getattr(forwards, op)))
    ours = torch.cat(stream(vae, z, 2), 2)
    with pytest.raises(AssertionError, match="relative error"):
        assert_equal_to_1e5(ours, stock)
    with pytest.raises(Mismatch):
        assert_close(ours, exact, stock)


# What runs, and how it lies in memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["0.9.0", "0.9.5"])
def test_every_convolution_and_norm_of_the_decoder_runs_in_an_op(kind):
    vae = tiny(kind)
    report = pv.accelerate(vae)
    decode(vae, latents(3))
    modules = list(vae.decoder.modules())
    convs = sum(isinstance(module, LTXVideoCausalConv3d) for module in modules)
    norms = sum(isinstance(module, RMSNorm) for module in modules)
    counts = {op: sum(impls.values()) for op, impls in report.calls().items()}
    assert counts == {"causal_conv3d": convs - 1, "decode_head_": 1, "pixel_norm_silu": norms}


@pytest.mark.parametrize("kind", KINDS)
def test_clips_lie_channels_last_at_every_module_boundary(kind):
    vae = tiny(kind)
    pv.accelerate(vae)
    seen, wrong = watch_layout(vae.encoder, vae.decoder)
    stream(vae, latents(9), 2)
    decode(vae, latents(3))
    encode(vae, video(9, 32, 48))
    assert len(seen) > 40 and not wrong


def test_who_watches_a_module_sees_what_the_stock_one_returns():
    vae, z = tiny("0.9.5"), latents(3)
    seen, shapes = {}, {}

    def look(where, name):
        return lambda module, arguments, output: where.setdefault(name, []).append(tuple(output.shape))

    for name in ("conv_out", "conv_out.conv", "up_blocks.0.upsamplers.0.conv", "up_blocks.1.upsamplers.0.conv.conv"):
        vae.decoder.get_submodule(name).register_forward_hook(look(seen, name))
    stock, shapes = decode(vae, z), dict(seen)
    seen.clear()
    pv.accelerate(vae)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert seen == shapes


# In place, reversible, under hooks ------------------------------------------------------------------------------


def test_restore_is_exact():
    vae, z = tiny("0.9.5"), latents()
    stock, before, state = decode(vae, z), instance_dicts(vae), vae.state_dict()
    report = pv.accelerate(vae, strict=True)
    decode(vae, z)
    assert instance_dicts(vae) != before
    assert {k: v.data_ptr() for k, v in vae.state_dict().items()} == {k: v.data_ptr() for k, v in state.items()}
    pv.restore(vae)
    assert instance_dicts(vae) == before and torch.equal(decode(vae, z), stock)
    assert report.complete


def test_saved_and_copied(tmp_path):
    vae, z = tiny(), latents(2)
    stock = decode(vae, z)
    pv.accelerate(vae)
    vae.save_pretrained(tmp_path)
    assert torch.equal(decode(AutoencoderKLLTXVideo.from_pretrained(tmp_path).eval(), z), stock)
    copied = copy.deepcopy(vae)
    assert torch.equal(decode(copied, z), decode(vae, z))
    pv.restore(copied)
    assert torch.equal(decode(copied, z), stock)
    assert_equal_to_1e5(decode(vae, z), stock)


@pytest.mark.parametrize("hooked_first", [True, False])
def test_under_leaf_offload(hooked_first):
    """Weights exist only during the forward of the module that owns them."""
    vae, z = tiny("0.9.5"), latents(2)
    stock = decode(vae, z)
    if not hooked_first:
        pv.accelerate(vae)
    cpu_offload(vae, torch.device("cpu"))
    report = pv.accelerate(vae, strict=True)
    assert vae.decoder.conv_in.conv.weight.device.type == "meta"
    assert_equal_to_1e5(decode(vae, z), stock)
    assert_equal_to_1e5(torch.cat(stream(vae, z, 1), 2), stock)
    assert set(report.calls()) == VAE_OPS and not report.fallbacks()


def test_under_layerwise_casting():
    vae, z = tiny().to(torch.bfloat16), latents(2)
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert vae.decoder.conv_in.conv.weight.dtype == torch.float8_e4m3fn
    plain = AutoencoderKLLTXVideo.from_config(vae.config).eval()
    plain.load_state_dict({name: value.to(torch.bfloat16) for name, value in vae.state_dict().items()})
    assert_close(decode(vae, z), truth(decode, plain, z.bfloat16()), stock)
    assert set(report.calls()) == VAE_OPS


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_fall_back_and_are_counted(checkpointing):
    vae, z = tiny("0.9.5"), latents(2).requires_grad_()
    if checkpointing:
        vae.enable_gradient_checkpointing()
        vae.train()

    def gradient():
        torch.manual_seed(7)
        out = vae.decode(z, **conditioned(vae, z)).sample
        return torch.autograd.grad(out.square().sum(), [z, vae.decoder.conv_in.conv.weight])

    stock = gradient()
    report = pv.accelerate(vae)
    for got, expected in zip(gradient(), stock, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    reasons = {reason for counted in report.fallbacks().values() for reason in counted}
    assert reasons == {"gradients are wanted and the op has no backward"} and not report.calls()


def test_autocast_keeps_its_convolutions():
    vae, z = tiny(), latents(2)
    exact = truth(decode, vae, z)
    with torch.autocast("cpu", torch.bfloat16):
        stock = decode(vae, z)
        report = pv.accelerate(vae)
        ours = decode(vae, z)
        pieces = torch.cat(stream(vae, z, 1), 2)
    assert_close(ours, exact, stock)
    assert_close(pieces, exact, stock)
    assert list(report.fallbacks()["causal_conv3d"]) == ["autocast chooses the dtype of the convolution"]


def test_autocast_draws_the_noise_of_diffusers():
    vae, z = tiny("0.9.5"), latents(2)
    with torch.autocast("cpu", torch.bfloat16):
        stock = decode(vae, z)
        pv.accelerate(vae)
        ours = decode(vae, z)
    assert ours.dtype == stock.dtype
    assert (ours.double() - stock.double()).abs().max() <= 0.05 * stock.abs().max()


@torch.no_grad()
def test_a_whole_decode_is_one_graph():
    vae, z = tiny("0.9.5", **ONE_LEVEL | {"decoder_inject_noise": (False, False)}), latents(2, 1, 2)
    stock = decode(vae, z)
    pv.accelerate(vae)
    torch.compiler.reset()
    compiled = torch.compile(vae.decode, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_equal_to_1e5(compiled(z, **conditioned(vae, z)).sample, stock)


# What is left ---------------------------------------------------------------------------------------------------


class _Conv(nn.Conv3d):
    pass


def test_a_foreign_convolution_is_left_and_works_in_the_stream():
    vae, z = tiny("0.9.5"), latents(3)
    resnet = vae.decoder.mid_block.resnets[0]
    resnet.conv2.conv.__class__ = _Conv
    vae.decoder.up_blocks[0].upsamplers[0].conv.conv.__class__ = _Conv
    vae.decoder.conv_out.conv.__class__ = _Conv
    stock = decode(vae, z)
    with pytest.raises(UnsupportedError, match=r"decoder\.mid_block\.resnets\.0\.conv2\.conv: causal_conv3d"):
        pv.accelerate(vae, strict=True)
    report = pv.accelerate(vae)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert_equal_to_1e5(torch.cat(stream(vae, z, 1), 2), stock)
    left = {name: entry["left"] for name, entry in report.to_dict()["modules"].items() if entry["left"]}
    why = "it is a tests _Conv, not a plain Conv3d"
    assert left == {
        "decoder.mid_block.resnets.0.conv2.conv": {"causal_conv3d": why},
        "decoder.up_blocks.0.upsamplers.0.conv.conv": {"causal_conv3d": why},
        "decoder.conv_out.conv": {"decode_head_": why},
    }


def test_unknown_sources_are_refused(monkeypatch):
    sources.check(ltx_vae.SOURCES)
    monkeypatch.setitem(ltx_vae.SOURCES, f"{LTXVideoDecoder3d.__module__}:LTXVideoDecoder3d", {"0" * 16: "0.42.1"})
    vae = tiny()
    before = instance_dicts(vae)
    with pytest.raises(ModelError, match="the source of LTXVideoDecoder3d"):
        pv.accelerate(vae)
    assert instance_dicts(vae) == before
