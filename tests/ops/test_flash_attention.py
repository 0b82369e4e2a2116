"""``impl="flash"``: an installed FlashAttention by stand-ins; what it takes, what it refuses, the check on the card."""

import importlib.util
import json
import math
from types import SimpleNamespace

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch, verdicts, verify
from pyvideo_kernels.errors import DeviceError, UnsupportedError, ValueOptionError
from pyvideo_kernels.integrations import upfront
from pyvideo_kernels.ops import flash_attention as flash
from pyvideo_kernels.reference import spacetime_attention as oracle
from pyvideo_kernels.sampler import kernels
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing import compare

from .library_standins import CARD, HALF, OP, arguments, misaligned, packed, run_flash

pytestmark = pytest.mark.usefixtures("no_library")

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


def test_the_one_that_was_written_for_the_card(card, install):
    install("4")
    assert flash.library_for(CARD, HALF, 256) is flash.FLASH4
    install("3")
    assert flash.library_for(CARD, HALF, 256) is flash.FLASH3
    card("sm_100")
    assert flash.library_for(CARD, HALF, 256) is flash.FLASH4
    with pytest.raises(UnsupportedError, match="no head_dim 192 on sm_100"):
        flash.library_for(CARD, HALF, 192)
    card("sm_80")
    with pytest.raises(UnsupportedError, match=r"FlashAttention-4 \(sm_90, sm_100, sm_103\).*none of them for sm_80"):
        flash.library_for(CARD, HALF, 128)


def test_what_is_missing_or_broken_is_said_with_the_remedy(card, monkeypatch):
    with pytest.raises(UnsupportedError, match="FlashAttention-3 not installed: pip install.*FlashAttention-4 not"):
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
    with pytest.raises(ValueOptionError, match="sdpa, flash, cudnn, cublas; got 'flash3'"):
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
