"""Tiles: the frames of diffusers' own, streamed; the fewest FLOPs that fit; a clip goes on where memory ran out."""

import pytest
import torch

from pyvideo_kernels import StreamingVaeDecoder, accelerate
from pyvideo_kernels.errors import ValueOptionError
from pyvideo_kernels.nn.tiling import TilePlan, overlap, tile_of_flags

from .test_streaming_vae_decoder import KINDS, assert_equal_to_1e5, latents, stock, tiny


def cut(vae, size, stride):
    """Turn the VAE's own tiles on, small enough for small frames."""
    vae.enable_tiling(size, size, stride, stride)
    return vae


# Geometry -----------------------------------------------------------------------------------------------------------


def test_spans_cover_every_pixel_once():
    for length in range(1, 30):
        for tile, stride in ((4, 3), (8, 6), (8, 8), (5, 2)):
            for kept in (None, (stride * 8, stride * 8)):
                spans = TilePlan((tile, tile), (stride, stride), kept=kept).spans(0, length, 8)
                assert spans[0].place == spans[0].seam == 0
                assert all(a.place + a.own == b.place for a, b in zip(spans, spans[1:], strict=False))
                assert spans[-1].place + spans[-1].own == length * 8 and spans[-1].stop == length
                # A seam is what two tiles share, and the first of them ends with it.
                assert all(b.seam == (a.stop - b.start) * 8 for a, b in zip(spans, spans[1:], strict=False))
                assert all(s.own <= (s.stop - s.start) * 8 for s in spans)


def test_flags_of_the_vae():
    vae = tiny()
    cut(vae, 16, 12)
    stream = StreamingVaeDecoder(vae)._stream
    assert tile_of_flags(stream) == TilePlan((4, 4), (3, 3), (4, 4), (12, 12))
    assert overlap(stream) == (1, 1)
    for wrong in ({"tile": (0, 4)}, {"stride": (5, 4)}, {"stride": (3,)}, {"kept": (0, 1)}, {"blend": (1.5, 2)}):
        with pytest.raises(ValueOptionError, match=f"`{next(iter(wrong))}` must be"):
            TilePlan(**{"tile": (4, 4), "stride": (3, 3), **wrong})


# The frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "stride"), [(16, 12), (24, 8), (20, 18)])
def test_the_flags_give_what_diffusers_gives(kind, size, stride):
    """3×3 tiles and more with slivers at the edges, through ``vae.decode`` and as a stream, in either order."""
    vae, z = tiny(kind), latents(frames=3, height=7, width=8, batch=2)
    scale = 2 if kind == "2.2" else 1
    cut(vae, size * scale, stride * scale)
    # Some of the frames must need the clamp, which comes after the blending.
    z = z * 4
    expected = stock(vae, z)
    assert expected.abs().max() == 1
    accelerate(vae)
    assert_equal_to_1e5(stock(vae, z), expected)
    plan = tile_of_flags(StreamingVaeDecoder(vae)._stream)
    if stride % 4:
        return  # frames of another size than whole ones
    for streams in (True, False):
        either = TilePlan(plan.tile, plan.stride, plan.blend, plan.kept, streams=streams)
        decoder = StreamingVaeDecoder(vae, tiling=either)
        for chunk, sizes in ((1, [1, 2, 2]), (2, [1, 4])):
            pieces = list(decoder.stream(z, chunk=chunk))
            assert [piece.shape[2] for piece in pieces] == sizes
            assert_equal_to_1e5(torch.cat(pieces, 2), expected)
        bytes_ = decoder.decode(z, dtype=torch.uint8)
        assert (bytes_.float() - (expected / 2 + 0.5) * 255).abs().max() < 0.502
        out = torch.full_like(expected, torch.nan)
        assert decoder.decode(z, out=out) is out
        assert_equal_to_1e5(out, expected)
