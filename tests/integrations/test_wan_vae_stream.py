"""Wan's VAE as a stream: full width against diffusers, what is fused and what is not once somebody watches, layout."""

import collections
import copy
import functools

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyvideo_kernels as pv
from pyvideo_kernels import StreamingVaeDecoder
from pyvideo_kernels.errors import DTypeError, ShapeError
from pyvideo_kernels.integrations.diffusers import wan_vae_blocks as blocks
from pyvideo_kernels.integrations.packing import forget_offloaded
from pyvideo_kernels.integrations.swap import mark_of
from pyvideo_kernels.testing.compare import assert_close

from .test_wan_vae import decode, encode, latents, tiny, truth, video

KINDS = ("2.1", "2.2")


def full(kind):
    """The decoder at its real widths; of 2.2, one block a stage instead of three, and little of an encoder."""
    torch.manual_seed(0)
    if kind == "2.1":
        return AutoencoderKLWan(base_dim=8, decoder_base_dim=96).eval()
    wide = {"decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2, "num_res_blocks": 0}
    more = {"in_channels": 12, "out_channels": 12, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    return AutoencoderKLWan(base_dim=8, scale_factor_spatial=16, **wide, **more).eval()


def error(ours, stock):
    assert ours.shape == stock.shape and ours.dtype == stock.dtype
    return float((ours.double() - stock.double()).abs().max() / stock.double().abs().max())


# Parity ---------------------------------------------------------------------------------------------------------


def test_full_width_2_1_equals_diffusers_in_any_chunks():
    vae = full("2.1")
    z = torch.randn(1, 16, 5, 1, 3)
    stock = decode(vae, z)  # 17 frames; the first 1 and 5 of them are those of the first 1 and 2 latents
    decoder = StreamingVaeDecoder(vae)
    for chunk in (1, 2, 5):
        assert error(decoder.decode(z, chunk=chunk), stock) <= 1e-5
    assert error(decode(vae, z[:, :, :1]), stock[:, :, :1]) <= 1e-5
    assert error(decode(vae, z[:, :, :2]), stock[:, :, :5]) <= 1e-5


def test_full_width_2_1_in_bfloat16_is_no_further_from_float64_than_diffusers():
    vae = full("2.1").bfloat16()
    z = torch.randn(1, 16, 2, 1, 3).bfloat16()
    exact, stock = truth(decode, vae, z), decode(vae, z)
    pv.accelerate(vae, strict=True)
    assert_close(decode(vae, z), exact, stock)


def test_full_width_2_2_equals_diffusers():
    vae = full("2.2")
    z = torch.randn(1, 48, 2, 1, 3)
    stock = decode(vae, z)
    report = pv.accelerate(vae, strict=True)
    assert error(decode(vae, z), stock) <= 1e-5
    assert not report.fallbacks()


@pytest.mark.parametrize("kind", KINDS)
def test_81_frames(kind):
    vae, z = tiny(kind), latents(21, 1, 3)
    stock = decode(vae, z)
    assert stock.shape[2] == 81
    decoder = StreamingVaeDecoder(vae)
    done = 0
    for frames in decoder.stream(z, chunk=5):
        assert error(frames, stock[:, :, done : done + frames.shape[2]]) <= 1e-5
        done += frames.shape[2]
    assert done == 81
    assert error(decode(vae, z), stock) <= 1e-5


def test_decoding_is_deterministic():
    vae, z = tiny(), latents(3)
    decoder = StreamingVaeDecoder(vae)
    assert torch.equal(decoder.decode(z, chunk=2), decoder.decode(z, chunk=2))


@pytest.mark.parametrize("shape", [(8, 8, 2, 2), (8, 4, 2, 2), (8, 4, 1, 2), (8, 1, 2, 2), (6, 12, 1, 2), (6, 9, 2, 2)])
def test_the_repeated_shortcut(shape):
    """Channels that are repeated a whole number of times along one axis, along several, or across two of them."""
    stock, x = DupUp3D(*shape), torch.randn(2, shape[0], 2, 3, 5)
    for first in (False, True):
        assert torch.equal(blocks.repeat_forward(stock, None, x, first), stock(x, first))


def test_return_values_of_decode_and_encode():
    vae, z, clip = tiny(), latents(2), video(5)
    pv.accelerate(vae)
    with torch.no_grad():
        frames = vae.decode(z).sample
        assert type(vae.decode(z, return_dict=False)) is tuple
        assert torch.equal(vae.decode(z, return_dict=False)[0], frames)
        assert torch.equal(vae._decode(z, return_dict=False)[0], frames)
        assert torch.equal(vae(clip).sample, vae.decode(vae.encode(clip).latent_dist.mode()).sample)
        vae.enable_slicing()
        pair = torch.cat([z, z.flip(2)])
        assert error(vae.decode(pair).sample[:1], frames) <= 1e-5


class _Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran before the arguments were checked")


@pytest.mark.parametrize(
    ("kind", "clip", "raised", "match"),
    [
        ("2.1", torch.zeros(1, 4, 1, 16, 16), ShapeError, r"vae encode: `x` must be \[B, 3, T, H, W\]"),
        ("2.1", torch.zeros(1, 3, 0, 16, 16), ShapeError, "nothing empty"),
        ("2.1", torch.zeros(3, 16, 16), ShapeError, "5 dimensions"),
        ("2.1", [1.0], DTypeError, "must be a tensor"),
        ("2.2", torch.zeros(1, 3, 1, 16, 15), ShapeError, "multiples of 2"),
    ],
)
def test_wrong_clips_are_refused_before_any_work(kind, clip, raised, match):
    vae = tiny(kind)
    pv.accelerate(vae)
    with _Nothing(), torch.no_grad(), pytest.raises(raised, match=match):
        vae._encode(clip)


# What is fused, and when not ------------------------------------------------------------------------------------


class _Outside(TorchDispatchMode):
    """Counts what runs beside the ops, by the number of bytes that it writes; and looks at what the ops are given."""

    def __init__(self):
        super().__init__()
        self.written, self.given, self.strided = collections.Counter(), 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name.startswith("pyvideo::"):
            clips = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.dim() == 5]
            clips = [x for x in clips if x.shape[-1] in (4, 8, 16)]  # channels; not the weights, not the frames
            self.given += len(clips)
            # Each frame is one run of memory, whatever clip it is cut from.
            self.strided += [(name, x.shape, x.stride()) for x in clips if not x[0, 0].is_contiguous()]
        elif not func.is_view and name != "aten::new_empty":
            self.written[name] += sum(x.numel() * x.element_size() for x in tree_leaves(out))
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_copied_between_the_ops(kind):
    """The fused decoder hands clips from op to op as they lie; beside them run the attention's projections, the caches
    of the first stage, which has one frame a latent, and the shortcuts of 2.2."""
    vae, z = tiny(kind), latents(4)
    decoder = StreamingVaeDecoder(vae)
    decoder.decode(z)  # packs
    with _Outside() as outside:
        decoder.decode(z)
    assert outside.given > 150 and not outside.strided
    frame = 4 * z.shape[3] * z.shape[4]  # bytes of a latent frame, a channel
    views = {"aten::_unsafe_view"} if kind == "2.2" else set()
    assert set(outside.written) - views == {"aten::add.Tensor", "aten::cat", "aten::clone", "aten::convolution"}
    assert outside.written["aten::add.Tensor"] == 4 * 16 * frame
    assert outside.written["aten::convolution"] == 4 * (48 + 16) * frame
    # Two frames after each latent but the first: conv_in, four convolutions of the middle and four behind it, and the
    # one in time, which begins a latent later. Where a latent is two frames or more, caches are views.
    assert outside.written["aten::cat"] == 2 * (3 * (4 + 16 * 8) + 2 * 16) * frame
    shortcuts = 16 * (1 + 3 * 2) * 4 + 16 * (1 + 3 * 4) * 16 if kind == "2.2" else 0
    first = 16 * 4 + 16 * 16 if kind == "2.2" else 0  # made as two frames, one of which is used
    assert outside.written["aten::clone"] <= (4 * 4 + shortcuts + 2 * first) * frame


def _boundaries(vae):
    """Modules whose result another one's fused convolution would have swallowed, or whose input it would have made."""
    block = vae.decoder.up_blocks[0]
    return {
        "a norm": block.resnets[0].norm2,
        "a convolution": block.resnets[0].conv1,
        "a block": block.resnets[1],
        "the middle": vae.decoder.mid_block,
        "the upsampled image": block.upsamplers[0].resample[0],
        "the convolution of frames": block.upsamplers[0].resample[1],
        "a convolution in time": block.upsamplers[0].time_conv,
        "the last norm": vae.decoder.norm_out,
        "the last convolution": vae.decoder.conv_out,
        "the decoder": vae.decoder,
    }


@pytest.mark.parametrize("name", list(_boundaries(tiny())))
def test_who_watches_a_module_sees_what_diffusers_computes(name):
    """A hook gets the module's own result, unfused, and what it changes takes effect."""
    vae, z = tiny(), latents(3)
    seen = {"stock": [], "ours": []}

    def hook(key, module, arguments, output):
        seen[key].append(output.clone())
        return output + 0.5

    handle = _boundaries(vae)[name].register_forward_hook(functools.partial(hook, "stock"))
    stock = decode(vae, z)
    handle.remove()
    pv.accelerate(vae, strict=True)
    unwatched = decode(vae, z)
    _boundaries(vae)[name].register_forward_hook(functools.partial(hook, "ours"))
    watched = decode(vae, z)
    assert len(seen["ours"]) == len(seen["stock"]) > 0
    assert all(error(a, b) <= 1e-5 for a, b in zip(seen["ours"], seen["stock"], strict=True))
    assert error(watched, stock) <= 1e-5 and error(unwatched, stock) > 1e-3


def test_a_hook_before_a_module_takes_effect():
    vae, z = tiny(), latents(3)
    block = vae.decoder.up_blocks[0].resnets[1]  # its norm runs in the convolution of the block before

    def shifted(module, arguments):
        return arguments[0] + 0.1, *arguments[1:]

    handle = block.register_forward_pre_hook(shifted)
    stock = decode(vae, z)
    handle.remove()
    pv.accelerate(vae)
    block.register_forward_pre_hook(shifted)
    assert error(decode(vae, z), stock) <= 1e-5


def test_blocks_left_alone_leave_their_neighbours_right():
    """A block of another class in the middle of a row: the convolution before it makes no norm that nobody reads."""
    vae, z = tiny(), latents(3)
    stock = decode(vae, z)
    block = vae.decoder.up_blocks[0].resnets[1]
    block.__class__ = type("Block", (type(block),), {})
    vae.decoder.mid_block.resnets[0].nonlinearity = nn.GELU()
    changed = decode(vae, z)
    pv.accelerate(vae)
    assert error(decode(vae, z), changed) <= 1e-5 and error(changed, stock) > 1e-3


# Packed weights -------------------------------------------------------------------------------------------------


def _packed(vae):
    marks = [mark_of(module) for module in vae.modules()]
    return sum(len(mark.packed) for mark in marks if mark is not None)


def test_packed_weights_follow_the_parameters_and_go_with_restore():
    vae, z = tiny(), latents(2)
    pv.accelerate(vae)
    decode(vae, z)
    assert _packed(vae) > 20
    other = tiny(seed=5)
    vae.load_state_dict(other.state_dict())  # in place: the same storages, other values
    assert error(decode(vae, z), decode(other, z)) <= 1e-5
    for model in (vae, other):
        model.decoder.conv_in.weight = nn.Parameter(model.decoder.conv_in.weight * 2)
    assert error(decode(vae, z), decode(other, z)) <= 1e-5
    assert _packed(copy.deepcopy(vae)) == 0
    vae.double()  # no op takes it: stock arithmetic
    vae.float()
    assert error(decode(vae, z), decode(other, z)) <= 1e-5
    pv.restore(vae)
    assert _packed(vae) == 0


def test_packed_weights_do_not_stay_where_a_model_is_offloaded():
    vae, z = tiny(), latents(2)
    stock = decode(vae, z)
    pv.accelerate(vae)
    vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert error(decode(vae, z), stock) <= 1e-5
    assert _packed(vae) == 0
    whole = tiny()
    decoder = StreamingVaeDecoder(whole)
    decoder.decode(z)
    forget_offloaded(whole)
    assert _packed(whole) > 20  # not of one that stays where it is


# torch.compile --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_whole_decode_is_one_graph():
    vae, z = tiny(num_res_blocks=0, dim_mult=[1, 2], temperal_downsample=[True]), latents(2, 2, 2)
    stock = decode(vae, z)
    pv.accelerate(vae, strict=True)
    torch.compiler.reset()
    compiled = torch.compile(vae.decode, backend="eager", fullgraph=True)
    assert error(compiled(z).sample, stock) <= 1e-5


# Adapters, files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
def test_lora_on_the_plain_convolutions(before):
    """Those that PEFT can adapt: behind an upsampler, and around the attention."""
    adapter = LoraConfig(r=2, target_modules=["to_qkv", "proj", "resample.1"], init_lora_weights=False)
    vae, z = tiny(), latents(2)
    plain = decode(vae, z)
    if not before:
        pv.accelerate(vae)
        decode(vae, z)  # packs
    torch.manual_seed(3)
    inject_adapter_in_model(adapter, vae)
    if not before:
        ours = decode(vae, z)
        pv.restore(vae)
        stock = decode(vae, z)
    else:
        stock = decode(vae, z)
        left = pv.accelerate(vae).to_dict()["modules"]
        why = left["decoder.up_blocks.0.upsamplers.0.resample.1"]["left"]["upsample_conv2d"]
        assert why == "it is a peft Conv2d, not a plain Conv2d"
        ours = decode(vae, z)
    assert error(ours, stock) <= 1e-5 and error(stock, plain) > 1e-2


def test_a_saved_model_is_the_stock_one(tmp_path):
    vae, z = tiny(), latents(2)
    stock = decode(vae, z)
    pv.accelerate(vae)
    decode(vae, z)
    torch.save(vae, tmp_path / "vae.pt")
    loaded = torch.load(tmp_path / "vae.pt", weights_only=False)
    assert torch.equal(decode(loaded, z), stock)
    assert loaded._decode.__func__ is AutoencoderKLWan._decode
    assert (tmp_path / "vae.pt").stat().st_size < 1.3 * sum(p.numel() * 4 for p in vae.parameters()) + 300_000


def test_clips_lie_channels_last_in_the_encoder_too():
    vae, clip = tiny("2.2"), video(9)
    stock = encode(vae, clip)
    pv.accelerate(vae, strict=True)
    with _Outside() as outside:
        ours = encode(vae, clip)
    assert error(ours, stock) <= 1e-5 and outside.given > 60 and not outside.strided
