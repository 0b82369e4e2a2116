"""Which implementation ``auto`` runs: the self-check and what is kept of it, capture, autocast, dtypes."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
import triton

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing import compare

CARD = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card that never ran anything: the check is replaced, its record is empty. Set ``card.outcome``."""
    state = SimpleNamespace(outcome=None, checks=0, capturing=False)

    def check(*_):
        state.checks += 1
        if state.outcome is not None:
            raise state.outcome

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(compare, "check_op", check)
    return state


def _trusted():
    return dispatch.trusted(OPS["rms_norm"], "triton", CARD)


def _recorded():
    path = dispatch.record_path()
    return list(json.loads(path.read_text()).values()) if path.exists() else []


def test_a_right_kernel_is_checked_once_and_remembered(card, monkeypatch):
    assert _trusted() and _trusted() and card.checks == 1 and _recorded() == [True]
    monkeypatch.setattr(dispatch, "_verdicts", {})  # the next process
    assert _trusted() and card.checks == 1


def test_a_wrong_kernel_is_never_run_again(card, monkeypatch):
    card.outcome = compare.Mismatch("off by one")
    with pytest.warns(RuntimeWarning, match="failed its self-check on sm_90.*off by one"):
        assert not _trusted()
    monkeypatch.setattr(dispatch, "_verdicts", {})
    assert not _trusted() and card.checks == 1 and _recorded() == [False]


@pytest.mark.parametrize(
    ("owner", "name", "value"), [(dispatch, "_code", lambda: "edited"), (triton, "__version__", "9")]
)
def test_a_verdict_is_about_this_code_and_this_compiler(card, monkeypatch, owner, name, value):
    assert _trusted() and card.checks == 1
    monkeypatch.setattr(owner, name, value)
    assert _trusted() and card.checks == 2


@pytest.mark.parametrize("outcome", [UnsupportedError("not built"), RuntimeError("CUDA error")])
def test_a_check_that_could_not_run_is_no_verdict_for_the_next_process(card, monkeypatch, outcome):
    card.outcome = outcome
    with warnings.catch_warnings():
        # An extension that is not built is nothing to warn about.
        warnings.simplefilter("error" if isinstance(outcome, UnsupportedError) else "ignore")
        assert not _trusted() and not _trusted()
    assert card.checks == 1 and _recorded() == []
    card.outcome = None
    monkeypatch.setattr(dispatch, "_verdicts", {})
    assert _trusted()


def test_no_memory_for_the_check_postpones_it(card):
    card.outcome = torch.OutOfMemoryError("CUDA out of memory")
    assert not _trusted() and _recorded() == []
    card.outcome = None
    assert _trusted()


def test_an_unverified_kernel_is_left_out_of_a_capture_and_that_is_said(card):
    card.capturing = True
    with pytest.warns(RuntimeWarning, match="before capturing"):
        assert not _trusted()
    assert card.checks == 0
    card.capturing = False
    assert _trusted()


@pytest.mark.parametrize("name", ["patch_embed3d", "final_layer", "spacetime_attention", "causal_conv3d"])
def test_autocast_does_not_reach_into_an_op(name):
    function, op = getattr(torch.ops.pyvideo, name), OPS[name]
    for impl in ("auto", "reference"):
        kwargs = next(compare.samples(op, torch.float32))
        expected = function(*op.bind(**kwargs), impl)
        with torch.autocast("cpu", torch.bfloat16):
            got = function(*op.bind(**kwargs), impl)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_partial_check_still_judges_and_needs_a_sample():
    op = OPS["spacetime_attention"]
    with pytest.raises(UnsupportedError, match="gives no lse"):
        compare.check_op(op, "sdpa", "cpu", torch.float32)
    assert compare.check_op(op, "sdpa", "cpu", torch.float32, partial=True) == 2

    def refuses(*_):
        raise UnsupportedError("not this")

    with pytest.raises(UnsupportedError, match="every sample"):
        compare.check_op(op, "sdpa", "cpu", torch.float32, refuses, partial=True)
    with pytest.raises(compare.Mismatch):
        compare.check_op(op, "sdpa", "cpu", torch.float32, lambda q, *_: (q * 2, q.new_empty(0)), partial=True)


def test_predictions_of_two_dtypes():
    """Valid by the contract and nothing for the compiled kernel: ``auto`` goes on, an explicit ``cpu`` says why."""
    z = torch.randn(3, 5)
    step = {"guidance_scale": 4.0, "sigma": 0.5, "sigma_next": 0.4}
    out = pv.guidance_step(z, z.bfloat16(), z, **step)
    assert torch.equal(out, pv.guidance_step(z, z.bfloat16(), z, **step, impl="reference"))
    with pytest.raises(UnsupportedError):
        pv.guidance_step(z, z.bfloat16(), z, **step, impl="cpu")


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_rotation_tables_that_ask_for_a_gradient_are_refused(name):
    q, table = torch.randn(1, 2, 2, 8), torch.randn(2, 8)
    tables = {"cos": table, "sin": table, name: table.clone().requires_grad_()}
    for function in (pv.qk_norm_rope, pv.qk_norm_rope_):
        with pytest.raises(UnsupportedError, match=f"`{name}` requires grad"):
            function(q.clone(), q.clone(), **tables)
        with torch.no_grad():
            function(q.clone(), q.clone(), **tables)
