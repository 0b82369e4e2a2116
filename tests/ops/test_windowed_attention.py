"""Windows and causal time of spacetime_attention: the kernel against masks that are made without any of its code."""

import contextlib
import itertools
import math

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.configs import forced_arch, forced_config
from pyvideo_kernels.configs.windowed_attention import WindowConfig, select
from pyvideo_kernels.errors import ShapeError, UnsupportedError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

OP = OPS["spacetime_attention"]
NEIGHBOURHOOD = (1, 1, 1)


def _tensors(tokens, heads, head_dim, *, kv_heads=None, dtype=torch.float32, batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, tokens, n, head_dim, generator=g).to(dtype).to(helpers.DEVICE)
        for n in (heads, kv_heads or heads, kv_heads or heads)
    ]


# The mask, from NATTEN's formulas, one query and one key at a time --------------------------------------------------


def _sees(i, j, length, window, stride, causal):
    window = min(window, length)
    if causal:
        leader = min(i // stride * stride + stride - 1, length - 1)
        return j <= i and leader - j < window
    leader = min(i // stride * stride + stride // 2, length - 1)
    left = window // 2
    right = window // 2 + window % 2 - 1
    centre = max(left, min(leader, length - 1 - right))
    return centre - left <= j <= centre + right


def _mask(grid, window, stride, causal, heads, text_len, side, lens):
    """``[B, heads, S, S]`` bool."""
    rows = [window or grid] * heads if window is None or isinstance(window[0], int) else window
    per_head = []
    for row in rows:
        video = torch.ones(1, 1, dtype=torch.bool)
        for axis, (length, size, step) in enumerate(zip(grid, row, stride, strict=True)):
            along = torch.tensor(
                [[_sees(i, j, length, size, step, causal and axis == 0) for j in range(length)] for i in range(length)]
            ).view(length, length)
            video = torch.kron(video.int(), along.int()).bool()
        per_head.append(video)
    mask = torch.nn.functional.pad(torch.stack(per_head), (0, text_len, 0, text_len), value=True)
    if side == "prefix":
        mask = mask.roll((text_len, text_len), (1, 2))
    out = []
    for valid in lens or [text_len]:
        seen = mask.clone()
        first = 0 if side == "prefix" else mask.shape[-1] - text_len
        seen[:, :, first + valid : first + text_len] = False
        out.append(seen)
    return torch.stack(out)


def _attend(q, k, v, mask, dtype):
    """Out and lse of explicit masked softmax in ``dtype``, rounded to the inputs' dtype."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).to(dtype).cpu() for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype).cpu(), k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


def _check(grid, window, stride=NEIGHBOURHOOD, *, causal=False, heads=1, kv_heads=None, head_dim=16, text_len=0,
           side="suffix", lens=None, dtype=torch.float32, call=pv.spacetime_attention, impl="triton"):  # fmt: skip
    tokens = math.prod(grid) + text_len
    device = helpers.device_of(impl)
    tensors = _tensors(tokens, heads, head_dim, kv_heads=kv_heads, dtype=dtype, batch=len(lens or [0]))
    q, k, v = (x.to(device) for x in tensors)
    valid = None if lens is None else torch.tensor(lens, device=device)
    out, lse = call(
        q, k, v, grid=grid, window=window, stride=stride, causal_time=causal, text_len=text_len, text_side=side,
        kv_lens=valid, return_lse=True, impl=impl,
    )  # fmt: skip
    mask = _mask(grid, window, stride, causal, heads, text_len, side, lens)
    exact, eager = (_attend(q, k, v, mask, kind) for kind in (torch.float64, torch.float32))
    assert_close(out.cpu(), exact[0], eager[0].to(dtype), "out")
    assert_close(lse.cpu(), exact[1], eager[1], "lse")


@pytest.mark.parametrize(
    ("grid", "window", "options"),
    [
        ((1, 1, 1), (1, 1, 1), {"heads": 3, "head_dim": 40}),
        ((3, 5, 7), (3, 3, 3), {"heads": 1, "head_dim": 64}),
        ((3, 5, 7), (2, 4, 5), {"stride": (1, 2, 3), "text_len": 3, "head_dim": 96}),
        ((3, 5, 7), (3, 4, 2), {"stride": (3, 4, 2), "heads": 3, "kv_heads": 1, "head_dim": 40}),
        ((5, 8, 8), [(1, 4, 2), (3, 3, 3), (5, 8, 9)], {"heads": 3, "text_len": 5, "side": "prefix", "lens": [2]}),
        ((2, 3, 4), (1, 9, 2), {"text_len": 4, "lens": [4, 0], "head_dim": 128}),
        ((6, 3, 5), (3, 2, 5), {"stride": (3, 1, 2), "causal": True, "text_len": 4, "lens": [3]}),
        ((5, 2, 3), None, {"causal": True, "heads": 2, "kv_heads": 1}),
        ((4, 1, 9), (2, 1, 4), {"stride": (2, 1, 1), "causal": True, "side": "prefix", "text_len": 2}),
        ((1, 1, 70), (1, 1, 9), {"stride": (1, 1, 4)}),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("impl", ["triton", helpers.CPU])
def test_kernel_sees_exactly_the_keys_of_the_definition(grid, window, options, impl):
    _check(grid, window, **options, impl=impl)


@pytest.mark.parametrize(("window", "stride"), [((3, 5, 9), (2, 5, 4)), ((6, 3, 18), (1, 2, 3))])
@pytest.mark.parametrize("impl", ["triton", helpers.CPU])
def test_many_boxes_along_every_axis(window, stride, impl):
    # The interpreter pays by the tile: large ones.
    boxes = WindowConfig(2, 4, 16, 4, 8, 8, 16, 4, 1)
    with forced_config("windowed_attention", boxes) if not helpers.GPU else contextlib.nullcontext():
        _check((6, 10, 18), window, stride, impl=impl)


@pytest.mark.skipif(helpers.GPU, reason="architectures are forced in the interpreter only")
@pytest.mark.parametrize(
    ("grid", "window", "options"),
    [
        ((3, 5, 7), (3, 3, 3), {"heads": 2, "text_len": 3, "side": "prefix", "lens": [3, 1]}),
        ((3, 5, 7), (2, 4, 5), {"stride": (1, 2, 3), "heads": 3, "head_dim": 128}),
        ((4, 3, 5), (2, 3, 5), {"heads": 2, "kv_heads": 1, "causal": True}),
        ((1, 1, 1), (1, 1, 1), {"text_len": 1}),
    ],
    ids=["text", "strides", "grouped causal", "one"],
)
def test_descriptors_see_the_same(grid, window, options, monkeypatch):
    from pyvideo_kernels.kernels import windowed_attention as kernels

    used = []
    monkeypatch.setattr(kernels, "select", lambda *a, **k: used.append(select(*a, **k)) or used[-1])
    with forced_arch("sm_90"):
        # A window of the whole grid is dense: the other kernel.
        _check(grid, window, dtype=torch.float16, **{"head_dim": 64, **options})
    assert all(config.descriptors for config in used) and bool(used) == (grid != (1, 1, 1))


def _natten(grid, window, stride, causal):
    """The same mask as a function of flex_attention."""
    t, h, w = grid

    def axis(i, j, length, size, step, streaming):
        size = min(size, length)
        if streaming:
            leader = torch.clamp(i // step * step + step - 1, max=length - 1)
            return (j <= i) & (leader - j < size)
        centre = torch.clamp(i // step * step + step // 2, max=length - 1)
        centre = torch.clamp(centre, size // 2, length - 1 - (size // 2 + size % 2 - 1))
        return (j >= centre - size // 2) & (j <= centre + size // 2 + size % 2 - 1)

    def mask_mod(b, head, i, j):
        seen = axis(i // (h * w), j // (h * w), t, window[0], stride[0], causal)
        seen = seen & axis(i // w % h, j // w % h, h, window[1], stride[1], False)
        return seen & axis(i % w, j % w, w, window[2], stride[2], False)

    return mask_mod


@pytest.mark.parametrize("impl", ["triton", "reference", helpers.CPU])
@pytest.mark.parametrize(
    ("window", "stride", "causal"),
    [((3, 3, 3), (1, 1, 1), False), ((2, 4, 5), (2, 3, 5), False), ((3, 2, 4), (2, 1, 3), True)],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_the_same_mask_agrees(window, stride, causal, impl):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    grid = (3, 5, 6)
    tokens = math.prod(grid)
    device = helpers.device_of(impl)
    q, k, v = (x.to(device) for x in _tensors(tokens, 2, 16))
    block = create_block_mask(_natten(grid, window, stride, causal), None, None, tokens, tokens, device=device)
    exact, eager = (
        flex_attention(*(x.transpose(1, 2).to(kind) for x in (q, k, v)), block_mask=block).transpose(1, 2)
        for kind in (torch.float64, torch.float32)
    )
    options = {"grid": grid, "window": window, "stride": stride, "causal_time": causal, "impl": impl}
    assert_close(pv.spacetime_attention(q, k, v, **options), exact, eager)


# What the comparisons above would miss ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"window": lambda w: [n + 1 for n in w]},
        {"window": lambda w: [max(n - 1, 1) for n in w]},
        {"stride": lambda s: [1, 1, 1]},
        {"text_side": lambda s: "prefix"},
        {"kv_lens": lambda n: torch.zeros_like(n)},
        {"causal_time": lambda c: True},
    ],
    ids=["window + 1", "window - 1", "no stride", "side", "text masked out", "causal"],
)
def test_a_wrong_kernel_is_seen(change):
    def wrong(*args, **kwargs):
        triton = dispatch.load(OP, "triton")
        kwargs.pop("impl")
        values = {"scale": args[0].shape[-1] ** -0.5, "precision": "native", **kwargs}
        values |= {name: f(values[name]) for name, f in change.items()}
        return triton(*OP.bind(**dict(zip("qkv", args, strict=True)), **values))

    case = {"text_len": 3, "lens": [2], "stride": (1, 2, 3)}
    _check((3, 4, 5), (2, 2, 3), **case)
    with pytest.raises(Mismatch):
        _check((3, 4, 5), (2, 2, 3), **case, call=wrong)


# Contract -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_contract(grad):
    q, k, v = (x.cpu().requires_grad_(grad) for x in _tensors(2 * 3 * 4 + 2, 2, 8))
    rest = ((2, 3, 4), (2, 2, 3, 1, 3, 2), (1, 2, 1), True, 2, "suffix", torch.tensor([1]), 0.3, grad, "native")
    torch.library.opcheck(torch.ops.pyvideo.spacetime_attention, (q, k, v, *rest, "reference"))


def test_one_graph_serves_every_grid():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def call(q, grid):
        return pv.spacetime_attention(q, q, q, grid=grid, window=(2, 3, 2), stride=(1, 2, 1), causal_time=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for grid in ((4, 4, 4), (3, 5, 7), (2, 3, 4)):
        q = _tensors(math.prod(grid), 2, 16)[0]
        torch.testing.assert_close(compiled(q, grid), call(q, grid), rtol=0, atol=0)
    assert len(graphs) == 1


def test_repeats_bitwise():
    q, k, v = _tensors(60, 2, 16)
    options = {"grid": (3, 4, 5), "window": [(2, 2, 2), (3, 3, 3)], "return_lse": True, "impl": "triton"}
    first, second = (pv.spacetime_attention(q, k, v, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_window_over_the_whole_grid_is_dense():
    q, k, v = _tensors(24, 2, 16)
    dense = pv.spacetime_attention(q, k, v, grid=(2, 3, 4), impl="triton")
    for window in ((2, 3, 4), (9, 9, 9), [(2, 3, 4), (5, 3, 4)]):
        assert torch.equal(pv.spacetime_attention(q, k, v, grid=(2, 3, 4), window=window, impl="triton"), dense)
    # SDPA takes it too; anything narrower it refuses.
    pv.spacetime_attention(q, k, v, grid=(2, 3, 4), window=(2, 3, 4), impl="sdpa")
    for options in ({"window": (2, 3, 3)}, {"causal_time": True}, {"window": [(2, 3, 4), (2, 3, 3)]}):
        with pytest.raises(UnsupportedError, match="impl 'sdpa' is dense"):
            pv.spacetime_attention(q, k, v, grid=(2, 3, 4), impl="sdpa", **options)
    # One frame has no past to cut.
    assert torch.equal(
        pv.spacetime_attention(q, k, v, grid=(1, 6, 4), causal_time=True, impl="triton"),
        pv.spacetime_attention(q, k, v, grid=(1, 6, 4), impl="triton"),
    )


@pytest.mark.skipif(helpers.GPU, reason="architectures are forced in the interpreter only")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])  # by pointers, by descriptors
def test_padding_text_never_gets_in(arch):
    q = _tensors(15, 1, 16, dtype=torch.float16)[0]
    dirty = q.clone()
    dirty[:, 13:] = float("nan")
    options = {"grid": (1, 3, 4), "window": (1, 2, 3), "text_len": 3, "kv_lens": torch.tensor([1]), "impl": "triton"}
    with forced_arch(arch):
        assert torch.equal(*(pv.spacetime_attention(q, kv, kv, **options) for kv in (q, dirty)))


@pytest.mark.skipif(helpers.GPU, reason="on a card the self-check covers its own variant")
def test_offsets_pass_two_to_the_31():
    # Samples of a batch, and heads, 2^31 elements apart. Only the pages that hold tokens are ever touched.
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        storage = torch.empty(2**31 + 4096, dtype=torch.float16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    options = {"grid": (2, 2, 4), "window": (1, 2, 2), "impl": "triton"}
    for strides, shape in (((2**31, 32, 16, 1), (2, 16, 2, 16)), ((2**31, 16, 2**31 + 64, 1), (1, 16, 2, 16))):
        far = storage.as_strided(shape, strides)
        far.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        near = far.clone()
        for arch in ("sm_80", "sm_90"):
            with forced_arch(arch):
                assert torch.equal(*(pv.spacetime_attention(x, x, x, **options) for x in (far, near)))


def test_windows_one_row_a_head():
    q, k, v = _tensors(24, 2, 16)
    with pytest.raises(ShapeError):
        pv.spacetime_attention(q[:, :23], k, v, grid=(2, 3, 4), window=(1, 1, 1))
    table = torch.tensor([[1, 2, 3], [2, 1, 4]])
    by_tensor = pv.spacetime_attention(q, k, v, grid=(2, 3, 4), window=table, impl="triton")
    for head, row in enumerate(table.tolist()):
        one = pv.spacetime_attention(
            *(x[:, :, head : head + 1] for x in (q, k, v)), grid=(2, 3, 4), window=row, impl="triton"
        )
        assert torch.equal(by_tensor[:, :, head : head + 1], one)


def test_boxes_hold_what_they_should():
    from pyvideo_kernels.configs.windowed_attention import box

    for tokens, grid in itertools.product(
        (16, 64, 128), ((1, 1, 1), (21, 30, 52), (1, 1, 900), (2, 90, 1), (64, 1, 1))
    ):
        sides = box(tokens, grid)
        assert math.prod(sides) == tokens and sum(sides) <= 31
    with pytest.raises(ValueError, match="31 in all"):
        WindowConfig(1, 1, 16, 1, 1, 32, 16, 4, 1)


def test_candidates_are_what_a_launch_may_take():
    from pyvideo_kernels.configs import tuned
    from pyvideo_kernels.configs.windowed_attention import candidates, candidates_backward, select_backward

    size = {"head_dim": 128, "itemsize": 2, "t": 21, "h": 30, "w": 52}
    forward = {"op": "spacetime_attention", "aligned": True, **size}
    backward = {"op": "spacetime_attention_backward", "of": "dkv", **size}
    for arch, family, found, key in (
        ("sm_90", select, candidates, forward),
        ("sm_80", select, candidates, {**forward, "aligned": False}),
        ("sm_90", select_backward, candidates_backward, backward),
    ):
        configs = found(arch, **key)
        assert configs[0] == family.rule(arch, **key) and 10 < len(configs) <= 40 and len(set(configs)) == len(configs)
        assert all(family.illegal(config, arch, **key) is None for config in configs)
        assert any(config.query != configs[0].query for config in configs)
        # As a table on disk has it, and back.
        row = tuned.as_row(family.name, tuple(key.items()), configs[-1])
        assert tuned.row_config(row, arch) == configs[-1] and tuned.row_op(row) == key["op"]
    assert "descriptors" in select.illegal(candidates("sm_90", **forward)[0], "sm_90", **{**forward, "aligned": False})
    with pytest.raises(UnsupportedError, match="head_dim up to 256"):
        select("sm_90", **{**forward, "head_dim": 257})


def test_exports_with_any_grid():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return pv.spacetime_attention(q, k, v, grid=(q.shape[1] // 12, 3, 4), window=(2, 3, 3), return_lse=True)

    tokens = torch.export.Dim("frames", min=2, max=64) * 12
    inputs = tuple(x.cpu() for x in _tensors(36, 2, 16))
    exported = torch.export.export(Attention(), inputs, dynamic_shapes=({1: tokens},) * 3).module()
    for frames in (3, 5):
        inputs = tuple(x.cpu() for x in _tensors(frames * 12, 2, 16))
        torch.testing.assert_close(exported(*inputs), Attention()(*inputs), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, (2, 3, 3), [(2, 3, 3), (3, 3, 5)]])
def test_a_cuda_graph_replays_on_new_values(window):
    options = {"grid": (3, 4, 5), "window": window, "return_lse": True, "impl": "triton"}
    first, second = (_tensors(60, 2, 64, dtype=torch.float16, seed=seed) for seed in (0, 1))
    expected = pv.spacetime_attention(*second, **options)  # compiled, and the table of windows made, before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = pv.spacetime_attention(*first, **options)
    for place, x in zip(first, second, strict=True):
        place.copy_(x)
    graph.replay()
    assert all(torch.equal(got, wanted) for got, wanted in zip(outputs, expected, strict=True))
