"""AutoencoderKLCogVideoX through our ops: parity with diffusers, layout, hooks, what is left."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXDecoder3D,
    CogVideoXSafeConv3d,
)
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import nn

import pyvideo_kernels as pv
from pyvideo_kernels import StreamingVaeDecoder
from pyvideo_kernels.errors import ModelError, UnsupportedError
from pyvideo_kernels.integrations.diffusers import cogvideox_vae, sources
from pyvideo_kernels.integrations.diffusers import cogvideox_vae_forwards as forwards
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from .cogvideox_helpers import ENCODER_OPS, VAE_OPS, decode, smaller, tiny
from .helpers import instance_dicts
from .vae_helpers import DEVICE, assert_equal_to_1e5, encode, full_width, latents, truth, video, watch_layout

# Parity ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """The released widths; one residual block a level fewer than half, for time."""
    vae = full_width(AutoencoderKLCogVideoX, layers_per_block=1)
    assert tuple(vae.config.block_out_channels) == (128, 256, 256, 512)
    return vae


@pytest.mark.parametrize(("frames", "size"), [(1, (3, 5)), (5, (2, 1))])
def test_full_width_decode_equals_diffusers_in_float32(wide, frames, size):
    vae, z = wide, latents(frames, *size, channels=16)
    pv.restore(vae)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert stock.shape[2] == 4 * frames - 3
    assert set(report.calls()) == VAE_OPS and not report.fallbacks()


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 7])
def test_decode_equals_diffusers_in_float32(frames):
    vae, z = tiny(), latents(frames, batch=2 if frames == 3 else 1)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    decoder = StreamingVaeDecoder(vae)
    for chunk in (1, 2, 5):
        pieces = list(decoder.stream(z, chunk=chunk))
        # The model's own batches of two latents, the odd one in the first.
        assert len(pieces) == max(1, frames // 2)
        assert_equal_to_1e5(torch.cat(pieces, 2), stock)
    assert set(report.calls()) == VAE_OPS and not report.fallbacks()


def test_81_frames():
    vae, z = tiny(), latents(21, 1, 2)
    stock = decode(vae, z)
    pv.accelerate(vae, strict=True)
    assert stock.shape[2] == 81
    assert_equal_to_1e5(decode(vae, z), stock)


@pytest.mark.parametrize("frames", [1, 8, 17])
def test_encode_equals_diffusers_in_float32(frames):
    vae, clip = tiny(), video(frames, 24, 40)
    stock = encode(vae, clip)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(encode(vae, clip), stock)
    assert set(report.calls()) == ENCODER_OPS and not report.fallbacks()


def test_bfloat16_is_no_further_from_float64_than_diffusers():
    vae = tiny().to(torch.bfloat16)
    for function, x in ((decode, latents(5)), (decode, latents(1)), (encode, video(9, 24, 40))):
        x = x.bfloat16()
        exact, stock = truth(function, vae, x), function(vae, x)
        pv.accelerate(vae, strict=True)
        assert_close(function(vae, x), exact, stock, function.__name__)
        pv.restore(vae)


def test_every_implementation_gives_the_same_clip():
    vae, z = tiny(), latents(3)
    stock = decode(vae, z)
    report = pv.accelerate(vae, impl="reference")
    assert_equal_to_1e5(decode(vae, z), stock)
    assert {impl for impls in report.calls().values() for impl in impls} == {"reference"}


def test_the_triton_kernels_decode():
    vae, z = smaller().to(DEVICE), latents(2, 1, 1).to(DEVICE)
    vae.num_latent_frames_batch_size = 1
    exact, stock = truth(decode, vae, z), decode(vae, z)
    report = pv.accelerate(vae, impl="triton", strict=True)
    assert_close(decode(vae, z), exact, stock)
    assert {impl for impls in report.calls().values() for impl in impls} == {"triton"}


@pytest.mark.parametrize("op", sorted(VAE_OPS))
def test_one_op_alone(op):
    vae, z = tiny(), latents(5)
    stock = decode(vae, z)
    report = pv.accelerate(vae, ops={op}, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert set(report.calls()) == {op}


def _with(**changes):
    return lambda op: lambda *args, **options: op(*args, **options | changes)


def _old_frames_swapped(op):
    def wrong(*args, cache=None, **options):
        return op(*args, cache=None if cache is None else cache.flip(1), **options)

    return wrong


def _scale_for_shift(op):
    return lambda *args, scale, shift, **options: op(*args, scale=shift, shift=scale, **options)


def _no_first_frame_apart(op):
    """The latents of all frames, the first too, spread evenly."""

    def wrong(x, *args, scale, shift, **options):
        t = x.shape[1]
        even = [z.index_select(1, torch.arange(t) * z.shape[1] // t) for z in (scale, shift)]
        return op(x, *args, scale=even[0], shift=even[1], **options)

    return wrong


def _not_first(op):
    def wrong(*args, first, **options):
        y = op(*args, first=False, **options)
        return y[:, :-1] if first and options["time_factor"] == 2 else y

    return wrong


def _one_row_down(op):
    return lambda *args, out=None, **options: (
        op(*args, **options).roll(1, 3) if out is None else out.copy_(op(*args, **options).roll(1, 3))
    )


@pytest.mark.parametrize(
    ("op", "mistake"),
    [
        ("causal_conv3d", _with(cache=None)),
        ("causal_conv3d", _old_frames_swapped),
        ("causal_conv3d", _with(pad_mode="zeros")),
        ("causal_conv3d", _with(residual=None)),
        ("group_norm_silu", _with(silu=False)),
        ("group_norm_silu", _with(per_frame=True)),
        ("group_norm_silu", _with(groups=2)),
        ("group_norm_silu", _scale_for_shift),
        ("group_norm_silu", _no_first_frame_apart),
        ("upsample_conv2d", _not_first),
        ("decode_head", _one_row_down),
        ("decode_head", _with(clamp=True)),
    ],
)
def test_parity_sees_a_mistake(op, mistake, monkeypatch):
    vae, z = tiny(), latents(5)
    exact, stock = truth(decode, vae, z), decode(vae, z)
    pv.accelerate(vae)
    monkeypatch.setattr(forwards, op, mistake(getattr(forwards, op)))
    ours = decode(vae, z)
    with pytest.raises(AssertionError, match="relative error"):
        assert_equal_to_1e5(ours, stock)
    with pytest.raises(Mismatch):
        assert_close(ours, exact, stock)


# What runs, and how it lies in memory ---------------------------------------------------------------------------


def test_every_convolution_and_norm_of_the_decoder_runs_in_an_op():
    vae = tiny()
    report = pv.accelerate(vae)
    decode(vae, latents(5))
    modules = list(vae.decoder.modules())
    convs = sum(isinstance(module, CogVideoXSafeConv3d) for module in modules)
    norms = sum(isinstance(module, nn.GroupNorm) for module in modules)
    ups = sum(isinstance(module, CogVideoXUpsample3D) for module in modules)
    counts = {op: sum(impls.values()) for op, impls in report.calls().items()}
    batches = 2
    assert counts == {
        "causal_conv3d": batches * (convs - 1),
        "decode_head_": batches,
        "group_norm_silu": batches * norms,
        "upsample_conv2d": batches * ups,
    }


def test_clips_lie_channels_last_at_every_module_boundary():
    vae = tiny()
    pv.accelerate(vae)
    seen, wrong = watch_layout(vae.encoder, vae.decoder)
    decode(vae, latents(5))
    encode(vae, video(9, 24, 40))
    assert len(seen) > 40 and not wrong


# In place, reversible, under hooks ------------------------------------------------------------------------------


def test_restore_is_exact():
    vae, z = tiny(), latents()
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
    assert torch.equal(decode(AutoencoderKLCogVideoX.from_pretrained(tmp_path).eval(), z), stock)
    copied = copy.deepcopy(vae)
    assert torch.equal(decode(copied, z), decode(vae, z))
    pv.restore(copied)
    assert torch.equal(decode(copied, z), stock)
    assert_equal_to_1e5(decode(vae, z), stock)


@pytest.mark.parametrize("hooked_first", [True, False])
def test_under_leaf_offload(hooked_first):
    """Weights exist only during the forward of the module that owns them."""
    vae, z = tiny(), latents(4)
    stock = decode(vae, z)
    if not hooked_first:
        pv.accelerate(vae)
    cpu_offload(vae, torch.device("cpu"))
    report = pv.accelerate(vae, strict=True)
    assert vae.decoder.conv_in.conv.weight.device.type == "meta"
    assert_equal_to_1e5(decode(vae, z), stock)
    # On a CPU, upsample_conv2d pays if its weight is packed once, and these weights come and go.
    assert set(report.calls()) == VAE_OPS - {"upsample_conv2d"} and not report.fallbacks()


def test_under_layerwise_casting():
    vae, z = tiny().to(torch.bfloat16), latents(2)
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert vae.decoder.conv_in.conv.weight.dtype == torch.float8_e4m3fn
    plain = AutoencoderKLCogVideoX.from_config(vae.config).eval()
    plain.load_state_dict({name: value.to(torch.bfloat16) for name, value in vae.state_dict().items()})
    assert_close(decode(vae, z), truth(decode, plain, z.bfloat16()), stock)
    assert set(report.calls()) == VAE_OPS - {"upsample_conv2d"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_fall_back_and_are_counted(checkpointing):
    vae, z = tiny(), latents(3).requires_grad_()
    if checkpointing:
        vae.enable_gradient_checkpointing()
        vae.train()

    def gradient():
        out = vae.decode(z).sample
        return torch.autograd.grad(out.square().sum(), [z, vae.decoder.conv_in.conv.weight])

    stock = gradient()
    report = pv.accelerate(vae)
    for got, expected in zip(gradient(), stock, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    reasons = {reason for counted in report.fallbacks().values() for reason in counted}
    assert reasons == {"gradients are wanted and the op has no backward"} and not report.calls()


def test_autocast_keeps_its_convolutions():
    vae, z = tiny(), latents(5)
    exact = truth(decode, vae, z)
    with torch.autocast("cpu", torch.bfloat16):
        stock = decode(vae, z)
        report = pv.accelerate(vae)
        ours = decode(vae, z)
    assert_close(ours, exact, stock)
    assert list(report.fallbacks()["causal_conv3d"]) == ["autocast chooses the dtype of the convolution"]


@torch.no_grad()
def test_a_whole_decode_is_one_graph():
    vae, z = smaller(), latents(4, 1, 2)  # two batches, the second with caches
    stock = decode(vae, z)
    pv.accelerate(vae)
    torch.compiler.reset()
    compiled = torch.compile(vae.decode, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_equal_to_1e5(compiled(z).sample, stock)


# What is left ---------------------------------------------------------------------------------------------------


class _Conv(CogVideoXSafeConv3d):
    pass


class _Causal(CogVideoXCausalConv3d):
    pass


class _Norm(nn.GroupNorm):
    pass


def test_modules_that_are_not_the_known_ones_are_left_and_work():
    vae, z = tiny(), latents(5)
    mid, up = vae.decoder.mid_block.resnets[0], vae.decoder.up_blocks[0].upsamplers[0]
    mid.conv1.conv.__class__ = _Conv
    mid.conv2.__class__ = _Causal
    mid.norm1.norm_layer.__class__ = _Norm
    up.conv = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
    vae.decoder.conv_out.__class__ = _Causal
    stock = decode(vae, z)
    with pytest.raises(UnsupportedError, match=r"decoder\.mid_block\.resnets\.0\.norm1\.norm_layer: group_norm_silu"):
        pv.accelerate(vae, strict=True)
    report = pv.accelerate(vae)
    assert_equal_to_1e5(decode(vae, z), stock)
    left = {name: set(entry["left"]) for name, entry in report.to_dict()["modules"].items() if entry["left"]}
    assert left == {
        "decoder.mid_block.resnets.0.norm1.norm_layer": {"group_norm_silu"},
        "decoder.mid_block.resnets.0.conv1.conv": {"causal_conv3d"},
        "decoder.mid_block.resnets.0.conv2": {"causal_conv3d", "decode_head_"},
        "decoder.up_blocks.0.upsamplers.0.conv": {"upsample_conv2d"},
        "decoder.conv_out": {"causal_conv3d", "decode_head_"},
    }


def test_unknown_sources_are_refused(monkeypatch):
    sources.check(cogvideox_vae.SOURCES)
    place = f"{CogVideoXDecoder3D.__module__}:CogVideoXDecoder3D"
    monkeypatch.setitem(cogvideox_vae.SOURCES, place, {"0" * 16: "0.42.1"})
    vae = tiny()
    before = instance_dicts(vae)
    with pytest.raises(ModelError, match="the source of CogVideoXDecoder3D"):
        pv.accelerate(vae)
    assert instance_dicts(vae) == before
