"""StreamingVaeDecoder: any grouping gives the same frames, memory is constant, wrong calls fail before any work."""

import gc
import itertools

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.utils._python_dispatch import TorchDispatchMode

import pyvideo_kernels as pv
from pyvideo_kernels import StreamingVaeDecoder
from pyvideo_kernels.errors import DTypeError, ModelError, ShapeError, ValueOptionError
from pyvideo_kernels.integrations.swap import swapped

KINDS = ("2.1", "2.2")


def tiny(kind="2.1", seed=0):
    torch.manual_seed(seed)
    config = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, False],
        "scale_factor_spatial": 4,
        "scale_factor_temporal": 2,
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    }
    if kind == "2.2":
        config |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
                   "scale_factor_spatial": 8}  # fmt: skip
    return AutoencoderKLWan(**config).eval()


def latents(frames=6, height=3, width=5, batch=1, seed=1):
    return torch.randn(batch, 4, frames, height, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stock(vae, z):
    return vae.decode(z).sample


def assert_equal_to_1e5(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error <= 1e-5, f"relative error {error:.2e}"


@pytest.mark.parametrize("kind", KINDS)
def test_any_chunk_gives_the_frames_of_diffusers(kind):
    vae, z = tiny(kind), latents(batch=2)
    expected = stock(vae, z)
    decoder = StreamingVaeDecoder(vae)
    for chunk, sizes in ((1, [1, 2, 2, 2, 2, 2]), (2, [1, 4, 4, 2]), (5, [1, 10]), (9, [1, 10])):
        pieces = list(decoder.stream(z, chunk=chunk))
        assert [piece.shape[2] for piece in pieces] == sizes
        assert_equal_to_1e5(torch.cat(pieces, 2), expected)
        joined = decoder.decode(z, chunk=chunk)
        assert joined.is_contiguous() and torch.equal(joined, torch.cat(pieces, 2))
    assert torch.equal(decoder.decode(z), decoder.decode(z, chunk=1))


def test_one_latent_is_one_frame():
    vae, z = tiny(), latents(1)
    expected = stock(vae, z)
    (frame,) = StreamingVaeDecoder(vae).stream(z)
    assert frame.shape == (1, 3, 1, 12, 20)
    assert_equal_to_1e5(frame, expected)


def test_clips_under_way_do_not_meet():
    """The state is the clip's: two streams in turns, one that is abandoned, and vae.decode in between."""
    vae, a, b = tiny(), latents(seed=1), latents(4, 2, 3, seed=2)
    expected = stock(vae, a), stock(vae, b)
    decoder = StreamingVaeDecoder(vae)
    abandoned = decoder.stream(b, chunk=2)
    next(abandoned)
    pieces = [[], []]
    for first, second in itertools.zip_longest(decoder.stream(a), decoder.stream(b)):
        pieces[0].append(first)
        if second is not None:
            pieces[1].append(second)
            assert_equal_to_1e5(stock(vae, b), expected[1])
    for got, wanted in zip(pieces, expected, strict=True):
        assert_equal_to_1e5(torch.cat(got, 2), wanted)


def test_the_grad_mode_of_the_caller_is_its_own():
    vae = tiny()
    decoder = StreamingVaeDecoder(vae)
    for frames in decoder.stream(latents(3)):
        assert torch.is_grad_enabled() and not frames.requires_grad
    assert not decoder.decode(latents(2)).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_other_dtypes(kind):
    vae, z = tiny(kind), latents(3)
    decoder = StreamingVaeDecoder(vae)
    with torch.no_grad():
        for name in ("weight", "bias"):  # some pixels beyond the ends
            getattr(vae.decoder.conv_out, name).mul_(4)
    frames = decoder.decode(z)
    assert frames.abs().max() == 1 and frames.dtype == torch.float32
    expected = ((frames.double() + 1) * 127.5).round()
    for got in (decoder.decode(z, dtype=torch.uint8), torch.cat(list(decoder.stream(z, dtype=torch.uint8)), 2)):
        assert got.dtype == torch.uint8 and got.shape == frames.shape
        # A value within rounding of a half may go either way.
        assert (got.double() - expected).abs().max() <= 1 and (got == expected).double().mean() > 0.999
        assert {int(got.min()), int(got.max())} == {0, 255}
    assert torch.equal(decoder.decode(z, dtype=torch.bfloat16), frames.bfloat16())
    assert torch.equal(next(decoder.stream(z, dtype=torch.float64)), frames[:, :, :1].double())


def test_out_is_filled_and_nothing_around_it():
    vae, z = tiny(), latents(3)
    decoder = StreamingVaeDecoder(vae)
    expected = decoder.decode(z)
    around = torch.full((3, 3, 9, 12, 20), float("nan"))
    out = around[1:2, :, 2:7]
    assert decoder.decode(z, out=out) is out and torch.equal(out, expected)
    assert around.isnan().sum() == around.numel() - out.numel()
    film = torch.zeros(expected.shape, dtype=torch.uint8)
    assert torch.equal(decoder.decode(z, out=film), decoder.decode(z, dtype=torch.uint8))


class _Allocations(TorchDispatchMode):
    """The largest number of bytes that storages made meanwhile held at one time."""

    def __init__(self, given):
        super().__init__()
        self.given, self.alive, self.most = given.untyped_storage()._cdata, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata == self.given:
                    continue
                self.alive[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


def test_memory_does_not_grow_with_the_clip():
    decoder = StreamingVaeDecoder(tiny())
    decoder.decode(latents(2))  # packs weights, which stay
    most = {}
    for frames in (4, 12):
        z = latents(frames)
        gc.collect()
        with _Allocations(z) as seen:
            for _ in decoder.stream(z):
                pass
        most[frames] = seen.most
    assert most[4] == most[12] > 10_000


class _Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran before the arguments were checked")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ({"height": 0}, {}, ShapeError, r"`latents` must be \[B, 4, T, h, w\]"),
        ({"frames": 0}, {}, ShapeError, "nothing empty"),
        ({}, {"chunk": 0}, ValueOptionError, "`chunk` must be a positive number"),
        ({}, {"chunk": 1.5}, ValueOptionError, "`chunk` must be a positive number"),
        ({}, {"chunk": True}, ValueOptionError, "`chunk` must be a positive number"),
        ({}, {"dtype": torch.int32}, DTypeError, "`dtype` must be a float dtype, torch.uint8 or None"),
        ({}, {"temb": 1}, ValueOptionError, "`temb` is no argument of AutoencoderKLWan"),
    ],
)
def test_wrong_calls_fail_before_any_work(arguments, options, error, match):
    decoder, z = StreamingVaeDecoder(tiny()), latents(**arguments)
    with _Nothing():
        with pytest.raises(error, match=match):
            decoder.stream(z, **options)
        with pytest.raises(error, match=match):
            decoder.decode(z, **options)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda z: z[:, :3], ShapeError, r"\[B, 4, T, h, w\] with nothing empty; got \[1, 3, 6, 3, 5\]"),
        (lambda z: z[0], ShapeError, "must have 5 dimensions"),
        (lambda z: z.bfloat16(), DTypeError, "must be torch.float32 like the VAE; got torch.bfloat16"),
        (lambda z: z.long(), DTypeError, "must be float32, bfloat16, float16 or float64"),
        (lambda z: [z], DTypeError, "must be a tensor; got list"),
        (lambda z: z.to("meta"), pv.errors.DeviceError, "`latents` must be on cpu like the VAE; got meta"),
    ],
)
def test_wrong_latents_fail_before_any_work(change, error, match):
    vae, z = tiny(), change(latents())
    decoder = StreamingVaeDecoder(vae)
    with _Nothing(), torch.no_grad():
        for call in (decoder.stream, decoder.decode):
            with pytest.raises(error, match=match):
                call(z)
        if isinstance(z, torch.Tensor):
            with pytest.raises(error, match=match):
                vae.decode(z)


@pytest.mark.parametrize(
    ("out", "options", "error", "match"),
    [
        (torch.empty(1, 3, 10, 12, 20), {}, ShapeError, r"`out` must be \[1, 3, 11, 12, 20\]"),
        (torch.empty(1, 3, 11, 12, 20), {"dtype": torch.uint8}, DTypeError, "`out` must be torch.uint8"),
        (torch.empty(1, 3, 11, 12, 20, dtype=torch.int64), {}, DTypeError, "`out` must be float32"),
        (torch.empty(1, 3, 11, 12, 20, device="meta"), {}, pv.errors.DeviceError, "`out` must be on cpu"),
    ],
)
def test_a_wrong_out_is_refused(out, options, error, match):
    decoder, z = StreamingVaeDecoder(tiny()), latents()
    with _Nothing(), pytest.raises(error, match=match):
        decoder.decode(z, out=out, **options)


def test_it_accelerates_what_is_not():
    vae = tiny()
    before = {name: dict(module.__dict__) for name, module in vae.named_modules()}
    decoder = StreamingVaeDecoder(vae)
    assert decoder.vae is vae
    settings = next(settings for _, _, settings in swapped(vae))
    StreamingVaeDecoder(vae)
    assert next(settings for _, _, settings in swapped(vae)) is settings
    StreamingVaeDecoder(vae, impl="reference")
    assert next(settings for _, _, settings in swapped(vae)).impl == "reference"
    pv.restore(vae)
    assert all(module.__dict__.keys() == before[name].keys() for name, module in vae.named_modules())
    # Restored, it still streams, in the stock modules.
    assert_equal_to_1e5(decoder.decode(latents()), stock(vae, latents()))


def test_other_models_are_refused():
    with pytest.raises(ModelError, match="`vae` must be one of AutoencoderKLWan"):
        StreamingVaeDecoder(torch.nn.Conv3d(1, 1, 1))
    with pytest.raises(ValueOptionError, match="`tiling` must be None"):
        StreamingVaeDecoder(tiny(), tiling=True)
