import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import pyvideo_kernels as pv
from pyvideo_kernels.configs import forced_config
from pyvideo_kernels.configs.group_norm_silu import GroupNormConfig, select
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError, ValueOptionError
from pyvideo_kernels.kernels.group_norm_silu import latent_offsets, sample_offset
from pyvideo_kernels.kernels.rms_norm_silu import row_offsets
from pyvideo_kernels.reference.group_norm_silu import group_norm_silu as oracle
from pyvideo_kernels.reference.group_norm_silu import nearest_index
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

NAME = "group_norm_silu"
IMPLS = ("auto", "reference", "triton")


def _inputs(*shape, dtype=torch.float32, seed=0, mean=0.0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(*shape, generator=g) + mean).to(dtype)
    weight, bias = (torch.randn(shape[-1], generator=g) * 0.3 + one for one in (1, 0))
    return x, weight.to(dtype), bias.to(dtype)


def _run(x, *args, impl, **options):
    args, options = (
        [a if a is None else a.to(helpers.DEVICE) for a in (x, *args)],
        {k: v.to(helpers.DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()},
    )
    return pv.group_norm_silu(*args, impl=impl, **options).cpu()


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_contract():
    helpers.check_op_contract(NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_frame", [False, True])
def test_matches_torch_group_norm(per_frame, dtype):
    x, weight, bias = _inputs(2, 3, 4, 5, 24, dtype=dtype)
    clip = x.permute(0, 4, 1, 2, 3)

    def eager(to):
        z = clip.to(to)
        if per_frame:
            z = z.transpose(1, 2).flatten(0, 1)
        z = F.silu(F.group_norm(z, 6, weight.to(to), bias.to(to), 1e-6))
        z = z.unflatten(0, (2, 3)).transpose(1, 2) if per_frame else z
        return z.permute(0, 2, 3, 4, 1)

    for impl in IMPLS if dtype != torch.bfloat16 or helpers.GPU else IMPLS[:2]:
        out = _run(x, weight, bias, groups=6, per_frame=per_frame, impl=impl)
        assert_close(out, eager(torch.float64), eager(dtype), impl)


@pytest.mark.parametrize(
    ("size", "latent"),
    [((1, 5, 7), (1, 2, 3)), ((5, 6, 8), (3, 3, 4)), ((4, 3, 4), (2, 3, 4)), ((9, 7, 5), (3, 5, 2))],
    ids=["image", "first-apart", "even", "uneven"],
)
def test_matches_the_spatial_norm_of_cogvideox(size, latent):
    cogvideox = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_cogvideox")
    stock = cogvideox.CogVideoXSpatialNorm3D(12, 4, groups=3)
    g = torch.Generator().manual_seed(1)
    x, zq = torch.randn(2, 12, *size, generator=g), torch.randn(2, 4, *latent, generator=g)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.5)

        def eager(to):
            return F.silu(stock.to(to)(x.to(to), zq.to(to))[0]).permute(0, 2, 3, 4, 1)

        exact, own = eager(torch.float64), eager(torch.float32)
        # 1x1 convolutions commute with nearest neighbours: they run on the few latents.
        small = zq.permute(0, 2, 3, 4, 1)
        scale, shift = (F.linear(small, conv.conv.weight.flatten(1), conv.conv.bias)
                        for conv in (stock.conv_y, stock.conv_b))  # fmt: skip
        norm = stock.norm_layer
        for impl in IMPLS:
            out = _run(x.permute(0, 2, 3, 4, 1).contiguous(), norm.weight.detach(), norm.bias.detach(), groups=3,
                       scale=scale, shift=shift, impl=impl)  # fmt: skip
            assert_close(out, exact, own, impl)


def test_nearest_is_torchs():
    for source in range(1, 60):
        for size in {source, 2 * source, 8 * source, *range(1, 150, 7)}:
            z = torch.arange(source, dtype=torch.float32)[None, None]
            expected = F.interpolate(z, size=size)[0, 0].long()
            assert torch.equal(nearest_index(size, source, z.device), expected), (size, source)


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("kind", ["one", "drift", "black-corner"])
def test_statistics_with_a_large_mean(kind, impl):
    """A mean of a thousand deviations, one that moves along the clip, and a first tile that is unlike the rest."""
    x, weight, bias = _inputs(1, 4, 16, 24, 16, mean=1000.0)
    if kind == "drift":
        x += torch.linspace(0, 50, 4).view(1, 4, 1, 1, 1)
    if kind == "black-corner":
        x[0, 0, 0, :7] = 0
    exact, own = (oracle(*(t.to(to) for t in (x, weight, bias)), None, None, 4, 1e-6, True, False)
                  for to in (torch.float64, torch.float32))  # fmt: skip
    # Eight partial results.
    config = GroupNormConfig(16, 32, 4, 8, 4)
    assert math.ceil(1536 / config.chunk(1536, 1)) == 8
    with forced_config(NAME, config):
        assert_close(_run(x, weight, bias, groups=4, impl=impl), exact, own, kind)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_long_sums(impl):
    """A million elements with a mean of a thousand deviations, in few partial results: an order of magnitude nearer to
    float64 than fp32 arithmetic that rounds the mean."""
    x, _, _ = _inputs(1, 65536, 16, mean=1000.0)
    exact, own = (oracle(x.to(to), None, None, None, None, 2, 1e-6, False, False) for to in (torch.float64, x.dtype))
    with forced_config(NAME, GroupNormConfig(16, 4096, 4, 4, 4)):
        out = _run(x, groups=2, silu=False, impl=impl)
    assert_close(out, exact, own)
    assert float((out - exact).square().mean().sqrt()) < 2e-7


def test_conditioned_clips_are_shared_among_threads():
    """Blocks that begin inside a line of the second clip, whatever the number of threads."""
    x, weight, bias = _inputs(2, 5, 27, 35, 16)
    scale, shift = (_inputs(2, 3, 9, 12, 16, seed=s)[0] for s in (1, 2))
    options = {"groups": 4, "scale": scale, "shift": shift}
    exact, low = (pv.group_norm_silu(x.to(to), weight, bias, **options, impl="reference")
                  for to in (torch.float64, torch.float32))  # fmt: skip
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(pv.group_norm_silu(x, weight, bias, **options))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    assert_close(results[0], exact, low)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("other groups", {"groups": 8}),
        ("statistics by frame", {"per_frame": True}),
        ("eps of the deviation", {"eps": 0.1}),
        ("no silu", {"silu": False}),
        ("no shift", {"shift": None}),
        ("the scale turned in width", {"scale": lambda z: z.flip(3)}),
        # What CogVideoX would do with an even number of frames.
        ("no first frame apart", {"scale": lambda z: z[:, [0, 0, 1, 1, 2]], "shift": lambda z: z[:, [0, 0, 1, 1, 2]]}),
    ],
)
def test_the_rule_sees(name, change):
    x, weight, bias = _inputs(1, 5, 4, 6, 16)
    scale, shift = (_inputs(1, 3, 2, 3, 16, seed=s)[0] for s in (1, 2))
    options = {"groups": 4, "scale": scale, "shift": shift}
    exact = pv.group_norm_silu(x.double(), weight.double(), bias.double(), groups=4,
                               scale=scale.double(), shift=shift.double())  # fmt: skip
    low = pv.group_norm_silu(x, weight, bias, impl="reference", **options)
    assert_close(pv.group_norm_silu(x, weight, bias, **options), exact, low)
    wrong = {**options, **{k: v(options[k]) if callable(v) else v for k, v in change.items()}}
    with pytest.raises(Mismatch):
        assert_close(pv.group_norm_silu(x, weight, bias, **wrong), exact, low, name)


def test_tokens_frames_and_clips_are_one_thing():
    x, weight, bias = _inputs(2, 3, 4, 5, 8)
    for impl in IMPLS:
        whole = _run(x, weight, bias, groups=2, impl=impl)
        tokens = _run(x.flatten(1, 3), weight, bias, groups=2, impl=impl)
        assert torch.equal(whole, tokens.view_as(whole)), impl
        frames = _run(x.flatten(0, 1), weight, bias, groups=2, impl=impl)
        by_frame = _run(x, weight, bias, groups=2, per_frame=True, impl=impl)
        assert torch.equal(frames.view_as(by_frame), by_frame), impl


def test_a_channels_last_clip_is_taken_as_it_lies():
    clip = torch.randn(1, 24, 2, 3, 4).contiguous(memory_format=torch.channels_last_3d)
    view = clip.permute(0, 2, 3, 4, 1)
    assert view.data_ptr() == clip.data_ptr() and view.is_contiguous()
    out = pv.group_norm_silu(view, groups=4)
    assert out.is_contiguous() and torch.equal(out, pv.group_norm_silu(view.clone(), groups=4))


def test_pixels_more_than_two_to_the_31_elements_apart(tmp_path):
    # A sparse file gives the addresses without the memory.
    if helpers.GPU:
        pytest.skip("a GPU has no sparse memory; the interpreter checks the addresses")
    shape, stride = (2, 2, 1, 2, 16), (3 * 2**30, 2**30, 2**29, 2**29, 1)
    last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    storage = np.memmap(tmp_path / "clip", np.float16, "w+", shape=(last + 1,))
    far = torch.from_numpy(storage).as_strided(shape, stride)
    x, weight, bias = _inputs(*shape, dtype=torch.float16)
    far.copy_(x)
    for per_frame in (False, True):
        options = {"groups": 4, "per_frame": per_frame, "impl": "triton", "scale": far, "shift": far}
        expected = pv.group_norm_silu(x, weight, bias, **{**options, "scale": x, "shift": x})
        assert torch.equal(pv.group_norm_silu(far, weight, bias, **options), expected)


@triton.jit
def _addresses(out_ptr, sample, block, frames, sb, st, n, c, h, w, ROWS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64) + sample
    rows = (tl.program_id(0) + block).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, ROWS)
    tl.store(out_ptr + at, sample_offset(sample, frames, sb, st) + row_offsets(rows, 1, 1, 1, c, 0, 0, 0))
    tl.store(out_ptr + ROWS + at, (sample * n + rows) * c)
    pixels = (rows % n).to(tl.int32)
    z = latent_offsets(pixels, h, w, 3, h // 2, w // 2, 0.25, 0.5, 0.5, h * w // 4 * c, w // 2 * c, c, True)
    tl.store(out_ptr + 2 * ROWS + at, z)


def test_addresses_of_the_last_pixels_of_a_long_clip():
    out = torch.zeros(3, 4, dtype=torch.int64, device=helpers.DEVICE)
    # Nine frames of 8K: 2.4 * 10^9 elements a frame at 64 channels; two clips.
    t, h, w, c = 9, 4320, 8640, 64
    n = t * h * w
    block = n // 4 - 1
    _addresses[(1,)](out, 1, block, 1, n * c, 0, n, c, h, w, 4)
    rows = [block * 4 + i for i in range(4)]
    assert rows[-1] == n - 1 and n * c > 2**34
    assert out[0].tolist() == [n * c + row * c for row in rows]
    assert out[1].tolist() == [(n + row) * c for row in rows]
    latent = [2 * (h * w // 4) * c + (h // 2 - 1) * (w // 2) * c + (row % w // 2) * c for row in rows]
    assert out[2].tolist() == latent and latent[0] > 2**30


def test_bitwise_repeatable():
    x, weight, bias = (t.to(helpers.DEVICE) for t in _inputs(1, 3, 5, 7, 32))
    for impl in ("auto", "triton"):
        first, second = (pv.group_norm_silu(x, weight, bias, groups=8, impl=impl) for _ in range(2))
        assert torch.equal(first, second)


def test_fullgraph():
    torch.compiler.reset()
    compiled = torch.compile(pv.group_norm_silu, fullgraph=True, dynamic=True, backend="aot_eager")
    for frames, latent in ((3, 2), (5, 3)):
        x, weight, bias = _inputs(1, frames, 4, 2, 16)
        options = {"groups": 4, "scale": _inputs(1, latent, 2, 1, 16, seed=1)[0]}
        assert torch.equal(compiled(x, weight, bias, **options), pv.group_norm_silu(x, weight, bias, **options))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 8)}, ShapeError, "`x` must have"),
        ({"x": torch.zeros(1, 1, 1, 1, 2, 8)}, ShapeError, "`x` must have"),
        ({"x": torch.zeros(1, 3, 2, 2, 8, dtype=torch.int32)}, DTypeError, "`x` must be float32"),
        ({"x": torch.zeros(1, 8, 3).transpose(1, 2)}, ShapeError, "`x` must have a contiguous last dimension"),
        ({"x": torch.zeros(1, 6, 8), "per_frame": True}, ShapeError, "for `per_frame`"),
        ({"groups": 3}, ValueOptionError, "`groups` must be a divisor of the 8 channels of `x`; got 3"),
        ({"groups": 0}, ValueOptionError, "`groups` must be"),
        ({"groups": True}, ValueOptionError, "`groups` must be"),
        ({"weight": torch.zeros(7)}, ShapeError, r"`weight` must be \[8\]"),
        ({"bias": torch.zeros(8, 1)}, ShapeError, "`bias` must have 1 dimensions"),
        ({"bias": torch.zeros(8, device="meta")}, DeviceError, "`bias` must be on cpu"),
        ({"scale": torch.zeros(1, 2, 1, 1, 7)}, ShapeError, r"`scale` must be \[1, Tz, Hz, Wz, 8\]"),
        ({"scale": torch.zeros(2, 2, 1, 1, 8)}, ShapeError, "`scale` must be"),
        ({"scale": torch.zeros(1, 1, 1, 1, 8)}, ShapeError, "Tz >= 2, of which the first is the first frame's"),
        ({"shift": torch.zeros(1, 2, 0, 1, 8)}, ShapeError, "`shift` must be"),
        ({"shift": torch.zeros(1, 8)}, ShapeError, "`shift` must have 5 dimensions"),
        ({"x": torch.zeros(1, 6, 8), "shift": torch.zeros(1, 2, 1, 1, 8)}, ShapeError, "for `shift`"),
        ({"scale": torch.zeros(1, 2, 1, 1, 8), "shift": torch.zeros(1, 2, 1, 2, 8)}, ShapeError, "like `scale`"),
        ({"x": torch.zeros(1, 3, 2, 2, 8, requires_grad=True)}, UnsupportedError, "`x` requires grad"),
        ({"scale": torch.zeros(1, 2, 1, 1, 8, requires_grad=True)}, UnsupportedError, "`scale` requires grad"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        pv.group_norm_silu(**{"x": torch.zeros(1, 3, 2, 2, 8), "groups": 2, **change})


def test_triton_refuses_float64_and_what_it_cannot_address():
    with pytest.raises(UnsupportedError, match="refuses float64"):
        _run(torch.zeros(1, 2, 8).double(), groups=2, impl="triton")
    with pytest.raises(UnsupportedError, match="more than 65535 clips"):
        _run(torch.zeros(1, 1, 8).expand(65536, 1, 8), groups=2, impl="triton")
    with pytest.raises(UnsupportedError, match="exceed 16384"):
        _run(torch.zeros(1, 1, 16385), groups=1, impl="triton")


def test_without_pixels():
    for impl in IMPLS:
        for shape in ((0, 2, 3, 3, 8), (1, 0, 3, 3, 8), (2, 0, 8)):
            assert _run(torch.zeros(*shape), groups=4, impl=impl).shape == shape


def test_wide_pixels_are_split_over_programs():
    x, weight, bias = _inputs(1, 5, 1030)
    exact = pv.group_norm_silu(x.double(), weight.double(), bias.double(), groups=10)
    low = pv.group_norm_silu(x, weight, bias, groups=10, impl="reference")
    assert_close(_run(x, weight, bias, groups=10, impl="triton"), exact, low)


def test_chunks_cover_the_pixels_in_whole_tiles():
    for arch in ("sm_90", "gfx942", "cpu"):
        for width in (3, 96, 128, 512, 1024, 4096):
            config = select(arch, width=width, itemsize=2)
            for pixels in (1, 31, 9 * 32 * 32, 17 * 256 * 256, 2**31 + 5):
                chunk = config.chunk(pixels, 1)
                parts = math.ceil(pixels / chunk)
                assert chunk % config.rows == 0 and parts <= config.programs and (parts - 1) * chunk < pixels
    # A clip of a decoder's last level gives every multiprocessor work.
    config = select("sm_90", width=128, itemsize=2)
    assert math.ceil(17 * 256 * 256 / config.chunk(17 * 256 * 256, 1)) > 1000


def test_configurations_that_no_kernel_takes():
    for change in ({"rows": 3}, {"steps": 64}, {"programs": 0}, {"block_c": 1 << 17}, {"num_warps": 32}):
        with pytest.raises(ValueOptionError, match="GroupNormConfig: "):
            GroupNormConfig(**{"block_c": 16, "rows": 4, "steps": 2, "programs": 8, "num_warps": 4, **change})
    narrow = GroupNormConfig(64, 4, 2, 8, 4)
    assert "`block_c` must cover 128" in select.illegal(narrow, "sm_90", width=128, itemsize=2)
    # Pixels of more than 1024 channels are split: a block covers what it can.
    assert select.illegal(GroupNormConfig(1024, 2, 2, 8, 4), "sm_90", width=4096, itemsize=2) is None


def test_cpu_kernel_leaves_nothing_of_a_large_mean_in_a_flat_group():
    from pyvideo_kernels import _native

    if not _native.available():
        pytest.skip("the extension was not built here")
    x = torch.full((1, 1, 1, 64, 64), 10048.0, dtype=torch.bfloat16)
    assert not pv.group_norm_silu(x, None, None, groups=32, eps=1e-5, silu=False, impl="cpu").any()
