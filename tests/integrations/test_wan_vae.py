"""AutoencoderKLWan through our ops: parity with diffusers, caches, layout, hooks, what is left."""

import collections
import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import nn

import pyvideo_kernels as pv
from pyvideo_kernels.errors import ModelError, UnsupportedError
from pyvideo_kernels.integrations.diffusers import sources, wan_vae
from pyvideo_kernels.integrations.diffusers import wan_vae_blocks as blocks
from pyvideo_kernels.integrations.diffusers import wan_vae_forwards as forwards
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from .helpers import Float64, instance_dicts

KINDS = ("2.1", "2.2")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton is interpreted on the CPU
ENCODER_OPS = {"rms_norm_silu", "causal_conv3d", "vae_attention"}
DECODER_OPS = ENCODER_OPS | {"upsample_conv2d", "decode_head_"}


def tiny(kind="2.1", seed=0, **changes):
    """Two up- and downsamplings in time and space, one residual block each, every kind of module."""
    torch.manual_seed(seed)
    config = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "scale_factor_spatial": 4,
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    }
    if kind == "2.2":
        config |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
                   "scale_factor_spatial": 8}  # fmt: skip
    vae = AutoencoderKLWan(**{**config, **changes}).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "gamma" in name:  # fresh ones would hide a dropped weight
                parameter.add_(0.3 * torch.randn_like(parameter))
    return vae


def latents(frames=2, height=3, width=5, batch=1, seed=1):
    return torch.randn(batch, 4, frames, height, width, generator=torch.Generator().manual_seed(seed))


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
    with Float64():
        out = function(copy.deepcopy(vae).double(), x)
    assert out.dtype == torch.float64
    return out


def assert_equal_to_1e5(ours, stock):
    assert ours.shape == stock.shape and ours.dtype == stock.dtype and ours.stride() == stock.stride()
    error = (ours.double() - stock.double()).abs().max() / stock.double().abs().max()
    assert error <= 1e-5, f"relative error {error:.2e}"


# Parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [1, 4])
def test_decode_equals_diffusers_in_float32(kind, frames):
    vae, z = tiny(kind), latents(frames, batch=2 if frames == 1 else 1)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert set(report.calls()) == DECODER_OPS and not report.fallbacks()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [1, 9])
def test_encode_equals_diffusers_in_float32(kind, frames):
    vae, clip = tiny(kind), video(frames)
    stock = encode(vae, clip)
    report = pv.accelerate(vae, strict=True)
    assert_equal_to_1e5(encode(vae, clip), stock)
    assert set(report.calls()) == ENCODER_OPS and not report.fallbacks()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_no_further_from_float64_than_diffusers(kind):
    vae = tiny(kind).to(torch.bfloat16)
    for function, x in ((decode, latents(2)), (encode, video(5))):
        x = x.bfloat16()
        exact, stock = truth(function, vae, x), function(vae, x)
        pv.accelerate(vae, strict=True)
        assert_close(function(vae, x), exact, stock, function.__name__)
        pv.restore(vae)


@pytest.mark.parametrize("kind", KINDS)
def test_tiling_and_slicing(kind):
    vae = tiny(kind)
    scale = vae.spatial_compression_ratio
    z, clip = latents(2, 3, 5, batch=2), video(5, 4 * scale, 5 * scale)
    vae.enable_slicing()
    vae.enable_tiling(4 * scale, 4 * scale, 3 * scale, 3 * scale)
    stock = decode(vae, z), encode(vae, clip)
    report = pv.accelerate(vae, strict=True)
    ours = decode(vae, z), encode(vae, clip)
    for got, expected in zip(ours, stock, strict=True):
        error = (got - expected).abs().max() / expected.abs().max()
        assert got.shape == expected.shape and error <= 1e-5
    assert not report.fallbacks()


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


def test_the_triton_kernels_decode():
    vae, z = tiny(dim_mult=[1, 2], temperal_downsample=[True]).to(DEVICE), latents(2, 1, 1).to(DEVICE)
    exact, stock = truth(decode, vae, z), decode(vae, z)
    report = pv.accelerate(vae, impl="triton", strict=True)
    assert_close(decode(vae, z), exact, stock)
    assert {impl for impls in report.calls().values() for impl in impls} == {"triton"}


@pytest.mark.parametrize("op", sorted(DECODER_OPS))
def test_one_op_alone(op):
    vae, z = tiny(), latents(2)
    stock = decode(vae, z)
    report = pv.accelerate(vae, ops={op}, strict=True)
    assert_equal_to_1e5(decode(vae, z), stock)
    assert set(report.calls()) == {op}


def _without_cache(x, weight, bias, *, cache=None, **options):
    return pv.causal_conv3d(x, weight, bias, **options)


def _with_old_frames_swapped(x, weight, bias, *, cache=None, **options):
    return pv.causal_conv3d(x, weight, bias, cache=None if cache is None else cache.flip(1), **options)


def _without_residual(x, weight, bias, *, residual=None, **options):
    return pv.causal_conv3d(x, weight, bias, **options)


def _with_odd_frames_first(x, weight, bias, *, epilogue=None, **options):
    if epilogue == "interleave":
        weight, bias = weight.roll(len(weight) // 2, 0), bias.roll(len(bias) // 2)
    return pv.causal_conv3d(x, weight, bias, epilogue=epilogue, **options)


def _without_gamma(x, weight, bias, *, norm_weight=None, **options):
    ones = None if norm_weight is None else torch.ones_like(norm_weight)
    return pv.causal_conv3d(x, weight, bias, norm_weight=ones, **options)


def _with_phases_swapped(x, weight, bias, *, packed, **options):
    return pv.upsample_conv2d(x, weight, bias, packed=packed.flip(0), **options)


def _over_frames(query, key, value, **options):
    return pv.vae_attention(query, key.roll(1, 1), value.roll(1, 1), **options)


def _without_its_past(x, weight, bias, *, cache=None, **options):
    return pv.decode_head(x, weight, bias, **options)


def _over_width(x, weight, **options):
    if x.shape[-2] != x.shape[-1]:
        return pv.rms_norm_silu(x * 1.05, weight, **options) * x.norm(dim=-2, keepdim=True).sigmoid()
    return pv.rms_norm_silu(x.transpose(-1, -2).contiguous(), weight, **options).transpose(-1, -2)


def _without_silu(x, weight, *, silu=True, **options):
    return pv.rms_norm_silu(x, weight, silu=False, **options)


@pytest.mark.parametrize(
    ("place", "op", "wrong"),
    [
        (forwards, "causal_conv3d", _without_cache),
        (forwards, "causal_conv3d", _with_old_frames_swapped),
        (forwards, "causal_conv3d", _without_residual),
        (forwards, "causal_conv3d", _with_odd_frames_first),
        (forwards, "causal_conv3d", _without_gamma),
        (forwards, "rms_norm_silu", _over_width),
        (forwards, "rms_norm_silu", _without_silu),
        (forwards, "upsample_conv2d", _with_phases_swapped),
        (forwards, "decode_head", _without_its_past),
        (blocks, "vae_attention", _over_frames),
    ],
)
def test_parity_sees_a_mistake(place, op, wrong, monkeypatch):
    vae, z = tiny(), latents(4)  # the third chunk is the first whose caches are full
    stock, exact = decode(vae, z), truth(decode, vae, z)
    pv.accelerate(vae)
    monkeypatch.setattr(place, op, wrong)
    with torch.no_grad():  # in chunks: the middle block has one latent at a time otherwise
        ours = pv.StreamingVaeDecoder(vae).decode(z, chunk=2)
    with pytest.raises(AssertionError, match="relative error"):
        assert_equal_to_1e5(ours, stock)
    with pytest.raises(Mismatch):
        assert_close(ours, exact, stock)


# What runs, and how it lies in memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_convolution_and_norm_of_the_decoder_runs_in_an_op(kind, monkeypatch):
    vae, frames = tiny(kind), 3
    report, epilogues = pv.accelerate(vae), collections.Counter()

    def counting(*args, epilogue=None, keep=True, **options):
        epilogues[epilogue, keep] += 1
        return pv.causal_conv3d(*args, epilogue=epilogue, keep=keep, **options)

    monkeypatch.setattr(forwards, "causal_conv3d", counting)
    decode(vae, latents(frames))
    modules = list(vae.decoder.modules())
    blocks = sum(isinstance(module, WanResidualBlock) for module in modules)
    convs = sum(isinstance(module, WanCausalConv3d) for module in modules)
    norms = sum(isinstance(module, WanRMS_norm) for module in modules)
    time_convs = 2  # not of the first latent, which becomes a single frame
    # post_quant_conv besides, and conv_out elsewhere.
    calls = {op: sum(counts.values()) for op, counts in report.calls().items()}
    assert calls.pop("causal_conv3d") == frames * convs - time_convs
    # By themselves: the attention's norm and the one behind it, and those behind the upsamplers.
    assert calls == {"rms_norm_silu": 4 * frames, "upsample_conv2d": 2 * frames, "vae_attention": frames,
                     "decode_head_": frames}  # fmt: skip
    assert epilogues["rms_norm_silu", False] == blocks * frames
    assert epilogues["rms_norm_silu", True] == (norms - blocks - 4) * frames
    assert epilogues["interleave", True] == 2 * frames - time_convs


@pytest.mark.parametrize("kind", KINDS)
def test_clips_lie_channels_last_at_every_module_boundary(kind):
    vae = tiny(kind)
    pv.accelerate(vae)
    seen, wrong = [], []

    def look(name):
        def hook(module, arguments, output):
            if output.dim() == 5 and output.shape[1] > 1:
                seen.append(name)
                if not output.movedim(1, -1)[0].is_contiguous():
                    wrong.append((name, tuple(output.shape), output.stride()))

        return hook

    for half in (vae.encoder, vae.decoder):
        for name, module in half.named_modules():
            if name:  # the halves themselves hand over the stock layout
                module.register_forward_hook(look(name))
    decode(vae, latents(3))
    encode(vae, video(9))
    assert len(set(seen)) > 30 and not wrong


def test_caches_hold_no_more_than_two_frames():
    vae = tiny()
    pv.accelerate(vae)
    caches = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    z = latents(3)
    with torch.no_grad():
        for frame in range(3):
            vae.decoder(z[:, :, frame : frame + 1], feat_cache=caches, feat_idx=[0], first_chunk=frame == 0)
    caches = [cache for cache in caches if cache is not None]  # diffusers counts shortcuts, which keep nothing
    assert len(caches) > 10 and {cache.shape[2] for cache in caches} == {2}
    # Views of no more than twice what they show: a cache must not keep a whole chunk alive.
    assert all(cache.untyped_storage().nbytes() <= 2 * cache.numel() * 4 for cache in caches)


# In place, reversible, under hooks ------------------------------------------------------------------------------


def test_restore_is_exact():
    vae, z = tiny(), latents()
    stock, before, state = decode(vae, z), instance_dicts(vae), vae.state_dict()
    report = pv.accelerate(vae)
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
    assert torch.equal(decode(AutoencoderKLWan.from_pretrained(tmp_path).eval(), z), stock)
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
    assert vae.decoder.conv_in.weight.device.type == "meta"
    assert_equal_to_1e5(decode(vae, z), stock)
    # On a CPU, upsample_conv2d pays if its weight is packed once, and these weights come and go.
    assert set(report.calls()) == DECODER_OPS - {"upsample_conv2d"} and not report.fallbacks()


def test_under_layerwise_casting():
    vae, z = tiny().to(torch.bfloat16), latents(2)
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert vae.decoder.conv_in.weight.dtype == torch.float8_e4m3fn
    exact = truth(decode, _cast_back(vae), z.to(torch.bfloat16))
    assert_close(decode(vae, z), exact, stock)
    assert set(report.calls()) == DECODER_OPS - {"upsample_conv2d"}


def _cast_back(vae):
    plain = AutoencoderKLWan.from_config(vae.config).eval()
    plain.load_state_dict({name: value.to(torch.bfloat16) for name, value in vae.state_dict().items()})
    return plain


def test_gradients_fall_back_and_are_counted():
    vae, z = tiny(), latents(2)
    z.requires_grad_()

    def gradient():
        out = vae.decode(z).sample
        return torch.autograd.grad(out.square().sum(), [z, vae.decoder.conv_in.weight])

    stock = gradient()
    report = pv.accelerate(vae)
    for got, expected in zip(gradient(), stock, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
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
    vae, z = tiny(num_res_blocks=0, dim_mult=[1, 2], temperal_downsample=[True]), latents(2, 2, 2)
    caches = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    vae.decoder(z[:, :, :1], caches, [0], True)
    stock = vae.decoder(z[:, :, 1:], list(caches), [0], False)
    pv.accelerate(vae)
    torch.compiler.reset()
    compiled = torch.compile(vae.decoder, backend="eager", fullgraph=True)
    assert_equal_to_1e5(compiled(z[:, :, 1:], list(caches), [0], False), stock)


# What is left ---------------------------------------------------------------------------------------------------


class _Subclass(WanCausalConv3d):
    pass


def test_modules_that_are_not_the_known_ones_are_left_and_work():
    vae, z = tiny(), latents(2)
    block = vae.decoder.mid_block.resnets[0]
    block.conv2.__class__ = _Subclass
    vae.decoder.norm_out.bias = nn.Parameter(torch.full((8, 1, 1, 1), 0.5))
    stock = decode(vae, z)
    with pytest.raises(UnsupportedError, match=r"decoder\.mid_block\.resnets\.0\.conv2: causal_conv3d"):
        pv.accelerate(vae, strict=True)
    report = pv.accelerate(vae)
    assert_equal_to_1e5(decode(vae, z), stock)
    left = {name: entry["left"] for name, entry in report.to_dict()["modules"].items() if entry["left"]}
    assert left == {
        "decoder.mid_block.resnets.0.conv2": {"causal_conv3d": "it is a tests _Subclass, not a plain WanCausalConv3d"},
        "decoder.norm_out": {"rms_norm_silu": "the norm has a bias"},
    }


def test_unknown_sources_are_refused(monkeypatch):
    sources.check(wan_vae.SOURCES)
    monkeypatch.setitem(wan_vae.SOURCES, f"{WanDecoder3d.__module__}:WanDecoder3d", {"0" * 16: "0.42.1"})
    vae = tiny()
    before = instance_dicts(vae)
    with pytest.raises(ModelError, match="the source of WanDecoder3d"):
        pv.accelerate(vae)
    assert instance_dicts(vae) == before
