import importlib

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close, check_op

from . import helpers

NAME = "final_layer"
GRID, PATCH = (2, 2, 3), (1, 2, 2)


def inputs(dtype=torch.float32, tokens=1, grid=GRID):
    g = torch.Generator().manual_seed(0)
    s = grid[0] * grid[1] * grid[2]
    x = torch.randn(2, s, 16, generator=g).to(dtype)
    scale, shift = (torch.randn(2, min(s, tokens), 16, generator=g) * 0.5 for _ in range(2))
    return x, scale, shift, torch.randn(12, 16, generator=g).to(dtype), torch.randn(12, generator=g).to(dtype)


def eager(x, scale, shift, weight, bias):
    """The models' lines."""
    y = torch.nn.functional.layer_norm(x.float() if x.dtype != torch.float64 else x, (16,), eps=1e-6)
    y = torch.nn.functional.linear((y * (1 + scale) + shift).type_as(x), weight, bias)
    y = y.reshape(x.shape[0], *GRID, *PATCH, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return y.flatten(6, 7).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_wide_offsets_match_float64(monkeypatch):
    # Clips of 2^31 pixels do not fit a test: the addresses meant for them are used on small ones.
    kernels = importlib.import_module("pyvideo_kernels.kernels.final_layer")
    monkeypatch.setattr(kernels, "NARROW_ELEMENTS", 0)
    for dtype in (torch.float16, torch.float32):  # one loop and two
        assert check_op(OPS[NAME], "triton", helpers.DEVICE, dtype) > 0


def test_contract():
    helpers.check_op_contract(NAME)


def test_gradients():
    helpers.check_gradients(NAME)


def test_fullgraph():
    helpers.check_fullgraph(pv.final_layer, *inputs(), grid=GRID, patch=PATCH)


def test_fullgraph_with_a_dynamic_grid():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, scale, shift, weight, bias, t, h, w: pv.final_layer(x, scale, shift, weight, bias, (t, h, w), PATCH),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for grid in ((2, 2, 3), (3, 4, 5)):
        args = inputs(grid=grid)
        torch.testing.assert_close(compiled(*args, *grid), pv.final_layer(*args, grid, PATCH), rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [1, 12])
def test_backward_is_no_worse_than_autograd_through_eager(tokens):
    args = inputs(tokens=tokens)
    grad = torch.randn(2, 3, 2, 4, 6, generator=torch.Generator().manual_seed(1))

    def gradients(dtype, function):
        leaves = [t.to(dtype).requires_grad_() for t in args]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    exact = gradients(torch.float64, eager)
    ours = gradients(torch.bfloat16, lambda *leaves: pv.final_layer(*leaves, GRID, PATCH))
    for got, low, ref in zip(ours, gradients(torch.bfloat16, eager), exact, strict=True):
        assert_close(got, ref, low)


@torch.no_grad()
@pytest.mark.parametrize("per_token", [False, True])
def test_agrees_with_a_wan_transformer_from_pixels_to_pixels(per_token):
    """A model without blocks is patch embedding and final layer: its own code, from our ops' inputs to outputs."""
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    model = wan.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=3, text_dim=8, freq_dim=8, ffn_dim=16,
        num_layers=0,
    ).eval()  # fmt: skip
    g = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    video = torch.randn(2, 4, 2, 4, 6, generator=g).bfloat16()
    temb = (torch.randn(2, 12, 24, generator=g) if per_token else torch.randn(2, 24, generator=g)).bfloat16()
    text = torch.zeros(2, 1, 8)

    # The timestep's embedding is not ours: both precisions start from the same one.
    def embed(timestep, encoder_hidden_states, *_, **__):
        value = temb.to(model.scale_shift_table)
        return value, value.repeat_interleave(6, -1), encoder_hidden_states, None

    model.condition_embedder.forward = embed
    timestep = torch.zeros(2, 12) if per_token else torch.zeros(2)
    outputs = {}
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        outputs[dtype] = model(video.to(dtype), timestep, text.to(dtype), return_dict=False)[0]
    model.bfloat16()

    table = model.scale_shift_table[None] + temb[:, :, None] if per_token else model.scale_shift_table + temb[:, None]
    shift, scale = table.unbind(2) if per_token else table.chunk(2, 1)
    tokens = pv.patch_embed3d(video, model.patch_embedding.weight, model.patch_embedding.bias)
    weight, bias = model.proj_out.weight, model.proj_out.bias
    low, exact = outputs[torch.bfloat16], outputs[torch.float64]
    assert_close(pv.final_layer(tokens, scale, shift, weight, bias, (2, 2, 3), (1, 2, 2)), exact, low)
    with pytest.raises(Mismatch):
        assert_close(pv.final_layer(tokens, shift, scale, weight, bias, (2, 2, 3), (1, 2, 2)), exact, low)
    channel_first = weight.unflatten(0, (4, 3)).transpose(0, 1).flatten(0, 1)
    with pytest.raises(Mismatch):
        assert_close(pv.final_layer(tokens, scale, shift, channel_first, bias, (2, 2, 3), (1, 2, 2)), exact, low)


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize(("dtype", "mean"), [(torch.float16, 64.0), (torch.float32, 3.0), (torch.float32, 30.0)])
def test_a_large_mean_does_not_cancel_the_signal(tokens, dtype, mean):
    """One kernel takes the mean off after the product: it must hold where eager, which takes it off first, does."""
    x, *rest = inputs(dtype, tokens=tokens)
    x = x + mean
    exact = eager(x.double(), *(t.double() for t in rest))
    device = helpers.DEVICE
    got = pv.final_layer(*(t.to(device) for t in (x, *rest)), GRID, PATCH, impl="triton").cpu()
    assert_close(got, exact, eager(x, *rest))


def test_repeats_bit_for_bit():
    args = [t.to(helpers.DEVICE) for t in inputs(torch.float16)]
    first, second = (pv.final_layer(*args, GRID, PATCH, impl="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(12, 16)}, ShapeError, "`x` must have 3 dimensions"),
        ({"grid": (2, 2, 2)}, ShapeError, r"`x` must be \[B, 2\*2\*2, D\] for `grid`"),
        ({"grid": (2, 6)}, ShapeError, "`grid` must be three sizes"),
        ({"patch": (1, 2, 5)}, ShapeError, r"`weight` must be \[C\*10, 16\]"),
        ({"patch": (1, 2, 0)}, ShapeError, "`patch` must be three sizes"),
        ({"scale": torch.zeros(2, 3, 16)}, ShapeError, r"`scale` must be \[2, 1, 16\] or \[2, 12, 16\]"),
        ({"scale": None}, DTypeError, "`scale` must be a tensor; got NoneType"),
        ({"weight": torch.zeros(12, 15)}, ShapeError, r"`weight` must be \[C\*4, 16\]"),
        ({"weight": torch.zeros(12, 16).half()}, DTypeError, "`weight` must be torch.float32 like `x`"),
        ({"bias": torch.zeros(3)}, ShapeError, r"`bias` must be \[12\]"),
        (
            {"x": torch.zeros(2, 16, 12).transpose(1, 2)},
            ShapeError,
            "`x` must have a contiguous last dimension",
        ),
        ({"shift": torch.zeros(2, 1, 16, device="meta")}, DeviceError, "`shift` must be on cpu"),
        ({"impl": "sdpa"}, UnsupportedError, "no implementation 'sdpa'"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    names = ("x", "scale", "shift", "weight", "bias")
    arguments = {**dict(zip(names, inputs(), strict=True)), "grid": GRID, "patch": PATCH, **change}
    with pytest.raises(error, match=words):
        pv.final_layer(**arguments)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_an_empty_grid(impl):
    x, *rest = (t.to(helpers.DEVICE) for t in inputs())
    assert pv.final_layer(x[:, :0], *rest, (0, 2, 3), PATCH, impl=impl).shape == (2, 3, 0, 4, 6)
