"""Where the kernels of causal_conv3d read and write: beyond 2^31 elements, and each box once."""

import dataclasses

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import pyvideo_kernels as pv
from pyvideo_kernels.configs import causal_conv3d as configs
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.kernels import causal_conv3d as kernels
from pyvideo_kernels.kernels import causal_conv3d_fwd as device_code

from . import helpers


@triton.jit
def _origins_kernel(
    out_ptr, pid, frames, h_tiles, w_tiles, n_tiles, per_place, h_out, w_out, o,
    FT: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b, t, h_tile, w_tile, group = device_code._program(pid, frames, h_tiles, w_tiles, n_tiles)
    origin, *_ = device_code._place(
        b, t, h_tile * BH, w_tile * BW, frames, h_out, w_out, o, group // per_place, FT, FH, FW
    )
    tl.store(out_ptr, origin)


@pytest.mark.parametrize(
    ("grid", "o", "unfold"),
    [
        # Wan at 480p×81 and 96 channels has 2.86 × 2^31 elements; a frame of the next passes 2^31 by itself.
        ((1, 81, 480, 832), 96, (1, 1, 1)),
        ((2, 2, 4320, 7680), 96, (1, 1, 1)),
        ((1, 9, 1088, 1920), 128, (2, 2, 2)),
        ((1, 16, 720, 1280), 192, (2, 1, 1)),
    ],
)
def test_origins_of_boxes_do_not_wrap(grid, o, unfold):
    b, t, h, w = grid
    config = configs.ConvConfig(8, 16, 32, 64, 32, 8, 4)
    tiles, places = (-(-h // 8), -(-w // 16)), unfold[0] * unfold[1] * unfold[2]
    per_place = -(-o // 96)
    groups = places * per_place
    boxes = b * t * tiles[0] * tiles[1] * groups
    out, beyond = torch.zeros(1, dtype=torch.int64, device=helpers.DEVICE), 0
    for pid in (0, boxes // 3, boxes // 2, boxes - 1):
        _origins_kernel[(1,)](out, pid, t, *tiles, groups, per_place, h, w, o, *unfold, config.block_h, config.block_w)
        rest, group = divmod(pid, groups)
        rest, w_tile = divmod(rest, tiles[1])
        rest, h_tile = divmod(rest, tiles[0])
        batch, frame = divmod(rest, t)
        i, j, k = np.unravel_index(group // per_place, unfold)
        ft, fh, fw = unfold
        at = (batch, frame * ft + i, h_tile * 8 * fh + j, w_tile * 16 * fw + k)
        expected = (((int(at[0]) * t * ft + int(at[1])) * h * fh + int(at[2])) * w * fw + int(at[3])) * o
        assert int(out) == expected
        beyond = max(beyond, expected)
    assert beyond >= 2**31


@triton.jit
def _border_kernel(out_ptr, h_tiles, w_tiles, h_first, h_last, w_first, w_last):
    box = tl.program_id(0)
    h_tile, w_tile = device_code._border_box(box, h_tiles, w_tiles, h_first, h_last, w_first, w_last)
    tl.store(out_ptr + 2 * box, h_tile)
    tl.store(out_ptr + 2 * box + 1, w_tile)


@pytest.mark.parametrize(
    ("tiles", "inside"),
    [((4, 5), ((1, 3), (1, 4))), ((3, 3), ((1, 2), (1, 2))), ((3, 4), ((0, 3), (1, 3))), ((3, 4), ((1, 2), (0, 4))),
     ((4, 2), ((1, 4), (1, 2)))],
)  # fmt: skip
def test_every_box_outside_is_visited_once(tiles, inside):
    (h_first, h_last), (w_first, w_last) = inside
    boxes = tiles[0] * tiles[1] - (h_last - h_first) * (w_last - w_first)
    out = torch.full((boxes, 2), -1, dtype=torch.int32, device=helpers.DEVICE)
    _border_kernel[(boxes,)](out, *tiles, *inside[0], *inside[1])
    outside = {
        (h, w)
        for h in range(tiles[0])
        for w in range(tiles[1])
        if not (h_first <= h < h_last and w_first <= w < w_last)
    }
    assert len(outside) == boxes and {tuple(row) for row in out.tolist()} == outside


@pytest.mark.parametrize("kernel", [(3, 3), (5, 3), (1, 3), (1, 1)])
def test_boxes_inside_read_no_pixel_outside(kernel):
    config = configs.ConvConfig(4, 8, 16, 16, 0, 4, 1)
    for h in range(1, 20):
        for w in (1, 7, 8, 9, 17, 33):
            for (first, last), size, taps, block in zip(
                kernels.interior((h, w), config, kernel), (h, w), kernel, (4, 8), strict=True
            ):
                for tile in range(-(-size // block)):
                    reads = tile * block - taps // 2, min(tile * block + block, size) - 1 + taps // 2
                    safe = reads[0] >= 0 and reads[1] < size and (taps == 1 or (tile + 1) * block <= size)
                    assert (first <= tile < last) == safe, (size, taps, tile)


@pytest.mark.parametrize("use_descriptors", [False, True])
@pytest.mark.parametrize("far", ["x", "cache", "residual"])
def test_frames_more_than_two_to_the_31_elements_apart(tmp_path, monkeypatch, use_descriptors, far):
    if helpers.GPU:
        pytest.skip("a GPU has no sparse memory; the interpreter checks the addresses")
    replaced = lambda arch, **shape: dataclasses.replace(configs.select(arch, **shape), descriptors=use_descriptors)
    monkeypatch.setattr(kernels, "select", replaced)
    # A sparse file gives the addresses without the memory; each stride fits 32 bits, what is reached does not.
    frames = {"x": 4, "cache": 4, "residual": 4}[far]
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g).half()

    # Five taps in time, for a cache of four frames.
    a = {"x": randn(1, 4, 1, 2, 16), "weight": randn(16, 16, 5, 1, 1) * 0.1, "cache": randn(1, 4, 1, 2, 16),
         "residual": randn(1, 4, 1, 2, 16)}  # fmt: skip
    stride = 2**30
    storage = np.memmap(tmp_path / "frames", np.float16, "w+", shape=((frames - 1) * stride + 32,))
    view = torch.from_numpy(storage).as_strided((1, frames, 1, 2, 16), (stride, stride, 32, 16, 1))
    view.copy_(a[far])
    expected = pv.causal_conv3d(**a, impl="triton")
    assert torch.equal(pv.causal_conv3d(**{**a, far: view}, impl="triton"), expected)


@pytest.mark.parametrize("pad_mode", ["zeros", "replicate", "reflect"])
def test_rows_whose_frame_is_more_than_two_to_the_31_elements(tmp_path, pad_mode):
    if helpers.GPU:
        pytest.skip("a GPU has no sparse memory; the interpreter checks the addresses")
    x = torch.randn(1, 1, 20, 2, 16, generator=torch.Generator().manual_seed(0)).half()
    weight = torch.randn(16, 16, 1, 3, 1, generator=torch.Generator().manual_seed(1)).half() * 0.1
    stride = 2**27  # a tile of four rows is within reach, the frame is not
    storage = np.memmap(tmp_path / "rows", np.float16, "w+", shape=(19 * stride + 32,))
    far = torch.from_numpy(storage).as_strided(x.shape, (20 * stride, 20 * stride, stride, 16, 1))
    far.copy_(x)
    expected = pv.causal_conv3d(x, weight, pad_mode=pad_mode, impl="triton")
    assert torch.equal(pv.causal_conv3d(far, weight, pad_mode=pad_mode, impl="triton"), expected)


def _call(x, weight, **options):
    given = {"residual": None, "epilogue": None, "factor": (1, 1, 1), "pad_mode": "zeros", **options}
    return kernels.causal_conv3d(
        x, weight, None, None, (1, 1, 1), given["pad_mode"], 0, given["residual"], given["epilogue"], given["factor"],
        None, 1e-12, True,
    )  # fmt: skip


def test_a_tile_beyond_32_bit_offsets_is_refused():
    config = configs.select("sm_80", c=16, o=16, itemsize=2, aligned=False)
    x = torch.empty_strided((1, 1, 64, 4, 16), (0, 0, 2**28, 16, 1), device="meta")
    assert kernels.tile_span(x, config, (3, 3), (1, 1)) >= 2**31
    near = torch.empty(1, 81, 720, 1280, 96, device="meta")  # 7e9 elements, whose tiles are small
    assert kernels.tile_span(near, config, (3, 3), (1, 1)) < 2**31
    weight = torch.empty(16, 16, 1, 3, 3, device="meta")
    for pad_mode in ("zeros", "replicate"):
        with pytest.raises(UnsupportedError, match=r"within 2\^31 elements"):
            _call(x, weight, pad_mode=pad_mode)


def test_the_tiles_of_results_and_residuals_are_bounded_too():
    weight = torch.empty(16 * 4, 16, 1, 1, 1, device="meta")
    x = torch.empty(1, 1, 64, 2**16, 16, device="meta")
    shuffle = {"epilogue": "pixel_shuffle", "factor": (1, 2, 2)}
    # 2 * 8 rows of 2 * 2^24 pixels of 16 channels are 2^33 elements; an x of as many pixels by itself is no problem.
    wide = torch.empty_strided((1, 1, 64, 2**24, 16), (0, 0, 16, 16, 1), device="meta")
    with pytest.raises(UnsupportedError, match=r"within 2\^31 elements"):
        _call(wide, weight, **shuffle)
    residual = torch.empty_strided((1, 1, 128, 2**17, 16), (0, 0, 2**28, 16, 1), device="meta")
    with pytest.raises(UnsupportedError, match=r"within 2\^31 elements"):
        _call(x, weight, **shuffle, residual=residual)
