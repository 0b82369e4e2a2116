"""Gradients of spacetime_attention, dense and windowed, and what a call costs."""

import itertools
import math

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import _native, dispatch
from pyvideo_kernels.configs import forced_arch
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.reference import spacetime_attention as oracle
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close, check_call, samples

from . import helpers
from .test_windowed_attention import _attend, _mask, _tensors

NAME = "spacetime_attention"
BACKWARD = OPS[f"{NAME}_backward"]


@pytest.mark.parametrize(
    "options",
    [
        {"grid": (1, 2, 3)},
        {"grid": (2, 2, 2), "window": [(1, 2, 2), (2, 1, 2)], "text_len": 3, "kv_lens": torch.tensor([2])},
        {"grid": (3, 2, 1), "window": (2, 2, 1), "stride": (2, 1, 1), "causal_time": True, "text_len": 1},
    ],
)
def test_reference_is_the_gradient_of_the_formula(options):
    tokens = math.prod(options["grid"]) + options.get("text_len", 0)
    inputs = [x.cpu().double().requires_grad_() for x in _tensors(tokens, 2, 3, kv_heads=1)]
    assert torch.autograd.gradcheck(
        lambda *x: pv.spacetime_attention(*x, **options, return_lse=True, impl="reference"), inputs
    )


# The interpreter takes its time: each sample in one dtype, and the largest in none (packed views are below).
_HERE = {torch.float32: (1, 4, 5, 7), torch.float16: (2, 3, 6)}


@pytest.mark.parametrize("dtype", helpers.TRITON_DTYPES)
def test_kernels_match_float64_on_the_samples(dtype):
    for index, kwargs in enumerate(samples(BACKWARD, dtype, helpers.DEVICE)):
        if helpers.GPU or index in _HERE[dtype]:
            check_call(BACKWARD, "triton", BACKWARD.bind(**kwargs), f"sample {index}")


def _gradients(inputs, grads, options, impl):
    """Of the public function; grads of out and, unless None, of lse."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = pv.spacetime_attention(*inputs, **options, return_lse=True, impl=impl)
    wanted = [(out, grads[0]), (lse, grads[1])] if grads[1] is not None else [(out, grads[0])]
    return torch.autograd.grad([x for x, _ in wanted], inputs, [g.to(x) for x, g in wanted])


def _independent(inputs, grads, mask, dtype):
    """autograd through explicit masked softmax in ``dtype``."""
    inputs = [x.detach().to(dtype).cpu().requires_grad_() for x in inputs]
    out, lse = _attend(*inputs, mask, dtype)
    given = [g.to(dtype).cpu() for g in grads if g is not None]
    return torch.autograd.grad([out, lse][: len(given)], inputs, given)


CASES = [
    ((2, 3, 7), None, {}),
    ((3, 4, 5), (2, 3, 3), {"stride": (1, 2, 3), "dlse": True, "head_dim": 40}),
    ((3, 4, 5), [(1, 4, 2), (3, 3, 3), (2, 2, 9)], {"heads": 3, "kv_heads": 1, "text_len": 3, "lens": [2]}),
    ((5, 2, 3), (3, 2, 2), {"stride": (3, 1, 2), "causal": True, "text_len": 2, "side": "prefix", "dlse": True}),
    ((4, 1, 3), None, {"causal": True, "lens": [1, 2], "text_len": 2, "head_dim": 128}),
    ((1, 2, 2), (1, 1, 2), {"heads": 3}),
]


@pytest.mark.parametrize(("grid", "window", "options"), CASES)
def test_gradients_match_autograd_through_an_independent_mask(grid, window, options):
    options = {"stride": (1, 1, 1), "causal": False, "heads": 1, "kv_heads": None, "head_dim": 16, "text_len": 0,
               "side": "suffix", "lens": None, "dlse": False, **options}  # fmt: skip
    lens, heads, tokens = options["lens"], options["heads"], math.prod(grid) + options["text_len"]
    inputs = _tensors(
        tokens, heads, options["head_dim"], kv_heads=options["kv_heads"], batch=len(lens or [0]), dtype=torch.float32
    )
    do = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(helpers.DEVICE)
    dlse = do[..., 0].transpose(1, 2) if options["dlse"] else None  # strided
    kwargs = {
        "grid": grid, "window": window, "stride": options["stride"], "causal_time": options["causal"],
        "text_len": options["text_len"], "text_side": options["side"],
        "kv_lens": None if lens is None else torch.tensor(lens, device=helpers.DEVICE),
    }  # fmt: skip
    mask = _mask(grid, window, options["stride"], options["causal"], heads, options["text_len"], options["side"], lens)
    exact, eager = (_independent(inputs, (do, dlse), mask, dtype) for dtype in (torch.float64, torch.float32))
    for impl in ("triton", "reference"):
        for name, got, ref64, low in zip(
            "qkv", _gradients(inputs, (do, dlse), kwargs, impl), exact, eager, strict=True
        ):
            assert_close(got.cpu(), ref64, low, f"{impl} d{name}")


def test_expanded_gradients_and_one_input_alone():
    q, k, v = _tensors(12, 2, 16)
    options = {"grid": (1, 3, 4), "window": (1, 2, 2)}
    ones = torch.ones_like(q)
    whole = _gradients((q, k, v), (ones, None), options, "triton")
    for wanted in range(3):
        inputs = [x.detach().requires_grad_(i == wanted) for i, x in enumerate((q, k, v))]
        pv.spacetime_attention(*inputs, **options, impl="triton").sum().backward()  # an expanded gradient
        assert torch.equal(inputs[wanted].grad, whole[wanted])
        assert all(x.grad is None for i, x in enumerate(inputs) if i != wanted)


def test_packed_views():
    packed = torch.randn(2, 12, 2, 3, 24, generator=torch.Generator().manual_seed(0)).to(helpers.DEVICE)
    views = [packed[:, :, :, i] for i in range(3)]
    do = torch.randn(2, 2, 12, 24, generator=torch.Generator().manual_seed(1)).to(helpers.DEVICE).transpose(1, 2)
    options = {"grid": (1, 3, 4), "window": (1, 2, 2)}
    by_view, compact = (
        _gradients(inputs, (do, None), options, "triton") for inputs in (views, [x.contiguous() for x in views])
    )
    for got, expected in zip(by_view, compact, strict=True):
        assert torch.equal(got, expected) and got.is_contiguous()


def test_gradients_repeat_bitwise():
    inputs = _tensors(24, 2, 16)
    do = torch.randn_like(inputs[0])
    options = {"grid": (2, 3, 4), "window": [(2, 2, 2), (1, 3, 3)]}
    first, second = (_gradients(inputs, (do, None), options, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_op_called_without_lse_makes_it_again():
    q, k, v = (x.requires_grad_() for x in _tensors(12, 1, 16))
    rest = ((1, 3, 4), [1, 2, 2], (1, 1, 1), False, 0, "suffix", None, 0.25)
    for impl in ("triton", "reference"):
        with_lse, without = (
            torch.autograd.grad(
                torch.ops.pyvideo.spacetime_attention(q, k, v, *rest, lse, "native", impl)[0].square().sum(), (q, k, v)
            )
            for lse in (True, False)
        )
        torch.testing.assert_close(with_lse, without)


def test_oracle_is_the_same_in_chunks(monkeypatch):
    kwargs = next(itertools.islice(samples(BACKWARD, torch.float64), 6, None))
    whole = oracle.spacetime_attention_backward(**kwargs)
    monkeypatch.setattr(oracle, "_MAX_SCORES", 700)
    for a, b in zip(oracle.spacetime_attention_backward(**kwargs), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"window": lambda w: [n + 1 for n in w]},
        {"stride": lambda s: [1, 1, 1]},
        {"kv_lens": lambda n: n + 1},
        {"scale": lambda s: s * 1.01},
        {"grads": lambda g: [g[0], -g[1]]},
        {"outputs": lambda o: [o[0].roll(1, 1), o[1]]},
    ],
    ids=["window", "stride", "lens", "scale", "dlse", "delta"],
)
def test_a_wrong_backward_is_seen(change):
    q, k, v = _tensors(23, 1, 16, dtype=torch.float16)
    kwargs = {
        "q": q, "k": k, "v": v, "grid": (2, 5, 2), "window": [1, 3, 2], "stride": [1, 3, 1], "causal_time": False,
        "text_len": 3, "text_side": "suffix", "kv_lens": torch.tensor([1], device=q.device), "scale": 0.25,
        "return_lse": True, "precision": "native",
    }  # fmt: skip
    outputs = list(oracle.spacetime_attention(**kwargs))
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x) for x in outputs]
    kwargs = {"grads": grads, "outputs": outputs, **kwargs, "needs": [True] * 3}
    triton = dispatch.load(BACKWARD, "triton")

    def wrong(*args):
        values = dict(zip(BACKWARD.arguments[:-1], args, strict=True))
        values |= {name: f(values[name]) for name, f in change.items()}
        return triton(*BACKWARD.bind(**values))

    check_call(BACKWARD, "triton", BACKWARD.bind(**kwargs), "right")
    with pytest.raises(Mismatch):
        check_call(BACKWARD, "triton", BACKWARD.bind(**kwargs), "sample", call=wrong)


# Which implementation, and what is refused --------------------------------------------------------------------------


def test_auto_runs_what_has_a_backward():
    q, k, v = (x.cpu() for x in _tensors(8, 2, 16))

    def ran(*inputs, **options):
        before = dispatch.calls()
        out = pv.spacetime_attention(*inputs, grid=(2, 2, 2), **options)
        if out.requires_grad:
            out.sum().backward()
        return {
            (op, i) for (op, i), n in dispatch.calls().items() if op.startswith(NAME) and n > before.get((op, i), 0)
        }

    assert ran(q, k, v) == {(NAME, "sdpa")}
    leaf = v.clone().requires_grad_()
    # SDPA gives no lse; the next in line does.
    assert ran(q, k, leaf) == {(NAME, "cpu" if _native.available() else "reference"), (BACKWARD.name, "reference")}
    with torch.no_grad():
        assert ran(q, k, leaf) == {(NAME, "sdpa")}
    with pytest.raises(UnsupportedError, match="no lse, which `return_lse` and gradients need"):
        pv.spacetime_attention(q, k, leaf, grid=(2, 2, 2), impl="sdpa")


def test_triton_refuses_a_backward_that_it_has_not():
    q, k, v = _tensors(2, 1, 136)
    out, lse = pv.spacetime_attention(q, k, v, grid=(1, 1, 2), return_lse=True, impl="triton")
    rest = ((1, 1, 2), None, (1, 1, 1), False, 0, "suffix", None, 0.1, True, "native", [True] * 3)
    with pytest.raises(UnsupportedError, match="backward of impl 'triton' has head_dim up to 128, got 136"):
        torch.ops.pyvideo.spacetime_attention_backward([out, lse], [out, lse], q, k, v, *rest, "triton")
    # auto goes on to the next.
    assert len(torch.ops.pyvideo.spacetime_attention_backward([out, lse], [out, lse], q, k, v, *rest, "auto")) == 3


def test_contract_and_fullgraph():
    for kwargs in itertools.islice(samples(BACKWARD, torch.float32), 5, None, 2):
        torch.library.opcheck(
            torch.ops.pyvideo.spacetime_attention_backward, (*BACKWARD.bind(**kwargs), "reference"),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip

    def step(q, k, v):
        out = pv.spacetime_attention(q, k, v, grid=(1, 3, 4), window=(1, 2, 2), impl="reference")
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    torch.compiler.reset()
    inputs = [x.cpu().requires_grad_() for x in _tensors(12, 1, 16)]

    def forward(*xs):
        return pv.spacetime_attention(*xs, grid=(1, 3, 4), window=(1, 2, 2), impl="reference")

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs).square().sum(), inputs), step(*inputs), rtol=0, atol=0
    )


@pytest.mark.skipif(helpers.GPU, reason="architectures are forced in the interpreter only")
@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_boxes_of_a_card_agree_with_those_of_the_interpreter(arch):
    inputs = _tensors(30, 1, 64, dtype=torch.float16)
    do = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).half()
    options = {"grid": (2, 3, 5), "window": (2, 2, 3)}
    out, lse = pv.spacetime_attention(*inputs, **options, return_lse=True, impl="triton")
    rest = ((2, 3, 5), [2, 2, 3], (1, 1, 1), False, 0, "suffix", None, 0.125, True, "native", [True] * 3)
    args = ([do, torch.zeros_like(lse)], [out, lse], *inputs, *rest)
    with forced_arch(arch):
        check_call(BACKWARD, "triton", args, arch)


# Cost ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "window", "stride", "causal", "text"),
    [
        ((2, 3, 4), None, (1, 1, 1), False, 0),
        ((3, 5, 4), (2, 4, 9), (1, 2, 3), False, 3),
        ((5, 2, 3), (3, 2, 1), (3, 1, 1), True, 2),
        ((5, 2, 3), None, (1, 1, 1), True, 0),
        ((3, 5, 4), [(1, 2, 2), (3, 5, 4)], (1, 2, 2), False, 1),
        ((0, 0, 0), None, (1, 1, 1), False, 3),
    ],
)
def test_cost_counts_the_pairs_of_the_mask(grid, window, stride, causal, text):
    mask = _mask(grid, window, stride, causal, 2, text, "suffix", None)
    options = {"stride": stride, "causal_time": causal, "text_len": text}
    cost = pv.spacetime_attention_cost(grid, 2, 64, window, **options, batch=3)
    assert cost.pairs == 3 * int(mask.sum()) and cost.flops == 4 * 64 * cost.pairs
    assert cost.sparsity == pytest.approx(1 - float(mask.double().mean()))
    tokens = math.prod(grid) + text
    assert cost.bytes == 4 * 3 * tokens * 2 * 64 * 2
    back = pv.spacetime_attention_cost(grid, 2, 64, window, **options, batch=3, kv_heads=1, itemsize=4, backward=True)
    assert back.flops == 10 * 64 * cost.pairs and back.pairs == cost.pairs
    assert back.bytes == 3 * tokens * (4 * 64 * 4 * (2 + 1) + 2 * 4)


def test_cost_refuses_by_name():
    for change, words in (
        ({"heads": 0}, "`heads` must be an integer of at least 1"),
        ({"text_len": -1}, "`text_len` must be"),
        ({"grid": (1, 2)}, "`grid` must be three integers"),
        ({"window": (1, 1, 1), "stride": (2, 1, 1)}, "`stride` must be at most the window"),
    ):
        with pytest.raises(ValueError, match=f"spacetime_attention_cost: {words}"):
            pv.spacetime_attention_cost(**{"grid": (1, 2, 3), "heads": 1, "head_dim": 8, **change})
