"""AutoencoderKLHunyuanVideo as a stream of temporal tiles: seams, flags, memory, wrong calls; and in pipelines."""

import weakref

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
from torch import nn

import pyvideo_kernels as pv
from pyvideo_kernels import StreamingVaeDecoder
from pyvideo_kernels.errors import DTypeError, ShapeError, UnsupportedError, ValueOptionError
from pyvideo_kernels.integrations.diffusers import hunyuan_video_vae_stream

from .hunyuan_video_helpers import TILED, VAE_OPS, decode, tiny
from .vae_helpers import assert_equal_to_1e5, encode, latents, video

# Temporal tiles and the stream ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "pieces"),
    [(1, [1]), (4, [13]), (5, [13, 4]), (7, [13, 12]), (8, [13, 12, 4]), (21, [13, *[12] * 5, 8])],
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
    vae, z, clip = tiny(), latents(5, 3, 4, batch=2), video(5, 24, 32)
    vae.enable_slicing()
    vae.enable_tiling(16, 24, tile_sample_stride_height=8, tile_sample_stride_width=16)
    stock = decode(vae, z), encode(vae, clip)
    report = pv.accelerate(vae, strict=True)
    ours = decode(vae, z), encode(vae, clip)
    for got, expected in zip(ours, stock, strict=True):
        error = (got - expected).abs().max() / expected.abs().max()
        assert got.shape == expected.shape and error <= 1e-5
    pieces = list(StreamingVaeDecoder(vae, tiling="vae").stream(z))
    assert [piece.shape[2] for piece in pieces] == [13, 4] and torch.equal(torch.cat(pieces, 2), ours[0])
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
