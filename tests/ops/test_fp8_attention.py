"""What fp8_attention does not share with int8_attention, whose kernels it runs: see test_int8_attention.py."""

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.configs import forced_arch
from pyvideo_kernels.errors import DTypeError, UnsupportedError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, check_op, samples

from . import helpers
from .test_int8_attention import _drawn, _qkv, _relative

NAME = "fp8_attention"
OP = OPS[NAME]


def _attend(q, k, v, impl="triton", **options):
    return pv.spacetime_attention(q, k, v, **options, precision="fp8", impl=impl)


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


@pytest.mark.skipif(helpers.GPU, reason="on a card the samples run the variant of that card")
def test_descriptor_variant_matches_float64():
    with forced_arch("sm_90"):
        assert check_op(OP, "triton", "cpu", torch.float16) == 8


def test_contract():
    kwargs = list(samples(OP, torch.float32))[1]
    # Without test_schema: it compares the arguments before and after, which torch cannot do in fp8.
    torch.library.opcheck(
        getattr(torch.ops.pyvideo, NAME), (*OP.bind(**kwargs), "reference"),
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


# Relative error of the output (RMS) and largest of the LSE; docs/ops/spacetime_attention.md has those at 1,000 keys.
_LEVELS = {
    "normal": (0.045, 0.03), "offset": (0.045, 0.03), "constant": (0.045, 0.03), "outlier": (0.03, 0.5),
    "wide": (0.15, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(_LEVELS))
def test_error_levels_against_dense_float64(kind):
    q, k, v = _drawn(kind)
    scores = torch.einsum("bqhd,bkd->bhqk", q.double(), k[:, :, 0].double()) * 64**-0.5
    exact = torch.einsum("bhqk,bkd->bqhd", scores.softmax(-1), v[:, :, 0].double())
    out, lse = _attend(q, k, v, grid=(2, 5, 13), return_lse=True)
    level, lse_level = _LEVELS[kind]
    assert _relative(out, exact) < level
    assert float((lse.double() - scores.logsumexp(-1)).abs().max()) < lse_level


def test_windows_text_and_views():
    q, k, v = (torch.stack((x, torch.ones_like(x)), 2)[:, :, 0] for x in _qkv(63))
    options = {"grid": (3, 4, 5), "window": (2, 3, 3), "text_len": 3, "text_side": "prefix"}
    options |= {"kv_lens": torch.tensor([2], device=helpers.DEVICE), "return_lse": True}
    exact, exact_lse = pv.spacetime_attention(*(x.double() for x in (q, k, v)), **options, impl="reference")
    out, lse = _attend(q, k, v, **options)
    assert _relative(out, exact) < 0.05 and float((lse.double() - exact_lse).abs().max()) < 0.1
    first, second = _attend(q, k, v, **options), _attend(q, k, v, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other, _ = pv.spacetime_attention(
        *(x.double() for x in (q, k, v)), **{**options, "window": (2, 3, 4)}, impl="reference"
    )
    assert _relative(out, other) > 0.1


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_bad_token_is_seen(impl):
    q, k, v = _qkv(36, heads=1)
    clean = _attend(q, k, v, impl, grid=(2, 3, 6))
    q = q.clone()
    q[0, 7, 0, 3] = float("nan")
    got = _attend(q, k, v, impl, grid=(2, 3, 6))
    assert bool(got[0, 7].isnan().all())
    rest = [n for n in range(36) if n != 7]
    assert torch.equal(got[:, rest], clean[:, rest])
    k = k.clone()
    k[0, 35, 0, 3] = float("inf")
    out, lse = _attend(q, k, v, impl, grid=(2, 3, 6), window=(1, 3, 3), return_lse=True)
    seen = out[0, :, 0].isnan().any(-1)
    assert bool(seen[35]) and not bool(seen[0]) and bool(lse[0, 0, 35].isnan())


@pytest.mark.parametrize(
    "change",
    [{"scale": lambda a: a["scale"] * 1.01}, {"k_scale": lambda a: a["k_scale"].flip(2)},
     {"k8": lambda a: a["k8"].view(torch.int8)}],
    ids=["scale", "key scales", "codes as integers"],
)  # fmt: skip
def test_the_samples_see_a_wrong_kernel(change):
    triton = dispatch.load(OP, "triton")

    def call(*args):
        values = dict(zip(OP.arguments[:-1], args, strict=True))
        changed = {**values, **{name: f(values) for name, f in change.items()}}
        if changed["k8"].dtype == torch.int8:
            changed["q8"] = changed["q8"].view(torch.int8)
        return triton(*OP.bind(**changed))

    with pytest.raises(Mismatch):
        check_op(OP, "triton", helpers.DEVICE, torch.float16, call=call)


# What is refused, and by whom ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
@pytest.mark.skipif(helpers.GPU, reason="architectures are forced in the interpreter only")
def test_a_card_without_e4m3_is_told(arch):
    q, k, v = _qkv(8)
    with forced_arch(arch), pytest.raises(UnsupportedError, match=f"fp8_attention: .*, {arch} has none; use int8"):
        _attend(q, k, v, grid=(2, 2, 2))
    # On a card there is nothing to fall back to.
    assert dispatch.order(OP, torch.device("cuda")) == ("triton",)


def test_codes_are_those_of_the_op():
    q, k, v = _qkv(8)
    codes = {name: pv.quantize_qk(q, k, precision=name)[:4] for name in ("int8", "fp8")}
    for name, other in (("int8", "fp8"), ("fp8", "int8")):
        q8, k8, *scales = codes[other]
        with pytest.raises(DTypeError, match=f"{name}_attention: `q8` must be an? (int8|float8_e4m3fn) tensor; got"):
            getattr(pv, f"{name}_attention")(q8, k8, v, *scales, grid=(2, 2, 2))
    with pytest.raises(UnsupportedError, match="in precision 'fp8': `v` requires grad"):
        _attend(q, k, v.clone().requires_grad_(), grid=(2, 2, 2))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_empty_batch(impl):
    q = torch.zeros(0, 8, 2, 16, device=helpers.DEVICE)
    out, lse = _attend(q, q, q, impl, grid=(2, 2, 2), return_lse=True)
    assert out.shape == q.shape and lse.shape == (0, 2, 8)
