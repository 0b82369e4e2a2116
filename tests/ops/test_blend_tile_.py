from types import SimpleNamespace

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

NAME = "blend_tile_"
IMPLS = ("cpu", "reference", "triton") if not helpers.GPU else ("reference", "triton")


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_contract():
    helpers.check_op_contract(NAME)


def tiles_of(height, width, size, stride, seed=0, dtype=torch.float32, last=False, shape=(1, 3, 2)):
    """Rows of decoded tiles: each starts at a multiple of ``stride`` and is ``size`` long, cut at the edge."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for y in range(0, height, stride):
        row = []
        for x in range(0, width, stride):
            tile = torch.randn(*shape, min(size, height - y), min(size, width - x), generator=g).to(dtype)
            row.append(tile.contiguous(memory_format=torch.channels_last_3d) if last else tile)
        rows.append(row)
    return rows


def stock(rows, stride, blend, clamp, blender=None):
    """diffusers' own way: everything decoded, then blended, then cut and joined."""
    from diffusers import AutoencoderKLWan

    vae, rows = AutoencoderKLWan, [[tile.clone() for tile in row] for row in rows]
    me, joined = SimpleNamespace(), []
    for i, row in enumerate(rows):
        cut = []
        for j, tile in enumerate(row):
            if i > 0:
                tile = vae.blend_v(me, rows[i - 1][j], tile, blend)
            if j > 0:
                tile = vae.blend_h(me, row[j - 1], tile, blend)
            cut.append(tile[:, :, :, :stride, :stride])
        joined.append(torch.cat(cut, dim=-1))
    out = torch.cat(joined, dim=3)
    return out.clamp(-1, 1) if clamp else out


def ours(rows, stride, blend, clamp, impl="auto", to=None, grain=1, skip=()):
    """One call a tile, in order, into the joined frames."""
    height, width = (sum(min(stride, n) for n in sizes) for sizes in (
        [row[0].shape[3] for row in rows], [tile.shape[4] for tile in rows[0]]))  # fmt: skip
    b, c, t = rows[0][0].shape[:3]
    frames = torch.full((b, c, t, height, width), 77, dtype=to or rows[0][0].dtype, device=rows[0][0].device)
    kept = [None] * len(rows[0])
    for i, row in enumerate(rows):
        left = None
        for j, tile in enumerate(row):
            h, w = tile.shape[3:]
            below = right = None
            if i + 1 < len(rows):
                below = tile.new_full((b, c, t, min(blend, rows[i + 1][j].shape[3], h), w), torch.nan)
            if j + 1 < len(row):
                right = tile.new_full((b, c, t, h, min(blend, row[j + 1].shape[4], w)), torch.nan)
            own = frames[:, :, :, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            pv.blend_tile_(
                own[:, :, :, :h, :w], tile, above=None if "above" in skip else kept[j], left=left,
                below=below, right=right, grain=grain, clamp=clamp, impl=impl,
            )  # fmt: skip
            kept[j], left = below, None if "left" in skip else right
    return frames


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("height", "width", "size", "stride", "dtype", "last"),
    [
        # 3×3, the last ones short; shorter than the seam; exactly as long; one tile a row.
        (15, 17, 8, 6, torch.float32, True),
        (13, 14, 8, 6, torch.float16, False),
        (14, 9, 9, 5, torch.float32, True),
        (4, 20, 8, 6, torch.float32, False),
    ],
)
def test_is_diffusers_blending(impl, height, width, size, stride, dtype, last):
    blend = size - stride
    rows = tiles_of(height, width, size, stride, dtype=dtype, last=last, shape=(1, 2, 1))
    wide = [[tile.double() for tile in row] for row in rows]
    exact, own = stock(wide, stride, blend, False), stock(rows, stride, blend, False)
    on = [[tile.to(helpers.DEVICE) for tile in row] for row in rows]
    out = ours(on, stride, blend, False, impl).cpu()
    assert_close(out, exact, own, impl)
    if dtype == torch.float32:
        torch.testing.assert_close(out, own, rtol=1e-6, atol=1e-6)
    if last:
        clamped = ours(on, stride, blend, True, impl).cpu()
        assert torch.equal(clamped, out.clamp(-1, 1)) and clamped.abs().max() == 1
        return
    # Bytes of the same, as the sampler rounds them; a value in the middle of two may go either way.
    bytes_, expected = ours(on, stride, blend, False, impl, to=torch.uint8).cpu(), (exact / 2 + 0.5).clamp(0, 1) * 255
    assert (bytes_.double() - expected).abs().max() <= (0.501 if dtype == torch.float32 else 0.75)


def test_patches_share_a_weight():
    """A model that unpacks pixels after blending: the same as blending its channels, then unpacking them."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    rows = tiles_of(6, 6, 5, 3, shape=(1, 4, 1))
    expected = unpatchify(stock(rows, 3, 2, False), patch_size=2)
    pixels = [[unpatchify(tile, patch_size=2) for tile in row] for row in rows]
    for impl in IMPLS:
        on = [[tile.to(helpers.DEVICE) for tile in row] for row in pixels]
        torch.testing.assert_close(ours(on, 6, 4, False, impl, grain=2).cpu(), expected, rtol=1e-6, atol=1e-6)
    assert (ours(on, 6, 4, False).cpu() - expected).abs().max() > 0.05


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("no seam above", {"skip": ("above",)}),
        ("no seam to the left", {"skip": ("left",)}),
        ("wider seam", {"blend": 3}),
        ("coarser weights", {"grain": 2}),
    ],
)
def test_the_rule_sees(name, change):
    rows = tiles_of(16, 18, 8, 4)
    exact, own = stock([[t.double() for t in row] for row in rows], 4, 4, False), stock(rows, 4, 4, False)
    assert_close(ours(rows, 4, 4, False), exact, own)
    with pytest.raises(Mismatch):
        assert_close(ours(rows, 4, **{"blend": 4, "clamp": False, **change}), exact, own, name)


def test_writes_nothing_else():
    """What lies around its part of the frames stays, byte for byte."""
    for impl in IMPLS:
        for dtype in (torch.float32, torch.uint8):
            frames = torch.full((1, 3, 2, 9, 11), 7, dtype=dtype, device=helpers.DEVICE)
            tile = torch.randn(1, 3, 2, 6, 7, device=helpers.DEVICE)
            pv.blend_tile_(frames[:, :, :, 2:6, 3:8], tile, left=torch.randn(1, 3, 2, 6, 2, device=helpers.DEVICE),
                           impl=impl)  # fmt: skip
            around = torch.ones_like(frames, dtype=torch.bool)
            around[:, :, :, 2:6, 3:8] = False
            assert bool((frames[around] == 7).all()) and not bool((frames[~around] == 7).all()), impl


def test_rows_more_than_two_to_the_31_elements_apart(tmp_path):
    if helpers.GPU:
        pytest.skip("a GPU has no sparse memory; the interpreter checks the addresses")
    import numpy as np

    # A sparse file gives the addresses without the memory.
    stride = 2**31 + 64
    storage = np.memmap(tmp_path / "frames", np.float16, "w+", shape=(2 * stride,))
    far = torch.from_numpy(storage).as_strided((1, 3, 2, 4, 5), (0, 20, stride, 5, 1))
    near = torch.randn(1, 3, 2, 4, 5).half()
    pv.blend_tile_(far, near, impl="triton")
    assert torch.equal(far, near)
    copy = torch.zeros_like(near)
    pv.blend_tile_(copy, far, impl="triton")
    assert torch.equal(copy, near)


def test_bitwise_repeatable():
    rows = [[t.to(helpers.DEVICE) for t in row] for row in tiles_of(6, 6, 5, 3, shape=(1, 2, 1))]
    for impl in IMPLS:
        assert torch.equal(ours(rows, 3, 2, True, impl), ours(rows, 3, 2, True, impl))


def test_fullgraph():
    def frames(tile, above):
        out, right = tile.new_zeros((1, 3, 1, 4, 4)), tile.new_zeros((1, 3, 1, 6, 2))
        pv.blend_tile_(out, tile, above=above, right=right)
        return out, right

    helpers.check_fullgraph(frames, torch.randn(1, 3, 1, 6, 5), torch.randn(1, 3, 1, 2, 5))


TILE = (1, 3, 1, 6, 5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tile": torch.zeros(3, 1, 6, 5)}, ShapeError, "`tile` must have 5 dimensions"),
        ({"tile": torch.zeros(TILE, dtype=torch.uint8)}, DTypeError, "`tile` must be float32"),
        ({"out": torch.zeros(TILE, dtype=torch.int8)}, DTypeError, "`out` must be float32"),
        ({"out": torch.zeros(1, 3, 1, 7, 5)}, ShapeError, r"`out` must be \[1, 3, 1, at most 6, at most 5\]"),
        ({"out": torch.zeros(1, 4, 1, 6, 5)}, ShapeError, "`out` must be"),
        ({"out": torch.zeros(3, 4, dtype=torch.uint8)}, ShapeError, "`out` must be of 5 dimensions"),
        ({"above": torch.zeros(1, 3, 1, 2, 4)}, ShapeError, r"`above` must be \[1, 3, 1, at most 6, 5\]"),
        ({"left": torch.zeros(1, 3, 1, 6, 6)}, ShapeError, r"`left` must be \[1, 3, 1, 6, at most 5\]"),
        ({"below": torch.zeros(1, 3, 2, 2, 5)}, ShapeError, "`below` must be"),
        ({"right": torch.zeros(1, 3, 1, 6, 2).half()}, DTypeError, "`right` must be torch.float32 like `tile`"),
        ({"left": torch.zeros(1, 3, 1, 6, 3), "grain": 2}, ValueError, "an integer, at least 1 and a divisor"),
        ({"grain": 0}, ValueError, "`grain` must be"),
        ({"grain": 1.0}, ValueError, "`grain` must be an integer"),
        ({"below": torch.zeros(1, 3, 1, 1, 5).expand(1, 3, 1, 2, 5)}, ShapeError, "`below` must be a tensor without"),
        ({"below": torch.zeros(1, 3, 1, 2, 5, device="meta")}, DeviceError, "`below` must be on cpu"),
        ({"tile": torch.zeros(TILE, requires_grad=True)}, UnsupportedError, "`tile` requires grad"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    out = torch.full(TILE, 7.0)
    with pytest.raises(error, match=words):
        pv.blend_tile_(**{"out": out, "tile": torch.zeros(TILE), **change})
    assert bool((out == 7).all())


def test_triton_refuses_float64_and_nothing_is_nothing():
    tile = torch.zeros(TILE, dtype=torch.float64, device=helpers.DEVICE)
    with pytest.raises(UnsupportedError, match="refuses float64"):
        pv.blend_tile_(tile.clone(), tile, impl="triton")
    for impl in IMPLS:
        empty = torch.zeros(1, 3, 0, 6, 5, device=helpers.DEVICE)
        pv.blend_tile_(empty, empty.clone(), impl=impl)
