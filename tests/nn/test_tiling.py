"""Tiles: the frames of diffusers' own, streamed; the fewest FLOPs that fit; a clip goes on where memory ran out."""

import gc
import itertools
import weakref

import pytest
import torch

from pyvideo_kernels import StreamingVaeDecoder, accelerate
from pyvideo_kernels.errors import ValueOptionError
from pyvideo_kernels.nn import TilePlan, memory, tiled
from pyvideo_kernels.nn.memory import Meter, free_memory, is_out_of_memory
from pyvideo_kernels.nn.tiling import Cost, measure, overlap, plan_tiles, tile_of_flags, tilings

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
                assert all(a.place + a.own == b.place for a, b in itertools.pairwise(spans))
                assert spans[-1].place + spans[-1].own == length * 8 and spans[-1].stop == length
                # A seam is what two tiles share, and the first of them ends with it.
                assert all(b.seam == (a.stop - b.start) * 8 for a, b in itertools.pairwise(spans))
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
@pytest.mark.parametrize(("size", "stride"), [(16, 12), (20, 18), (8, 12)])
def test_the_flags_give_what_diffusers_gives(kind, size, stride):
    """3×3 tiles and more with slivers at the edges, through ``vae.decode`` and as a stream, in either order."""
    vae, z = tiny(kind), latents(frames=3, height=7, width=7 if kind == "2.1" else 4)
    scale = 2 if kind == "2.2" else 1
    cut(vae, size * scale, stride * scale)
    # Some of the frames must need the clamp, which comes after the blending.
    vae.decoder.conv_out.weight.data *= 4
    expected = stock(vae, z)
    assert expected.abs().max() == 1
    accelerate(vae)
    assert_equal_to_1e5(stock(vae, z), expected)
    plan = tile_of_flags(StreamingVaeDecoder(vae)._stream)
    if stride % 4 or stride > size:
        return  # frames of another size than whole ones
    for streams, chunk, sizes in ((True, 1, [1, 2, 2]), (True, 2, [1, 4]), (False, 1, [1, 2, 2])):
        either = TilePlan(plan.tile, plan.stride, plan.blend, plan.kept, streams=streams)
        pieces = list(StreamingVaeDecoder(vae, tiling=either).stream(z, chunk=chunk))
        assert [piece.shape[2] for piece in pieces] == sizes
        assert_equal_to_1e5(torch.cat(pieces, 2), expected)
    out = torch.full_like(expected, torch.nan)
    decoder = StreamingVaeDecoder(vae, tiling=plan)
    assert decoder.decode(z, out=out) is out
    assert_equal_to_1e5(out, expected)
    if kind == "2.2":
        decoder.tiling = either
        bytes_ = decoder.decode(z, dtype=torch.uint8)
        assert (bytes_.float() - (expected / 2 + 0.5) * 255).abs().max() < 0.502


def test_gradients_go_through_the_tiles_of_diffusers():
    vae, z = cut(tiny(), 16, 12), latents(frames=2, height=5)
    expected = vae.decode(z).sample
    accelerate(vae)
    got = vae.decode(z.requires_grad_()).sample
    assert got.requires_grad
    assert_equal_to_1e5(got.detach(), expected.detach())


# The choice ---------------------------------------------------------------------------------------------------------


def test_tilings_come_with_the_fewest_flops_first():
    def decoded(plan):
        rows, columns = (plan.spans(axis, n, 8) for axis, n in ((0, 60), (1, 104)))
        assert rows[-1].stop == 60 and columns[-1].stop == 104
        return sum(s.stop - s.start for s in rows) * sum(s.stop - s.start for s in columns)

    found = list(itertools.islice(tilings(60, 104, (8, 8)), 12))
    work = [decoded(plan) for plan in found]
    assert work == sorted(work)
    # Two tiles side by side along the longer edge: one seam of 60 × 8 latents.
    assert found[0] == TilePlan((60, 56), (60, 48)) and work[0] == 60 * 112
    assert all(plan.tile[0] * plan.tile[1] <= 900 for plan in tilings(60, 104, (8, 8), most=900))
    assert list(tilings(1, 1, (8, 8))) == [] and next(tilings(1, 4, (8, 8))).tile == (1, 3)


def test_the_plan_is_the_fewest_flops_that_fit():
    stream = StreamingVaeDecoder(tiny())._stream
    cost = Cost(step=1000, state=100, frames=10, clip=50)
    whole = cost.of_whole(48, 80)

    def plan(free, **options):
        return plan_tiles(stream, 48, 80, cost, free, **options)

    assert plan(whole / 0.89) is None and plan(None) is None
    ratio, last = stream.size(1, 1), 0
    for free in (0.95 * whole, 0.5 * whole, 0.3 * whole, 0.2 * whole):
        chosen = plan(free)
        assert cost.of_tiles(chosen, 48, 80, ratio) <= 0.9 * free
        tried = 0
        for tiles in tilings(48, 80, overlap(stream)):
            tried += 1
            if tiles.tile == chosen.tile:
                break
            for streams in (True, False):
                other = TilePlan(tiles.tile, tiles.stride, streams=streams)
                assert cost.of_tiles(other, 48, 80, ratio) > 0.9 * free, "something cheaper fits"
        assert tried >= last
        last = tried
    # Steps that are too large are cut and still stream; caches that are too large are held a tile at a time.
    assert plan(0.5 * whole).streams
    heavy = Cost(step=100, state=1000, frames=10, clip=50)
    assert not plan_tiles(stream, 48, 80, heavy, 0.5 * heavy.of_whole(48, 80)).streams
    # Nobody waits for the first frame of a clip that is joined, and there is room for its frames.
    together = plan(0.5 * whole, joined=True)
    assert not together.streams and cost.of_tiles(together, 48, 80, ratio, joined=True) <= 0.45 * whole
    assert together.tile[0] * together.tile[1] >= plan(0.5 * whole).tile[0] * plan(0.5 * whole).tile[1]
    # Nothing fits in nothing: the least there is.
    assert max(plan(1).tile) < 20
    assert plan(None, most=400).tile[0] * plan(None, most=400).tile[1] <= 400


@pytest.mark.parametrize(("kind", "chunk"), [("2.1", 1), ("2.2", 2)])
def test_costs_are_those_that_are_met(kind, chunk):
    """Measured on a few latents across, held against the real thing."""
    decoder = StreamingVaeDecoder(tiny(kind))
    z = latents(frames=5, height=8, width=10)
    cost = measure(decoder._stream, z, chunk, {})
    for plan in (None, TilePlan((5, 6), (3, 4)), TilePlan((5, 6), (3, 4), streams=False)):
        decoder.tiling = plan
        with Meter() as meter:
            for piece in decoder.stream(z, chunk=chunk):
                del piece
        ratio = decoder._stream.size(1, 1)
        predicted = cost.of_whole(8, 10) if plan is None else cost.of_tiles(plan, 8, 10, ratio)
        # Too much rather than too little, and not by much.
        assert 0.85 * predicted <= meter.peak <= 1.02 * predicted, (plan, meter.peak / predicted)


def test_measuring_leaves_the_random_numbers_alone():
    decoder, z = StreamingVaeDecoder(tiny()), latents()
    decoder.vae.decoder.conv_in.register_forward_hook(lambda m, args, out: torch.rand(1) and None)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measure(decoder._stream, z, 1, {})
    assert torch.equal(torch.rand(3), expected)


def test_auto_takes_tiles_where_memory_demands_it(monkeypatch):
    z = latents(frames=3, height=9, width=10)
    decoder = StreamingVaeDecoder(tiny(), tiling="auto")
    said = []
    decoder.say = said.append
    whole = StreamingVaeDecoder(decoder.vae).decode(z)
    torch.testing.assert_close(decoder.decode(z), whole, rtol=0, atol=0)
    assert not said
    free = 0.6 * measure(decoder._stream, z, 1, {}).of_whole(9, 10)
    monkeypatch.setattr(tiled, "free_memory", lambda device: free)
    frames = torch.cat(list(decoder.stream(z)), 2)
    plan = plan_tiles(decoder._stream, 9, 10, measure(decoder._stream, z, 1, {}), free)
    torch.testing.assert_close(frames, StreamingVaeDecoder(decoder.vae, tiling=plan).decode(z), rtol=0, atol=0)
    assert len(said) == 1 and "whole frames would not fit" in said[0] and "pixels" in said[0]


def test_smaller_steps_come_before_tiles(monkeypatch):
    z = latents(frames=5, height=4, width=5)
    decoder, said = StreamingVaeDecoder(tiny(), tiling="auto"), []
    decoder.say = said.append
    whole = [measure(decoder._stream, z, chunk, {}).of_whole(4, 5) for chunk in (1, 4)]
    assert whole[1] > 1.2 * whole[0] / 0.9
    monkeypatch.setattr(tiled, "free_memory", lambda device: 1.1 * whole[0] / 0.9)
    assert [piece.shape[2] for piece in decoder.stream(z, chunk=4)] == [1, 2, 2, 2, 2]
    assert said == [
        "vae decode: whole frames of 4 latents at once would not fit in memory: decoding a latent at a time"
    ]
    # The same where it turns out on the way: the frames are the same too.
    monkeypatch.undo()
    decoder.tiling = None
    expected = decoder.decode(z)
    handle = decoder.vae.decoder.conv_out.register_forward_pre_hook(_no_more_than_two_frames)
    pieces = list(decoder.stream(z, chunk=4))
    handle.remove()
    assert_equal_to_1e5(torch.cat(pieces, 2), expected)
    assert [piece.shape[2] for piece in pieces] == [1, 2, 2, 2, 2]
    assert said[1] == "vae decode: not enough memory after 1 frames: decoding again a latent at a time"


def _no_more_than_two_frames(module, args):
    if args[0].shape[2] > 4:
        raise torch.OutOfMemoryError("CUDA out of memory")


# Memory that runs out -----------------------------------------------------------------------------------------------

NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried to allocate"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 1 TB"),
    MemoryError(),
)


class Scarce:
    """The last block of a decoder that fails above a size: when the caches of the step are half written."""

    def __init__(self, vae, most, error=NO_MEMORY[0], calls=0):
        self.most, self.error, self.calls, self.sizes = most, error, calls, []
        self.scale = StreamingVaeDecoder(vae)._stream.size(1, 1)[0]
        self.handle = vae.decoder.conv_out.register_forward_pre_hook(self)

    def __call__(self, module, args):
        size = args[0].shape[-2] * args[0].shape[-1] // self.scale**2
        self.sizes.append(size)
        self.calls -= 1
        if size > self.most and self.calls < 0:
            raise self.error


@pytest.mark.parametrize("error", NO_MEMORY[:2], ids=["cuda", "cpu"])
def test_a_stream_goes_on_in_tiles(error):
    vae, z = tiny(), latents(frames=4, height=8, width=10)
    whole = torch.cat(list(StreamingVaeDecoder(vae).stream(z)), 2)
    decoder = StreamingVaeDecoder(vae)
    scarce = Scarce(vae, most=40, error=error, calls=2)
    with pytest.warns(RuntimeWarning, match="not enough memory after 3 frames: decoding again in tiles of") as said:
        pieces = list(decoder.stream(z))
    assert len(said) == 1
    assert [piece.shape[2] for piece in pieces] == [1, 2, 2, 2]
    frames = torch.cat(pieces, 2)
    # What was delivered stays; the rest is what these tiles give.
    torch.testing.assert_close(frames[:, :, :3], whole[:, :, :3], rtol=1e-5, atol=1e-6)
    scarce.handle.remove()
    plan = next(tilings(8, 10, overlap(decoder._stream), most=40))
    expected = StreamingVaeDecoder(vae, tiling=plan).decode(z)
    torch.testing.assert_close(frames[:, :, 3:], expected[:, :, 3:], rtol=1e-5, atol=1e-6)
    assert (frames - whole)[:, :, 3:].abs().max() > 1e-4


def test_a_whole_clip_is_then_of_one_kind():
    vae, z = tiny(), latents(frames=3, height=8, width=10)
    decoder = StreamingVaeDecoder(vae)
    scarce = Scarce(vae, most=40, calls=2)
    with pytest.warns(RuntimeWarning, match="not enough memory after 3 frames"):
        got = decoder.decode(z, out=torch.full((1, 3, 5, 32, 40), torch.nan))
    with pytest.warns(RuntimeWarning, match="not enough memory: decoding"):
        through_the_model = stock(vae, z)
    scarce.handle.remove()
    plan = next(tilings(8, 10, overlap(decoder._stream), most=40))
    expected = StreamingVaeDecoder(vae, tiling=plan).decode(z)
    assert_equal_to_1e5(got, expected)
    assert_equal_to_1e5(through_the_model, expected)


def test_tiles_shrink_until_they_fit_and_then_the_error_is_the_callers():
    vae, z = tiny(), latents(frames=1, height=4, width=8)
    decoder, said = StreamingVaeDecoder(vae), []
    decoder.say = said.append
    scarce = Scarce(vae, most=9)
    assert decoder.decode(z).shape == (1, 3, 1, 16, 32)
    assert 1 < len(said) <= 3 and max(scarce.sizes[-6:]) <= 9
    scarce.most = -1
    with pytest.raises(torch.OutOfMemoryError, match=r"20.00 GiB"):
        decoder.decode(z)
    # Tiles of the caller's own, and other failures, are the caller's at once.
    scarce.most, scarce.sizes = 16, []
    with pytest.raises(torch.OutOfMemoryError):
        StreamingVaeDecoder(vae, tiling=TilePlan((4, 5), (4, 4))).decode(z)
    scarce.error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        decoder.decode(z)
    assert len(scarce.sizes) == 2


def test_what_failed_is_let_go_before_the_tiles_begin(monkeypatch):
    vae, z = tiny(), latents(frames=3, height=8, width=10)
    decoder = StreamingVaeDecoder(vae)
    decoder.say = lambda text: None
    held, alive = [], []
    scarce = Scarce(vae, most=40)
    vae.decoder.conv_in.register_forward_hook(lambda m, a, out: held.append(weakref.ref(out.untyped_storage())))
    real = tiled.Tiled.frames

    def frames(self):
        alive.append([ref for ref in held if ref() is not None])
        return real(self)

    monkeypatch.setattr(tiled.Tiled, "frames", frames)
    decoder.decode(z)
    assert scarce.sizes[0] == 80 and held and alive == [[]]
    gc.collect()


def test_words_of_memory():
    assert all(is_out_of_memory(error) for error in NO_MEMORY)
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("illegal memory access")) and not is_out_of_memory(ValueError("memory"))
    assert free_memory(torch.device("meta")) is None
    free = free_memory(torch.device("cpu"))
    assert free is None or free > 1 << 20


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    whole = free_memory(torch.device("cpu"))
    if whole is None:
        pytest.skip("this system does not say how much memory is free")
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    (tmp_path / "memory.current").write_text("3000\n")
    for limit, expected in (("10000\n", 7000), ("2000\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert free_memory(torch.device("cpu")) == expected
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 10000


def test_a_meter_counts_what_is_held_at_once():
    with Meter() as meter:
        a = torch.zeros(1000)
        for _ in range(5):
            b = a + 1
            c = b.view(10, 100)[2:].t() * 2
            c.add_(1)
            del b, c
        assert meter.live == 4000 and meter.peak == 4000 + 4000 + 3200
        del a
    assert meter.live == 0
