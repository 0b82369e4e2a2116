"""AutoencoderKLHunyuanVideo through our ops: parity with diffusers, layout, hooks, what is left."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as stock_file
from torch import nn

import pyvideo_kernels as pv
from pyvideo_kernels.errors import ModelError, UnsupportedError
from pyvideo_kernels.integrations.diffusers import hunyuan_video_vae, sources
from pyvideo_kernels.integrations.diffusers import hunyuan_video_vae_forwards as forwards
from pyvideo_kernels.integrations.swap import mark_of
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from .helpers import instance_dicts
from .hunyuan_video_helpers import ENCODER_OPS, TILED, VAE_OPS, decode, tiny
from .vae_helpers import assert_equal_to_1e5, drawn, encode, latents, truth, video

# Parity ---------------------------------------------------------------------------------------------------------


def test_full_width_decode_is_that_of_diffusers():
    """The released model's widths and depth. The encoder's weights, which are most of the time, are left out."""
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo().eval().requires_grad_(False)
    assert tuple(vae.config.block_out_channels) == (128, 256, 512, 512)
    torch.manual_seed(0)
    for part in (vae.decoder, vae.post_quant_conv):
        drawn(part.to_empty(device="cpu"))
    clips = [latents(frames, *size, channels=16) for frames, size in ((1, (3, 5)), (5, (1, 2)))]
    stock = [decode(vae, z) for z in clips]
    report = pv.accelerate(vae, strict=True)
    for z, expected in zip(clips, stock, strict=True):
        assert_equal_to_1e5(decode(vae, z), expected)
    assert [clip.shape[2] for clip in stock] == [1, 17]
    assert set(report.calls()) == VAE_OPS and not report.fallbacks()
    pv.restore(vae)
    half, z = vae.to(torch.bfloat16), clips[0].bfloat16()
    exact, stock = truth(decode, half, z), decode(half, z)
    pv.accelerate(half, strict=True)
    assert_close(decode(half, z), exact, stock)


@pytest.mark.parametrize("frames", [1, 2, 5, TILED])
def test_decode_equals_diffusers_in_float32(frames):
    vae, z = tiny(), latents(frames, 3, 5, batch=2 if frames == 2 else 1)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert stock.shape[2] == 4 * frames - 3 and set(report.calls()) == VAE_OPS and not report.fallbacks()


@pytest.mark.parametrize("frames", [1, 5, 33])
def test_encode_equals_diffusers_in_float32(frames):
    vae, clip = tiny(), video(frames, 16, 24)
    stock = encode(vae, clip)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(encode(vae, clip), stock)
    assert set(report.calls()) == ENCODER_OPS and not report.fallbacks()


def test_bfloat16_is_no_further_from_float64_than_diffusers():
    vae = tiny().to(torch.bfloat16)
    for function, x in ((decode, latents(2)), (decode, latents(TILED)), (encode, video(5, 16, 24))):
        x = x.bfloat16()
        exact, stock = truth(function, vae, x), function(vae, x)
        pv.accelerate(vae, strict=True)
        assert_close(function(vae, x), exact, stock, function.__name__)
        pv.restore(vae)


@pytest.mark.gpu
def test_the_triton_kernels_decode():
    """On a GPU alone: the interpreter takes longer over a decoder than over the tests of its kernels."""
    vae, z = tiny().to("cuda"), latents(TILED).to("cuda")
    exact, stock = truth(decode, vae, z), decode(vae, z)
    report = pv.accelerate(vae, impl="triton", strict=True)
    assert_close(decode(vae, z), exact, stock)
    assert {impl for impls in report.calls().values() for impl in impls} == {"triton"}


def test_every_implementation_gives_the_same_clip():
    vae, z = tiny(), latents(2, 2, 2)
    stock = decode(vae, z)
    report = pv.accelerate(vae, impl="reference")
    assert_equal_to_1e5(decode(vae, z), stock)
    assert {impl for impls in report.calls().values() for impl in impls} == {"reference"}
    # The CPU's own attention is torch's.
    report = pv.accelerate(vae, ops={"vae_attention"}, impl="cpu")
    assert_equal_to_1e5(decode(vae, z), stock)
    assert set(report.calls()) == {"vae_attention"} and set(report.calls()["vae_attention"]) == {"sdpa"}


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

    vae, z, clip = tiny(), latents(2), video(5, 16, 24)
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


def test_clips_lie_channels_last_at_every_module_boundary(monkeypatch):
    vae, right = tiny(), nn.Module.__call__
    pv.accelerate(vae)
    names = {
        module: name for half in ("encoder", "decoder") for name, module in vae.get_submodule(half).named_modules()
    }
    seen, wrong = [], []

    def call(module, *args, **kwargs):  # not a hook: nothing is fused over a hook
        output = right(module, *args, **kwargs)
        name = names.get(module)
        # What leaves a half has the stock layout, and frames are written in it.
        if name and not (name.startswith("conv_out") and output.shape[1] == 3) and output.dim() == 5:
            seen.append(name)
            if not output.movedim(1, -1)[0].is_contiguous():
                wrong.append((name, tuple(output.shape), output.stride()))
        return output

    monkeypatch.setattr(nn.Module, "__call__", call)
    report = pv.accelerate(vae)
    decode(vae, latents(3))
    encode(vae, video(9, 16, 24))
    assert len(set(seen)) > 70 and not wrong and set(report.calls()) == VAE_OPS


def test_a_hook_sees_what_the_stock_module_returns():
    vae, z = tiny(), latents(2)
    outputs = {name: [] for name, _ in vae.decoder.named_modules()}
    for name, module in vae.decoder.named_modules():
        module.register_forward_hook(lambda _, args, output, name=name: outputs[name].append(output.clone()))
    decode(vae, z)
    stock = {name: outputs[name][:] for name in outputs}
    for seen in outputs.values():
        seen.clear()
    report = pv.accelerate(vae, strict=True)
    decode(vae, z)
    for name, expected in stock.items():
        for got, output in zip(outputs[name], expected, strict=True):
            assert got.shape == output.shape, name
            assert (got - output).abs().max() <= 1e-4 * output.abs().max(), name
    assert sum(map(len, stock.values())) > 80 and not report.fallbacks()


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


def test_packed_weights_follow_the_weights_and_go_with_them():
    vae, z = tiny(), latents(2)
    pv.accelerate(vae)
    decode(vae, z)
    up, conv = vae.decoder.up_blocks[0].upsamplers[0].conv.conv, vae.decoder.conv_in.conv
    assert mark_of(up).packed and not mark_of(vae.decoder).packed
    with torch.no_grad():
        up.weight.mul_(-1.5)
    conv.weight = nn.Parameter(conv.weight.detach().flip(0))
    ours = decode(vae, z)
    pv.restore(vae)
    assert_equal_to_1e5(ours, decode(vae, z))
    assert mark_of(up) is None


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
    # On a CPU, upsample_conv2d pays if its weight is packed once, and these weights come and go.
    assert set(report.calls()) == VAE_OPS - {"upsample_conv2d"} and not report.fallbacks()


def test_under_layerwise_casting():
    vae, z = tiny().to(torch.bfloat16), latents(2)
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert vae.decoder.conv_in.conv.weight.dtype == torch.float8_e4m3fn
    plain = AutoencoderKLHunyuanVideo.from_config(vae.config).eval()
    plain.load_state_dict({name: value.to(torch.bfloat16) for name, value in vae.state_dict().items()})
    assert_close(decode(vae, z), truth(decode, plain, z.to(torch.bfloat16)), stock)
    assert set(report.calls()) == VAE_OPS - {"upsample_conv2d"}


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
    levels = {"block_out_channels": (8, 8, 8), "layers_per_block": 0, "spatial_compression_ratio": 4}
    levels |= {f"{way}_block_types": (f"HunyuanVideo{way.title()}Block3D",) * 3 for way in ("up", "down")}
    vae, z = tiny(**levels), latents(2, 2, 2)
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
