import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.ops.video_sparse_attention import tiles_with_share
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

RAGGED = (5, 6, 9)  # 2 x 2 x 3 tiles of (4, 4, 4), cut on every axis


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _blocks(grid, tile):
    """Tokens of each tile in (T, H, W) order, written out."""
    h, w = grid[1:]
    corners = itertools.product(*(range(0, n, side) for n, side in zip(grid, tile, strict=True)))
    return [
        [
            (i * h + j) * w + k
            for i, j, k in itertools.product(
                *(range(at, min(at + side, n)) for at, side, n in zip(corner, tile, grid, strict=True))
            )
        ]
        for corner in corners
    ]


def _inputs(grid=RAGGED, heads=2, kv_heads=None, b=1, head_dim=16, dtype=torch.float32):
    """Tokens of a tile resemble each other, or every mean would be near zero and every tile as good as another."""
    blocks, s = _blocks(grid, (4, 4, 4)), math.prod(grid)
    out = []
    for seed, n in enumerate((heads, kv_heads or heads, kv_heads or heads)):
        x, common = _randn(b, s, n, head_dim, seed=seed), _randn(b, len(blocks), n, head_dim, seed=seed + 10)
        for index, tokens in enumerate(blocks):
            x[:, tokens] += common[:, index, None]
        out.append(x.to(dtype).to(helpers.DEVICE))
    return out


def _brute(q, k, v, grid, tile, choose, gate=None):
    """The definition, a head and a tile at a time, in the dtype of the inputs; ``choose(scores, tile) -> tiles``."""
    blocks, scale = _blocks(grid, tile), q.shape[3] ** -0.5
    q, k, v = (x.cpu() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out, chosen = torch.zeros_like(q), {}
    for batch, head in itertools.product(range(q.shape[0]), range(q.shape[2])):
        mine = [x[batch, :, head // (1 if x is q else group)] for x in (q, k, v)]
        means = [torch.stack([x[tokens].mean(0) for tokens in blocks]) for x in mine]
        scores = means[0] @ means[1].T * scale
        coarse = scores.softmax(-1) @ means[2]
        for index, tokens in enumerate(blocks):
            chosen[batch, head, index] = tiles = choose(scores[index], index)
            keys = [token for of in tiles for token in blocks[of]]
            weights = (mine[0][tokens] @ mine[1][keys].T * scale).softmax(-1)
            out[batch, tokens, head] = weights @ mine[2][keys]
            if gate is not None:
                out[batch, tokens, head] += gate.cpu().expand(q.shape)[batch, tokens, head] * coarse[index]
    return out, chosen


def _top(n):
    return lambda scores, tile: sorted(scores.topk(n).indices.tolist())


def _share(share, sizes):
    def choose(scores, tile):
        mass = (scores.double() + torch.tensor(sizes).double().log()).softmax(0).tolist()
        chosen, held = [tile], mass[tile]
        for other in sorted((n for n in range(len(mass)) if n != tile), key=lambda n: -mass[n]):
            if held >= share:
                break
            chosen.append(other)
            held += mass[other]
        return sorted(chosen)

    return choose


def _chosen(indices, counts):
    return {
        place: indices[place][: int(counts[place])].tolist()
        for place in itertools.product(*map(range, counts.shape))
    }  # fmt: skip


CASES = {
    "top_k": ({"top_k": 3}, {"b": 2}, (4, 4, 4), None),
    "top_k, gate a channel": ({"top_k": 2}, {}, (4, 4, 4), (1, 270, 2, 16)),
    "grouped heads, boxes of 128, gate a token": ({"top_k": 1}, {"heads": 4, "kv_heads": 2}, (2, 8, 8), (1, 270, 4, 1)),
    "threshold, one gate": ({"select": "threshold", "share": 0.7}, {}, (4, 4, 4), (1, 1, 1, 1)),
    "threshold of little": ({"select": "threshold", "share": 1e-6}, {}, (4, 4, 4), None),
}


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_is_the_definition(case, impl):
    options, shape, tile, gate_shape = CASES[case]
    q, k, v = _inputs(**shape)
    gate = None if gate_shape is None else _randn(*gate_shape, seed=5).to(helpers.DEVICE)
    options = {**options, "grid": RAGGED, "tile": tile, "gate": gate}
    out, indices, counts = pv.video_sparse_attention(q, k, v, **options, return_selection=True, impl=impl)
    sizes = [len(tokens) for tokens in _blocks(RAGGED, tile)]
    choose = _top(options["top_k"]) if "top_k" in options else _share(options["share"], sizes)
    (exact, chosen), (low, _) = (
        _brute(*(x.to(d) for x in (q, k, v)), RAGGED, tile, choose, None if gate is None else gate.to(d))
        for d in (torch.float64, torch.float32)
    )
    assert _chosen(indices, counts) == chosen
    assert indices.dtype == counts.dtype == torch.int32
    assert_close(out.cpu(), exact, low)
    if case == "threshold of little":
        assert bool((counts == 1).all())
        assert bool((indices[..., 0].cpu() == torch.arange(len(sizes))).all())
    if gate is not None:
        for wrong in (-gate, torch.zeros_like(gate)):
            other = pv.video_sparse_attention(q, k, v, **{**options, "gate": wrong}, impl="reference")
            with pytest.raises(Mismatch):
                assert_close(other.cpu(), exact, low)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    "options", [{"top_k": 4}, {"top_k": 500}, {"select": "threshold", "share": 1.0}], ids=["all", "more", "share 1"]
)
def test_every_tile_is_dense_attention(options, impl):
    grid = (3, 5, 7)
    q, k, v = _inputs(grid, heads=2, kv_heads=1)
    out, indices, counts = pv.video_sparse_attention(q, k, v, grid=grid, **options, return_selection=True, impl=impl)
    assert bool((counts == 4).all()) and indices.shape == (1, 2, 4, 4)
    exact, low = (pv.spacetime_attention(*(x.to(d) for x in (q, k, v)), grid=grid, impl="reference")
                  for d in (torch.float64, torch.float32))  # fmt: skip
    assert_close(out, exact, low)


@pytest.mark.parametrize(
    ("grid", "heads", "head_dim"),
    [((1, 1, 1), 1, 128), ((3, 5, 7), 3, 40), ((1, 9, 1), 1, 16), ((5, 8, 8), 1, 96), ((6, 10, 18), 1, 64)],
)
def test_any_grid_and_head(grid, heads, head_dim):
    q, k, v = _inputs(grid, heads=heads, head_dim=head_dim)
    out = pv.video_sparse_attention(q, k, v, grid=grid, top_k=1, impl="triton")
    exact, low = (_brute(*(x.to(d) for x in (q, k, v)), grid, (4, 4, 4), _top(1))[0]
                  for d in (torch.float64, torch.float32))  # fmt: skip
    assert_close(out.cpu(), exact, low)


def test_half_precision_is_rounded_once():
    q, k, v = _inputs(dtype=torch.float16)
    gate = _randn(1, 270, 2, 16, seed=5, dtype=torch.float16).to(helpers.DEVICE)
    out = pv.video_sparse_attention(q, k, v, grid=RAGGED, top_k=3, gate=gate, impl="triton")
    exact, low = (
        pv.video_sparse_attention(
            *(x.to(d) for x in (q, k, v)), grid=RAGGED, top_k=3, gate=gate.to(d), impl="reference"
        )
        for d in (torch.float64, torch.float16)
    )
    assert out.dtype == torch.float16
    assert_close(out, exact, low)


# The choice -----------------------------------------------------------------------------------------------------


def test_a_share_is_held_by_no_fewer_tiles():
    scores = _randn(2, 3, 40, 40, seed=3) * 3
    sizes = torch.randint(1, 65, (40,), generator=torch.Generator().manual_seed(0))
    mass = (scores.double() + sizes.double().log()).softmax(-1)
    index = torch.arange(40)
    for share in (0.01, 0.3, 0.9, 0.999):
        indices, counts = tiles_with_share(scores, sizes, share)
        listed = torch.arange(40) < counts[..., None]
        kept = torch.zeros_like(mass).scatter_add_(-1, indices.long(), listed.double())
        assert kept.max() == 1 and bool((kept[..., index, index] == 1).all())
        assert bool(((kept * mass).sum(-1) >= share - 1e-5).all())
        # Without the least of the others it is not held; own tiles stay whatever they weigh.
        others = torch.where((kept > 0) & (index != index[:, None]), mass, torch.inf)
        least = others.amin(-1)
        held = (kept * mass).sum(-1) - least
        assert bool(((held < share + 1e-5) | (least == torch.inf)).all())
        assert bool((indices[..., 1:] > indices[..., :-1])[listed[..., 1:]].all())


def test_a_share_just_under_one_keeps_every_tile_that_counts():
    scores = torch.zeros(1, 1, 8, 8)
    _, counts = tiles_with_share(scores, torch.full((8,), 64), 1 - 1e-9)
    assert bool((counts == 8).all())


# On the device alone --------------------------------------------------------------------------------------------


class _NoSync(TorchDispatchMode):
    """Raises where a value would be read back, or decide on a shape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if any(word in name for word in ("_local_scalar_dense", "item", "nonzero", "unique", "masked_select")):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


OPTIONS = [{"top_k": 3}, {"select": "threshold", "share": 0.5}]


@pytest.mark.parametrize("options", OPTIONS, ids=["top_k", "threshold"])
def test_nothing_waits_for_the_device(options):
    q, k, v = _inputs(heads=2, kv_heads=1)
    gate = torch.ones(1, 1, 2, 1, device=helpers.DEVICE)
    with pytest.raises(AssertionError, match="waits for the device"), _NoSync():
        q[0, 0, 0, 0].item()
    with _NoSync():  # up to the launches
        expected = pv.video_sparse_attention(q, k, v, grid=RAGGED, gate=gate, return_selection=True, **options)
    # Tensors without values.
    meta = [x.to("meta") for x in (q, k, v, gate)]
    got = pv.video_sparse_attention(*meta[:3], grid=RAGGED, gate=meta[3], return_selection=True, **options)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in expected]


def test_the_launchers_wait_for_nothing(monkeypatch):
    """The Triton implementations themselves, up to where they launch, on tensors without values."""
    from pyvideo_kernels.kernels import block_mean, block_sparse_attention

    class Launched:
        def __getitem__(self, programs):
            return lambda *_, **__: launches.append(programs)

    launches = []
    monkeypatch.setattr(block_mean, "_block_mean_fwd_kernel", Launched())
    monkeypatch.setattr(block_sparse_attention, "_block_sparse_attention_fwd_kernel", Launched())
    q = torch.empty(1, 270, 2, 16, device="meta")
    lists = torch.empty(1, 2, 12, 3, dtype=torch.int32, device="meta")
    with _NoSync():
        mean = block_mean.block_mean(q, RAGGED, (4, 4, 4))
        block_sparse_attention.block_sparse_attention(
            q, q, q, lists, lists[..., 0], RAGGED, (4, 4, 4), None, mean, q, 0.25, False
        )
    assert launches == [(24,), (24,)]


def test_one_graph_serves_every_grid():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda q, grid: pv.video_sparse_attention(q, q, q, grid=grid, top_k=2, return_selection=True),
        fullgraph=True, dynamic=True, backend=backend,
    )  # fmt: skip
    for grid in ((5, 6, 9), (4, 9, 13), (9, 5, 6)):
        q = _inputs(grid, heads=1)[0].cpu()
        expected = pv.video_sparse_attention(q, q, q, grid=grid, top_k=2, return_selection=True)
        torch.testing.assert_close(compiled(q, grid), expected, rtol=0, atol=0)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=["top_k", "threshold"])
def test_a_cuda_graph_chooses_anew(options):
    first, second = _inputs(b=1), [x.flip(1).contiguous() for x in _inputs(b=1)]
    options = {"grid": RAGGED, "return_selection": True, "impl": "triton", **options}
    expected = pv.video_sparse_attention(*second, **options)  # compiled before the capture
    held = [x.clone() for x in first]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = pv.video_sparse_attention(*held, **options)
    for place, x in zip(held, second, strict=True):
        place.copy_(x)
    graph.replay()
    assert all(torch.equal(got, wanted) for got, wanted in zip(outputs, expected, strict=True))


def test_exports():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return pv.video_sparse_attention(q, k, v, grid=(3, 5, 9), select="threshold", share=0.5)

    inputs = tuple(x.cpu() for x in _inputs((3, 5, 9), heads=1))
    exported = torch.export.export(Attention(), inputs).module()
    assert torch.equal(exported(*inputs), Attention()(*inputs))


@pytest.mark.parametrize("options", OPTIONS, ids=["top_k", "threshold"])
def test_repeats_bitwise(options):
    q, k, v = _inputs((3, 5, 9), heads=1)
    first, second = (
        pv.video_sparse_attention(q, k, v, grid=(3, 5, 9), return_selection=True, impl="triton", **options)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_explicit_implementation_serves_every_part():
    q, k, v = _inputs((1, 2, 5), heads=1)
    gate = torch.ones(1, 1, 1, 1, device=helpers.DEVICE)
    for impl in ("reference", "triton"):
        before = dispatch.calls()
        pv.video_sparse_attention(q, k, v, grid=(1, 2, 5), top_k=1, gate=gate, impl=impl)
        ran = {key: n - before.get(key, 0) for key, n in dispatch.calls().items() if n != before.get(key, 0)}
        assert ran == {("block_mean", impl): 3, ("block_sparse_attention", impl): 1}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": torch.zeros(1, 8, 3, 16)}, ShapeError, r"`k` must be \[1, 8, a divisor of 2, 16\]"),
        ({"v": torch.zeros(1, 8, 2, 16).half()}, DTypeError, "`v` must be torch.float32 like `q`"),
        ({"grid": (2, 2, 3)}, ShapeError, r"`q` must be \[B, T\*H\*W, heads, head_dim\] for grid"),
        ({"grid": 8}, ValueError, "`grid` must be three integers"),
        ({"tile": (4, 4, 2)}, ValueError, "`tile` must be a box .* of 64 or 128 tokens"),
        ({"top_k": None}, ValueError, "`top_k` must be an integer of at least 1"),
        ({"top_k": 0}, ValueError, "`top_k` must be an integer of at least 1"),
        ({"top_k": 0.5}, ValueError, "`top_k` must be an integer of at least 1"),
        ({"share": 0.5}, ValueError, "`share` must be None for select='top_k'"),
        ({"select": "sorted"}, ValueError, "`select` must be 'top_k' or 'threshold'"),
        ({"select": "threshold", "share": 0.5}, ValueError, "`top_k` must be None for select='threshold'"),
        ({"select": "threshold", "top_k": None}, ValueError, r"`share` must be in \(0, 1\]"),
        ({"select": "threshold", "top_k": None, "share": 0.0}, ValueError, r"`share` must be in \(0, 1\]"),
        ({"select": "threshold", "top_k": None, "share": 1.1}, ValueError, r"`share` must be in \(0, 1\]"),
        ({"gate": torch.zeros(1, 8, 2)}, ShapeError, "`gate` must have 4 dimensions"),
        ({"gate": torch.zeros(1, 8, 2, 15)}, ShapeError, r"`gate` must be \[1, 8, 2, 16\], or 1 along some"),
        ({"gate": torch.zeros(1, 8, 2, 16).half()}, DTypeError, "`gate` must be torch.float32 like `q`"),
        ({"gate": torch.zeros(1, 8, 2, 16, device="meta")}, DeviceError, "`gate` must be on cpu"),
        ({"gate": torch.zeros(1, 8, 2, 16, requires_grad=True)}, UnsupportedError, "`gate` requires grad"),
        ({"q": torch.zeros(1, 8, 2, 16, requires_grad=True)}, UnsupportedError, "`q` requires grad"),
        ({"scale": -1.0}, ValueError, "`scale` must be a positive number"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    arguments = {"grid": (2, 2, 2), "top_k": 1, **{n: torch.zeros(1, 8, 2, 16) for n in "qkv"}, **change}
    with pytest.raises(error, match=words):
        pv.video_sparse_attention(**arguments)
