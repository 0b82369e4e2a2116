import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError, ValueOptionError
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

NAME = "qk_norm_rope"


def tables(tokens, head_dim, *, heads=1, layout="interleaved", seed=1):
    """Random rotations ``[1, tokens, heads, head_dim]``: real angles would hide a wrong sign near position 0."""
    g = torch.Generator().manual_seed(seed)
    angle = torch.rand(1, tokens, heads, head_dim // 2, generator=g) * 6.0
    angle = angle.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def inputs(tokens=3, heads=2, head_dim=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, tokens, heads, head_dim, generator=g).to(dtype) for _ in range(2))
    weights = [(1 + torch.randn(heads * head_dim, generator=g) * 0.3).to(dtype) for _ in range(2)]
    return q, k, *weights, *tables(tokens, head_dim)


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations("qk_norm_rope_"))
def test_in_place_matches_float64(impl, device, dtype):
    helpers.check_implementation("qk_norm_rope_", impl, device, dtype)


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME + "_backward"))
def test_backward_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME + "_backward", impl, device, dtype)


def test_explicit_impl_is_kept_in_backward():
    q, k, *rest = (t.to(helpers.DEVICE) for t in inputs())
    key = NAME + "_backward", "triton"
    before = dispatch.calls().get(key, 0)
    q.requires_grad_()
    out, _ = pv.qk_norm_rope(q, k, *rest, impl="triton")
    out.sum().backward()  # its gradient has stride 0, and k has none
    expected = q.grad.clone()
    q.grad = None
    pv.qk_norm_rope(q, k, *rest, impl="reference")[0].sum().backward()
    torch.testing.assert_close(q.grad, expected)
    assert dispatch.calls()[key] == before + 1


def test_contract():
    helpers.check_op_contract(NAME)


def test_in_place_contract():
    helpers.check_op_contract("qk_norm_rope_")


def test_gradients():
    helpers.check_gradients(NAME)


def test_low_precision_backward_is_no_worse_than_autograd_through_eager():
    g = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, 4, 3, 8, generator=g) for _ in range(2))
    weight = 1 + torch.randn(24, generator=g) * 0.3
    cos, sin = tables(4, 8)
    grad = torch.randn(2, 4, 3, 8, generator=g)

    def eager(x, weight):
        x = torch.nn.functional.rms_norm(x.flatten(2), (24,), weight, 1e-6).unflatten(2, (3, 8))
        a, b = x[..., 0::2], x[..., 1::2]
        c, s = cos[..., 0::2].to(x), sin[..., 0::2].to(x)
        return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)

    def ours(x, weight):
        return pv.qk_norm_rope(x, k.to(x.dtype), weight, None, cos, sin)[0]

    def gradients(dtype, function):
        leaves = [q.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    exact = gradients(torch.float64, eager)
    for got, low, ref in zip(gradients(torch.bfloat16, ours), gradients(torch.bfloat16, eager), exact, strict=True):
        assert_close(got, ref, low)


def test_fullgraph():
    helpers.check_fullgraph(pv.qk_norm_rope, *inputs())


def test_fullgraph_with_dynamic_tokens():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, cos, sin, video: pv.qk_norm_rope(q, k, cos=cos, sin=sin, rotary_range=(0, video)),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for tokens in (5, 7):
        q, k, _, _, cos, sin = inputs(tokens)
        args = q, k, cos[:, :-2], sin[:, :-2], tokens - 2
        expected = pv.qk_norm_rope(*args[:2], cos=args[2], sin=args[3], rotary_range=(0, tokens - 2))
        torch.testing.assert_close(compiled(*args), expected, rtol=0, atol=0)


def test_in_place_writes_through_views_of_a_packed_projection():
    _, _, q_weight, k_weight, cos, sin = inputs()
    qkv = torch.randn(1, 3, 3, 2, 8, generator=torch.Generator().manual_seed(5))
    before = qkv.clone()
    expected = pv.qk_norm_rope(qkv[:, :, 0], qkv[:, :, 1], q_weight, k_weight, cos, sin)

    def run(qkv):
        q, k = qkv[:, :, 0], qkv[:, :, 1]
        got = pv.qk_norm_rope_(q, k, q_weight, k_weight, cos, sin)
        assert got[0] is q and got[1] is k
        return qkv

    torch.compiler.reset()
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        after = function(before.clone())
        for place, result in enumerate(expected):
            torch.testing.assert_close(after[:, :, place], result, rtol=0, atol=0)
        torch.testing.assert_close(after[:, :, 2], before[:, :, 2], rtol=0, atol=0)


def test_in_place_refuses_inputs_that_require_grad():
    q, k, *rest = inputs()
    with pytest.raises(UnsupportedError, match="`k` requires grad"):
        pv.qk_norm_rope_(q, k.requires_grad_(), *rest)
    with pytest.raises(UnsupportedError, match="`q_weight` requires grad"):
        pv.qk_norm_rope_(q, k.detach(), rest[0].requires_grad_(), *rest[1:])
    with pytest.raises(ShapeError, match="`k` must be a tensor without broadcast dimensions"):
        pv.qk_norm_rope_(q, k.detach()[:, :1].expand(1, 3, 2, 8), rest[0].detach(), *rest[1:])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # inf * 0, then not selected
def test_text_is_left_unrotated_whatever_it_holds():
    q, k, _, _, cos, sin = inputs(tokens=4)
    q[:, 0, 0, 0] = float("inf")
    q, k, cos, sin = (t.to(helpers.DEVICE) for t in (q, k, cos[:, 1:3], sin[:, 1:3]))
    for impl in ("reference", "triton"):
        out, _ = pv.qk_norm_rope(q, k, cos=cos, sin=sin, norm="none", rotary_range=(1, 3), impl=impl)
        assert torch.equal(out[:, 0], q[:, 0]) and torch.equal(out[:, 3], q[:, 3])
        assert not torch.equal(out[:, 1:3], q[:, 1:3])


def test_repeats_bit_for_bit():
    args = [t.to(helpers.DEVICE) for t in inputs(dtype=torch.float16)]
    first, second = (pv.qk_norm_rope(*args, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Against diffusers: its own processors run, attention is replaced by a catcher of q and k ------------------------


def catch(monkeypatch, module, name):
    """Replace an attention function by one that keeps its q and k."""
    caught = {}

    def attention(query, key, value, *_, **__):
        caught["q"], caught["k"] = query, key
        return value

    monkeypatch.setattr(module, name, attention)
    return caught


def randomise(module):
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = torch.randn(parameter.shape, generator=g) * 0.3
            parameter.copy_(spread + 1 if "norm" in name and name.endswith("weight") else spread)
    return module.eval()


def projected(attention, hidden, head_dim):
    """q and k of ``hidden`` in bfloat16, which the module's projections give from now on.

    The rounding of a projection belongs to neither side: the float64 run starts from the rounded values too.
    """
    attention.bfloat16()
    values = []
    for module in (attention.to_q, attention.to_k):
        values.append(module(hidden))
        module.forward = lambda x, value=values[-1]: value.to(x)
    return [value.unflatten(2, (-1, head_dim)) for value in values]


def both_precisions(module, run):
    """q and k that ``run(dtype)`` makes the module hand to attention, in bfloat16 and in float64."""
    module.bfloat16()
    low = run(torch.bfloat16)
    module.double()
    exact = run(torch.float64)
    module.bfloat16()
    return low, exact


def agree(ours, low, exact):
    for name, out in zip("qk", ours, strict=True):
        assert out.shape == low[name].shape
        assert_close(out, exact[name], low[name], name)


def noise(tokens, width, batch=1):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(tokens)).bfloat16()


@torch.no_grad()
def test_agrees_with_wan(monkeypatch):
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    caught = catch(monkeypatch, wan, "dispatch_attention_fn")
    attention = wan.WanAttention(dim=48, heads=3, dim_head=16, eps=1e-6, processor=wan.WanAttnProcessor())
    q, k = projected(randomise(attention), noise(6, 48, batch=2), 16)
    cos, sin = wan.WanRotaryPosEmbed(16, (1, 2, 2), 32)(torch.empty(2, 4, 1, 4, 6))

    def run(dtype):
        attention(noise(6, 48, batch=2).to(dtype), rotary_emb=(cos, sin))
        return dict(caught)

    low, exact = both_precisions(attention, run)
    weights = attention.norm_q.weight, attention.norm_k.weight
    agree(pv.qk_norm_rope(q, k, *weights, cos, sin), low, exact)
    for wrong in ((*weights, cos, -sin), (*weights[::-1], cos, sin)):
        with pytest.raises(Mismatch):
            agree(pv.qk_norm_rope(q, k, *wrong), low, exact)


@torch.no_grad()
def test_agrees_with_hunyuan_video(monkeypatch):
    hunyuan = pytest.importorskip("diffusers.models.transformers.transformer_hunyuan_video")
    from diffusers.models.attention_processor import Attention

    caught = catch(monkeypatch, hunyuan, "dispatch_attention_fn")
    options = {"bias": True, "qk_norm": "rms_norm", "eps": 1e-6, "pre_only": True}
    processor = hunyuan.HunyuanVideoAttnProcessor2_0()
    attention = randomise(Attention(query_dim=32, heads=2, dim_head=16, **options, processor=processor))
    video, text = noise(5, 32), noise(3, 32)
    q, k = projected(attention, torch.cat((video, text), 1), 16)
    cos, sin = (t[0, :, 0] for t in tables(5, 16))

    def run(dtype):
        attention(video.to(dtype), encoder_hidden_states=text.to(dtype), image_rotary_emb=(cos, sin))
        return dict(caught)

    low, exact = both_precisions(attention, run)
    weights = attention.norm_q.weight, attention.norm_k.weight
    agree(pv.qk_norm_rope(q, k, *weights, cos, sin, norm="per_head", rotary_range=(0, 5)), low, exact)


@torch.no_grad()
def test_agrees_with_cogvideox(monkeypatch):
    processors = pytest.importorskip("diffusers.models.attention_processor")
    caught = catch(monkeypatch, processors.F, "scaled_dot_product_attention")
    options = {"bias": True, "qk_norm": "layer_norm", "eps": 1e-6, "processor": processors.CogVideoXAttnProcessor2_0()}
    attention = randomise(processors.Attention(query_dim=32, heads=2, dim_head=16, **options))
    video, text = noise(5, 32), noise(3, 32)
    q, k = projected(attention, torch.cat((text, video), 1), 16)
    cos, sin = (t[0, :, 0] for t in tables(5, 16))

    def run(dtype):
        attention(video.to(dtype), encoder_hidden_states=text.to(dtype), image_rotary_emb=(cos, sin))
        return {name: x.transpose(1, 2) for name, x in caught.items()}

    low, exact = both_precisions(attention, run)
    norm_q, norm_k = attention.norm_q, attention.norm_k
    ours = pv.qk_norm_rope(
        q, k, norm_q.weight, norm_k.weight, cos, sin, norm="per_head", norm_type="layer",
        q_bias=norm_q.bias, k_bias=norm_k.bias, rotary_range=(3, 8),
    )  # fmt: skip
    agree(ours, low, exact)


@torch.no_grad()
def test_agrees_with_ltx(monkeypatch):
    ltx = pytest.importorskip("diffusers.models.transformers.transformer_ltx")
    caught = catch(monkeypatch, ltx, "dispatch_attention_fn")
    attention = randomise(ltx.LTXAttention(query_dim=48, heads=3, kv_heads=3, dim_head=16))
    q, k = projected(attention, noise(4, 48, batch=2), 16)
    by_head = tables(4, 16, heads=3)
    flat = [t.flatten(2).expand(2, -1, -1) for t in by_head]

    def run(dtype):
        attention(noise(4, 48, batch=2).to(dtype), image_rotary_emb=flat)
        return dict(caught)

    low, exact = both_precisions(attention, run)
    agree(pv.qk_norm_rope(q, k, attention.norm_q.weight, attention.norm_k.weight, *by_head, eps=1e-5), low, exact)


@pytest.mark.parametrize(("layout", "dim"), [("interleaved", -1), ("half", -2)])
def test_agrees_with_diffusers_rotation(layout, dim):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    q, k, *_ = inputs(tokens=5, dtype=torch.float64)
    cos, sin = (t[0, :, 0].double() for t in tables(5, 8, layout=layout))
    for ours, x in zip(pv.qk_norm_rope(q, k, cos=cos, sin=sin, norm="none", layout=layout), (q, k), strict=True):
        theirs = embeddings.apply_rotary_emb(x, (cos, sin), use_real_unbind_dim=dim, sequence_dim=1)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # theirs rotates in float32


# Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(1, 3, 16)}, ShapeError, "`q` must have 4 dimensions"),
        ({"k": torch.zeros(1, 3, 2, 4)}, ShapeError, r"`k` must be \[1, S, heads, 8\]"),
        ({"k": torch.zeros(1, 3, 2, 8).half()}, DTypeError, "`k` must be torch.float32 like `q`"),
        ({"k": torch.zeros(1, 4, 2, 8)}, ShapeError, "`k` must be of 3 tokens like `q`"),
        ({"q_weight": torch.ones(8)}, ShapeError, r"`q_weight` must be \[16\]"),
        ({"norm": "per_head"}, ShapeError, r"`q_weight` must be \[8\]"),
        ({"norm": "none"}, ValueOptionError, "`q_weight` must be None with norm='none'"),
        ({"q_bias": torch.zeros(16)}, ValueOptionError, "`q_bias` must be None with norm_type='rms'"),
        ({"norm": "heads"}, ValueOptionError, "`norm` must be one of 'across_heads'"),
        ({"norm_type": "batch"}, ValueOptionError, "`norm_type` must be one of 'rms'"),
        ({"layout": "pairs"}, ValueOptionError, "`layout` must be one of 'interleaved'"),
        ({"sin": None}, DTypeError, "`sin` must be a tensor when the other table is given"),
        ({"cos": torch.zeros(4, 8)}, ShapeError, r"`cos` must be \[3, 8\] or \[1 or 1, 3, 1 or 2, 8\]"),
        ({"rotary_range": (2, 4)}, ValueOptionError, r"`rotary_range` must be \(start, stop\)"),
        ({"rotary_range": (0, 2)}, ShapeError, r"`cos` must be \[2, 8\]"),
        ({"cos": None, "sin": None, "rotary_range": (0, 1)}, ValueOptionError, "`rotary_range` must be None without"),
        (
            {"q": torch.zeros(1, 3, 8, 2).transpose(2, 3)},
            ShapeError,
            "`q` must have a contiguous last dimension",
        ),
        ({"cos": torch.zeros(3, 8, device="meta")}, DeviceError, "`cos` must be on cpu"),
        ({"impl": "cuda"}, UnsupportedError, "no implementation 'cuda'|needs CUDA"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    names = ("q", "k", "q_weight", "k_weight", "cos", "sin")
    with pytest.raises((error, DeviceError) if "impl" in change else error, match=words):
        pv.qk_norm_rope(**{**dict(zip(names, inputs(), strict=True)), **change})


def test_odd_head_dim_is_normalised_but_not_rotated():
    q = torch.randn(1, 2, 2, 5)
    out, _ = pv.qk_norm_rope(q, q, impl="reference")
    torch.testing.assert_close(out.flatten(2), torch.nn.functional.rms_norm(q.flatten(2), (10,), eps=1e-6))
    with pytest.raises(ShapeError, match="even head_dim"):
        pv.qk_norm_rope(q, q, cos=torch.ones(2, 5), sin=torch.ones(2, 5))
    with pytest.raises(UnsupportedError, match="odd head_dim"):
        pv.qk_norm_rope(q.to(helpers.DEVICE), q.to(helpers.DEVICE), impl="triton")


def test_empty_sequence():
    q = torch.zeros(2, 0, 2, 8, device=helpers.DEVICE)
    for impl in ("reference", "triton"):
        assert pv.qk_norm_rope(q, q, impl=impl)[0].shape == (2, 0, 2, 8)


def test_tokens_without_heads():
    q, weight = torch.randn(2, 3, 0, 64), torch.randn(64)
    assert pv.qk_norm_rope(q, q, weight, weight, norm="per_head")[0].shape == q.shape
