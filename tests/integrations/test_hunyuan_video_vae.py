"""AutoencoderKLHunyuanVideo through our ops: parity with diffusers, temporal tiles, layout, hooks, what is left."""

import copy
import weakref

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as stock_file
from torch import nn

import pyvideo_kernels as pv
from pyvideo_kernels import StreamingVaeDecoder
from pyvideo_kernels.errors import DTypeError, ModelError, ShapeError, UnsupportedError, ValueOptionError
from pyvideo_kernels.integrations.diffusers import hunyuan_video_vae, hunyuan_video_vae_stream, sources
from pyvideo_kernels.integrations.diffusers import hunyuan_video_vae_forwards as forwards
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from .helpers import instance_dicts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton is interpreted on the CPU
ENCODER_OPS = {"group_norm_silu", "causal_conv3d", "vae_attention"}
VAE_OPS = ENCODER_OPS | {"upsample_conv2d", "decode_head_"}
TILED = 9  # latents of a clip in three temporal tiles: [0, 5), [3, 8), [6, 9)


def tiny(seed=0, **changes):
    """The model's own four levels with their up- and downsamplings, one residual block each, narrow."""
    torch.manual_seed(seed)
    config = {
        "latent_channels": 4,
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return drawn(AutoencoderKLHunyuanVideo(**{**config, **changes}).eval())


@torch.no_grad()
def drawn(module):
    """Weights that keep the variance, norms that are not the identity: in a fresh model biases outweigh the signal,
    whose rounding errors the next norm then blows up, in float32 to several times the tolerance for diffusers too.
    """
    for part in module.modules():
        if isinstance(part, (nn.Conv3d, nn.Linear)):
            bound = (3 / part.weight[0].numel()) ** 0.5
            part.weight.uniform_(-bound, bound)
            part.bias.uniform_(-0.1, 0.1)
        elif isinstance(part, nn.GroupNorm):
            part.weight.uniform_(0.5, 1.5)
            part.bias.uniform_(-0.5, 0.5)
    return module


def latents(frames=2, height=3, width=5, batch=1, channels=4, seed=1):
    return torch.randn(batch, channels, frames, height, width, generator=torch.Generator().manual_seed(seed))


def video(frames=9, height=16, width=24, seed=2):
    return torch.randn(1, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def decode(vae, z):
    with torch.no_grad():
        return vae.decode(z.to(vae.dtype)).sample


def encode(vae, clip):
    with torch.no_grad():
        return vae.encode(clip.to(vae.dtype)).latent_dist.parameters


def truth(function, vae, x):
    """The stock result in float64."""
    out = function(copy.deepcopy(vae).double(), x)
    assert out.dtype == torch.float64
    return out


def assert_equal_to_1e5(ours, stock):
    assert ours.shape == stock.shape and ours.dtype == stock.dtype and ours.stride() == stock.stride()
    error = (ours.double() - stock.double()).abs().max() / stock.double().abs().max()
    assert error <= 1e-5, f"relative error {error:.2e}"


# Parity ---------------------------------------------------------------------------------------------------------


def test_full_width_decode_equals_diffusers_in_float32():
    """The released model's widths and depth. The encoder's weights, which are most of the time, are left out."""
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo().eval().requires_grad_(False)
    assert tuple(vae.config.block_out_channels) == (128, 256, 512, 512)
    torch.manual_seed(0)
    for part in (vae.decoder, vae.post_quant_conv):
        drawn(part.to_empty(device="cpu"))
    clips = [latents(frames, *size, channels=16) for frames, size in ((1, (3, 5)), (2, (1, 3)), (5, (1, 2)))]
    stock = [decode(vae, z) for z in clips]
    report = pv.accelerate(vae, strict=True)
    for z, expected in zip(clips, stock, strict=True):
        assert_equal_to_1e5(decode(vae, z), expected)
    assert [clip.shape[2] for clip in stock] == [1, 5, 17]
    assert set(report.calls()) == VAE_OPS and not report.fallbacks()


@pytest.mark.parametrize("frames", [1, 2, 5, TILED])
def test_decode_equals_diffusers_in_float32(frames):
    vae, z = tiny(), latents(frames, batch=2 if frames == 2 else 1)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert stock.shape[2] == 4 * frames - 3 and set(report.calls()) == VAE_OPS and not report.fallbacks()


@pytest.mark.parametrize("frames", [1, 5, 33])
def test_encode_equals_diffusers_in_float32(frames):
    vae, clip = tiny(), video(frames)
    stock = encode(vae, clip)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(encode(vae, clip), stock)
    assert set(report.calls()) == ENCODER_OPS and not report.fallbacks()


def test_bfloat16_is_no_further_from_float64_than_diffusers():
    vae = tiny().to(torch.bfloat16)
    for function, x in ((decode, latents(2)), (decode, latents(TILED)), (encode, video(5))):
        x = x.bfloat16()
        exact, stock = truth(function, vae, x), function(vae, x)
        pv.accelerate(vae, strict=True)
        assert_close(function(vae, x), exact, stock, function.__name__)
        pv.restore(vae)


def test_every_implementation_gives_the_same_clip():
    vae, z = tiny(), latents(2, 2, 2)
    stock = decode(vae, z)
    report = pv.accelerate(vae, impl="reference")
    assert_equal_to_1e5(decode(vae, z), stock)
    assert {impl for impls in report.calls().values() for impl in impls} == {"reference"}


@pytest.mark.parametrize("op", sorted(VAE_OPS))
def test_one_op_alone(op):
    vae, z = tiny(), latents(2)
    stock = decode(vae, z)
    report = pv.accelerate(vae, ops={op}, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert set(report.calls()) == {op}


def _zeros_around(op):
    return lambda *args, pad_mode, **options: op(*args, pad_mode="zeros", **options)


def _zeros_beside(op):
    return lambda *args, pad_mode, **options: op(*args, pad_mode="first_frame", **options)


def _without_residual(op):
    return lambda *args, residual=None, **options: op(*args, **options)


def _without_silu(op):
    return lambda *args, silu=True, **options: op(*args, silu=False, **options)


def _frame_by_frame(op):
    return lambda x, *args, **options: op(x, *args, per_frame=x.dim() == 5, **options)


def _half_the_groups(op):
    return lambda *args, groups, **options: op(*args, groups=groups // 2, **options)


def _one_frame_late(op):
    return lambda x, *args, **options: op(x.roll(1, 1), *args, **options)


def _within_frames(op):
    return lambda *args, causal, **options: op(*args, causal=False, **options)


def _clamped(op):
    return lambda *args, clamp, **options: op(*args, clamp=True, **options)


@pytest.mark.parametrize(
    ("op", "mistake"),
    [
        ("causal_conv3d", _zeros_around),
        ("causal_conv3d", _zeros_beside),
        ("causal_conv3d", _without_residual),
        ("group_norm_silu", _without_silu),
        ("group_norm_silu", _frame_by_frame),
        ("group_norm_silu", _half_the_groups),
        ("upsample_conv2d", _zeros_beside),
        ("upsample_conv2d", _one_frame_late),
        ("vae_attention", _within_frames),
        ("decode_head_", _zeros_around),
        ("decode_head_", _clamped),
    ],
)
def test_parity_sees_a_mistake(op, mistake, monkeypatch):
    vae, z = tiny(), latents(2)
    stock, exact = decode(vae, z), truth(decode, vae, z)
    pv.accelerate(vae)
    name = op.rstrip("_")
    monkeypatch.setattr(forwards, name, mistake(getattr(pv, name)))
    ours = decode(vae, z)
    with pytest.raises(AssertionError, match="relative error"):
        assert_equal_to_1e5(ours, stock)
    with pytest.raises(Mismatch):
        assert_close(ours, exact, stock)


# Temporal tiles and the stream ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "pieces"),
    [(1, [1]), (4, [13]), (5, [13, 4]), (7, [13, 12]), (8, [13, 12, 4]), (TILED, [13, 12, 8])],
)
def test_frames_leave_as_soon_as_no_later_tile_touches_them(count, pieces):
    vae, z = tiny(layers_per_block=0), latents(count, 2, 3)
    stock = decode(vae, z)
    decoder = StreamingVaeDecoder(vae)
    streamed = [list(decoder.stream(z, chunk=chunk)) for chunk in (1, 2, 5)]
    assert [part.shape[2] for part in streamed[0]] == pieces
    assert_equal_to_1e5(torch.cat(streamed[0], 2), stock)
    for parts in streamed[1:]:
        assert all(torch.equal(got, expected) for got, expected in zip(parts, streamed[0], strict=True))
    assert torch.equal(decoder.decode(z), torch.cat(streamed[0], 2))


def _flags(vae, **flags):
    for name, value in flags.items():
        assert hasattr(vae, name)
        setattr(vae, name, value)
    return vae


@pytest.mark.parametrize(
    "flags",
    [
        {"use_framewise_decoding": False},
        {"tile_sample_min_num_frames": 8, "tile_sample_stride_num_frames": 4},
        {"tile_sample_min_num_frames": 16, "tile_sample_stride_num_frames": 4},  # three tiles meet in one frame
        {"tile_sample_min_num_frames": 18, "tile_sample_stride_num_frames": 12},  # seams between different frames
        {"tile_sample_min_num_frames": 12, "tile_sample_stride_num_frames": 12},  # no seams
        {"tile_sample_min_num_frames": 16, "tile_sample_stride_num_frames": 10},  # frames are repeated
        {"tile_sample_min_num_frames": 8, "tile_sample_stride_num_frames": 12},  # frames are left out
    ],
)
def test_the_flags_of_the_vae_say_what_is_decoded_together(flags):
    vae, z = _flags(tiny(layers_per_block=0), **flags), latents(TILED, 2, 3)
    stock = decode(vae, z).contiguous()  # diffusers may cut frames off
    pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert_equal_to_1e5(StreamingVaeDecoder(vae).decode(z), stock)


def test_flags_are_read_at_each_call():
    vae, z = tiny(layers_per_block=0), latents(TILED, 2, 3)
    tiled = decode(vae, z)
    whole = decode(_flags(vae, use_framewise_decoding=False), z)
    assert (tiled - whole).abs().max() > 1e-3 * whole.abs().max()  # the grouping is part of the model
    pv.accelerate(vae)
    assert_equal_to_1e5(decode(vae, z), whole)
    assert_equal_to_1e5(decode(_flags(vae, use_framewise_decoding=True), z), tiled)


def test_a_seam_fades_the_way_diffusers_does(monkeypatch):
    vae, z = tiny(layers_per_block=0), latents(5, 2, 3)
    stock = decode(vae, z)
    decoder, right = StreamingVaeDecoder(vae), hunyuan_video_vae_stream._faded
    assert_equal_to_1e5(decoder.decode(z), stock)
    for wrong in (
        lambda before, frames, extent: frames,
        lambda before, frames, extent: right(before.flip(2), frames, extent),
        lambda before, frames, extent: right(before, frames, extent - 1),
    ):
        monkeypatch.setattr(hunyuan_video_vae_stream, "_faded", wrong)
        with pytest.raises(AssertionError, match="relative error"):
            assert_equal_to_1e5(decoder.decode(z), stock)


def test_only_the_tail_of_a_tile_is_kept(monkeypatch):
    """What a step leaves behind does not grow, and a tile that begins at the last latent is not decoded."""
    vae, z, calls = tiny(layers_per_block=0), latents(13, 1, 2), []
    stream = hunyuan_video_vae_stream.Stream(vae)
    steps = stream.steps(13, 1)
    assert steps == [(0, 5), (3, 8), (6, 11), (9, 13)]
    vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    state, tile = stream.new_state(), None
    with torch.no_grad():
        for start, stop in steps:
            last = (start, stop) == steps[-1]
            frames = stream.step(z[:, :, start:stop], state, first=start == 0, last=last)
            assert tile is None or tile() is None
            tile = weakref.ref(frames.untyped_storage())
            if not last:
                assert state.tail.shape == (1, 3, 4, 8, 16)
                assert state.tail.untyped_storage().nbytes() == state.tail.numel() * 4
            del frames
    assert state.tail is None and len(calls) == 4


def test_tiling_and_slicing():
    vae, z, clip = tiny(), latents(6, 3, 5, batch=2), video(5, 24, 40)
    vae.enable_slicing()
    vae.enable_tiling(16, 16, tile_sample_stride_height=8, tile_sample_stride_width=8)
    stock = decode(vae, z), encode(vae, clip)
    report = pv.accelerate(vae, strict=True)
    ours = decode(vae, z), encode(vae, clip)
    for got, expected in zip(ours, stock, strict=True):
        error = (got - expected).abs().max() / expected.abs().max()
        assert got.shape == expected.shape and error <= 1e-5
    assert not report.fallbacks()


def test_wrong_calls_raise_before_any_work():
    vae = tiny(layers_per_block=0)
    decoder, z, ran = StreamingVaeDecoder(vae), latents(2, 1, 1), []
    vae.post_quant_conv.register_forward_hook(lambda *_: ran.append(1))
    for error, call in (
        (ShapeError, lambda: decoder.decode(z[:, :3])),
        (ShapeError, lambda: decoder.stream(z[0])),
        (ShapeError, lambda: decoder.decode(z[:, :, :0])),
        (DTypeError, lambda: decoder.decode(z.half())),
        (ValueOptionError, lambda: decoder.stream(z, chunk=0)),
        (ValueOptionError, lambda: decoder.decode(z, timestep=0)),
        (ShapeError, lambda: decode(vae, z[:, :3])),
    ):
        with pytest.raises(error, match=r"vae decode: `"):
            call()
    assert not ran


# What runs, and how it lies in memory ---------------------------------------------------------------------------


def test_every_convolution_and_norm_of_the_decoder_runs_in_an_op():
    vae = tiny()
    report = pv.accelerate(vae)
    decode(vae, latents(2))
    calls = {op: sum(counts.values()) for op, counts in report.calls().items()}
    modules = [*vae.decoder.modules(), vae.post_quant_conv]
    kinds = {kind: sum(type(module) is kind for module in modules) for kind in (nn.Conv3d, nn.GroupNorm, Attention)}
    assert calls["causal_conv3d"] + calls["upsample_conv2d"] + calls["decode_head_"] == kinds[nn.Conv3d]
    assert (calls["upsample_conv2d"], calls["decode_head_"]) == (3, 1)
    assert (calls["group_norm_silu"], calls["vae_attention"]) == (kinds[nn.GroupNorm], kinds[Attention])


def test_no_mask_and_no_padded_or_enlarged_clip_is_made(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a mask, a padded or an enlarged clip was made")

    vae, z, clip = tiny(), latents(2), video(5)
    for ops in ("all", VAE_OPS - {"vae_attention"}):
        pv.accelerate(vae, ops=ops)
        with monkeypatch.context() as patch:
            for module in (stock_file, forwards):
                patch.setattr(module, "prepare_causal_attention_mask", never)
            patch.setattr(forwards, "_upsampled", never)
            patch.setattr(nn.functional, "pad", never)
            patch.setattr(nn.functional, "interpolate", never)
            if ops == "all":
                decode(vae, z)
                encode(vae, clip)
            else:  # the net is tight
                with pytest.raises(AssertionError, match="a mask"):
                    decode(vae, z)


def test_clips_lie_channels_last_at_every_module_boundary():
    vae = tiny()
    pv.accelerate(vae)
    seen, wrong = [], []

    def look(name):
        def hook(module, arguments, output):
            if output.dim() == 5 and output.shape[1] > 1:
                seen.append(name)
                if not output.movedim(1, -1)[0].is_contiguous():
                    wrong.append((name, tuple(output.shape), output.stride()))

        return hook

    stock_layout = {"decoder": "", "decoder.conv_out": "", "decoder.conv_out.conv": "", "encoder": ""}
    for half in ("encoder", "decoder"):
        for name, module in vae.get_submodule(half).named_modules(prefix=half):
            if name not in stock_layout:  # what leaves a half has the stock layout, and frames are written in it
                module.register_forward_hook(look(name))
    decode(vae, latents(3))
    encode(vae, video(9))
    assert len(set(seen)) > 100 and not wrong


# In place, reversible, under hooks ------------------------------------------------------------------------------


def test_restore_is_exact():
    vae, z = tiny(), latents(5)
    stock, before, state = decode(vae, z), instance_dicts(vae), vae.state_dict()
    report = pv.accelerate(vae)
    decode(vae, z)
    assert instance_dicts(vae) != before
    assert {k: v.data_ptr() for k, v in vae.state_dict().items()} == {k: v.data_ptr() for k, v in state.items()}
    pv.restore(vae)
    assert instance_dicts(vae) == before and torch.equal(decode(vae, z), stock)
    assert report.complete


def test_saved_and_copied(tmp_path):
    vae, z = tiny(layers_per_block=0), latents(2)
    stock = decode(vae, z)
    pv.accelerate(vae)
    vae.save_pretrained(tmp_path)
    assert torch.equal(decode(AutoencoderKLHunyuanVideo.from_pretrained(tmp_path).eval(), z), stock)
    copied = copy.deepcopy(vae)
    assert torch.equal(decode(copied, z), decode(vae, z))
    pv.restore(copied)
    assert torch.equal(decode(copied, z), stock)
    assert_equal_to_1e5(decode(vae, z), stock)


@pytest.mark.parametrize("hooked_first", [True, False])
def test_under_leaf_offload(hooked_first):
    """Weights exist only during the forward of the module that owns them."""
    vae, z = tiny(), latents(2)
    stock = decode(vae, z)
    if not hooked_first:
        pv.accelerate(vae)
    cpu_offload(vae, torch.device("cpu"))
    report = pv.accelerate(vae, strict=True)
    assert vae.decoder.conv_in.conv.weight.device.type == "meta"
    assert_equal_to_1e5(decode(vae, z), stock)
    assert set(report.calls()) == VAE_OPS and not report.fallbacks()


def test_under_layerwise_casting():
    vae, z = tiny().to(torch.bfloat16), latents(2)
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert vae.decoder.conv_in.conv.weight.dtype == torch.float8_e4m3fn
    plain = AutoencoderKLHunyuanVideo.from_config(vae.config).eval()
    plain.load_state_dict({name: value.to(torch.bfloat16) for name, value in vae.state_dict().items()})
    assert_close(decode(vae, z), truth(decode, plain, z.to(torch.bfloat16)), stock)
    assert set(report.calls()) == VAE_OPS


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_fall_back_and_are_counted(checkpointing):
    vae, z = tiny(layers_per_block=0), latents(5, 1, 2)
    z.requires_grad_()
    if checkpointing:
        vae.enable_gradient_checkpointing()

    def gradient():
        out = vae.decode(z).sample
        return torch.autograd.grad(out.square().sum(), [z, vae.decoder.conv_in.conv.weight])

    stock = gradient()
    report = pv.accelerate(vae)
    for got, expected in zip(gradient(), stock, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    reasons = {reason for counted in report.fallbacks().values() for reason in counted}
    assert reasons == {"gradients are wanted and the op has no backward"} and not report.calls()


def test_autocast_keeps_its_convolutions():
    vae, z = tiny(), latents(2)
    exact = truth(decode, vae, z)
    with torch.autocast("cpu", torch.bfloat16):
        stock = decode(vae, z)
        report = pv.accelerate(vae)
        ours = decode(vae, z)
    assert_close(ours, exact, stock)
    assert list(report.fallbacks()["causal_conv3d"]) == ["autocast chooses the dtype of the convolution"]


@torch.no_grad()
def test_compiles_into_one_graph():
    vae, z = tiny(layers_per_block=0), latents(2, 2, 2)
    stock = vae.decoder(z)
    pv.accelerate(vae)
    torch.compiler.reset()
    compiled = torch.compile(vae.decoder, backend="eager", fullgraph=True)
    assert_equal_to_1e5(compiled(z), stock)


# What is left ---------------------------------------------------------------------------------------------------


class _Subclass(nn.Conv3d):
    pass


def test_modules_that_are_not_the_known_ones_are_left_and_work():
    vae, z = tiny(), latents(2)
    block = vae.decoder.mid_block.resnets[0]
    block.conv2.conv.__class__ = _Subclass
    vae.decoder.up_blocks[0].upsamplers[0].conv.pad_mode = "circular"
    vae.decoder.mid_block.attentions[0].set_processor(AttnProcessor())
    stock = decode(vae, z)
    with pytest.raises(UnsupportedError, match=r"decoder\.mid_block\.resnets\.0\.conv2\.conv: causal_conv3d"):
        pv.accelerate(vae, strict=True)
    report = pv.accelerate(vae)
    assert_equal_to_1e5(decode(vae, z), stock)
    left = {name: entry["left"] for name, entry in report.to_dict()["modules"].items() if entry["left"]}
    subclass = "it is a tests _Subclass, not a plain Conv3d"
    assert left == {
        "decoder.mid_block.resnets.0.conv2.conv": {"causal_conv3d": subclass},
        "decoder.mid_block.attentions.0": {"vae_attention": "its processor is a AttnProcessor"},
        "decoder.up_blocks.0.upsamplers.0.conv.conv": {
            "causal_conv3d": "its padding is circular",
            "upsample_conv2d": "its padding is circular",
        },
    }


def test_unknown_sources_are_refused(monkeypatch):
    sources.check(hunyuan_video_vae.SOURCES)
    place = f"{stock_file.__name__}:HunyuanVideoDecoder3D"
    monkeypatch.setitem(hunyuan_video_vae.SOURCES, place, {"0" * 16: "0.42.1"})
    vae = tiny(layers_per_block=0)
    before = instance_dicts(vae)
    with pytest.raises(ModelError, match="the source of HunyuanVideoDecoder3D"):
        pv.accelerate(vae)
    assert instance_dicts(vae) == before


# Pipelines ------------------------------------------------------------------------------------------------------


def pipeline():
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    transformer = nn.Linear(1, 1)
    return HunyuanVideoPipeline(
        transformer=transformer, vae=tiny(layers_per_block=0), scheduler=FlowMatchEulerDiscreteScheduler(), **parts
    )


def test_a_pipeline_gets_its_vae_swapped_and_says_so_of_its_transformer():
    pipe, z = pipeline(), latents(2)
    stock = decode(pipe.vae, z)
    report = pv.accelerate(pipe, strict=True)
    assert_equal_to_1e5(decode(pipe.vae, z), stock)
    assert set(report.calls()) == VAE_OPS and all(path.startswith("vae") for path in report.to_dict()["modules"])
    assert "not integrated yet" in report.to_dict()["kept"]["transformer"]
    pv.warmup(pipe, shapes=(16, 24, 9))
    pv.restore(pipe)
    assert torch.equal(decode(pipe.vae, z), stock)


def test_attention_of_a_transformer_that_is_not_integrated_is_not_silently_dropped():
    pipe = pipeline()
    assert "not integrated yet" in str(pv.accelerate(pipe, attention="dense").to_dict()["modules"]["transformer"])
    with pytest.raises(UnsupportedError, match="transformer: spacetime_attention: Linear is not integrated yet"):
        pv.accelerate(pipe, attention="dense", strict=True)
