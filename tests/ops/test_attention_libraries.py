"""Dense attention handed to a library: FlashAttention by stand-ins, cuDNN by PyTorch's operator replaced."""

import importlib.util
import json
import logging
import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch, known_bad, verdicts, verify
from pyvideo_kernels.attention_text import choose
from pyvideo_kernels.errors import DeviceError, UnsupportedError, ValueOptionError
from pyvideo_kernels.integrations import upfront
from pyvideo_kernels.integrations.report import Report
from pyvideo_kernels.integrations.swap import Plan, Settings
from pyvideo_kernels.ops import attention_libraries as libraries
from pyvideo_kernels.ops import flash_attention as flash
from pyvideo_kernels.reference import spacetime_attention as oracle
from pyvideo_kernels.sampler import doctor, kernels
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing import compare

OP = OPS["spacetime_attention"]
CARD = torch.device("cuda", 0)
HALF = torch.bfloat16


# Stand-ins ------------------------------------------------------------------------------------------------------


def attention_and_lse(q, k, v, scale):
    """In their layout, by plain products; natural logarithm, ``[B, heads, S]`` fp32."""
    heads = q.shape[2] // k.shape[2]
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), scores.logsumexp(-1)


class FlashModule(types.ModuleType):
    """``flash_attn_func`` as the releases have it; ``calls`` are its arguments, ``change`` spoils the result."""

    def __init__(self, name, kind):
        super().__init__(name)
        self.__version__ = "0.1"
        self.__spec__ = importlib.util.spec_from_loader(name, None)
        self.__path__ = []
        self.calls, self.change = [], lambda out, lse: (out, lse)

        def run(q, k, v, softmax_scale, causal, asked):
            assert all(x.dim() == 4 and x.stride(-1) == 1 for x in (q, k, v)) and q.dtype in (HALF, torch.float16)
            assert not causal and q.shape[2] % k.shape[2] == 0 and k.shape == v.shape and q.shape[1] == k.shape[1]
            assert not torch.is_grad_enabled()
            self.calls.append(SimpleNamespace(q=q, k=k, v=v, scale=softmax_scale, asked=asked))
            out, lse = attention_and_lse(q, k, v, softmax_scale)
            return self.change(out.to(q.dtype), lse)

        def early3(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
            return run(q, k, v, softmax_scale, causal, None)

        def late3(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), return_attn_probs=False):
            out, lse = run(q, k, v, softmax_scale, causal, return_attn_probs)
            return (out, lse) if return_attn_probs else out

        def four(q, k, v, qv=None, softmax_scale=None, causal=False, num_splits=1, return_lse=False):
            out, lse = run(q, k, v, softmax_scale, causal, return_lse)
            return out, lse if return_lse else None

        self.flash_attn_func = {"early 3": early3, "3": late3, "4": four}[kind]


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No library, no card, no records; as in a fresh process."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "flash_attn_3"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verdicts, "VERIFIED", tmp_path / "verified.json")
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(flash, "_version", lambda distribution: None)
    flash.forget()
    libraries.forget()
    yield
    flash.forget()
    libraries.forget()


@pytest.fixture
def card(monkeypatch):
    """Takes the CPU for a card of an architecture: ``card("sm_90")``."""

    def be(arch):
        monkeypatch.setattr(dispatch, "arch_of", lambda device: arch)
        libraries.forget()

    be("sm_90")
    return be


@pytest.fixture
def install(monkeypatch):
    def put(kind):
        if kind == "4":
            monkeypatch.setitem(sys.modules, "flash_attn", FlashModule("flash_attn", "4"))
        name = "flash_attn.cute" if kind == "4" else "flash_attn_interface"
        module = FlashModule(name, kind)
        monkeypatch.setitem(sys.modules, name, module)
        flash.forget()
        return module

    return put


def arguments(q, k, v, **options):
    given = {
        "grid": [1, 1, q.shape[1]], "window": None, "stride": [1, 1, 1], "causal_time": False, "text_len": 0,
        "text_side": "suffix", "kv_lens": None, "scale": q.shape[-1] ** -0.5, "return_lse": False,
        "precision": "native",
    }  # fmt: skip
    return OP.bind(q=q, k=k, v=v, **given | options)


def packed(s=24, heads=2, head_dim=64, dtype=HALF, b=2):
    return torch.randn(b, s, 3, heads, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype).unbind(2)


def run_flash(*args, **options):
    return flash.spacetime_attention_flash(*arguments(*args, **options))


# FlashAttention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["early 3", "3", "4"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_release_passes_the_rule_on_all_samples_that_it_takes(card, install, kind, head_dim):
    install(kind)
    # Not: lengths of the text, of which there are three.
    assert compare.check_op(OP, "flash", "cpu", HALF, partial=True, head_dim=head_dim) >= 4
    assert all(kwargs["kv_lens"] is None for kwargs in compare.samples(OP, HALF, head_dim=head_dim) if _takes(kwargs))


def _takes(kwargs):
    try:
        flash.spacetime_attention_flash(*OP.bind(**kwargs))
    except UnsupportedError:
        return False
    return True


@pytest.mark.parametrize("kind", ["early 3", "3", "4"])
def test_layout_scale_and_lse(card, install, kind):
    module = install(kind)
    q, k, v = packed()
    out, lse = run_flash(q, k[:, :, :1], v[:, :, :1], scale=0.3, return_lse=True)
    call = module.calls[-1]
    assert call.q is q and call.q.stride() == packed()[0].stride() and call.scale == 0.3  # the view itself: no copy
    exact, exact_lse = oracle.spacetime_attention(*arguments(q, k[:, :, :1], v[:, :, :1], scale=0.3, return_lse=True))
    torch.testing.assert_close(out, exact, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, exact_lse, atol=1e-4, rtol=1e-4)  # the natural logarithm, [B, heads, S]
    assert out.is_contiguous() and lse.shape == (2, 2, 24) and lse.dtype == torch.float32
    out, lse = run_flash(q, k, v)
    assert lse.shape == (0,) and out.shape == q.shape and module.calls[-1].asked in (None, False)


def test_nothing_to_compute(card, install):
    module = install("3")
    q = torch.zeros(2, 0, 2, 64, dtype=HALF)
    out, lse = run_flash(q, q, q, grid=[0, 0, 0], return_lse=True)
    assert out.shape == q.shape and lse.shape == (2, 2, 0) and not module.calls


def test_the_inputs_gradients_are_this_packages_own(card, install):
    install("4")  # asserts that it is called without a graph
    q, k, v = (x.clone().requires_grad_() for x in packed())
    out, _ = run_flash(q, k, v, return_lse=True)
    assert not out.requires_grad


def misaligned():
    q, k, v = packed(head_dim=64)
    flat = torch.zeros(q.numel() + 1, dtype=HALF)
    return flat[1:].view(q.shape), k.contiguous(), v.contiguous()


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (packed, {"window": [1, 1, 3]}, "impl 'flash' is dense; use impl='triton'"),
        (packed, {"causal_time": True, "grid": [24, 1, 1]}, "impl 'flash' is dense"),
        (packed, {"kv_lens": torch.tensor([1, 1]), "text_len": 2, "grid": [1, 1, 22]}, "takes no `kv_lens`"),
        (packed, {"precision": "int8"}, "precision 'int8' is not built in impl 'flash'"),
        (lambda: packed(dtype=torch.float32), {}, "bf16 and fp16; got torch.float32"),
        (lambda: packed(head_dim=20), {}, "FlashAttention-3 has no head_dim 20 on sm_90"),
        (lambda: packed(head_dim=264), {}, "FlashAttention-3 has no head_dim 264"),
        (misaligned, {}, "needs `q` and its strides .* on multiples of 16 bytes"),
        (lambda: [x[..., :60][..., :56] for x in packed(head_dim=60)], {}, "needs `q` and its strides"),
    ],
)
def test_what_it_cannot_do_is_refused_before_any_work(card, install, tensors, options, message):
    module = install("3")
    with pytest.raises(UnsupportedError, match=message):
        run_flash(*tensors(), **options)
    assert not module.calls


def test_offsets_past_32_bits_are_refused_where_nobody_knows(card, install):
    install("4")
    huge = torch.empty((2, 2**20, 24, 128), dtype=HALF, device="meta").as_strided(
        (2, 2**20, 24, 128), (2**31, 3072, 128, 1)
    )
    with pytest.raises(UnsupportedError, match="not known to go past 2³¹"):
        flash._check_layout(flash.FLASH4, "q", SimpleNamespace(
            stride=huge.stride, shape=huge.shape, element_size=lambda: 2, data_ptr=lambda: 0
        ))  # fmt: skip


def test_the_newest_that_serves_the_card(card, install):
    install("3")
    assert flash.library_for(CARD, HALF, 128) is flash.FLASH3
    install("4")
    assert flash.library_for(CARD, HALF, 256) is flash.FLASH4
    card("sm_100")
    assert flash.library_for(CARD, HALF, 256) is flash.FLASH4
    with pytest.raises(UnsupportedError, match="no head_dim 192 on sm_100"):
        flash.library_for(CARD, HALF, 192)
    card("sm_80")
    with pytest.raises(UnsupportedError, match=r"FlashAttention-4 \(sm_90, sm_100, sm_103\).*none of them for sm_80"):
        flash.library_for(CARD, HALF, 128)


def test_what_is_missing_or_broken_is_said_with_the_remedy(card, monkeypatch):
    with pytest.raises(UnsupportedError, match="FlashAttention-4 not installed: pip install.*FlashAttention-3 not"):
        run_flash(*packed())
    broken = importlib.util.spec_from_loader("flash_attn_interface", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: broken if name == broken.name else None)
    monkeypatch.setattr(flash, "_version", lambda distribution: "3.0.0" if "3" in distribution else None)
    flash.forget()
    with pytest.raises(UnsupportedError, match="FlashAttention-3 flash_attn_interface cannot be imported"):
        run_flash(*packed())


def test_explicit_never_falls_back(card):
    q, k, v = packed(dtype=torch.float32)
    with pytest.raises(DeviceError, match="impl 'flash' needs CUDA tensors; got cpu"):
        pv.spacetime_attention(q, k, v, grid=(1, 1, 24), impl="flash")
    with pytest.raises(UnsupportedError, match="no implementation 'flash'"):
        dispatch.load(OPS["rms_norm"], "flash")
    with pytest.raises(ValueOptionError, match="sdpa, flash; got 'flash3'"):
        pv.spacetime_attention(q, k, v, grid=(1, 1, 24), impl="flash3")
    with pytest.raises(DeviceError):
        kernels.check(("spacetime_attention",), "dense", "flash", torch.device("cpu"))


# The check on the card ------------------------------------------------------------------------------------------


def test_auto_trusts_it_only_after_the_check_on_this_card(card, install, monkeypatch):
    module, seen = install("3"), []
    real = compare.check_op

    def check(op, impl, device, dtype, **options):
        seen.append((impl, dtype, options))
        return real(op, impl, "cpu", dtype, **options)

    monkeypatch.setattr(compare, "check_op", check)
    monkeypatch.setattr(dispatch, "_capturing", lambda device: False)
    assert dispatch.trusted(OP, "flash", CARD, HALF, 64) and dispatch.trusted(OP, "flash", CARD, HALF, 64)
    assert seen == [("flash", HALF, {"head_dim": 64, "partial": True})]
    dispatch.forget()
    assert dispatch.trusted(OP, "flash", CARD, HALF, 64) and len(seen) == 1  # kept for the next process
    # A wrong lse is as bad as a wrong output: it is what gradients and merges stand on.
    module.change = lambda out, lse: (out, lse / math.log(2))
    with pytest.warns(RuntimeWarning, match="impl 'flash' failed its self-check on sm_90"):
        assert not dispatch.trusted(OP, "flash", CARD, HALF, 128)
    # Another release is another kernel.
    monkeypatch.setattr(flash, "_version", lambda distribution: "3.0.1")
    flash.forget()
    dispatch.forget()
    with pytest.warns(RuntimeWarning, match="failed its self-check"):
        assert not dispatch.trusted(OP, "flash", CARD, HALF, 64)
    assert verdicts.head_dims_known(OP, "flash", "sm_90", HALF) == {64: False}


def test_no_check_and_no_warning_where_it_cannot_serve(card, install, monkeypatch, recwarn):
    monkeypatch.setattr(dispatch, "_capturing", lambda device: True)
    for of, why in (((HALF, 128), "not installed"), ((torch.float32, 128), "takes bf16 and fp16")):
        with pytest.raises(UnsupportedError, match=why):
            dispatch.trusted(OP, "flash", CARD, *of)
    install("3")
    with pytest.raises(UnsupportedError, match="no head_dim 20"):
        dispatch.trusted(OP, "flash", CARD, HALF, 20)
    assert not recwarn.list
    with pytest.warns(RuntimeWarning, match="impl 'flash' is unverified on sm_90.*CUDA graph capture"):
        assert not dispatch.trusted(OP, "flash", CARD, HALF, 128)


def test_checks_up_front_go_on_to_the_next(card, monkeypatch):
    rows = upfront.check(["spacetime_attention"], CARD, HALF, 128)
    assert [(row.impl, row.trusted) for row in rows] == [("flash", False), ("sdpa", True)]
    assert "not installed" in rows[0].why


def test_canaries_take_it_as_a_library_and_the_record_that_ships_does_not_hold_it(card, install, tmp_path):
    install("3")
    row = verify.canary(OP, "flash", torch.device("cpu"), HALF, 64)
    assert row.ok and row.digest == flash.digest()
    where = {
        "device": "cuda", "arch": "sm_90", "gpu": "NVIDIA H100", "driver": "580.1", "torch": "2.13.0",
        "triton": "3.7.1", "revision": "abc1234", "date": "2026-01-02",
    }  # fmt: skip
    kept = {"op": "spacetime_attention", "impl": "triton", "dtype": "bfloat16", "head_dim": 64, "ok": True}
    rows = [{**row.as_dict(), "digest": "of another machine"}, kept | {"digest": verdicts.digest(OP, "triton")}]
    assert verdicts.commit(tmp_path / "record.json", rows, where) == 1
    assert list(json.loads((tmp_path / "record.json").read_text())["sm_90"]) == [
        "spacetime_attention triton bfloat16 64"
    ]


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
    libraries.dense_sdpa(q, k, v, 0.25)
    assert cudnn.calls == 1
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
    assert dispatch.order(OP, torch.device("cpu"), HALF, 128) == ("sdpa", "reference")
    measured = libraries.Measured("triton", "benchmarks/results/x.json at abc1234")
    monkeypatch.setitem(libraries.MEASURED, ("sm_90", "bfloat16", 128), measured)
    assert dispatch.order(OP, CARD, HALF, 128) == ("triton", "flash", "sdpa", "reference")
    assert (
        dispatch.order(OP, CARD, HALF, 64) == dispatch.order(OP, CARD, torch.float16, 128) == dispatch.order(OP, CARD)
    )
    assert dispatch.order(OPS["spacetime_attention_backward"], CARD, HALF, 128)[0] != "flash"


class OnCard:
    """A walk of ``auto`` in CUDA's order, on CPU tensors."""

    def __init__(self, monkeypatch):
        import dataclasses

        self.op = dataclasses.replace(OP, auto={"cpu": ("flash", "sdpa", "reference")})
        monkeypatch.setattr(dispatch, "trusted", self.trusted)
        self.trust = True

    def trusted(self, op, impl, device, dtype, head_dim):
        dispatch._require(impl, device, dtype, head_dim)
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
    assert dispatch.explain(OP, torch.device("cpu"))[0] == ("sdpa", True, "PyTorch's scaled_dot_product_attention")
