import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

import pyvideo_kernels as pv
from pyvideo_kernels.configs import forced_config
from pyvideo_kernels.configs import vae_attention as configs
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError, ValueOptionError
from pyvideo_kernels.ops import vae_attention as ops
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close, check_op, samples

from . import helpers

NAME = "vae_attention"


def _qkv(b=1, t=3, s=7, d=32, dtype=torch.float32, seed=0):
    """Thirds of a fused projection, sharp enough that a wrong key shows."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(b, t, s, 3 * d, generator=g) * 1.5).to(dtype).chunk(3, -1)


def _kernels():
    return __import__("pyvideo_kernels.kernels.vae_attention", fromlist=["select"])


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_descriptor_variant_matches_float64(monkeypatch):
    """Every sample's rows are whole numbers of 16 bytes."""
    used = []

    def select(arch, *, aligned, **shape):
        used.append(aligned)
        return dataclasses.replace(configs.select(arch, aligned=aligned, **shape), descriptors=aligned)

    monkeypatch.setattr(_kernels(), "select", select)
    helpers.check_implementation(NAME, "triton", helpers.DEVICE, torch.float16)
    assert used == [True] * sum(1 for _ in samples(OPS[NAME], torch.float16))


@pytest.mark.parametrize(
    ("d", "config"),
    [
        # Results over three programs, the last of which has columns past D; scores in pieces, ragged too.
        (40, configs.VaeAttentionConfig(16, 16, 16, 0, 16, 4, 1)),
        (80, configs.VaeAttentionConfig(16, 16, 32, 16, 32, 4, 1)),
        # Wider than D.
        (24, configs.VaeAttentionConfig(16, 32, 16, 16, 0, 4, 1)),
    ],
)
@pytest.mark.parametrize("descriptors", [False, True])
def test_shares_of_the_results(d, config, descriptors):
    q, k, v = (x.to(helpers.DEVICE) for x in _qkv(t=2, s=18, d=d, dtype=torch.float16))
    exact, low = (pv.vae_attention(*(x.to(to) for x in (q, k, v)), impl="reference") for to in (torch.float64, q.dtype))
    with forced_config(NAME, dataclasses.replace(config, descriptors=descriptors), d=d):
        assert_close(pv.vae_attention(q, k, v, impl="triton"), exact, low)


def test_contract():
    helpers.check_op_contract(NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_wans_attention_block(dtype):
    wan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    torch.manual_seed(0)
    stock = wan.WanAttentionBlock(48)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=g) * 0.3).to(dtype))
    x = torch.randn(2, 48, 3, 3, 5, generator=g).to(dtype)

    def attend(impl):
        """The block's forward on channels-last rows."""
        rows = stock.norm(x.permute(0, 2, 1, 3, 4).flatten(0, 1))
        qkv = stock.to_qkv(rows).unflatten(0, (2, 3)).flatten(3).transpose(2, 3).contiguous()
        q, k, v = qkv.to(helpers.DEVICE).chunk(3, -1)
        out = pv.vae_attention(q, k, v, impl=impl).cpu().transpose(2, 3).reshape(6, 48, 3, 5)
        return stock.proj(out).unflatten(0, (2, 3)).transpose(1, 2) + x

    with torch.no_grad():
        stock.double()
        exact = stock(x.double())
        stock.to(dtype)
        low = stock(x)
        for impl in ("auto", "reference"):
            assert_close(attend(impl), exact, low, impl)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_hunyuan_videos_mask(frames, dtype):
    hunyuan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_hunyuan_video")
    b, s, d = 2, 6, 64
    qkv = _qkv(b, frames, s, d, dtype)

    def stock(to):
        q, k, v = (x.to(to).flatten(1, 2).unsqueeze(1) for x in qkv)
        mask = hunyuan.prepare_causal_attention_mask(frames, s, to, "cpu", batch_size=b)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).view(b, frames, s, d)

    exact, low = stock(torch.float64), stock(dtype)
    impls = ["auto", "reference"]
    if helpers.GPU or dtype == torch.float32:
        impls.append("triton")
    for impl in impls:
        out = pv.vae_attention(*(x.to(helpers.DEVICE) for x in qkv), causal=True, impl=impl)
        assert_close(out.cpu(), exact, low, impl)


@pytest.mark.parametrize("impl", ["sdpa", "reference", "triton", helpers.CPU])
def test_what_a_frame_sees(impl):
    q, k, v = (x.to(helpers.device_of(impl)) for x in _qkv())
    k2, v2 = k.clone(), v.clone()
    k2[:, 1] += 1
    v2[:, 1] -= 1
    for causal, same in ((False, [True, False, True]), (True, [True, False, False])):
        before, after = (pv.vae_attention(q, *kv, causal=causal, impl=impl) for kv in ((k, v), (k2, v2)))
        assert [torch.equal(before[:, t], after[:, t]) for t in range(3)] == same


@pytest.mark.parametrize("impl", ["sdpa", "reference", "triton", helpers.CPU])
@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_nan_stays_where_it_is_seen(impl, poisoned):
    tensors = {name: x.to(helpers.device_of(impl)).clone() for name, x in zip("qkv", _qkv(), strict=True)}
    tensors[poisoned][:, 1, 3] = torch.nan
    out = pv.vae_attention(**tensors, causal=True, impl=impl)
    assert out[:, 0].isfinite().all()
    assert out[:, 1, 3].isnan().all()
    if poisoned != "q":
        assert out[:, 1:].isnan().all()


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_of_nan_keys_is_not_taken_for_a_mask(causal):
    """Of any number of keys at the end, whatever block torch's CPU kernel takes them in."""
    q, k, v = (x.to(helpers.DEVICE) for x in _qkv(t=2, s=600, d=16))
    for last in (1, 88, 600):
        poisoned = k.clone()
        poisoned[:, 0, -last:] = torch.nan
        out = pv.vae_attention(q, poisoned, v, causal=causal, impl="sdpa")
        assert out[:, 0].isnan().all() and bool(out[:, 1].isnan().all()) == causal
        assert causal or out[:, 1].isfinite().all()


@pytest.mark.parametrize("impl", ["sdpa", "triton"])
def test_clips_apart_in_memory(impl):
    """Neither frames and clips nor frames and tokens are one dimension."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 4, 5, 32, generator=g).to(helpers.DEVICE)[::2, :3] for _ in range(3))
    for causal in (False, True):
        exact = pv.vae_attention(*(x.double() for x in (q, k, v)), causal=causal, impl="reference")
        low = pv.vae_attention(q, k, v, causal=causal, impl="reference")
        assert_close(pv.vae_attention(q, k, v, causal=causal, impl=impl), exact, low)


@pytest.mark.parametrize(
    ("name", "causal", "change"),
    [
        ("the future", True, {"causal": False}),
        ("other frames", False, {"causal": True}),
        ("another scale", False, {"scale": 0.2}),
        ("keys for values", False, lambda q, k, v: (q, v, k)),
        ("keys of the frame before", True, lambda q, k, v: (q, k.roll(1, 1), v.roll(1, 1))),
        ("tokens in another order", False, lambda q, k, v: (q.flip(2), k, v)),
    ],
)
def test_the_rule_sees(name, causal, change):
    qkv = _qkv()
    exact = pv.vae_attention(*(x.double() for x in qkv), causal=causal)
    low = pv.vae_attention(*qkv, causal=causal, impl="reference")
    assert_close(pv.vae_attention(*qkv, causal=causal), exact, low)
    wrong = change(*qkv) if callable(change) else qkv
    options = {"causal": causal, **({} if callable(change) else change)}
    with pytest.raises(Mismatch):
        assert_close(pv.vae_attention(*wrong, **options), exact, low, name)


def test_the_rule_sees_a_key_left_out():
    def one_less(q, k, v, causal, scale):
        return ops.vae_attention_sdpa(q, k[:, :, :-1], v[:, :, :-1], False, scale)

    with pytest.raises(Mismatch):
        check_op(OPS[NAME], "sdpa", "cpu", torch.float32, call=one_less)


def test_a_fused_projection_is_read_in_place():
    _, k, _ = _qkv(b=2)
    run = _kernels().one_run(k)
    assert run.data_ptr() == k.data_ptr() and run.shape == (2, 1, 21, 32) and run.stride(2) == 96
    apart = _kernels().one_run(k[:, ::2])
    assert torch.equal(apart, k[:, ::2].reshape(2, 1, 14, 32))


def test_frames_more_than_two_to_the_31_elements_apart(tmp_path):
    if helpers.GPU:
        pytest.skip("a GPU has no sparse memory; the interpreter checks the addresses")
    # A sparse file gives the addresses without the memory; each stride fits 32 bits, three frames of it do not.
    q, k, v = (x.contiguous() for x in _qkv(t=3, s=3, d=16, dtype=torch.float16))
    stride = 2**30
    storage = np.memmap(tmp_path / "frames", np.float16, "w+", shape=(2 * stride + 3 * 3 * 16,))
    far = torch.from_numpy(storage).as_strided((1, 3, 3, 48), (stride, stride, 48, 1))
    far.copy_(torch.cat([q, k, v], -1))
    expected = pv.vae_attention(q, k, v, impl="triton")
    assert torch.equal(pv.vae_attention(*far.chunk(3, -1), impl="triton"), expected)


def test_tokens_beyond_32_bit_offsets_are_refused():
    far = torch.empty_strided((1, 1, 8, 16), (0, 0, 2**28, 1), device="meta", dtype=torch.float16)
    with pytest.raises(UnsupportedError, match=r"less than 2\^24 elements apart"):
        _kernels().vae_attention(far, far, far, False, 1.0)


def test_the_library_is_refused_where_it_has_no_fused_kernel(monkeypatch):
    q, k, v = _qkv()
    cuda = torch.backends.cuda
    monkeypatch.setattr(cuda, "SDPAParams", lambda *_: None)
    for name in ("can_use_flash_attention", "can_use_efficient_attention", "can_use_cudnn_attention"):
        monkeypatch.setattr(cuda, name, lambda *_: False)
    with pytest.raises(UnsupportedError, match=r"no fused kernel behind impl 'sdpa' takes D = 32 .*impl='triton'"):
        ops._refuse_unfused(q, k, v)
    monkeypatch.setattr(cuda, "can_use_efficient_attention", lambda *_: True)
    ops._refuse_unfused(q, k, v)


@pytest.mark.parametrize(
    ("d", "split"),
    [(8, (16, 0)), (32, (32, 0)), (40, (32, 16)), (96, (64, 32)), (256, (256, 0)), (384, (256, 128)),
     (512, (256, 256)), (768, (256, 128)), (1024, (256, 256))],
)  # fmt: skip
def test_widths_are_split_into_powers_of_two(d, split):
    assert configs.split_width(d) == split


def test_a_config_that_leaves_columns_out_is_refused():
    config = configs.VaeAttentionConfig(16, 16, 32, 0, 0, 4, 1)
    shape = {"d": 40, "itemsize": 2, "aligned": False}
    assert "must cover D = 40" in configs.select.illegal(config, "sm_80", **shape)
    assert configs.select.illegal(dataclasses.replace(config, step=16), "sm_80", **shape) is None
    with_descriptors = dataclasses.replace(config, step=16, descriptors=True)
    assert "cannot address" in configs.select.illegal(with_descriptors, "sm_90", **shape)
    with pytest.raises(UnsupportedError, match="D up to 1024"):
        configs.select("sm_90", d=1088, itemsize=2, aligned=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("d", [96, 384, 512, 1024])
def test_every_candidate_is_legal(arch, d):
    shape = {"d": d, "itemsize": 2, "aligned": True}
    rule = configs.select(arch, **shape)
    found = configs.select.candidates(arch, **shape)
    assert found[0] == rule and len(found) > 3
    assert all(configs.select.illegal(config, arch, **shape) is None for config in found)


def test_bitwise_repeatable():
    qkv = [x.to(helpers.DEVICE) for x in _qkv()]
    for impl in ("auto", "triton"):
        first, second = (pv.vae_attention(*qkv, causal=True, impl=impl) for _ in range(2))
        assert torch.equal(first, second)


def test_fullgraph():
    helpers.check_fullgraph(lambda q, k, v: pv.vae_attention(q, k, v, causal=True), *_qkv())
    torch.compiler.reset()
    compiled = torch.compile(pv.vae_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for s in (5, 6):
        qkv = _qkv(s=s)
        assert torch.equal(compiled(*qkv), pv.vae_attention(*qkv))


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
@pytest.mark.parametrize("shape", [(0, 2, 3, 16), (1, 0, 3, 16), (1, 2, 0, 16)])
@pytest.mark.parametrize("causal", [False, True])
def test_without_tokens(impl, shape, causal):
    x = torch.zeros(shape, device=helpers.DEVICE)
    assert pv.vae_attention(x, x, x, causal=causal, impl=impl).shape == shape


_X = torch.zeros(1, 2, 3, 16)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(2, 3, 16)}, ShapeError, "`q` must have 4 dimensions"),
        ({"q": torch.zeros(1, 2, 3, 0)}, ShapeError, "`k` must be"),
        ({"k": torch.zeros(1, 2, 4, 16)}, ShapeError, r"`k` must be \[1, 2, 3, 16\] like `q`"),
        ({"v": torch.zeros(1, 2, 3, 8)}, ShapeError, r"`v` must be \[1, 2, 3, 16\]"),
        ({"v": _X.half()}, DTypeError, "`v` must be torch.float32 like `q`"),
        ({"q": _X.long()}, DTypeError, "`q` must be float32"),
        ({"k": _X.transpose(2, 3).contiguous().transpose(2, 3)}, ShapeError, "`k` must have a contiguous last"),
        ({"k": _X.to("meta")}, DeviceError, "`k` must be on cpu"),
        ({"causal": 1}, ValueOptionError, "`causal` must be True or False"),
        ({"scale": 0.0}, ValueOptionError, "`scale` must be a positive finite number"),
        ({"scale": float("nan")}, ValueOptionError, "`scale` must be"),
        ({"q": _X.clone().requires_grad_()}, UnsupportedError, "`q` requires grad"),
        ({"impl": "fast"}, ValueError, "`impl` must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        pv.vae_attention(**{"q": _X, "k": _X, "v": _X, **change})


def test_no_columns():
    x = torch.zeros(1, 2, 3, 0)
    with pytest.raises(ShapeError, match="with D >= 1"):
        pv.vae_attention(x, x, x)


def test_float64_is_the_librarys_and_the_references():
    qkv = [x.double() for x in _qkv()]
    torch.testing.assert_close(
        pv.vae_attention(*qkv, impl="sdpa"), pv.vae_attention(*qkv, impl="reference"), rtol=1e-12, atol=1e-12
    )
    with pytest.raises(UnsupportedError, match="float64"):
        pv.vae_attention(*qkv, impl="triton") if helpers.GPU else _kernels().vae_attention(*qkv, False, 1.0)
