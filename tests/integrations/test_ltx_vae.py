"""AutoencoderKLLTXVideo through our ops: parity with diffusers, whole and in pieces, layout, hooks, what is left."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoCausalConv3d, LTXVideoDecoder3d
from diffusers.models.normalization import RMSNorm
from torch import nn

import pyvideo_kernels as pv
from pyvideo_kernels import StreamingVaeDecoder
from pyvideo_kernels.errors import DTypeError, ModelError, ShapeError, UnsupportedError, ValueOptionError
from pyvideo_kernels.integrations.diffusers import ltx_vae, ltx_vae_blocks, ltx_vae_clip, ltx_vae_stream, sources
from pyvideo_kernels.integrations.diffusers import ltx_vae_forwards as forwards
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from .helpers import instance_dicts
from .vae_helpers import (
    DEVICE,
    assert_equal_to_1e5,
    drawn,
    encode,
    full_width,
    latents,
    truth,
    video,
    watch_layout,
)

VAE_OPS = {"pixel_norm_silu", "causal_conv3d", "decode_head_"}
ENCODER_OPS = {"pixel_norm_silu", "causal_conv3d"}
# What 0.9.1 and 0.9.5 have over the first release, and levels of 2 × 2 × 2 as there.
NEW_DECODER = {
    "timestep_conditioning": True,
    "decoder_spatio_temporal_scaling": (True, True, True),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
}
KINDS = {
    "0.9.0": {
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": (1,) * 5,
        "decoder_block_out_channels": (8, 8, 16, 16),
        "decoder_layers_per_block": (1,) * 5,
    },
    "0.9.5": {
        "block_out_channels": (8, 16, 16, 16, 16),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "spatio_temporal_scaling": (True,) * 4,
        "layers_per_block": (1,) * 5,
        "decoder_block_out_channels": (8, 16, 32),
        "decoder_layers_per_block": (1,) * 4,
        "decoder_inject_noise": (True, False, True, True),
        **NEW_DECODER,
    },
}
ONE_LEVEL = {
    "decoder_block_out_channels": (8,),
    "decoder_layers_per_block": (1, 1),
    "decoder_inject_noise": (True, True),
    "decoder_spatio_temporal_scaling": (True,),
    "upsample_residual": (True,),
    "upsample_factor": (2,),
}
KINDS["causal"] = {**KINDS["0.9.5"], "decoder_causal": True, "encoder_causal": False}


def tiny(kind="0.9.0", seed=0, **changes):
    """Three up- and downsamplings, one residual block each, narrow; every kind of module."""
    torch.manual_seed(seed)
    return drawn(AutoencoderKLLTXVideo(**{"latent_channels": 4, "patch_size": 2, **KINDS[kind], **changes}).eval())


def conditioned(vae, z):
    """The timestep of each clip, for a decoder that wants one."""
    return {"temb": torch.linspace(0.05, 0.3, z.shape[0])} if vae.config.timestep_conditioning else {}


def decode(vae, z):
    torch.manual_seed(7)  # the noise that a decoder injects
    with torch.no_grad():
        return vae.decode(z.to(vae.dtype), **conditioned(vae, z)).sample


def stream(vae, z, chunk):
    torch.manual_seed(7)
    decoder = StreamingVaeDecoder(vae)
    return list(decoder.stream(z.to(vae.dtype), chunk=chunk, **conditioned(vae, z)))


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


@pytest.mark.parametrize(
    "flags",
    [
        {"use_tiling": True},
        {"use_framewise_decoding": True},
        {"use_tiling": True, "use_framewise_decoding": True, "use_slicing": True},
    ],
)
def test_flags_that_change_the_arithmetic_give_what_diffusers_gives(flags):
    vae = tiny()
    vae.tile_sample_min_height = vae.tile_sample_min_width = 32
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 16
    z = latents(4, 2, 3, batch=2 if "use_slicing" in flags else 1)
    plain = decode(vae, z)
    for name, value in flags.items():
        setattr(vae, name, value)
    stock = decode(vae, z)
    assert not torch.equal(stock, plain)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert not report.fallbacks()


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


@pytest.mark.parametrize("what", ["noise", "skip", "cache", "first", "embedding"])
def test_parity_sees_a_mistake_of_the_stream(what, monkeypatch):
    vae, z = tiny("0.9.5"), latents(5)
    stock = decode(vae, z)
    pv.accelerate(vae)
    clip = ltx_vae_clip.Clip
    if what == "noise":  # anew in each call
        monkeypatch.setattr(ltx_vae_blocks, "_noise", lambda scale, x, clip, key, right=ltx_vae_blocks._noise: (
            right(scale, x, None, key)))  # fmt: skip
    elif what == "skip":  # a frame early
        monkeypatch.setattr(clip, "hold", lambda self, layer, frames, used, right=clip.hold: (
            right(self, layer, frames.roll(1, 1), used)))  # fmt: skip
    elif what == "cache":  # a frame short
        monkeypatch.setattr(ltx_vae_clip, "next_cache", lambda x, cache, n, right=ltx_vae_clip.next_cache: (
            right(x, cache, n - 1)))  # fmt: skip
    elif what == "first":  # the second frame is dropped as well
        monkeypatch.setattr(clip, "first", lambda self, layer: True)
    else:  # of another clip
        monkeypatch.setattr(ltx_vae_blocks, "_rows", lambda temb, table, right=ltx_vae_blocks._rows: (
            right(temb * 1.5, table)))  # fmt: skip
    try:
        ours = torch.cat(stream(vae, z, 2), 2)
    except (RuntimeError, ValueError):
        return  # frames do not add up
    with pytest.raises(AssertionError):
        assert_equal_to_1e5(ours, stock)


# The stream -----------------------------------------------------------------------------------------------------


def ready(latents):
    """Frames that are ready after so many latents, of tiny("0.9.0"): each convolution holds one back, each upsampling
    but doubles and drops the first.
    """
    frames = max(0, latents - 6)  # conv_in, two residual blocks, the convolution of the first upsampler
    for convolutions in (5, 3, 3):  # blocks and the next upsampler; the last of them conv_out
        frames = max(0, 2 * frames - 1 - convolutions)
    return frames


def test_frames_leave_as_soon_as_the_convolutions_have_seen_enough():
    vae = tiny()
    pv.accelerate(vae)
    adapter, frames = ltx_vae_stream.Stream(vae), 14
    assert adapter.late() == 6 + 5 / 2 + 3 / 4 + 3 / 8
    for chunk in (1, 3):
        steps = adapter.steps(frames, chunk)
        given = [run for run in steps if run[0] < frames]
        assert [stop for _, stop in given] == [min(n, frames) for n in range(chunk, frames + chunk, chunk)]
        assert steps[len(given) :] == [(frames, frames)] * -(-9.625 // chunk).__int__()
        state, z, done = adapter.new_state(), latents(frames, 1, 1), 0
        for start, stop in steps:
            with torch.no_grad():
                got = adapter.step(z[:, :, start:stop], state, first=start == 0, last=False).shape[2]
            done += got
            # What was inside is let out as evenly as it came.
            assert done == ready(stop) if start < frames else 0 <= got <= 8 * chunk
        assert done == adapter.frames(frames) == 8 * frames - 7


def test_a_chunk_as_long_as_the_clip_is_one_step_and_causal_decoders_are_not_late():
    vae = tiny()
    pv.accelerate(vae)
    adapter = ltx_vae_stream.Stream(vae)
    assert adapter.steps(5, 5) == adapter.steps(5, 8) == [(0, 5)]
    vae = tiny("causal")
    pv.accelerate(vae)
    assert ltx_vae_stream.Stream(vae).steps(5, 2) == [(0, 2), (2, 4), (4, 5)]
    assert [piece.shape[2] for piece in stream(vae, latents(5), 2)] == [9, 16, 8]


def held(value):
    """Elements of the tensors in a state, by the memory that they keep alive."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes() // value.element_size()
    if isinstance(value, dict):
        return sum(held(item) for item in value.values())
    return sum(held(item) for item in vars(value).values()) if hasattr(value, "__dict__") else 0


def test_memory_does_not_grow_with_the_clip():
    vae = tiny("0.9.5")
    pv.accelerate(vae)
    adapter, longest, kept = ltx_vae_stream.Stream(vae), {}, {}
    for frames in (10, 20):
        most = longest[frames] = {}
        hooks = [
            module.register_forward_hook(
                lambda module, _, y, name=name, most=most: most.update({name: max(most.get(name, 0), y.shape[2])})
            )
            for name, module in vae.decoder.named_modules()
            if isinstance(module, LTXVideoCausalConv3d)
        ]
        state, z = adapter.new_state(temb=torch.tensor([0.1])), latents(frames, 1, 1)
        for start, stop in adapter.steps(frames, 1):
            with torch.no_grad():
                adapter.step(z[:, :, start:stop], state, first=start == 0, last=False)
            if stop < frames:
                kept[frames] = held(state)
        for hook in hooks:
            hook.remove()
    assert longest[10] == longest[20] and kept[10] == kept[20] > 0
    assert longest[20]["conv_in"] == 1 and longest[20]["conv_out"] <= 2 * 8


def test_the_vae_itself_decodes_long_clips_in_pieces(monkeypatch):
    vae, z = tiny("0.9.5"), latents(6)
    stock = decode(vae, z)
    pv.accelerate(vae)
    adapter = ltx_vae_stream.Stream(vae)
    assert adapter.ample(z) > 6  # small frames: all at once
    monkeypatch.setattr(ltx_vae_stream, "_AMPLE", 2 * 8 * 4 * 16 * 24 * 2)
    assert adapter.ample(z) == 4
    calls = []
    hook = vae.decoder.register_forward_hook(lambda *call: calls.append(call[2].shape[2]))
    assert_equal_to_1e5(decode(vae, z), stock)
    hook.remove()
    assert len(calls) == len(adapter.steps(6, 4)) > 2


def test_bytes():
    vae, z = tiny(), latents(3)
    frames = decode(vae, z)
    decoder = StreamingVaeDecoder(vae)
    pixels = decoder.decode(z, dtype=torch.uint8)
    expected = (frames / 2 + 0.5).clamp(0, 1) * 255
    assert pixels.dtype == torch.uint8 and (pixels.float() - expected).abs().max() <= 0.501


def test_wrong_calls_raise_before_any_work():
    plain, timed = tiny(), tiny("0.9.5")
    z = latents(2)
    for vae in (plain, timed):
        pv.accelerate(vae)
    for vae, given, error, match in (
        (plain, (z[:, :3],), ShapeError, r"\[B, 4, T, h, w\]"),
        (plain, (z[:, :, :0],), ShapeError, "nothing empty"),
        (plain, (z[0],), ShapeError, "latents"),
        (plain, (z.bfloat16(),), DTypeError, "float32 like the VAE"),
        (timed, (z,), ValueOptionError, "`temb`"),
        (timed, (z, torch.zeros(2)), ShapeError, r"`temb` must be \[1\]"),
    ):
        with pytest.raises(error, match=match):
            vae.decode(*given)
    with pytest.raises(ValueOptionError, match="takes latents and temb"):
        StreamingVaeDecoder(plain).decode(z, timestep=1)


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


@torch.no_grad()
def test_compiles_into_one_graph():
    vae, z = tiny("0.9.5", **ONE_LEVEL | {"decoder_inject_noise": (False, False)}), latents(2, 1, 2)
    temb = torch.tensor([0.1])
    stock = vae.decoder(z, temb)
    pv.accelerate(vae)
    torch.compiler.reset()
    compiled = torch.compile(vae.decoder, backend="eager", fullgraph=True)
    assert_equal_to_1e5(compiled(z, temb), stock)


# What is left ---------------------------------------------------------------------------------------------------


class _Conv(nn.Conv3d):
    pass


class _Causal(LTXVideoCausalConv3d):
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


def test_a_decoder_with_a_foreign_layer_decodes_whole_clips():
    vae, z = tiny(), latents(3)
    vae.decoder.mid_block.resnets[0].conv1.__class__ = _Causal
    stock = decode(vae, z)
    report = pv.accelerate(vae)
    assert_equal_to_1e5(decode(vae, z), stock)
    pieces = stream(vae, z, 1)
    assert len(pieces) == 1
    assert_equal_to_1e5(pieces[0], stock)
    assert "decoder.mid_block.resnets.0.conv1" in {name for name, m in report.to_dict()["modules"].items() if m["left"]}


def test_unknown_sources_are_refused(monkeypatch):
    sources.check(ltx_vae.SOURCES)
    monkeypatch.setitem(ltx_vae.SOURCES, f"{LTXVideoDecoder3d.__module__}:LTXVideoDecoder3d", {"0" * 16: "0.42.1"})
    vae = tiny()
    before = instance_dicts(vae)
    with pytest.raises(ModelError, match="the source of LTXVideoDecoder3d"):
        pv.accelerate(vae)
    assert instance_dicts(vae) == before


def test_a_pipeline_gets_its_vae_swapped_and_says_so_of_its_transformer():
    transformer = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=8, cross_attention_dim=8,
        num_layers=1, caption_channels=8,
    )  # fmt: skip
    pipe = LTXPipeline(FlowMatchEulerDiscreteScheduler(), tiny("0.9.5"), None, None, transformer)
    report = pv.accelerate(pipe, strict=True)
    z = latents(2)
    assert_equal_to_1e5(decode(pipe.vae, z), decode(tiny("0.9.5"), z))
    assert set(report.calls()) == VAE_OPS
    assert "LTXVideoTransformer3DModel is not integrated yet" in str(report.to_dict())
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    pv.warmup(pipe, shapes=(32, 48, 9))
    assert torch.equal(torch.randn(2), expected)  # the decoder drew noise of its own
