"""Tiles of the other families: their own flags, as a stream; costs; memory that runs out."""

import pytest
import torch

from pyvideo_kernels import StreamingVaeDecoder
from pyvideo_kernels.nn import TilePlan
from pyvideo_kernels.nn.memory import Meter
from pyvideo_kernels.nn.tiling import measure

from ..integrations import hunyuan_video_helpers, ltx_helpers, test_cogvideox_vae
from .test_streaming_vae_decoder import assert_equal_to_1e5

# Family -> a narrow VAE, and a clip in tiles of 2 × 3 latents (2 × 2 for CogVideoX), a new one every 1 × 2 (1 × 1).
FAMILIES = {
    "hunyuan": (hunyuan_video_helpers.tiny, (9, 3, 4)),
    "cogvideox": (test_cogvideox_vae.tiny, (5, 3, 5)),
    "ltx": (ltx_helpers.tiny, (3, 3, 4)),
}


def family(name):
    make, shape = FAMILIES[name]
    vae = make()
    z = torch.randn(1, vae.config.latent_channels, *shape, generator=torch.Generator().manual_seed(1))
    if name == "cogvideox":
        vae.enable_tiling(16, 16, 0.5, 0.5)
        return vae, z
    vae.enable_tiling()
    for flag, size in {"min_height": 2, "min_width": 3, "stride_height": 1, "stride_width": 2}.items():
        setattr(vae, f"tile_sample_{flag}", size * vae.spatial_compression_ratio)
    return vae, z


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stream_follows_the_flags(name):
    vae, z = family(name)
    with torch.no_grad():
        expected = vae.decode(z).sample
    decoder = StreamingVaeDecoder(vae, tiling="vae")
    assert_equal_to_1e5(torch.cat(list(decoder.stream(z)), 2), expected)
    assert_equal_to_1e5(decoder.decode(z), expected)
    # None is whole frames, whatever the flags.
    decoder.tiling = None
    assert (decoder.decode(z) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_costs_are_those_that_are_met(name):
    vae, _ = family(name)
    decoder, z = StreamingVaeDecoder(vae), torch.randn(1, vae.config.latent_channels, 5, 5, 6)
    cost = measure(decoder._stream, z, 2, {})
    for plan in (None, TilePlan((3, 4), (2, 3)), TilePlan((3, 4), (2, 3), streams=False)):
        decoder.tiling = plan
        with Meter() as meter:
            for piece in decoder.stream(z, chunk=2):
                del piece
        ratio = decoder._stream.size(1, 1)
        predicted = cost.of_whole(5, 6) if plan is None else cost.of_tiles(plan, 5, 6, ratio)
        assert 0.8 * predicted <= meter.peak <= 1.02 * predicted, (plan, meter.peak / predicted)


# Latents of a clip of a few steps, and of one of twice as many.
LENGTHS = {"hunyuan": (11, 20), "cogvideox": (7, 11), "ltx": (18, 24)}


@pytest.mark.parametrize("name", FAMILIES)
def test_memory_does_not_grow_with_the_clip(name):
    vae = FAMILIES[name][0]()
    decoder, most = StreamingVaeDecoder(vae), []

    def clip(frames):
        return torch.randn(1, vae.config.latent_channels, frames, 1, 2)

    decoder.decode(clip(2))  # packs weights, which stay
    for frames in LENGTHS[name]:
        z = clip(frames)
        with Meter() as meter:
            for piece in decoder.stream(z):
                del piece
        most.append(meter.peak)
    assert most[0] == most[1] > 10_000
