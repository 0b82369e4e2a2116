import itertools
import math

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.configs import block_sparse_attention as configs
from pyvideo_kernels.configs import forced_arch
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.reference import block_sparse_attention as oracle
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close, check_op, samples

from . import helpers

NAME = "block_sparse_attention"
OP = OPS[NAME]


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _qkv(s, heads=2, head_dim=16, kv_heads=None, b=1, dtype=torch.float32):
    shapes = ((b, s, heads, head_dim), *[(b, s, kv_heads or heads, head_dim)] * 2)
    return [_randn(*shape, seed=i, dtype=dtype).to(helpers.DEVICE) for i, shape in enumerate(shapes)]


def _lists(b, heads, blocks, counts, dtype=torch.int32):
    """Random lists of different lengths, a length a head and block in turn."""
    g = torch.Generator().manual_seed(0)
    indices = torch.rand(b, heads, blocks, blocks, generator=g).argsort(-1)[..., : max(counts)]
    lengths = torch.tensor(list(itertools.islice(itertools.cycle(counts), b * heads * blocks))).view(b, heads, blocks)
    return indices.to(dtype).to(helpers.DEVICE), lengths.to(dtype).to(helpers.DEVICE)


def _brute(q, k, v, indices, counts, grid, tile, lens=None):
    """Softmax by the mask of the lists, written out token by token: float64, independent of the oracle."""
    cells = list(itertools.product(*map(range, grid)))
    tiles = [math.ceil(n / side) for n, side in zip(grid, tile, strict=True)]
    where = []
    for cell in cells:
        box = [c // side for c, side in zip(cell, tile, strict=True)]
        a, b, c = (n % side for n, side in zip(cell, tile, strict=True))
        where.append(((box[0] * tiles[1] + box[1]) * tiles[2] + box[2], (a * tile[1] + b) * tile[2] + c))
    q, k, v = (x.double().cpu() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out, lse = torch.zeros_like(q), torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=torch.float64)
    for batch, head, (i, (block, _)) in itertools.product(range(q.shape[0]), range(q.shape[2]), enumerate(where)):
        listed = indices[batch, head, block, : int(counts[batch, head, block])].tolist()
        seen = [j for j, (of, place) in enumerate(where) if of in listed and (lens is None or place < int(lens[of]))]
        if seen:
            scores = k[batch, seen, head // group] @ q[batch, i, head] * q.shape[3] ** -0.5
            lse[batch, head, i] = scores.logsumexp(0)
            out[batch, i, head] = scores.softmax(0) @ v[batch, seen, head // group]
    return out, lse


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


@pytest.mark.skipif(helpers.GPU, reason="on a card the samples run the variant of that card")
def test_descriptor_variant_matches_float64(monkeypatch):
    from pyvideo_kernels.kernels import block_sparse_attention as kernels

    used = []
    monkeypatch.setattr(kernels, "select", lambda *a, **k: used.append(configs.select(*a, **k)) or used[-1])
    with forced_arch("sm_90"):
        check_op(OP, "triton", "cpu", torch.float16)
    # A head dim of 40, in the fifth, is narrower than its block, which would read the next head: by pointers.
    assert [config.descriptors for config in used] == [True, True, True, True, False, True]


def test_contract():
    for kwargs in itertools.islice(samples(OP, torch.float32), 3):
        torch.library.opcheck(getattr(torch.ops.pyvideo, NAME), (*OP.bind(**kwargs), "reference"))


CASES = {
    "boxes": ((3, 5, 9), (2, 4, 8), None, None),
    "grouped heads": ((2, 4, 18), (1, 4, 16), 1, None),
    "short blocks": ((1, 1, 150), (1, 1, 64), None, (64, 10, 22)),
    "padding inside boxes": ((2, 9, 8), (2, 8, 4), None, (64, 0, 31, 8)),
}


@pytest.mark.parametrize("impl", ["reference", "triton", helpers.CPU])
@pytest.mark.parametrize("case", CASES)
def test_sees_exactly_what_the_lists_say(case, impl):
    grid, tile, kv_heads, lens = CASES[case]
    blocks = math.prod(math.ceil(n / side) for n, side in zip(grid, tile, strict=True))
    device = helpers.device_of(impl)
    q, k, v = (x.to(device) for x in _qkv(math.prod(grid), kv_heads=kv_heads))
    lists = _lists(1, 2, blocks, (2, 0, 1), torch.int64 if case == "boxes" else torch.int32)
    indices, counts = (x.to(device) for x in lists)
    lens = None if lens is None else torch.tensor(lens, dtype=torch.int32, device=device)
    options = {"tile": tile, "grid": grid, "kv_block_lens": lens, "return_lse": True}
    if grid[:2] == (1, 1):
        options = {**options, "block_size": 64, "tile": None, "grid": None}
    out, lse = pv.block_sparse_attention(q, k, v, indices, counts, **options, impl=impl)
    exact = _brute(q, k, v, indices, counts, grid, tile, lens)
    low = pv.block_sparse_attention(q, k, v, indices, counts, **options, impl="reference")
    for got, expected, eager in zip((out, lse), exact, low, strict=True):
        assert_close(got.cpu(), expected, eager.cpu())
    # Both sorts of rows are there.
    assert (lse == -math.inf).any() and (lse > -math.inf).any()
    assert bool((out.transpose(1, 2)[lse == -math.inf] == 0).all())


@pytest.mark.parametrize("impl", ["reference", "triton", helpers.CPU])
def test_every_block_is_dense_attention(impl):
    device = helpers.device_of(impl)
    q, k, v = (x.to(device) for x in _qkv(3 * 4 * 9, heads=1))
    indices = torch.arange(3, dtype=torch.int32, device=device).expand(1, 1, 3, 3)  # not contiguous either
    counts = torch.full((1, 1, 3), 3, dtype=torch.int32, device=device)
    out = pv.block_sparse_attention(q, k, v, indices, counts, tile=(4, 4, 4), grid=(3, 4, 9), impl=impl)
    exact, low = (pv.spacetime_attention(*(x.to(d) for x in (q, k, v)), grid=(3, 4, 9), impl="reference")
                  for d in (torch.float64, torch.float32))  # fmt: skip
    assert_close(out, exact, low)


@pytest.mark.parametrize("impl", ["reference", "triton", helpers.CPU])
def test_lists_are_clamped_not_checked(impl):
    device = helpers.device_of(impl)
    q, k, v = (x.to(device) for x in _qkv(128, heads=1))

    def run(indices, counts):
        indices, counts = (torch.tensor(x, dtype=torch.int32, device=device) for x in (indices, counts))
        return pv.block_sparse_attention(q, k, v, indices, counts, block_size=64, impl=impl)

    wild = run([[[[-7, 1000], [2**31 - 1, -(2**31)]]]], [[[99, -3]]])
    assert torch.equal(wild, run([[[[0, 1], [0, 0]]]], [[[2, 0]]]))
    assert bool((wild[:, 64:] == 0).all())


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])  # by pointers, by descriptors
def test_padding_never_gets_in(arch, impl):
    if helpers.GPU and arch == "sm_80":
        pytest.skip("on a card its own variant runs, once")
    q, k, v = _qkv(96, heads=1, dtype=torch.float16)
    dirty = torch.cat([torch.zeros(40), torch.full((24,), torch.nan), torch.zeros(30), torch.full((2,), torch.nan)])
    dirty = dirty.to(torch.float16).to(helpers.DEVICE)[:, None, None]
    indices, counts = _lists(1, 1, 2, (2,))
    lens = torch.tensor([40, 30], device=helpers.DEVICE)

    def run(k, v):
        return pv.block_sparse_attention(q, k, v, indices, counts, block_size=64, kv_block_lens=lens, impl=impl)

    if helpers.GPU:
        assert torch.equal(run(k + dirty, v + dirty), run(k, v))
        return
    with forced_arch(arch):
        assert torch.equal(run(k + dirty, v + dirty), run(k, v))


@pytest.mark.parametrize("impl", ["triton", helpers.CPU])
def test_a_listed_twice_block_counts_twice(impl):
    device = helpers.device_of(impl)
    q, k, v = (x.to(device) for x in _qkv(128, heads=1))
    twice = torch.tensor([[[[0, 0, 1]] * 2]], dtype=torch.int32, device=device)
    counts = torch.full((1, 1, 2), 3, dtype=torch.int32, device=device)
    out = pv.block_sparse_attention(q, k, v, twice, counts, block_size=64, impl=impl)
    exact, low = (
        torch.nn.functional.scaled_dot_product_attention(
            *(x.to(d).transpose(1, 2) for x in (q, *(torch.cat([x[:, :64], x], 1) for x in (k, v))))
        ).transpose(1, 2)
        for d in (torch.float64, torch.float32)
    )
    assert_close(out, exact, low)


def test_repeats_bitwise():
    q, k, v = _qkv(130, dtype=torch.float16)
    indices, counts = _lists(1, 2, 3, (3, 2))
    first, second = (
        pv.block_sparse_attention(q, k, v, indices, counts, block_size=64, return_lse=True, impl="triton")
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(helpers.GPU, reason="on a card the self-check covers its own variant")
def test_offsets_pass_two_to_the_31():
    # Heads 2^31 elements apart. Only the pages that hold tokens are ever touched.
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        storage = torch.empty(2**31 + 4096, dtype=torch.float16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    far = storage.as_strided((1, 20, 2, 16), (2**31, 16, 2**31 + 64, 1))
    far.copy_(_randn(1, 20, 2, 16))
    near = far.clone()
    indices, counts = _lists(1, 2, 1, (1,))
    out, expected = (
        pv.block_sparse_attention(x, x, x, indices, counts, block_size=64, impl="triton") for x in (far, near)
    )
    assert torch.equal(out, expected)
    means = [pv.block_mean(x, grid=(1, 4, 5), tile=(1, 2, 2), impl="triton") for x in (far, near)]
    assert torch.equal(*means)


def test_a_dense_part_of_text_is_merged():
    """What the docstring says of text: its keys apart, dense, and the two merged."""
    q, k, v = _qkv(128, heads=1)
    text_k, text_v = (_randn(1, 7, 1, 16, seed=s).to(helpers.DEVICE) for s in (8, 9))
    indices, counts = _lists(1, 1, 2, (1, 0))
    sparse = pv.block_sparse_attention(q, k, v, indices, counts, block_size=64, return_lse=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, text_k) * 0.25
    dense = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), text_v), scores.logsumexp(-1)
    out, _ = pv.merge_attention(*zip(sparse, dense, strict=True))
    listed = slice(64 * int(indices[0, 0, 0, 0]), 64 * int(indices[0, 0, 0, 0]) + 64)
    for rows, keys, values in (
        (slice(0, 64), torch.cat([k[:, listed], text_k], 1), torch.cat([v[:, listed], text_v], 1)),
        (slice(64, 128), text_k, text_v),
    ):
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q[:, rows], keys, values))
        )
        torch.testing.assert_close(out[:, rows], expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


# What the samples would miss -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"block_indices": lambda a: (a["block_indices"] + 1) % a["block_counts"].shape[-1]},
        {"block_counts": lambda a: a["block_counts"] - 1},
        {"block_indices": lambda a: a["block_indices"].flip(1)},
        {"kv_block_lens": lambda a: None},
        {"kv_block_lens": lambda a: None if a["kv_block_lens"] is None else a["kv_block_lens"] + 1},
        {"gate": lambda a: None if a["gate"] is None else -a["gate"]},
        {"coarse": lambda a: None if a["coarse"] is None else a["coarse"].flip(2)},
        {"v": lambda a: a["v"].flip(2)},
    ],
    ids=["index off by one", "count off by one", "another head's list", "no lens", "lens off by one", "gate's sign",
         "another block's row", "head order"],
)  # fmt: skip
def test_the_samples_see_a_wrong_kernel(change):
    reference = dispatch.load(OP, "reference")  # the same for every implementation, and quicker than the interpreter

    def wrong(*args):
        values = dict(zip(OP.arguments[:-1], args, strict=True))
        return reference(*OP.bind(**{**values, **{name: f(values) for name, f in change.items()}}))

    assert check_op(OP, "reference", helpers.DEVICE, torch.float32, call=reference) == 6
    with pytest.raises(Mismatch):
        check_op(OP, "reference", helpers.DEVICE, torch.float32, call=wrong)


def test_every_element_has_its_sum_of_products():
    for kwargs in samples(OP, torch.float64):
        args = OP.bind(**kwargs)
        sums, outputs = oracle.summed(*args), oracle.block_sparse_attention(*args)
        assert all(sums[at].shape == outputs[at].shape and bool((sums[at] >= 0).all()) for at in sums)
        assert len(sums) == 1 + kwargs["return_lse"]


# Configurations and refusals ------------------------------------------------------------------------------------


def test_steps_are_parts_of_the_block():
    key = {"head_dim": 128, "itemsize": 2, "aligned": True, "tile_t": 4, "tile_h": 4, "tile_w": 4}
    assert configs.part((4, 4, 8), 32) == (1, 4, 8) and configs.part((1, 1, 128), 64) == (1, 1, 64)
    for arch in ("sm_80", "sm_90", "gfx942", "cpu"):
        assert configs.illegal(configs.select(arch, **key), arch, **key) is None
    wide = configs.BlockConfig(1, 1, 32, 128, 4, 2)
    assert "a part of the block of 4 x 4 x 4" in configs.illegal(wide, "sm_80", **key)
    assert "16 keys" in configs.illegal(configs.BlockConfig(1, 2, 4, 128, 4, 2), "sm_80", **key)
    assert "block_d" in configs.illegal(configs.BlockConfig(4, 4, 4, 64, 4, 2), "sm_80", **key)
    tma = configs.BlockConfig(4, 4, 4, 128, 4, 2, descriptors=True)
    assert "descriptors" in configs.illegal(tma, "sm_90", **{**key, "aligned": False})


def test_refuses_inputs_that_require_grad():
    q, k, v = _qkv(64)
    with pytest.raises(UnsupportedError, match="`k` requires grad and this op has no backward"):
        pv.block_sparse_attention(q, k.requires_grad_(), v, *_lists(1, 2, 1, (1,)), block_size=64)


def test_triton_refuses_what_it_has_not():
    for head_dim, dtype, words in ((257, torch.float32, "head_dim up to 256"), (16, torch.float64, "refuses float64")):
        q, k, v = _qkv(2, head_dim=head_dim, dtype=dtype)
        with pytest.raises(UnsupportedError, match=words):
            pv.block_sparse_attention(q, k, v, *_lists(1, 2, 1, (1,)), block_size=64, impl="triton")


_BOXES = {"block_size": None, "tile": (4, 4, 8), "grid": (2, 4, 9)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(1, 72, 16)}, ShapeError, "`q` must have 4 dimensions"),
        ({"k": torch.zeros(1, 72, 3, 16)}, ShapeError, r"`k` must be \[1, 72, a divisor of 2, 16\]"),
        ({"v": torch.zeros(1, 72, 1, 16)}, ShapeError, r"`v` must be \[1, 72, 2, 16\]"),
        ({"v": torch.zeros(1, 72, 2, 16).half()}, DTypeError, "`v` must be torch.float32 like `q`"),
        ({"k": torch.zeros(1, 72, 2, 16, device="meta")}, DeviceError, "`k` must be on cpu"),
        ({"block_size": None}, ValueError, "`tile` must be given with the other"),
        ({"block_size": None, "tile": (4, 4, 4)}, ValueError, "`grid` must be given with the other"),
        ({"grid": (2, 4, 9)}, ValueError, "`block_size` must be None where `tile` and `grid` are given"),
        ({"block_size": 96}, ValueError, "`block_size` must be 64 or 128"),
        ({**_BOXES, "tile": (4, 4, 6)}, ValueError, "`tile` must be a box .* of 64 or 128 tokens"),
        ({**_BOXES, "tile": (4, 16)}, ValueError, "`tile` must be three integers"),
        ({**_BOXES, "grid": (2, 4, 8)}, ShapeError, r"`q` must be \[B, T\*H\*W, heads, head_dim\] for grid"),
        ({**_BOXES, "grid": (0, 4, 9)}, ValueError, "`grid` must be three integers"),
        ({"block_indices": [[0]]}, DTypeError, "`block_indices` must be an int32 or int64 tensor; got list"),
        ({"block_indices": torch.zeros(1, 2, 2, 1)}, DTypeError, "`block_indices` must be an int32 or int64"),
        ({"block_indices": torch.zeros(1, 2, 3, 1).int()}, ShapeError, r"`block_indices` must be \[1, 2, 2, listed\]"),
        ({"block_indices": torch.zeros(1, 2, 2, 0).int()}, ShapeError, r"`block_indices` must be \[1, 2, 2, listed\]"),
        ({"block_counts": torch.zeros(1, 2, 1).int()}, ShapeError, r"`block_counts` must be \[1, 2, 2\]"),
        ({"block_counts": torch.zeros(1, 2, 2).int().to("meta")}, DeviceError, "`block_counts` must be on cpu"),
        ({"kv_block_lens": torch.zeros(3).int()}, ShapeError, r"`kv_block_lens` must be \[2\]"),
        ({"kv_block_lens": (1, 2)}, DTypeError, "`kv_block_lens` must be an int32 or int64 tensor; got tuple"),
        ({"scale": 0.0}, ValueError, "`scale` must be a positive number"),
        ({"scale": "1"}, ValueError, "`scale` must be a positive number"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
        ({"impl": "sdpa"}, UnsupportedError, "no implementation 'sdpa'"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    arguments = {
        **{name: torch.zeros(1, 72, 2, 16) for name in "qkv"},
        "block_indices": torch.zeros(1, 2, 2, 1, dtype=torch.int32),
        "block_counts": torch.ones(1, 2, 2, dtype=torch.int32), "block_size": 64, **change,
    }  # fmt: skip
    with pytest.raises(error, match=words):
        pv.block_sparse_attention(**arguments)


@pytest.mark.parametrize("impl", ["reference", "triton", helpers.CPU])
def test_empty_batch(impl):
    q = torch.zeros(0, 80, 2, 16, device=helpers.device_of(impl))
    lists = torch.zeros(0, 2, 2, 1, dtype=torch.int32, device=q.device)
    out, lse = pv.block_sparse_attention(q, q, q, lists, lists[..., 0], block_size=64, return_lse=True, impl=impl)
    assert out.shape == q.shape and lse.shape == (0, 2, 80)
