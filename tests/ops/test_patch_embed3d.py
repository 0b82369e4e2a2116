import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyvideo_kernels as pv
from pyvideo_kernels import dispatch
from pyvideo_kernels.errors import DeviceError, DTypeError, ShapeError, UnsupportedError
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, assert_close

from . import helpers

NAME = "patch_embed3d"


def inputs(dtype=torch.float32, channels=3, dim=5, patch=(1, 2, 2), shape=(2, 4, 6)):
    g = torch.Generator().manual_seed(0)
    video = torch.randn(2, channels, *shape, generator=g).to(dtype)
    weight = torch.randn(dim, channels, *patch, generator=g).to(dtype)
    return video, weight, torch.randn(dim, generator=g).to(dtype)


def convolution(video, weight, bias):
    """What the models do: a convolution whose stride is its kernel, then tokens."""
    return torch.nn.functional.conv3d(video, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


class Called(TorchDispatchMode):
    """Names of the torch operations made inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_no_implementation_calls_a_convolution():
    """Conv3d whose stride is its kernel takes seconds with several torch and cuDNN pairs; see known_bad.py."""
    video, weight, bias = (t.to(helpers.DEVICE) for t in inputs())
    calls = [(OPS[NAME], impl, (video, weight, bias, [1, 2, 2])) for impl in OPS[NAME].impls]
    back = OPS[f"{NAME}_backward"]
    grad = torch.ones_like(pv.patch_embed3d(video, weight, bias))
    calls += [(back, impl, ([grad], video, weight, bias, [1, 2, 2], [True] * 3)) for impl in back.impls]
    for op, impl, args in calls:
        if impl == "cpu" and helpers.GPU:
            continue
        with Called() as called:
            dispatch.load(op, impl)(*args)
        assert called.names and not [name for name in called.names if "conv" in name or "unfold" in name], impl
    with Called() as called:
        convolution(video, weight, bias)
    assert "convolution" in called.names, "the test would see one"


@pytest.mark.parametrize(("impl", "device", "dtype"), helpers.implementations(NAME))
def test_matches_float64(impl, device, dtype):
    helpers.check_implementation(NAME, impl, device, dtype)


def test_contract():
    helpers.check_op_contract(NAME)


def test_gradients():
    helpers.check_gradients(NAME)


def test_fullgraph():
    helpers.check_fullgraph(pv.patch_embed3d, *inputs())


def test_fullgraph_with_dynamic_sizes():
    torch.compiler.reset()
    compiled = torch.compile(pv.patch_embed3d, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 4, 6), (3, 8, 4)):
        args = inputs(shape=shape)
        torch.testing.assert_close(compiled(*args), pv.patch_embed3d(*args), rtol=0, atol=0)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2), (1, 1, 1), (2, 1, 3)])
def test_agrees_with_a_convolution(patch):
    video, weight, bias = inputs(torch.bfloat16, patch=patch)
    exact = convolution(video.double(), weight.double(), bias.double())
    low = convolution(video, weight, bias)
    channels_last = video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    for source in (video, channels_last):
        assert_close(pv.patch_embed3d(source, weight, bias), exact, low)
        assert_close(pv.patch_embed3d(source, weight.flatten(1), bias, patch), exact, low)


def test_backward_is_no_worse_than_a_convolutions():
    video, weight, bias = inputs()
    grad = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(1))

    def gradients(dtype, function):
        leaves = [t.to(dtype).requires_grad_() for t in (video, weight, bias)]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    exact = gradients(torch.float64, convolution)
    for ours, low, ref in zip(gradients(torch.bfloat16, pv.patch_embed3d), gradients(torch.bfloat16, convolution),
                              exact, strict=True):  # fmt: skip
        assert_close(ours, ref, low)


@pytest.mark.parametrize("axes", [(0, 1, 2, 4, 3), (0, 1, 3, 2, 4)])
def test_the_rule_sees_swapped_patch_axes(axes):
    video, weight, bias = inputs(patch=(2, 2, 2), shape=(4, 4, 4))
    exact = convolution(video.double(), weight.double(), bias.double())
    assert_close(pv.patch_embed3d(video, weight, bias), exact, convolution(video, weight, bias))
    with pytest.raises(Mismatch):
        assert_close(pv.patch_embed3d(video, weight.permute(axes[0], axes[1], *axes[2:]), bias), exact, exact.float())


def test_repeats_bit_for_bit():
    args = [t.to(helpers.DEVICE) for t in inputs(torch.float16)]
    assert torch.equal(pv.patch_embed3d(*args, impl="triton"), pv.patch_embed3d(*args, impl="triton"))


def test_fp32_is_not_rounded_to_tf32():
    video, weight, bias = inputs(channels=16, dim=8)
    exact = pv.patch_embed3d(video.double(), weight.double(), bias.double())
    error = (pv.patch_embed3d(video.to(helpers.DEVICE), weight.to(helpers.DEVICE), bias.to(helpers.DEVICE),
                              impl="triton").cpu() - exact).abs().max()  # fmt: skip
    assert error < 2e-5 < 2**-11 * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"video": torch.zeros(3, 2, 4, 6)}, ShapeError, "`video` must have 5 dimensions"),
        ({"video": torch.zeros(1, 3, 2, 5, 6)}, ShapeError, "T, H, W multiples of the patch"),
        ({"video": torch.zeros(1, 4, 2, 4, 6)}, ShapeError, r"`weight` must be \[D, 4, pt, ph, pw\]"),
        ({"patch": (2, 2, 2)}, ShapeError, r"`patch` must be \(1, 2, 2\) like `weight`"),
        ({"weight": torch.zeros(5, 12)}, ShapeError, r"`patch` must be \(pt, ph, pw\) when `weight` has two"),
        (
            {"weight": torch.zeros(5, 11), "patch": (1, 2, 2)},
            ShapeError,
            r"`weight` must be \[D, 12\]",
        ),
        ({"weight": torch.zeros(5, 12), "patch": (1, 2)}, ShapeError, "`patch` must be three sizes"),
        ({"weight": torch.zeros(5, 12), "patch": (0, 2, 2)}, ShapeError, "`patch` must be three sizes"),
        ({"weight": torch.zeros(5, 3, 1, 2, 2).half()}, DTypeError, "`weight` must be torch.float32 like `video`"),
        ({"bias": torch.zeros(4)}, ShapeError, r"`bias` must be \[5\]"),
        ({"bias": torch.zeros(5, device="meta")}, DeviceError, "`bias` must be on cpu"),
        ({"impl": "sdpa"}, UnsupportedError, "no implementation 'sdpa'"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, words):
    arguments = {**dict(zip(("video", "weight", "bias"), inputs(), strict=True)), **change}
    with pytest.raises(error, match=words):
        pv.patch_embed3d(**arguments)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_frames_and_no_tokens(impl):
    video, weight, bias = (t.to(helpers.DEVICE) for t in inputs())
    assert pv.patch_embed3d(video[:, :, :0], weight, bias, impl=impl).shape == (2, 0, 5)
