"""causal_conv3d by a library: when ``auto`` takes cuDNN, what is made for it, and oneDNN's entry point."""

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels import collect_env, dispatch, verdicts
from pyvideo_kernels.errors import DeviceError, UnsupportedError
from pyvideo_kernels.integrations import upfront
from pyvideo_kernels.ops import causal_conv3d_library as library
from pyvideo_kernels.ops import upsample_conv2d_library
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import check_op, samples

from . import helpers

OP = OPS["causal_conv3d"]
CARD = torch.device("cuda", 0)


@pytest.fixture
def cudnn(monkeypatch):
    """A torch of 2.9 with a cuDNN, whose version a test may change."""

    class Installed:
        version = "9.15.1"

    monkeypatch.setattr(collect_env, "cudnn_version", lambda: Installed.version)
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_90")
    return Installed


def _args(c, o, kernel=(3, 3, 3), dtype=torch.bfloat16):
    kwargs = next(samples(OP, dtype)) | {
        "x": torch.empty(1, 1, 2, 2, c, dtype=dtype), "weight": torch.empty(o, c, *kernel, dtype=dtype), "cache": None,
        "bias": None, "residual": None,
    }  # fmt: skip
    return OP.bind(**kwargs)


def _order(*args, **options):
    return dispatch.order(OP, CARD, torch.bfloat16, None, _args(*args, **options))


def test_cudnn_is_taken_where_it_is_known_to_be_fast(cudnn):
    ours, theirs = ("triton", "cudnn", "reference"), ("cudnn", "triton", "reference")
    assert dispatch.order(OP, CARD) == ours
    for channels in ((256, 256), (384, 384), (512, 256)):
        assert _order(*channels) == theirs
    for channels in ((96, 96), (192, 384), (384, 192), (256, 3)):
        assert _order(*channels) == ours
    assert _order(384, 384, kernel=(1, 3, 3)) == theirs
    # One or three products a value are no work to speak of beside the passes that a library needs.
    assert _order(384, 768, kernel=(3, 1, 1)) == _order(384, 384, kernel=(1, 1, 1)) == ours
    assert _order(384, 384, dtype=torch.float32) == ours


@pytest.mark.parametrize(
    ("torch_version", "version", "problem"), [("2.8.0", "9.10.2", "wrong"), ("2.9.1", "9.12", "slow")]
)
def test_cudnn_is_left_out_where_it_is_known_to_be_wrong_or_slow(cudnn, monkeypatch, torch_version, version, problem):
    monkeypatch.setattr(torch, "__version__", torch_version)
    cudnn.version = version
    assert _order(384, 384) == ("triton", "reference")
    rows = dispatch.explain(OP, CARD, args=_args(384, 384))
    assert f"cuDNN is left out: known to be {problem} in 3-D convolutions (conv3d-{problem}" in rows[0][2]
    assert not dict((impl, usable) for impl, usable, _ in dispatch.explain(OP, CARD))["cudnn"]
    with pytest.raises(UnsupportedError, match=f"leaves cuDNN {version} out"):
        dispatch.trusted(OP, "cudnn", CARD, torch.bfloat16)


def test_clips_beyond_32_bit_indices_are_not_for_cudnn(cudnn):
    args = list(_args(384, 384))
    for frames, order in ((55, "cudnn"), (56, "triton")):
        # One pixel, seen as a clip: [1, frames, 300, 320, 384], of which only the shape counts.
        args[0] = torch.empty(1, 1, 1, 1, 384, dtype=torch.bfloat16).expand(1, frames, 300, 320, 384)
        assert dispatch.order(OP, CARD, torch.bfloat16, None, args)[0] == order
    assert "2^31 elements" in dispatch.explain(OP, CARD, args=args)[0][2]
    with pytest.raises(UnsupportedError, match=r"fewer than 2\^31 elements; got 2\d{9}"):
        library.causal_conv3d_cudnn(*args)
    x = torch.empty(1, 1, 1, 1, 96).expand(1, 60, 240, 416, 96)
    upsample = upsample_conv2d_library.upsample_conv2d_cudnn
    with pytest.raises(UnsupportedError, match="upsample_conv2d: impl 'cudnn' takes fewer"):
        upsample(x, torch.empty(96, 96, 3, 3), None, None, 1, None, True, "zeros", None)


def test_dispatch_says_why(cudnn):
    first, *_ = dispatch.explain(OP, CARD, args=_args(384, 384))
    assert first[0] == "cudnn" and "cuDNN 9.15.1" in first[2]
    assert first[2].endswith("cuDNN first: 384 and 384 channels are at least 256")
    usual = dispatch.explain(OP, CARD, args=_args(96, 96))
    assert usual == dispatch.explain(OP, CARD) and [row[0] for row in usual] == ["triton", "cudnn", "reference"]


def _runs(monkeypatch, **functions):
    """Run calls as on a card whose implementations are these functions, none of them in need of a check."""
    ran = []

    def load(op, impl):
        def call(*args):
            ran.append(impl)
            return functions[impl](*args)

        return call

    monkeypatch.setattr(dispatch, "load", load)
    monkeypatch.setattr(dispatch, "check_runs_on", lambda *_: None)
    monkeypatch.setattr(dispatch, "trusted", lambda *_: True)
    monkeypatch.setitem(dispatch.AUTO_ORDER, "cpu", ("triton", "cudnn", "reference"))
    return ran


def test_an_explicit_request_gets_what_it_names(cudnn, monkeypatch):
    def refuses(*_):
        raise UnsupportedError("not this")

    result = (torch.zeros(1), torch.zeros(0))
    ran = _runs(monkeypatch, triton=refuses, cudnn=lambda *_: result)
    args = _args(384, 384)
    with pytest.raises(UnsupportedError, match="not this"):
        dispatch.run(OP, (*args, "triton"))
    assert ran == ["triton"]
    dispatch.run(OP, (*args, "auto"))
    dispatch.run(OP, (*_args(96, 96), "auto"))
    # cuDNN first for many channels; for few of them only where Triton cannot.
    assert ran[1:] == ["cudnn", "triton", "cudnn"]


def test_all_that_a_call_may_run_is_checked_up_front(cudnn, monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "trusted", lambda op, impl, *_: asked.append(impl) or True)
    rows = upfront.check(["causal_conv3d"], CARD, torch.bfloat16, None)
    assert asked == [row.impl for row in rows] == ["triton", "cudnn"]


def test_a_verdict_on_cudnn_is_about_its_version(cudnn):
    before = verdicts.digest(OP, "cudnn")
    cudnn.version = "9.16"
    assert verdicts.digest(OP, "cudnn") == "cuDNN 9.16" != before
    assert verdicts.needs_check("cudnn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_made_for_cudnn_matches_float64(cudnn, dtype):
    """Pads, joins and epilogues, with the CPU's convolution in the place of cuDNN's."""
    assert check_op(OP, "cudnn", "cpu", dtype, library.causal_conv3d_cudnn) == sum(1 for _ in samples(OP, dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not helpers.GPU, reason="no CUDA device: cuDNN runs on one")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cudnn_matches_float64(dtype):
    assert check_op(OP, "cudnn", "cuda", dtype)


def test_where_there_is_no_cudnn(monkeypatch):
    x, weight = torch.zeros(1, 1, 2, 2, 4), torch.zeros(4, 4, 3, 3, 3)
    if not helpers.GPU:
        with pytest.raises(DeviceError, match="impl 'cudnn' needs CUDA tensors"):
            pv.causal_conv3d(x, weight, impl="cudnn")
    monkeypatch.setattr(collect_env, "cudnn_version", lambda: None)
    with pytest.raises(UnsupportedError, match="built with cuDNN; use impl='triton'"):
        library.causal_conv3d_cudnn(*_args(4, 4))
    monkeypatch.setattr(collect_env, "cudnn_version", lambda: "9.15")
    with torch.backends.cudnn.flags(enabled=False), pytest.raises(UnsupportedError, match="cudnn.enabled = True"):
        library.causal_conv3d_cudnn(*_args(4, 4))


@pytest.mark.parametrize("mode", ["replicate", "reflect"])
def test_the_padded_clip_is_torchs(mode):
    """Against torch.nn.functional.pad, which has both modes (in time it is the oldest frame that is repeated)."""
    x = torch.randn(2, 3, 4, 5, 6)
    weight = torch.empty(1, 6, 3, 5, 3)
    got, left = library.padded(x, None, weight, mode, 1)
    expected = torch.nn.functional.pad(x.permute(0, 4, 1, 2, 3), (1, 1, 2, 2, 0, 0), mode)
    expected = torch.nn.functional.pad(expected, (0, 0, 0, 0, 2, 1), "replicate")
    assert torch.equal(got, expected) and left == [0, 0, 0]
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    joined, _ = library.padded(x[:, 1:], x[:, :1], weight, mode, 1)
    assert torch.equal(joined, expected[:, :, 1:])


def test_a_residual_goes_the_way_back():
    y = torch.randn(1, 2, 3, 4, 24)
    from pyvideo_kernels.reference.causal_conv3d import unfold_channels

    for epilogue, factor in (("interleave", (1, 1, 1)), ("pixel_shuffle", (2, 2, 3)), (None, (1, 1, 1))):
        assert torch.equal(library.fold_channels(unfold_channels(y, epilogue, factor), epilogue, factor), y)
