"""Videos and models on which it matters which keys are seen, masks made without the package, and a recorder."""

import copy

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import pyvideo_kernels as pv
from pyvideo_kernels.integrations.diffusers import wan_attention

from .helpers import tiny

GRID = (3, 5, 6)
WINDOW = (3, 3, 2)
FIRST_STEP = {"step_index": 0, "num_inference_steps": 4}
LATER_STEP = {"step_index": 1, "num_inference_steps": 4}


def inputs(batch=1, grid=GRID):
    g = torch.Generator().manual_seed(1)
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w, generator=g),
        "timestep": torch.tensor([37, 905][:batch]),
        "encoder_hidden_states": torch.randn(batch, 7, 16, generator=g),
    }


def model_of(layers=2, **config):
    """As tiny(), with attention sharp enough that it matters which keys are seen."""
    model = tiny(layers, **config)
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.norm_q.weight.mul_(2)
    return model


# An independent mask ---------------------------------------------------------------------------------------------


def axis_mask(n, window, stride=1):
    """[n, n]: the run of `window` keys around each query's leader, pushed inside the axis."""
    window = min(window, n)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        leader = min(i // stride * stride + stride // 2, n - 1)
        start = min(max(leader - window // 2, 0), n - window)
        mask[i, start : start + window] = True
    return mask


def mask_of(window, grid=GRID, stride=(1, 1, 1)):
    t, h, w = (axis_mask(n, k, s) for n, k, s in zip(grid, window, stride, strict=True))
    n = grid[0] * grid[1] * grid[2]
    return torch.einsum("ab,cd,ef->acebdf", t.int(), h.int(), w.int()).reshape(n, n).bool()


class Masked(WanAttnProcessor):
    """The stock processor with a mask [heads, S, S] in self-attention."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        mask = self.mask if encoder_hidden_states is None else attention_mask
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


def masked(model, masks):
    """A stock copy of ``model`` whose block i sees ``masks[i]`` (None: everything)."""
    model = copy.deepcopy(model)
    pv.restore(model)
    for block, mask in zip(model.blocks, masks, strict=True):
        if mask is not None:
            block.attn1.set_processor(Masked(mask[None]))
    return model


class Recorder:
    """What the attention ops were asked for, in order: "dense", or the window, or the tiles."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("spacetime_attention", "video_sparse_attention"):
            monkeypatch.setattr(wan_attention, name, self.recording(getattr(wan_attention, name)))

    def recording(self, op):
        def call(*args, **kwargs):
            key = {"spacetime_attention": "window", "video_sparse_attention": "top_k"}[op.__name__]
            asked = kwargs.get(key)
            self.calls.append("dense" if asked is None else tuple(asked) if isinstance(asked, list) else asked)
            return op(*args, **kwargs)

        return call

    def take(self):
        calls, self.calls = self.calls, []
        return calls
