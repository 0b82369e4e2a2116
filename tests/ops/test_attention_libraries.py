"""Dense attention handed to a library: cuDNN by PyTorch's operator replaced, the order, and who says what it was."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch, known_bad
from pyvideo_kernels.attention_text import choose
from pyvideo_kernels.integrations import upfront
from pyvideo_kernels.integrations.report import Report
from pyvideo_kernels.integrations.swap import Plan, Settings
from pyvideo_kernels.ops import attention_libraries as libraries
from pyvideo_kernels.sampler import doctor, kernels
from pyvideo_kernels.schemas import OPS

from .library_standins import CARD, HALF, OP, arguments, attention_and_lse, misaligned, packed, run_flash

pytestmark = pytest.mark.usefixtures("no_library")

# cuDNN ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cudnn(card, monkeypatch):
    """PyTorch's operator replaced: takes what ``state.takes`` says, and counts."""
    state = SimpleNamespace(calls=0, takes=True, error=None)

    def op(q, k, v, bias, lse, dropout, causal, debug, *, scale):
        state.calls += 1
        if state.error is not None:
            raise state.error
        assert (bias, lse, dropout, causal, debug) == (None, False, 0.0, False, False)
        gqa = q.shape[1] != k.shape[1]
        return (torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa), None)

    monkeypatch.setattr(libraries, "_cudnn_op", lambda: op)
    monkeypatch.setattr(libraries, "_cudnn_version", lambda: "9.15.1")
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda params, debug: state.takes)
    libraries.forget()
    return state


def by_heads(**options):
    return [x.transpose(1, 2) for x in packed(**options)]


def test_cudnn_serves_half_precision_where_it_is_the_faster_one(cudnn, card):
    q, k, v = by_heads(heads=4)
    out = libraries.dense_sdpa(q, k[:, :2], v[:, :2], 0.25)
    exact = attention_and_lse(*(x.transpose(1, 2) for x in (q, k[:, :2], v[:, :2])), 0.25)[0]
    torch.testing.assert_close(out.transpose(1, 2).float(), exact, atol=2e-2, rtol=2e-2)
    assert cudnn.calls == 1
    libraries.dense_sdpa(*by_heads(dtype=torch.float32), 0.25)
    cudnn.takes = False
    again = libraries.dense_sdpa(q, k[:, :2], v[:, :2], 0.25)
    assert cudnn.calls == 1
    torch.testing.assert_close(again, out, atol=2e-2, rtol=2e-2)
    cudnn.takes = True
    card("sm_80")
    libraries.dense_sdpa(q, k, v, 0.25)
    card("gfx942")
    libraries.dense_sdpa(q, k, v, 0.25)
    assert cudnn.calls == 1
    card("sm_100")
    libraries.dense_sdpa(q, k, v, 0.25)
    assert cudnn.calls == 2


def test_a_users_switch_holds(cudnn):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        libraries.dense_sdpa(*by_heads(), 0.25)
    assert cudnn.calls == 0
    libraries.dense_sdpa(*by_heads(), 0.25)
    assert cudnn.calls == 1


@pytest.mark.parametrize(("effect", "first"), [(known_bad.WRONG, False), (known_bad.GRADIENTS, True)])
def test_a_known_bad_cudnn_is_not_tried_first(cudnn, monkeypatch, effect, first):
    problem = known_bad.Problem(
        "sdpa-cudnn-test", effect, "x", "y", ("z",), {"cudnn": ("9.10", "9.16")}, archs=("sm_90",)
    )
    monkeypatch.setattr(known_bad, "PROBLEMS", (problem,))
    libraries.dense_sdpa(*by_heads(), 0.25)
    # What is wrong with its gradients does not matter here: the backward is not cuDNN's.
    assert (cudnn.calls == 1) is first
    assert libraries.why_not_cudnn(torch.device("cpu")) == (
        "" if first else "known problem sdpa-cudnn-test (cuDNN >= 9.10, < 9.16; sm_90)"
    )


def test_a_shape_that_cudnn_has_no_plan_for_goes_to_torchs_kernels_from_then_on(cudnn, caplog):
    cudnn.error = RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No valid execution plans built.")
    q, k, v = by_heads()
    for _ in range(2):
        torch.testing.assert_close(
            libraries.dense_sdpa(q, k, v, 0.25),
            torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25),
        )
    assert cudnn.calls == 1 and caplog.text.count("cuDNN has no plan for q [2, 2, 24, 64]") == 1
    for error in (torch.OutOfMemoryError("cuDNN workspace"), RuntimeError("CUDA error: an illegal memory access")):
        libraries.forget()
        cudnn.error = error
        with pytest.raises(type(error), match=str(error)):
            libraries.dense_sdpa(q, k, v, 0.25)


def test_the_operator_is_the_one_that_was_read():
    op = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    assert libraries._cudnn_op() is op
    q, k, v = (x.to("meta") for x in by_heads())
    out = op(q, k, v, None, False, 0.0, False, False, scale=0.25)[0]
    assert out.shape == q.shape


# Which is first, and who says so ---------------------------------------------------------------------------------


def test_the_order(card, monkeypatch):
    assert libraries.MEASURED == {}, "a row needs a committed result: benchmarks/results/"
    assert dispatch.order(OP, CARD) == ("flash", "sdpa", "triton", "reference")
    assert dispatch.order(OP, torch.device("cpu"), HALF, 128) == ("cpu", "sdpa", "reference")
    measured = libraries.Measured("triton", "benchmarks/results/x.json at abc1234")
    monkeypatch.setitem(libraries.MEASURED, ("sm_90", "bfloat16", 128), measured)
    assert dispatch.order(OP, CARD, HALF, 128) == ("triton", "flash", "sdpa", "reference")
    assert (
        dispatch.order(OP, CARD, HALF, 64) == dispatch.order(OP, CARD, torch.float16, 128) == dispatch.order(OP, CARD)
    )
    assert dispatch.order(OPS["spacetime_attention_backward"], CARD, HALF, 128)[0] != "flash"


def test_cudnn_stands_before_flash_attention_where_it_was_published_to_be_faster(cudnn, card, monkeypatch):
    usual = ("flash", "sdpa", "triton", "reference")
    card("sm_100")
    assert dispatch.order(OP, CARD, HALF, 128) == usual  # cuDNN 9.15
    monkeypatch.setattr(libraries, "_cudnn_version", lambda: "9.19")
    assert dispatch.order(OP, CARD, HALF, 128) == ("sdpa", "flash", "triton", "reference")
    assert "sglang/pull/33655" in libraries.source(CARD, HALF, "sdpa") and not libraries.source(CARD, HALF, "flash")
    assert dispatch.order(OP, CARD, torch.float32, 128) == usual
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert dispatch.order(OP, CARD, HALF, 128) == usual  # without cuDNN, PyTorch's is the slower one
    monkeypatch.undo()
    card("sm_90")
    assert dispatch.order(OP, CARD, HALF, 128) == usual


def test_one_query_is_not_for_cudnn(cudnn):
    libraries.dense_sdpa(*by_heads(s=1), 0.25)
    assert cudnn.calls == 0


class OnCard:
    """A walk of ``auto`` in CUDA's order, on CPU tensors."""

    def __init__(self, monkeypatch):
        self.op = dataclasses.replace(OP, auto={"cpu": ("flash", "sdpa", "reference")}, in_order="")
        monkeypatch.setattr(dispatch, "trusted", self.trusted)
        self.trust = True

    def trusted(self, op, impl, device, dtype, head_dim):
        dispatch._require(op, impl, device, dtype, head_dim)
        return self.trust

    def __call__(self, *args, **options):
        before = dispatch.calls()
        dispatch.run(self.op, (*arguments(*args, **options), "auto"))
        after = dispatch.calls()
        return [impl for (name, impl), n in after.items() if name == OP.name and n > before.get((name, impl), 0)]


def test_auto_hands_over_to_what_takes_the_call(card, install, monkeypatch):
    auto = OnCard(monkeypatch)
    q, k, v = packed()
    assert auto(q, k, v) == ["sdpa"]
    install("3")
    assert auto(q, k, v) == ["flash"] and auto(q, k, v, return_lse=True) == ["flash"]
    assert auto(*packed(dtype=torch.float32)) == ["sdpa"] and auto(*misaligned()) == ["sdpa"]
    assert auto(q, k, v, window=[1, 1, 3]) == ["reference"]
    auto.trust = False
    assert auto(q, k, v) == ["sdpa"]


def test_it_is_said_once_which(card, install, cudnn, caplog):
    caplog.set_level(logging.INFO, "pyvideo_kernels")
    install("3")
    for _ in range(3):
        run_flash(*packed())
        libraries.dense_sdpa(*by_heads(), 0.25)
    run_flash(*packed(head_dim=128))
    assert [record.getMessage() for record in caplog.records] == [
        "spacetime_attention on cpu, bfloat16, head_dim 64: FlashAttention-3 0.1 (impl 'flash')",
        "spacetime_attention on cpu, bfloat16, head_dim 64: cuDNN 9.15.1, by PyTorch's operator (impl 'sdpa')",
        "spacetime_attention on cpu, bfloat16, head_dim 128: FlashAttention-3 0.1 (impl 'flash')",
    ]
    cudnn.takes = False  # of this shape
    libraries.dense_sdpa(*by_heads(), 0.25)
    libraries.dense_sdpa(*by_heads(dtype=torch.float32), 0.25)
    assert len(caplog.records) == 4 and "float32, head_dim 64: PyTorch's choice, " in caplog.records[-1].getMessage()


def test_the_report_names_the_kernel_of_the_calls_since(card, install, monkeypatch):
    auto = OnCard(monkeypatch)
    run_flash_first = install("3")
    auto(*packed())
    report = Report("model", Plan(), Settings(ops=frozenset({OP.name})))
    assert report.attention_kernels() == [] and run_flash_first.calls
    auto(*packed())
    assert report.attention_kernels() == ["FlashAttention-3 0.1 (bfloat16, head_dim 64, cpu)"]
    assert report.to_dict()["attention_kernels"] == report.attention_kernels()
    assert "spacetime_attention, dense: FlashAttention-3 0.1 (bfloat16, head_dim 64, cpu)" in report.plain()


@pytest.mark.parametrize(
    ("asked", "named"),
    [("dense", True), ({"window": (0.5, 0.5, 0.5)}, False), ({"window": (0.5, 0.5, 0.5), "dense_steps": 2}, True)],
)
def test_the_report_says_before_the_first_call_what_will_run(cudnn, install, asked, named):
    settings = Settings(ops=frozenset({OP.name}), attention=choose(asked, "attention"))

    def said():
        checked = upfront.check([OP.name], CARD, HALF, 128)
        return Report("model", Plan(), settings, checked).attention_kernels()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "self_check", lambda *of: True)
        patch.setattr(dispatch, "_capturing", lambda device: False)
        first = said()
        install("4")
        second = said()
    faster = "cuDNN 9.15.1, published as faster than PyTorch's own kernels here"
    assert first == ([f"{faster} (bfloat16, head_dim 128, cuda:0)"] if named else [])
    assert second == (["FlashAttention-4 0.1 (bfloat16, head_dim 128, cuda:0)"] if named else [])


def test_doctor_shows_each_card_and_dtype(card, cudnn, install, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    rows = doctor._dense_attention(CARD)
    assert [(row["device"], row["dtype"], row["impl"]) for row in rows] == [
        ("cuda:0", dtype, "sdpa") for dtype in ("bfloat16", "float16", "float32")
    ]
    assert doctor._attention_rows(rows) == [(
        "dense attention, cuda:0",
        "bfloat16, float16: sdpa (cuDNN 9.15.1, published as faster than PyTorch's own kernels here); "
        "float32: sdpa (PyTorch's choice (cuDNN takes bf16 and fp16; this is float32))",
    )]  # fmt: skip
    install("4")
    flashed = doctor._attention_rows(doctor._dense_attention(CARD))[0][1]
    assert "bfloat16, float16: flash (FlashAttention-4 0.1, unverified: self-check on first use)" in flashed
    walk = kernels.binding("spacetime_attention", CARD, HALF)[1]
    assert [impl for impl, *_ in walk] == ["flash", "sdpa", "triton", "reference"]
    measured = libraries.Measured("sdpa", "benchmarks/results/x.json at abc1234")
    monkeypatch.setitem(libraries.MEASURED, ("sm_90", "bfloat16", 128), measured)
    first = doctor._dense_attention(CARD)[0]
    assert first["impl"] == "sdpa" and first["why"].endswith("; fastest in benchmarks/results/x.json at abc1234")


def test_doctor_says_why_a_library_is_not_bound(card, cudnn):
    walk = {impl: why for impl, _, why in kernels.binding("spacetime_attention", CARD, HALF)[1]}
    assert "FlashAttention-4 not installed: pip install" in walk["flash"]
    card("sm_89")
    walk = {impl: why for impl, _, why in kernels.binding("spacetime_attention", CARD, HALF)[1]}
    assert "none of them for sm_89" in walk["flash"]
    assert walk["sdpa"] == "PyTorch's choice (cuDNN is faster on sm_90, sm_100, sm_103; this is sm_89)"


def test_on_a_cpu_nothing_is_handed_over_and_nothing_is_said(caplog):
    caplog.set_level(logging.INFO, "pyvideo_kernels")
    q, k, v = packed(dtype=torch.float32)
    pv.spacetime_attention(q, k, v, grid=(1, 1, 24))
    assert not caplog.records and libraries.served() == []
    rows = dispatch.explain(OP, torch.device("cpu"))
    assert rows[1] == ("sdpa", True, "PyTorch's scaled_dot_product_attention") and rows[0][0] == "cpu"
