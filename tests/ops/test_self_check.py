"""The self-check sees what it is there to see; what is kept of it; calls recorded and made again."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from pyvideo_kernels import dispatch, verdicts, verify
from pyvideo_kernels.errors import UnsupportedError, ValueOptionError
from pyvideo_kernels.ops.rms_norm import rms_norm as public_rms_norm
from pyvideo_kernels.recording import Call
from pyvideo_kernels.reference import causal_conv3d as conv
from pyvideo_kernels.reference import rms_norm as norm
from pyvideo_kernels.reference import spacetime_attention as attention
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing import compare, conditions
from pyvideo_kernels.testing.compare import Mismatch, check_op

CARD = torch.device("cuda", 0)
WHERE = {
    "device": "cuda", "arch": "sm_90", "gpu": "NVIDIA H100", "driver": "580.1", "torch": "2.13.0",
    "triton": verdicts.triton_version(), "revision": "abc1234", "date": "2026-01-02",
}  # fmt: skip


# Wrong kernels --------------------------------------------------------------------------------------------------


def off_by_one_in_the_last_column(x, weight, eps):
    out = norm.rms_norm(x, weight, eps)
    out[..., -1] += 1
    return out


def leaves_the_tail_unwritten(x, weight, eps):
    whole, out = norm.rms_norm(x, weight, eps), torch.empty(x.shape, dtype=x.dtype)
    out[..., :-1] = whole[..., :-1]
    return out


def reads_past_the_edge(x, weight, eps):
    # A tile of 128 columns, of which those past the edge are multiplied by zero.
    if x.dim() != 2:
        return norm.rms_norm(x, weight, eps)
    tile = x.as_strided((x.shape[0], 128), x.stride())
    rest = (tile * torch.where(torch.arange(128) < x.shape[-1], 0.0, 0.0)).sum(-1, keepdim=True)
    return norm.rms_norm(x, weight, eps) + rest.to(x.dtype)


def writes_past_the_edge(x, weight, eps):
    x.as_strided((1,), (1,), x.storage_offset() + conditions.extent(x)).zero_()
    return norm.rms_norm(x, weight, eps)


def writes_over_its_input(x, weight, eps):
    out = norm.rms_norm(x, weight, eps)
    x.mul_(1.5)
    return out


WRONG = [
    (off_by_one_in_the_last_column, "max error"),
    (leaves_the_tail_unwritten, "non-finite"),
    (reads_past_the_edge, "non-finite"),
    (writes_past_the_edge, "wrote over `x`: 1 elements past"),
    (writes_over_its_input, "wrote over `x`: an element of it"),
]


def wrong_at_128(q, *rest):
    out, lse = attention.spacetime_attention(q, *rest)
    return (out + 0.1 if q.shape[-1] == 128 else out), lse


@pytest.mark.parametrize(("kernel", "message"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_each_way_to_be_wrong_is_seen(kernel, message):
    with pytest.raises(Mismatch, match=message):
        check_op(OPS["rms_norm"], "reference", "cpu", torch.float32, kernel)


def test_a_right_kernel_passes_in_place_and_out_of_place():
    for name in ("rms_norm", "qk_norm_rope", "qk_norm_rope_", "unipc_step", "rms_norm_backward"):
        assert check_op(OPS[name], "reference", "cpu", torch.float32) > 0


def test_a_kernel_that_is_wrong_at_one_head_dim_is_wrong_there_alone():
    op = OPS["spacetime_attention"]
    assert check_op(op, "reference", "cpu", torch.float32, wrong_at_128, head_dim=64)
    with pytest.raises(Mismatch):
        check_op(op, "reference", "cpu", torch.float32, wrong_at_128, head_dim=128)


# Conditions -----------------------------------------------------------------------------------------------------


def test_poison_is_lifted_again_whatever_happens():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    compiler = torch._inductor.config.deterministic
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with pytest.raises(KeyError), conditions.poisoned():
            for fresh in (torch.empty(3), torch.empty_strided((2, 2), (4, 1)), torch.ones(2).new_empty(5)):
                assert fresh.isnan().all()
            assert torch.empty(2, dtype=torch.int32).eq(2**31 - 1).all()
            assert torch._inductor.config.deterministic is compiler, "the compiler is nobody's business here"
            raise KeyError
        assert torch.utils.deterministic.fill_uninitialized_memory is False
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert before == (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    )  # fmt: skip


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, 5)[:, 1:, ::2],
        torch.randn(4, 6).t(),
        torch.randn(3, 1).expand(3, 7),
        torch.randn(0, 4),
        torch.tensor(2.0),
        torch.arange(7)[3:],
        torch.randn(11).half()[5:],
    ],
)
def test_a_surrounded_tensor_is_the_same_tensor_in_poison(x):
    inside = conditions.Surrounded(x)
    y = inside.tensor
    assert torch.equal(x, y) and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype
    assert (y.data_ptr() - y.untyped_storage().data_ptr()) % 64 == x.storage_offset() * x.element_size() % 64
    assert not inside.damage()
    around = y.as_strided((1,), (1,), y.storage_offset() - 1)
    assert around.isnan().all() if x.is_floating_point() else around.item() == torch.iinfo(x.dtype).max
    around.zero_()
    assert "1 elements before" in inside.damage() and "1 elements before" in inside.damage(written=True)


def test_what_an_in_place_op_writes_is_no_damage():
    inside = conditions.Surrounded(torch.randn(3, 8)[:, ::2])
    inside.tensor.zero_()
    assert inside.damage() and not inside.damage(written=True)
    inside.tensor.as_strided((1,), (1,), inside.tensor.storage_offset() + 1).zero_()
    assert inside.damage(written=True)


def test_products_are_exact_in_a_check_and_the_users_afterwards():
    b = torch.backends
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        state = (b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, b.mkldnn.matmul.fp32_precision)
        with conditions.products():
            assert {b.cuda.matmul.fp32_precision, b.cudnn.conv.fp32_precision, b.mkldnn.matmul.fp32_precision} == {
                "ieee"
            }
        with pytest.raises(KeyError), conditions.products(conv="tf32"):
            assert b.cudnn.conv.fp32_precision == "tf32"
            raise KeyError
        assert state == (b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, b.mkldnn.matmul.fp32_precision)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_only_the_convolutions_follow_the_tf32_switch_and_both_positions_are_checked():
    both = {
        name for name, op in OPS.items() if compare.product_modes(op, "triton", CARD, torch.float32) == ("ieee", "tf32")
    }
    assert both == {"causal_conv3d", "decode_head_", "upsample_conv2d"}
    op = OPS["causal_conv3d"]
    for impl, device, dtype in (
        ("triton", torch.device("cpu"), torch.float32),
        ("triton", CARD, torch.bfloat16),
        ("cpu", torch.device("cpu"), torch.float32),
    ):
        assert compare.product_modes(op, impl, device, dtype) == ("ieee",)


def test_a_tf32_product_is_right_where_tf32_is_allowed_and_wrong_where_not():
    op = OPS["causal_conv3d"]
    args = op.bind(**next(compare.samples(op, torch.float32)))

    def tf32(x, weight, bias, cache, *rest):
        x, weight, cache = (conditions.truncate_tf32(t) for t in (x, weight, cache))
        return conv.causal_conv3d(x, weight, bias, cache, *rest)

    compare.check_call(op, "triton", args, "tf32", tf32, "tf32")
    for any_order in (False, True):
        with pytest.raises(Mismatch):
            compare.check_call(op, "triton", args, "ieee", tf32, "ieee", any_order=any_order)

    def careless(*call):
        y, z = tf32(*call)
        return y * (1 + 2**-8), z

    with pytest.raises(Mismatch):
        compare.check_call(op, "triton", args, "tf32", careless, "tf32")


def test_any_order_of_a_long_sum_is_granted_to_real_calls_and_nothing_more():
    """A thousand values of one sign, added one by one: several times the error of a blocked sum, and not wrong."""
    op = OPS["patch_embed3d"]
    g = torch.Generator().manual_seed(0)
    video = torch.rand(1, 16, 8, 8, 8, generator=g) + 1
    weight = torch.rand(4, 16, 4, 8, 8, generator=g) + 1
    args = (video, weight, None, [4, 8, 8])

    def one_by_one(video, weight, bias, patch):
        from pyvideo_kernels.reference.patch_embed3d import patchify

        columns, out = patchify(video, patch), torch.zeros(1, 2, 4)
        for i in range(columns.shape[-1]):
            out = out + columns[..., i : i + 1] * weight.flatten(1)[:, i]
        return out

    with pytest.raises(Mismatch):
        compare.check_call(op, "reference", args, "sum", one_by_one)
    compare.check_call(op, "reference", args, "sum", one_by_one, any_order=True)
    with pytest.raises(Mismatch):
        compare.check_call(op, "reference", args, "sum", lambda *a: one_by_one(*a) * (1 + 2**-13), any_order=True)


def test_scores_added_in_another_order_are_granted_to_an_attention_and_ten_times_that_is_not():
    op = OPS["spacetime_attention"]
    cases = [case for case in compare.samples(op, torch.float16, head_dim=128) if case["return_lse"]]
    for kwargs in cases:
        args = op.bind(**kwargs)
        allowed = attention.summed(*compare.to_float64(args))[1]

        def off_by(share, allowed=allowed):
            def call(*given):
                out, lse = attention.spacetime_attention(*given)
                return out, lse + (share * 2.0**-24 * allowed).to(lse.dtype)

            return call

        compare.check_call(op, "reference", args, "lse", off_by(0.8), any_order=True)
        with pytest.raises(Mismatch, match="output 1"):
            compare.check_call(op, "reference", args, "lse", off_by(10), any_order=True)


def test_a_model_is_judged_with_the_products_it_makes(monkeypatch):
    """A canary is about both positions of the TF32 switch, a model's call about the one that is set."""
    op = OPS["causal_conv3d"]
    modes = []
    monkeypatch.setattr(verify, "product_modes", lambda *_: ("ieee", "tf32"))
    monkeypatch.setattr(verify, "check_call", lambda *_, mode, **__: modes.append(mode))
    call = _call(op.name, next(compare.samples(op, torch.float32)))
    for allowed in (True, False):
        with conditions.products(conv="tf32" if allowed else "ieee"):
            verify.verify_call(call, "cpu")
    assert modes == ["tf32", "ieee"]


# What auto makes of it ------------------------------------------------------------------------------------------


class OnCard:
    """A tensor for dispatch's eyes: of a card that is not here."""

    device, dtype = CARD, torch.float32


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card with empty records whose kernels are Python functions on the CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verdicts, "VERIFIED", tmp_path / "verified.json")
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "_capturing", lambda device: False)
    checked = []

    def check(op, impl, device, dtype, *, head_dim=None, inner=compare.check_op):
        checked.append((op.name, head_dim))
        return inner(op, impl, "cpu", dtype, head_dim=head_dim)

    monkeypatch.setattr(compare, "check_op", check)
    return checked


def _auto(name, args):
    before = dispatch.calls()
    out = dispatch._run(OPS[name], list(args), "auto", OnCard)
    (ran,) = [impl for (op, impl), n in dispatch.calls().items() if op == name and n > before.get((op, impl), 0)]
    return out, ran


@pytest.mark.parametrize("kernel", [kernel for kernel, _ in WRONG], ids=lambda kernel: kernel.__name__)
def test_auto_warns_of_a_wrong_kernel_and_runs_the_next(card, monkeypatch, kernel):
    monkeypatch.setitem(dispatch._functions, ("rms_norm", "triton"), kernel)
    args = (torch.randn(3, 40), torch.randn(40), 1e-6)
    with pytest.warns(RuntimeWarning, match="rms_norm: impl 'triton' failed its self-check on sm_90.*next impl"):
        out, ran = _auto("rms_norm", args)
    assert ran == "reference" and torch.equal(out, norm.rms_norm(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _auto("rms_norm", args)[1] == "reference" and len(card) == 1


def test_auto_runs_a_kernel_that_passed_and_checks_it_no_more(card, monkeypatch):
    monkeypatch.setitem(dispatch._functions, ("rms_norm", "triton"), norm.rms_norm)
    args = (torch.randn(3, 40), torch.randn(40), 1e-6)
    assert [_auto("rms_norm", args)[1] for _ in range(3)] == ["triton"] * 3 and len(card) == 1
    dispatch.forget()
    assert _auto("rms_norm", args)[1] == "triton" and len(card) == 1


def test_auto_knows_a_kernel_that_is_wrong_at_head_dim_128(card, monkeypatch):
    op = OPS["spacetime_attention"]
    monkeypatch.setitem(dispatch._functions, (op.name, "triton"), wrong_at_128)

    def call(head_dim):
        q = torch.randn(1, 8, 1, head_dim)
        # With lse, which the library's attention refuses.
        return _auto(op.name, (q, q, q, (2, 2, 2), None, (1, 1, 1), False, 0, "suffix", None, 0.1, True, "native"))[1]

    assert call(64) == "triton"
    with pytest.warns(RuntimeWarning, match="spacetime_attention"):
        assert call(128) == "reference"
    assert call(64) == "triton" and card == [(op.name, 64), (op.name, 128)]


def test_a_compiled_graph_resolves_the_op_when_it_runs_not_while_it_is_traced(monkeypatch):
    seen = []
    inner = dispatch._run

    def run(op, inputs, impl, tensor):
        seen.append((torch.compiler.is_compiling(), type(tensor)))
        return inner(op, inputs, impl, tensor)

    monkeypatch.setattr(dispatch, "_run", run)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: public_rms_norm(x * 2), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 40)
    assert torch.equal(compiled(x), public_rms_norm(x * 2)) and torch.equal(compiled(x), public_rms_norm(x * 2))
    assert seen and all(entry == (False, torch.Tensor) for entry in seen)


# Records --------------------------------------------------------------------------------------------------------


def test_an_ops_digest_is_of_its_own_sources():
    names = {
        name: {f"{path.parent.name}/{path.stem}" for path in verdicts.sources(f"pyvideo_kernels.kernels.{name}")}
        for name in ("rms_norm", "qk_norm_rope", "spacetime_attention", "causal_conv3d")
    }
    assert {"kernels/rms_norm", "kernels/launch", "configs/row", "configs/__init__"} <= names["rms_norm"]
    assert {"kernels/qk_norm_rope", "kernels/qk_norm_rope_backward", "kernels/pairs"} <= names["qk_norm_rope"]
    assert {"kernels/spacetime_attention", "configs/spacetime_attention"} <= names["spacetime_attention"]
    assert "ops/causal_conv3d" in names["causal_conv3d"], "the weights are packed there"
    own = [f"kernels/{name}" for name in names]
    for name, files in names.items():
        assert [other for other in own if other in files] == [f"kernels/{name}"]


def test_imports_are_followed_wherever_they_stand(tmp_path):
    path = tmp_path / "some_kernel.py"
    path.write_text(
        "import torch\nimport pyvideo_kernels.configs.row\nfrom . import launch\nfrom .pairs import load\n"
        "def late():\n    from pyvideo_kernels.configs import elementwise as configs\n"
        "    from pyvideo_kernels.errors import DTypeError\n"
    )
    found = set(verdicts._imports("pyvideo_kernels.kernels.some_kernel", path))
    assert {"pyvideo_kernels.configs.row", "pyvideo_kernels.kernels.launch", "pyvideo_kernels.kernels.pairs",
            "pyvideo_kernels.configs.elementwise"} <= found  # fmt: skip
    assert not any(name.startswith(("torch", "pyvideo_kernels.errors")) for name in found)


def test_tuned_tiles_are_part_of_the_digest(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(verdicts, "__file__", str(tmp_path / "verdicts.py"))
    row = {"tuned": True, "family": "row", "key": {"op": "rms_norm"}, "config": {"rows": 1}}
    other = {"tuned": True, "family": "row", "key": {"op": "layer_norm_modulate"}, "config": {"rows": 2}}
    rule = row | {"tuned": False}
    (tmp_path / "configs" / "h100.json").write_text(json.dumps({"rows": [row, other, rule]}))
    (tmp_path / "configs" / "broken.json").write_text("{")
    assert [json.loads(part) for part in verdicts._tuned("rms_norm_backward")] == [["h100.json", [row]]]
    assert not list(verdicts._tuned("causal_conv3d"))


def _row(name="rms_norm", ok=True, **rest):
    op = OPS[name]
    return {"op": name, "impl": "triton", "dtype": "bfloat16", "head_dim": None, "ok": ok,
            "digest": verdicts.digest(op, "triton"), **rest}  # fmt: skip


def _trusted(name="rms_norm", head_dim=None):
    return dispatch.trusted(OPS[name], "triton", CARD, torch.bfloat16, head_dim)


def test_a_committed_record_is_trusted_without_a_check(card, monkeypatch):
    rows = [_row(), _row("spacetime_attention", head_dim=128)]
    assert verdicts.commit(verdicts.VERIFIED, rows, WHERE) == 2
    assert _trusted() and _trusted("spacetime_attention", 128) and not card
    assert dispatch.explain(OPS["rms_norm"], CARD)[0] == ("triton", True, "verified on NVIDIA H100, 2026-01-02")
    monkeypatch.setattr(compare, "check_op", lambda *_, **__: (_ for _ in ()).throw(Mismatch("asked")))
    for name, head_dim in (("spacetime_attention", 64), ("gate_residual", None)):
        with pytest.warns(RuntimeWarning, match="asked"):
            assert not _trusted(name, head_dim)


@pytest.mark.parametrize("change", [{"digest": "0" * 12}, {"triton": "0.1"}, {"gpu": ""}, {"driver": None}])
def test_a_record_of_other_code_or_another_compiler_or_no_card_is_not_trusted(card, monkeypatch, change):
    verdicts.commit(verdicts.VERIFIED, [_row()], WHERE)
    record = json.loads(verdicts.VERIFIED.read_text())
    record["sm_90"]["rms_norm triton bfloat16"].update(change)
    verdicts.VERIFIED.write_text(json.dumps(record))
    verdicts._committed.cache_clear()
    assert verdicts.committed(OPS["rms_norm"], "triton", "sm_90", torch.bfloat16) is None
    monkeypatch.setitem(dispatch._functions, ("rms_norm", "triton"), norm.rms_norm)
    assert _trusted() and card == [("rms_norm", None)]


def test_what_failed_on_this_card_outweighs_the_committed_record(card):
    verdicts.commit(verdicts.VERIFIED, [_row()], WHERE)
    verdicts.remember(verdicts.key_of(OPS["rms_norm"], "triton", "sm_90", torch.bfloat16), False)
    assert not _trusted() and not card


def test_commit_merges_and_takes_out_what_failed(card):
    path = verdicts.VERIFIED
    verdicts.commit(path, [_row(), _row("gate_residual")], WHERE)
    verdicts.commit(path, [_row()], WHERE | {"arch": "sm_80", "gpu": "NVIDIA A100"})
    assert verdicts.commit(path, [_row(ok=False), _row("unipc_step"), _row(impl="cpu", digest="")], WHERE) == 2
    record = json.loads(path.read_text())
    assert set(record["sm_90"]) == {"gate_residual triton bfloat16", "unipc_step triton bfloat16"}
    assert set(record["sm_80"]) == {"rms_norm triton bfloat16"}


@pytest.mark.parametrize(
    ("rows", "where", "message"),
    [
        ([_row()], WHERE | {"device": "cpu"}, "on a GPU"),
        ([_row()], WHERE | {"driver": None}, "lacks driver"),
        ([_row()], {}, "lacks arch, gpu"),
        ([_row(digest="0" * 12)], WHERE, "other sources"),
        ([_row() | {"op": "no_such_op"}], WHERE, "no_such_op"),
    ],
)
def test_commit_refuses_what_does_not_say_where_it_ran(card, rows, where, message):
    with pytest.raises(ValueOptionError, match=message):
        verdicts.commit(verdicts.VERIFIED, rows, where)
    assert not verdicts.VERIFIED.exists()


def test_the_shipped_record_is_well_formed():
    path = Path(verdicts.__file__).with_name("verified.json")
    record = json.loads(path.read_text())
    for arch, entries in record.items():
        assert arch.startswith(("sm_", "gfx"))
        for name, entry in entries.items():
            op, impl, *_ = name.split()
            assert impl in OPS[op].impls
            assert all(entry.get(fact) for fact in ("digest", "triton", "torch", "gpu", "driver", "revision", "date"))


# Recording ------------------------------------------------------------------------------------------------------


def test_a_recorder_keeps_one_call_of_each_kind_as_it_was():
    wide = torch.randn(4, 40)
    with dispatch.recording() as recorder:
        for eps in (1e-6, 1e-5):
            public_rms_norm(wide[:, :24], eps=eps)
        public_rms_norm(wide[:, 2:26])
        q = torch.randn(1, 2, 2, 8)
        before = q.clone()
        torch.ops.pyvideo.qk_norm_rope_(
            q, q.clone(), None, None, None, None, None, None, "per_head", "rms", "interleaved", 0, -1, 1e-6, "auto"
        )
    public_rms_norm(wide)
    assert [(call.op.name, call.count, call.head_dim) for call in recorder.calls] == [
        ("rms_norm", 2, None), ("rms_norm", 1, None), ("qk_norm_rope_", 1, 8),
    ]  # fmt: skip
    first, shifted, in_place = recorder.calls
    assert first.args[0].stride() == (40, 1) and torch.equal(first.args[0], wide[:, :24])
    assert shifted.args[0].storage_offset() == 2, "alignment is part of a kind, and kept"
    assert torch.equal(in_place.args[0], before), "as it was before the op wrote over it"
    assert str(first).startswith("x 4×24")


def test_a_recorder_stops_at_its_limit_and_verification_says_so():
    with dispatch.recording(limit=1000) as recorder:
        public_rms_norm(torch.randn(2, 40))
        public_rms_norm(torch.randn(20, 40))
    small, large = recorder.calls
    assert small.args is not None and large.args is None
    row = verify.verify_call(large, "reference")
    assert row.failed and "memory" in row.error


# Verification of calls ------------------------------------------------------------------------------------------


def _call(name, kwargs, head_dim=None):
    op = OPS[name]
    args = op.bind(**kwargs)
    first = next(a for a in args if isinstance(a, torch.Tensor))
    return Call(op, args, torch.device("cpu"), first.dtype, head_dim, "somewhere", 3)


def test_calls_are_judged_by_canary_and_by_their_own_arguments(monkeypatch):
    kwargs = next(compare.samples(OPS["rms_norm"], torch.float32))
    monkeypatch.setitem(dispatch._functions, ("rms_norm", "cpu"), norm.rms_norm)
    rows = verify.verify_calls([_call("rms_norm", kwargs), _call("rms_norm", kwargs)])
    assert [(row.check, row.ok) for row in rows] == [("canary", True), ("call", True), ("call", True)]

    def wrong_here(x, weight, eps):  # the canary has no such width
        return norm.rms_norm(x, weight, eps) * (1.5 if x.shape[-1] == 51 else 1.0)

    monkeypatch.setitem(dispatch._functions, ("rms_norm", "cpu"), wrong_here)
    own = {"x": torch.randn(2, 51), "weight": None, "eps": 1e-6}
    rows = verify.verify_calls([_call("rms_norm", own)])
    assert [(row.check, row.ok) for row in rows] == [("canary", True), ("call", False)]
    monkeypatch.setitem(dispatch._functions, ("rms_norm", "cpu"), off_by_one_in_the_last_column)
    rows = verify.verify_calls([_call("rms_norm", own)])
    assert [(row.impl, row.check, row.ok) for row in rows] == [("cpu", "canary", False), ("reference", "call", True)]


def test_a_kernel_that_raises_is_wrong_and_one_that_refuses_is_not(monkeypatch):
    def raises(*_):
        raise RuntimeError("illegal memory access")

    def refuses(*_):
        raise UnsupportedError("not built")

    call = _call("rms_norm", next(compare.samples(OPS["rms_norm"], torch.float32)))
    for kernel, states in ((raises, [False, True]), (refuses, [None, None, True])):
        monkeypatch.setitem(dispatch._functions, ("rms_norm", "cpu"), kernel)
        assert [row.ok for row in verify.verify_calls([call])] == states


def test_arguments_that_are_no_numbers_are_not_held_against_a_kernel():
    kwargs = next(compare.samples(OPS["rms_norm"], torch.float32))
    kwargs["x"][0, 0, 0] = torch.inf
    assert [(row.check, row.ok) for row in verify.verify_calls([_call("rms_norm", kwargs)])] == [
        ("canary", True), ("call", None),
    ]  # fmt: skip


def test_a_long_attention_is_judged_on_some_of_its_rows(monkeypatch):
    op = OPS["spacetime_attention"]
    monkeypatch.setattr(verify, "_MAX_SCORES", 1000)
    monkeypatch.setattr(verify, "_ROWS", 7)
    cases = [
        case for case in compare.samples(op, torch.float32)
        if case["window"] is None and not case["causal_time"] and case["grid"] != (0, 0, 0)
    ]  # fmt: skip
    for case in cases:
        rows = verify._sampled_rows(op, op.bind(**case))
        s = case["q"].shape[1]
        assert not rows or (rows[0] == 0 and rows[-1] == s - 1 and len(rows) <= 7)
        at = torch.arange(s)
        whole = attention.spacetime_attention(*op.bind(**case))
        for expected, got in zip(whole, verify.attention_rows(*op.bind(**case), rows=at)):
            torch.testing.assert_close(got, expected)
    long = _call(op.name, cases[1], 40)
    assert verify.verify_call(long, "sdpa").ok is None  # it gives no lse
    no_lse = _call(op.name, cases[1] | {"return_lse": False}, 40)
    assert verify.verify_call(no_lse, "sdpa").ok

    def wrong_in_the_last_row(q, *rest):
        out, lse = attention.spacetime_attention(q, *rest)
        out[:, -1] += 0.1
        return out, lse

    monkeypatch.setitem(dispatch._functions, (op.name, "sdpa"), wrong_in_the_last_row)
    row = verify.verify_call(no_lse, "sdpa")
    assert row.failed and "error" in row.error


def test_the_command_fails_and_names_the_op(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(dispatch._functions, ("rms_norm", "cpu"), norm.rms_norm)
    assert verify.main(["--device", "cpu", "--op", "rms_norm", "--json", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["kind"] == "correctness" and len(written["rows"]) == len(verify.DTYPES)
    monkeypatch.setitem(dispatch._functions, ("rms_norm", "cpu"), leaves_the_tail_unwritten)
    assert verify.main(["--device", "cpu", "--op", "rms_norm"]) == 1
    assert "FAILED  rms_norm cpu float32" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # before any check
        verify.main(["--device", "cpu", "--op", "rms_norm", "--commit"])
    assert "--commit: verified.json is about GPUs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        verify.main(["--device", "abacus"])
    assert "--device must be" in capsys.readouterr().err
