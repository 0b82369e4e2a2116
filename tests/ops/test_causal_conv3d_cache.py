"""`next_cache`: the past of a chunk, taken from the one before it."""

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels.ops.causal_conv3d import next_cache

from . import helpers


def _randn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect", "first_frame"])
def test_chunks_with_their_next_cache_equal_the_whole_clip(mode, impl, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, weight = _randn(1, 5, 2, 3, 16).to(helpers.DEVICE), _randn(16, 16, 3, 1, 1, scale=0.15).to(helpers.DEVICE)
    whole = pv.causal_conv3d(x, weight, pad_mode=mode, pad_end=1, impl=impl)
    parts, cache, start = [], None, 0
    for frames in (1, 1, 3, 0):
        part, last = x[:, start : start + frames], start + frames == 5 and frames == 0
        if frames or last:
            parts.append(pv.causal_conv3d(part, weight, cache=cache, pad_mode=mode, pad_end=int(last), impl=impl))
        cache, start = next_cache(part, cache, 2), start + frames
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("new", "held", "shared"),
    [(1, None, "x"), (2, None, "x"), (4, None, "x"), (5, None, None), (3, 2, "x"), (1, 2, None), (1, 1, None),
     (0, 2, "cache"), (0, 1, "cache")],
)  # fmt: skip
def test_next_cache_is_a_view_where_little_is_kept_alive(new, held, shared):
    x, cache = _randn(1, new, 2, 3, 4), None if held is None else _randn(1, held, 2, 3, 4, seed=1)
    got = next_cache(x, cache, 2)
    both = x if cache is None else torch.cat([cache, x], 1)
    assert torch.equal(got, both[:, -2:])
    storages = {
        "x": x.untyped_storage().data_ptr(),
        "cache": None if cache is None else cache.untyped_storage().data_ptr(),
    }
    own = got.untyped_storage()
    assert own.data_ptr() == storages[shared] if shared else own.data_ptr() not in storages.values()
    assert own.nbytes() <= 2 * 2 * 2 * 3 * 4 * 4


def test_next_cache_of_nothing():
    x = _randn(1, 2, 2, 3, 4)
    assert next_cache(x, None, 0) is None and next_cache(x[:, :0], None, 2) is None
    assert torch.equal(next_cache(x[:, :1], x[:, :0], 2), x[:, :1])
