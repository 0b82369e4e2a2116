"""Quality numbers on videos whose PSNR and SSIM are known, and the error against float32 on a real block stack."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from pyvideo_kernels.benchmarks.e2e import quality
from pyvideo_kernels.benchmarks.e2e.quality import BrokenVideo

RNG = np.random.default_rng(0)
VIDEO = RNG.random((3, 24, 32, 3), dtype=np.float32) * 0.5


def test_a_constant_shift_has_a_known_psnr():
    found = quality.compare_videos(VIDEO + np.float32(0.1), VIDEO)
    assert found["max_error"] == pytest.approx(0.1, rel=1e-5)
    assert found["psnr"]["mean"] == pytest.approx(20.0, abs=1e-3)  # -10 log10(0.1²)
    assert found["identical"] is False and len(found["frames"]) == 3


def test_flat_frames_have_a_known_ssim():
    a, b, c1 = 0.6, 0.3, 0.01**2
    found = quality.compare_videos(np.full_like(VIDEO, a), np.full_like(VIDEO, b))
    assert found["ssim"]["min"] == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1), rel=1e-4)


def test_identical_videos_have_no_psnr_and_a_ssim_of_one():
    found = quality.compare_videos(VIDEO, VIDEO.copy())
    assert found["identical"] is True and found["max_error"] == 0
    assert found["psnr"] == {"mean": None, "min": None} and found["ssim"] == {"mean": 1.0, "min": 1.0}


def test_one_bad_frame_is_in_the_minimum():
    bad = VIDEO.copy()
    bad[1] = VIDEO[1][::-1]
    found = quality.compare_videos(bad, VIDEO)
    assert [frame["psnr"] is None for frame in found["frames"]] == [True, False, True]
    assert found["ssim"]["min"] == found["frames"][1]["ssim"] < 0.5 < found["ssim"]["mean"]
    assert found["psnr"]["min"] == found["frames"][1]["psnr"]


def test_frames_smaller_than_the_filter():
    small = VIDEO[:, :6, :6]
    assert quality.compare_videos(small * 0.9, small)["ssim"]["min"] < 1


def test_another_length_is_no_quality():
    with pytest.raises(BrokenVideo, match=r"\[2, 24, 32, 3\].*\[3, 24, 32, 3\]"):
        quality.compare_videos(VIDEO[:2], VIDEO)


def test_without_scikit_image_there_is_the_maximum(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    found = quality.compare_videos(VIDEO + np.float32(0.25), VIDEO)
    assert found == {"max_error": pytest.approx(0.25), "identical": False}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_no_video_holds_is_refused(value):
    video = torch.zeros(1, 3, 2, 4, 4)
    quality.check_finite("video", video)
    video[0, 1, 0, 2, 3] = value
    with pytest.raises(BrokenVideo, match="1 of 96 values of the video"):
        quality.check_finite("video", video)


def test_a_black_video_is_refused_unless_the_reference_is_one():
    black = np.zeros_like(VIDEO)
    quality.check_not_black(black, black)
    quality.check_not_black(VIDEO, VIDEO)
    with pytest.raises(BrokenVideo, match="black"):
        quality.check_not_black(black, VIDEO)


def test_frames_are_in_zero_to_one_with_channels_last():
    decoded = torch.tensor([-1.0, 0.0, 1.0, 1.5]).view(1, 1, 4, 1, 1).expand(1, 3, 4, 2, 5)
    video = quality.frames(decoded)
    assert video.shape == (4, 2, 5, 3) and video[:, 0, 0, 0].tolist() == [0.0, 0.5, 1.0, 1.0]


def test_relative_error():
    x = torch.tensor([3.0, 4.0])
    assert quality.relative_error(x + torch.tensor([0.3, 0.4]), x) == pytest.approx(0.1)
    assert quality.relative_error(x, x) == 0 and quality.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert quality.relative_error(x, torch.zeros(2)) == math.inf


# Against float32 --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.table = nn.Parameter(torch.randn(size))
        self.net = nn.ModuleList([nn.Linear(size, size), nn.GELU(), nn.Linear(size, size)])

    def forward(self, x):
        y = x * self.table
        for part in self.net:
            y = part(y)
        return x + y


class Model(nn.Module):
    """Parameters of its own, a part, a list of blocks, a buffer, and a dtype that one part reads off another."""

    def __init__(self, size=16):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(size))
        self.embed = nn.Linear(size, size)
        self.blocks = nn.ModuleList([Block(size) for _ in range(3)])
        self.register_buffer("shift", torch.randn(size))

    def forward(self, x, *, time=None, return_dict=True):
        x = self.embed(x) * self.scale + self.shift + time
        for block in self.blocks:
            x = block(x)
        return (x,)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().bfloat16().requires_grad_(False)


def _call(dtype=torch.bfloat16):
    torch.manual_seed(1)
    return (torch.randn(2, 5, 16, dtype=dtype),), {"time": torch.randn(16, dtype=dtype), "return_dict": False}


def test_float32_velocity_is_that_of_the_upcast_model(model):
    whole = copy.deepcopy(model).float()
    args, kwargs = _call()
    expected = whole(args[0].float(), time=kwargs["time"].float())[0]
    found = quality.float32_velocity(model, _call())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert quality.relative_error(quality.velocity(model, _call()), found) > 1e-4  # bf16 is not float32


def test_float32_velocity_leaves_the_weights_alone(model):
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()}
    quality.float32_velocity(model, _call())
    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_one_block_at_a_time_is_in_float32(model, monkeypatch):
    seen = []
    forward = Block.forward

    def counting(self, x):
        seen.append([block.table.dtype == torch.float32 for block in reference[0].blocks])
        return forward(self, x)

    reference = []
    share = quality.sharing_copy
    monkeypatch.setattr(quality, "sharing_copy", lambda m: reference.append(share(m)) or reference[0])
    monkeypatch.setattr(Block, "forward", counting)
    quality.float32_velocity(model, _call())
    assert seen == [[True, False, False], [False, True, False], [False, False, True]]
    assert all(parameter.dtype == torch.bfloat16 for parameter in reference[0].parameters())


def test_weights_are_put_back_when_a_block_raises(model, monkeypatch):
    reference = []
    share = quality.sharing_copy
    monkeypatch.setattr(quality, "sharing_copy", lambda m: reference.append(share(m)) or reference[0])
    monkeypatch.setattr(Block, "forward", lambda self, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quality.float32_velocity(model, _call())
    assert all(parameter.dtype == torch.bfloat16 for parameter in reference[0].parameters())


def test_first_call_is_a_copy_of_the_first_arguments(model):
    x = torch.zeros(1, 2, 16, dtype=torch.bfloat16)

    def run():
        for _ in range(2):
            model(x, time=torch.zeros(16, dtype=torch.bfloat16))
            x.add_(1)

    args, kwargs = quality.first_call(model, run)
    assert args[0].eq(0).all() and set(kwargs) == {"time"} and not model._forward_pre_hooks
