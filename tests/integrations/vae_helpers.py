"""What the tests of VAEs have in common: clips, weights that do not hide mistakes, and the parity checks."""

import copy

import torch
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton is interpreted on the CPU


@torch.no_grad()
def drawn(module, seed=0):
    """Weights that keep the variance, norms and gates that are not the identity: in a fresh model biases outweigh the
    signal, whose rounding errors the next norm then blows up, for diffusers too.
    """
    g = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Conv3d, nn.Linear)):
            bound = (3 / part.weight[0].numel()) ** 0.5
            part.weight.uniform_(-bound, bound, generator=g)
            if part.bias is not None:
                part.bias.uniform_(-0.1, 0.1, generator=g)
        elif isinstance(part, (nn.GroupNorm, nn.LayerNorm)) and part.weight is not None:
            part.weight.uniform_(0.5, 1.5, generator=g)
            part.bias.uniform_(-0.5, 0.5, generator=g)
        for name, parameter in part.named_parameters(recurse=False):
            if "scale_shift_table" in name or "per_channel_scale" in name:
                parameter.normal_(0, 0.3, generator=g)
    return module


def full_width(kind, **config):
    """A decoder of the released widths: most of the time goes into drawing weights, so the encoder gets none."""
    with torch.device("meta"):
        vae = kind(**config)
    vae.decoder.to_empty(device="cpu")
    return drawn(vae.decoder) and vae.eval().requires_grad_(False)


def latents(frames=2, height=2, width=3, batch=1, channels=4, seed=1):
    return torch.randn(batch, channels, frames, height, width, generator=torch.Generator().manual_seed(seed))


def video(frames, height, width, seed=2):
    return torch.randn(1, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def encode(vae, clip):
    with torch.no_grad():
        return vae.encode(clip.to(vae.dtype)).latent_dist.parameters


def truth(function, vae, x):
    """The stock result in float64."""
    out = function(copy.deepcopy(vae).double(), x)
    assert out.dtype == torch.float64
    return out


def assert_equal_to_1e5(ours, stock, layout=True):
    assert ours.shape == stock.shape and ours.dtype == stock.dtype
    assert not layout or ours.stride() == stock.stride()
    error = (ours.double() - stock.double()).abs().max() / stock.double().abs().max()
    assert error <= 1e-5, f"relative error {error:.2e}"


def watch_layout(*roots):
    """``(names seen, what was wrong)``: hooks that look whether clips lie channels-last between modules."""
    seen, wrong = set(), []

    def look(name):
        def hook(module, arguments, output):
            clip = output[0] if isinstance(output, tuple) else output
            if clip.dim() == 5 and 0 not in clip.shape and clip.shape[1] > 1:
                seen.add(name)
                if not clip.movedim(1, -1)[0].is_contiguous():
                    wrong.append((name, tuple(clip.shape), clip.stride()))

        return hook

    for root in roots:
        for name, module in root.named_modules():
            # The roots themselves, and what ends the decoder, hand over the stock layout.
            if name and not name.startswith(("conv_out", "norm_out", "time_embedder")) and "norm" not in name:
                module.register_forward_hook(look(f"{type(root).__name__}.{name}"))
    return seen, wrong
