import math

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.errors import DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, check_op

from . import helpers

NAME = "qk_norm_rope_means"
OP = OPS[NAME]
GRID, TILE = (3, 1, 5), (2, 2, 4)


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(helpers.DEVICE)


def _video(dtype=torch.float32, heads=2, kv_heads=1, head_dim=16):
    tokens = math.prod(GRID)
    angle = _randn(1, tokens, 1, head_dim // 2, seed=5).repeat_interleave(2, -1) * 3
    q, k = _randn(1, tokens, heads, head_dim) + 1, _randn(1, tokens, kv_heads, head_dim, seed=1) + 1
    weights = (_randn(heads * head_dim, seed=2), _randn(kv_heads * head_dim, seed=3))
    return q.to(dtype), k.to(dtype), *weights, angle.cos(), angle.sin()


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_contract():
    helpers.check_op_contract(NAME)


def test_fullgraph():
    helpers.check_fullgraph(pv.qk_norm_rope_means, *_video(), grid=GRID, tile=TILE)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_is_the_two_ops_in_one(impl):
    args = _video(torch.float16)
    q, k, q_mean, k_mean = pv.qk_norm_rope_means(*args, grid=GRID, tile=TILE, impl=impl)
    alone = pv.qk_norm_rope(*args, impl=impl)
    assert torch.equal(q, alone[0]) and torch.equal(k, alone[1])
    for x, mean in ((q, q_mean), (k, k_mean)):
        # Boxes cut out by hand, of what is stored: closer than fp16 would let the unrounded be.
        video, boxes = x.double().unflatten(1, GRID), []
        for t, w in ((0, 0), (0, 4), (2, 0), (2, 4)):
            boxes.append(video[:, t : t + 2, :, w : w + 4].flatten(1, 3).mean(1))
        assert mean.dtype == torch.float32 and mean.is_contiguous()
        torch.testing.assert_close(mean.double(), torch.stack(boxes, 2), rtol=1e-6, atol=1e-6)


def test_repeats_bitwise():
    first, second = (pv.qk_norm_rope_means(*_video(), grid=GRID, tile=TILE, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_bad_token_stays_in_its_tile():
    args = _video()
    args[0][0, 9] = float("nan")  # (1, 0, 4): the second tile
    q, k, q_mean, k_mean = pv.qk_norm_rope_means(*args, grid=GRID, tile=TILE, impl="triton")
    assert q.isnan().any(3).nonzero().tolist() == [[0, 9, 0], [0, 9, 1]]
    assert q_mean.isnan().any(3).nonzero().tolist() == [[0, 0, 1], [0, 1, 1]]
    assert not k.isnan().any() and not k_mean.isnan().any()


def _wrong(**change):
    triton = dispatch.load(OP, "triton")

    def call(*args):
        values = dict(zip(OP.arguments[:-1], args, strict=True))
        return triton(*OP.bind(**{**values, **{name: f(values) for name, f in change.items()}}))

    return call


@pytest.mark.parametrize(
    "change",
    [
        {"sin": lambda a: None if a["sin"] is None else -a["sin"]},
        {"k_weight": lambda a: None},
        {"q": lambda a: a["q"].flip(2)},
        {"grid": lambda a: [a["grid"][0], a["grid"][2], a["grid"][1]]},
        {"tile": lambda a: [a["tile"][1], a["tile"][0], a["tile"][2]]},
    ],
    ids=["sense of rotation", "no weight", "head order", "sides of the grid", "sides of the tile"],
)
def test_the_samples_see_a_wrong_kernel(change):
    with pytest.raises(Mismatch):
        check_op(OP, "triton", helpers.DEVICE, torch.float32, call=_wrong(**change))


def test_video_sparse_attention_takes_its_means():
    grid, tokens = (4, 4, 9), 144
    q, k, v = (_randn(1, tokens, n, 16, seed=n) for n in (2, 1, 1))
    q, k, q_mean, k_mean = pv.qk_norm_rope_means(q, k, norm="per_head", grid=grid)
    options = {"grid": grid, "top_k": 1, "return_selection": True}
    own = pv.video_sparse_attention(q, k, v, **options)
    given = pv.video_sparse_attention(q, k, v, **options, q_mean=q_mean, k_mean=k_mean)
    assert all(torch.equal(a, b) for a, b in zip(own, given, strict=True))
    # They are what it chooses by: the least likely tile becomes the likeliest.
    other = pv.video_sparse_attention(q, k, v, **options, q_mean=-q_mean, k_mean=k_mean)
    assert not torch.equal(other[1], own[1])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q_mean": torch.zeros(1, 2, 2, 16)}, ShapeError, r"`q_mean` must be \[1, 2, 3, 16\]"),
        ({"k_mean": torch.zeros(1, 2, 3, 16)}, ShapeError, r"`k_mean` must be \[1, 1, 3, 16\]"),
        ({"k_mean": torch.zeros(1, 1, 3, 16).half()}, DTypeError, "`k_mean` must be torch.float32"),
        ({"q_mean": torch.zeros(1, 2, 3, 16, requires_grad=True)}, UnsupportedError, "`q_mean` requires grad"),
    ],
)
def test_video_sparse_attention_refuses_other_means(change, error, words):
    q, k = torch.zeros(1, 144, 2, 16), torch.zeros(1, 144, 1, 16)
    with pytest.raises(error, match=f"video_sparse_attention: .*{words}"):
        pv.video_sparse_attention(q, k, k, grid=(4, 4, 9), top_k=1, **change)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": torch.zeros(1, 7, 2, 16)}, ShapeError, "qk_norm_rope_means: `k` must be"),
        ({"grid": (2, 2, 3)}, ShapeError, r"`q` must be \[B, T\*H\*W, heads, head_dim\] for grid \[2, 2, 3\]"),
        ({"grid": (2, 0, 3)}, ValueError, "`grid` must be three integers"),
        ({"tile": (4, 4)}, ValueError, "`tile` must be three integers"),
        ({"q": torch.zeros(1, 8, 2, 16).char()}, DTypeError, "qk_norm_rope_means: `q` must be float32"),
        ({"norm": "both"}, ValueError, "qk_norm_rope_means: `norm` must be"),
        ({"q_weight": torch.zeros(3)}, ShapeError, r"`q_weight` must be \[32\]"),
        ({"q": torch.zeros(1, 8, 2, 16, requires_grad=True)}, UnsupportedError, "`q` requires grad"),
        ({"impl": "cpu"}, UnsupportedError, "no implementation 'cpu'"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    q = torch.zeros(1, 8, 2, 16)
    with pytest.raises(error, match=words):
        pv.qk_norm_rope_means(**{"q": q, "k": q, "grid": (2, 2, 2), **change})


def test_triton_refuses_what_it_has_not():
    for heads, head_dim, dtype, words in (
        (1, 7, torch.float32, "odd head_dim"),
        (1, 16, torch.float64, "refuses float64"),
        (130, 128, torch.float32, "qk_norm_rope_means: 130 heads of 128 are padded to 32768.*impl='reference'"),
    ):
        q = torch.zeros(1, 2, heads, head_dim, dtype=dtype, device=helpers.DEVICE)
        with pytest.raises(UnsupportedError, match=words):
            pv.qk_norm_rope_means(q, q, grid=(1, 1, 2), impl="triton")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_empty_batch(impl):
    q = torch.zeros(0, 8, 2, 16, device=helpers.DEVICE)
    shapes = [tuple(x.shape) for x in pv.qk_norm_rope_means(q, q, grid=(2, 2, 2), tile=(1, 2, 2), impl=impl)]
    assert shapes == [(0, 8, 2, 16)] * 2 + [(0, 2, 2, 16)] * 2
