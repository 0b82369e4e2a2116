"""Tiny random Wan models, their float64 truth, and the parity check that every case goes through."""

import copy

import torch
from diffusers import WanTransformer3DModel
from torch.overrides import TorchFunctionMode

from pyvideo_kernels.testing.compare import assert_close


def tiny(layers=2, seed=0, **config):
    """Two layers, two heads of 16; odd enough sizes that a swapped axis shows."""
    torch.manual_seed(seed)
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": layers,
        "rope_max_seq_len": 16,
    }
    model = WanTransformer3DModel(**{**settings, **config}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh norm weights are ones, biases zeros, tables tiny, attention uniform: none would show a mistake.
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter))
            elif "to_v" in name or "to_out" in name:
                parameter.mul_(3)
            elif "scale_shift_table" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


def inputs(dtype=torch.float32, batch=2, seed=1, channels=4, text=7, per_token=False):
    """Keyword arguments of one forward call: 2 x 2 x 3 tokens."""
    g = torch.Generator().manual_seed(seed)
    frames, height, width = 2, 4, 6
    timestep = torch.tensor([37, 905][:batch])
    if per_token:
        tokens = frames * (height // 2) * (width // 2)
        timestep = torch.where(torch.arange(tokens) < tokens // 2, 0, timestep[:, None])
    return {
        "hidden_states": torch.randn(batch, channels, frames, height, width, generator=g).to(dtype),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(batch, text, 16, generator=g).to(dtype),
    }


class Float64(TorchFunctionMode):
    """Turns the model's casts to fp32 into casts to float64, so that stock code runs in float64 throughout."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*args, **kwargs)


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return value


def truth(model, arguments):
    """What the stock ``model`` computes in float64 with its present weights."""
    model = copy.deepcopy(model).double()
    with torch.no_grad(), Float64():
        out = model(**{name: double(value) for name, value in arguments.items()}).sample
    assert out.dtype == torch.float64
    return out


def run(model, arguments):
    with torch.no_grad():
        return model(**arguments).sample


def used(report):
    """Names of the ops that ran since the report."""
    return set(report.calls())


WAN_OPS = {
    "layer_norm_modulate",
    "gate_residual",
    "gate_residual_norm_modulate",
    "rms_norm",
    "qk_norm_rope",
    "patch_embed3d",
    "linear_gelu",
    "final_layer",
}


def instance_dicts(model):
    """What every module's instance dict holds, by identity, without the containers that torch itself refills."""
    return {name: {key: id(value) for key, value in module.__dict__.items()} for name, module in model.named_modules()}


__all__ = ["WAN_OPS", "Float64", "assert_close", "double", "inputs", "instance_dicts", "run", "tiny", "truth", "used"]
