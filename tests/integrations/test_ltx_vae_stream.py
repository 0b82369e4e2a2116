"""AutoencoderKLLTXVideo as a stream: its delay, its memory, its noise, the flags of the VAE, wrong calls, pipelines."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoCausalConv3d

import pyvideo_kernels as pv
from pyvideo_kernels import StreamingVaeDecoder
from pyvideo_kernels.errors import DTypeError, ModelError, ShapeError, ValueOptionError
from pyvideo_kernels.integrations.diffusers import ltx_vae_blocks, ltx_vae_clip, ltx_vae_stream

from .ltx_helpers import VAE_OPS, decode, stream, tiny
from .vae_helpers import assert_equal_to_1e5, latents


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
    with pytest.raises(ValueOptionError, match="`timestep` is no argument of AutoencoderKLLTXVideo"):
        StreamingVaeDecoder(plain).decode(z, timestep=1)
    pieces = StreamingVaeDecoder(plain).stream(latents(20, 1, 1))
    next(pieces)
    pv.restore(plain)
    with pytest.raises(ModelError, match="restored while a clip was under way"):
        next(pieces)


class _Causal(LTXVideoCausalConv3d):
    pass


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
