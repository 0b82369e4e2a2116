"""AutoencoderKLCogVideoX as a stream: its batches and caches, the flags of the VAE, wrong calls, pipelines."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

import pyvideo_kernels as pv
from pyvideo_kernels import StreamingVaeDecoder
from pyvideo_kernels.errors import DTypeError, ShapeError, ValueOptionError
from pyvideo_kernels.integrations.diffusers import cogvideox_vae_stream

from .cogvideox_helpers import VAE_OPS, decode, tiny
from .vae_helpers import assert_equal_to_1e5, encode, latents, video


def test_batches_of_another_size():
    vae, z = tiny(), latents(7)
    vae.num_latent_frames_batch_size = 3
    stock = decode(vae, z)
    pv.accelerate(vae, strict=True)
    assert cogvideox_vae_stream.Stream(vae).steps(7, 1) == [(0, 4), (4, 7)]
    assert_equal_to_1e5(decode(vae, z), stock)


def test_tiling_and_slicing():
    vae, z, clip = tiny(), latents(3, 3, 5, batch=2), video(9, 24, 32)
    plain = decode(vae, z)
    vae.enable_slicing()
    vae.enable_tiling(16, 16, 0.5, 0.5)
    stock = decode(vae, z), encode(vae, clip)
    assert not torch.equal(stock[0], plain)
    report = pv.accelerate(vae, strict=True)
    for got, expected in zip((decode(vae, z), encode(vae, clip)), stock, strict=True):
        assert_equal_to_1e5(got, expected)
    assert not report.fallbacks()


def test_frames_of_each_step_and_the_state_between_them():
    vae = tiny()
    pv.accelerate(vae)
    adapter, z = cogvideox_vae_stream.Stream(vae), latents(9)
    state, done, kept = adapter.new_state(), 0, []
    steps = adapter.steps(9, 1)
    assert steps == [(0, 3), (3, 5), (5, 7), (7, 9)]
    for start, stop in steps:
        with torch.no_grad():
            frames = adapter.step(z[:, :, start:stop], state, first=start == 0, last=stop == 9)
        assert frames.shape[2] == adapter.frames(stop) - adapter.frames(start)
        done += frames.shape[2]
        kept.append(held(state))
    assert done == adapter.frames(9) == 33
    assert kept[1] == kept[2] > 0 == kept[3]  # constant; nothing is kept after the last


def held(value):
    """Bytes that the tensors of a state keep alive."""
    if isinstance(value, dict):
        return sum(held(item) for item in value.values())
    return value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) else 0


def test_caches_hold_two_frames_and_none_of_the_latents():
    vae = tiny()
    pv.accelerate(vae)
    with torch.no_grad():
        _, cache = vae.decoder(latents(2))

    def walk(value, path=""):
        if isinstance(value, dict):
            for name, item in value.items():
                yield from walk(item, f"{path}.{name}")
        else:
            yield path, value

    caches = dict(walk(cache))
    assert {tensor.shape[2] for tensor in caches.values() if tensor is not None} == {2}
    assert {path.rpartition(".")[2] for path, tensor in caches.items() if tensor is None} == {"conv_y", "conv_b"}


@pytest.mark.parametrize("frames", [3, 4])
def test_bytes_and_a_buffer_of_the_caller(frames):
    vae, z = tiny(), latents(frames)
    stock = decode(vae, z)
    decoder = StreamingVaeDecoder(vae)
    pixels = decoder.decode(z, dtype=torch.uint8)
    expected = (stock / 2 + 0.5).clamp(0, 1) * 255
    assert pixels.dtype == torch.uint8 and (pixels.float() - expected).abs().max() <= 0.501
    around = stock.new_full((1, 3, stock.shape[2] + 2, *stock.shape[3:]), 7.0)
    out = around[:, :, 1:-1]
    assert decoder.decode(z, out=out).data_ptr() == out.data_ptr()
    assert_equal_to_1e5(out, stock, layout=False)
    assert (around[:, :, [0, -1]] == 7).all()


def test_wrong_calls_raise_before_any_work():
    vae, z = tiny(), latents(2)
    pv.accelerate(vae)
    for wrong, error, match in (
        (z[:, :3], ShapeError, r"\[B, 4, T, h, w\]"),
        (z[:, :, :0], ShapeError, "nothing empty"),
        (z[0], ShapeError, "latents"),
        (z.bfloat16(), DTypeError, "float32 like the VAE"),
    ):
        with pytest.raises(error, match=match):
            vae.decode(wrong)
    with pytest.raises(ValueOptionError, match="`temb` is no argument"):
        StreamingVaeDecoder(vae).decode(z, temb=1)


def test_latents_are_convolved_at_their_own_size_and_no_image_is_enlarged(monkeypatch):
    vae, z = tiny(), latents(3, 2, 3)
    sizes = set()
    pv.accelerate(vae)

    def look(module, arguments, output):
        sizes.add(tuple(arguments[0].shape[2:]))

    for name, module in vae.decoder.named_modules():
        if name.endswith(("conv_y", "conv_b")):
            module.register_forward_hook(look)
    monkeypatch.setattr(F, "interpolate", None)
    decode(vae, z)
    assert sizes == {(3, 2, 3)}


def test_a_pipeline_gets_its_vae_swapped_and_says_so_of_its_transformer():
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
        num_layers=1, sample_width=4, sample_height=4, sample_frames=5,
    )  # fmt: skip
    pipe = CogVideoXPipeline(None, None, tiny(), transformer, CogVideoXDDIMScheduler())
    report = pv.accelerate(pipe, strict=True)
    z = latents(3)
    assert_equal_to_1e5(decode(pipe.vae, z), decode(tiny(), z))
    assert set(report.calls()) == VAE_OPS
    assert "CogVideoXTransformer3DModel is not integrated yet" in str(report.to_dict())
    pv.warmup(pipe, shapes=(16, 24, 9))
