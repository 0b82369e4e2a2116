"""Which implementation ``auto`` runs: the self-check and what is kept of it, capture, autocast, dtypes."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
import triton

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch, verdicts
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing import compare

CARD = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card that never ran anything: the check is replaced, its records are empty. Set ``card.outcome``."""
    state = SimpleNamespace(outcome=None, checks=[], capturing=False)

    def check(op, impl, device, dtype, *, head_dim=None):
        state.checks.append((op.name, impl, dtype, head_dim))
        if state.outcome is not None:
            raise state.outcome

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verdicts, "VERIFIED", tmp_path / "verified.json")
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "_capturing", lambda device: state.capturing)
    monkeypatch.setattr(compare, "check_op", check)
    return state


def _trusted(name="rms_norm", impl="triton", dtype=torch.bfloat16, head_dim=None):
    return dispatch.trusted(OPS[name], impl, CARD, dtype, head_dim)


def _recorded():
    path = verdicts.record_path()
    return list(json.loads(path.read_text()).values()) if path.exists() else []


def test_a_right_kernel_is_checked_once_and_remembered(card):
    assert _trusted() and _trusted() and len(card.checks) == 1 and _recorded() == [True]
    dispatch.forget()  # the next process
    assert _trusted() and len(card.checks) == 1


def test_a_wrong_kernel_is_never_run_again(card):
    card.outcome = compare.Mismatch("off by one")
    with pytest.warns(RuntimeWarning, match="rms_norm: impl 'triton' failed its self-check on sm_90.*off by one"):
        assert not _trusted()
    dispatch.forget()
    assert not _trusted() and len(card.checks) == 1 and _recorded() == [False]


def test_each_dtype_and_each_head_dim_has_its_own_check(card):
    assert _trusted() and _trusted(dtype=torch.float16)
    assert _trusted("spacetime_attention", head_dim=64)
    card.outcome = compare.Mismatch("wrong tile")
    with pytest.warns(RuntimeWarning, match="spacetime_attention"):
        assert not _trusted("spacetime_attention", head_dim=128)
    dispatch.forget()
    assert _trusted("spacetime_attention", head_dim=64) and not _trusted("spacetime_attention", head_dim=128)
    assert [head_dim for *_, head_dim in card.checks] == [None, None, 64, 128]
    known = dispatch.explain(OPS["spacetime_attention"], CARD)
    assert known[2] == ("triton", True, "self-check failed on this card for head_dim 128, passed for head_dim 64")


def test_head_dim_is_read_from_the_call():
    kwargs = next(compare.samples(OPS["qk_norm_rope_backward"], torch.float32, head_dim=24))
    for name in ("qk_norm_rope", "qk_norm_rope_", "qk_norm_rope_backward"):
        own = {key: value for key, value in kwargs.items() if key in OPS[name].arguments}
        assert OPS[name].head_dim(OPS[name].bind(**own)) == 24
    assert OPS["rms_norm"].head_dim((torch.zeros(2, 3), None, 1e-6)) is None
    for name in ("spacetime_attention", "qk_norm_rope"):
        assert {kwargs["q"].shape[-1] for kwargs in compare.samples(OPS[name], torch.float32, head_dim=40)} == {40}


def test_odd_head_dims_have_samples_that_are_not_rotated():
    cases = list(compare.samples(OPS["qk_norm_rope"], torch.float32, head_dim=7))
    assert cases and all(case["cos"] is None for case in cases)


@pytest.mark.parametrize(
    ("owner", "name", "value"), [(verdicts, "digest", lambda op, impl: "edited"), (triton, "__version__", "9")]
)
def test_a_verdict_is_about_this_code_and_this_compiler(card, monkeypatch, owner, name, value):
    assert _trusted() and len(card.checks) == 1
    dispatch.forget()
    monkeypatch.setattr(owner, name, value)
    assert _trusted() and len(card.checks) == 2


@pytest.mark.parametrize("outcome", [UnsupportedError("not built"), RuntimeError("CUDA error")])
def test_a_check_that_could_not_run_is_no_verdict_for_the_next_process(card, outcome):
    card.outcome = outcome
    with warnings.catch_warnings():
        # An extension that is not built is nothing to warn about.
        warnings.simplefilter("error" if isinstance(outcome, UnsupportedError) else "ignore")
        assert not _trusted() and not _trusted()
    assert len(card.checks) == 1 and _recorded() == []
    card.outcome = None
    dispatch.forget()
    assert _trusted()


def test_no_memory_for_the_check_postpones_it(card):
    card.outcome = torch.OutOfMemoryError("CUDA out of memory")
    assert not _trusted() and _recorded() == []
    card.outcome = None
    assert _trusted()


def test_an_unverified_kernel_is_left_out_of_a_capture_and_that_is_said(card):
    card.capturing = True
    with pytest.warns(RuntimeWarning, match="rms_norm.*cannot be checked during a CUDA graph capture.*warmup"):
        assert not _trusted()
    assert not card.checks
    card.capturing = False
    assert _trusted()
    dispatch.forget()
    card.capturing = True
    assert _trusted()  # settled before


def test_no_check_while_torch_compile_traces(card, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.warns(RuntimeWarning, match="while torch.compile traces"):
        assert not _trusted()
    assert not card.checks


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
