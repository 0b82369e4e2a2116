"""Wan's transformer, eager against accelerated, both judged against float64; and mistakes that must be seen."""

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels.integrations.diffusers import wan_attention, wan_forwards
from pyvideo_kernels.testing.compare import Mismatch

from .helpers import WAN_OPS, assert_close, inputs, run, tiny, truth, used


def image_to_video(dtype=torch.float32):
    """Added keys and values on image tokens; the stock processor takes the last 512 tokens as text."""
    model = tiny(image_dim=8, added_kv_proj_dim=32, in_channels=6)
    arguments = inputs(channels=6, text=512, batch=1)
    g = torch.Generator().manual_seed(2)
    arguments["encoder_hidden_states_image"] = torch.randn(1, 5, 8, generator=g)
    return model, arguments


CASES = {
    "2.1": lambda: (tiny(), inputs()),
    "i2v": image_to_video,
    "ti2v": lambda: (tiny(), inputs(per_token=True)),
    "no cross norm": lambda: (tiny(cross_attn_norm=False), inputs()),
    "temporal patch": lambda: (tiny(patch_size=(2, 1, 3)), inputs()),
}


def check(model, arguments, **options):
    """Accelerate ``model`` and hold its output against the stock one; the report."""
    ref64, eager = truth(model, arguments), run(model, arguments)
    report = pv.accelerate(model, **options)
    assert_close(run(model, arguments), ref64, eager, str(options))
    pv.restore(model)
    return report


@pytest.mark.parametrize("name", CASES)
def test_every_variant_in_fp32(name):
    report = check(*CASES[name](), strict=True)
    assert used(report) == WAN_OPS and report.complete and not report.fallbacks()


@pytest.mark.parametrize("name", ["2.1", "ti2v", "i2v"])
@pytest.mark.parametrize("way", ["to", "load"])
def test_bf16_by_to_and_by_load(name, way, tmp_path):
    """``.to`` casts everything; loading keeps the modulation tables and the affine norms in fp32."""
    model, arguments = CASES[name]()
    if way == "to":
        model = model.to(torch.bfloat16)
    else:
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert model.blocks[0].scale_shift_table.dtype == torch.float32
    arguments = {k: v.bfloat16() if v.is_floating_point() else v for k, v in arguments.items()}
    report = check(model, arguments, strict=True)
    assert used(report) == WAN_OPS and not report.fallbacks()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_dense_attention_needs_the_grid_and_gets_it(impl):
    report = check(tiny(), inputs(), attention="dense", impl=impl, strict=True)
    assert report.calls()["spacetime_attention"] and not report.fallbacks()
    if impl == "reference":
        assert all(set(impls) == {"reference"} for impls in report.calls().values())


@pytest.mark.parametrize("name", ["2.1", "ti2v"])
def test_every_triton_kernel_in_the_model(name):
    """On a CPU in Triton's interpreter, on a GPU compiled: the strides and shapes that a model really passes."""
    model, arguments = CASES[name]()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = {key: value.to(device) for key, value in arguments.items()}
    report = check(model.to(device), arguments, impl="triton", attention="dense", strict=True)
    assert used(report) == WAN_OPS | {"spacetime_attention"} and not report.fallbacks()
    assert all(set(impls) == {"triton"} for impls in report.calls().values())


@pytest.mark.parametrize("op", sorted(WAN_OPS))
def test_one_op_alone(op):
    """Each op can be had alone, and nothing else runs then."""
    report = check(tiny(), inputs(), ops=[op])
    assert used(report) == {op} and not report.fallbacks()


# Mistakes --------------------------------------------------------------------------------------------------------


def _flipped_rope(q, k, q_weight, k_weight, cos, sin, **options):
    return pv.qk_norm_rope(q, k, q_weight, k_weight, cos, -sin, **options)


def _half_layout(*args, **options):
    return pv.qk_norm_rope(*args, layout="half", **options)


def _swapped_weights(q, k, q_weight, k_weight, *tables, **options):
    return pv.qk_norm_rope(q, k, k_weight, q_weight, *tables, **options)


def _unrotated_key(q, k, q_weight, k_weight, cos, sin, **options):
    rotated, _ = pv.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, **options)
    return rotated, pv.qk_norm_rope(q, k, q_weight, k_weight, **options)[1]


def _swapped_modulation(x, scale=None, shift=None, **options):
    return pv.layer_norm_modulate(x, shift, scale, **options)


def _dropped_gate(x, y, gate=None, *modulation, **options):
    return pv.gate_residual_norm_modulate(x, y, None, *modulation, **options)


def _swapped_fused_modulation(x, y, gate=None, scale=None, shift=None, **options):
    return pv.gate_residual_norm_modulate(x, y, gate, shift, scale, **options)


def _dropped_last_gate(x, y, gate=None, **options):
    return pv.gate_residual(x, y, **options)


def _dropped_affine(*args, weight=None, bias=None, **options):
    return pv.gate_residual_norm_modulate(*args, **options)


def _swapped_final_modulation(x, scale, shift, *rest, **options):
    return pv.final_layer(x, shift, scale, *rest, **options)


def _transposed_patches(x, scale, shift, weight, bias, grid, patch, **options):
    video = pv.final_layer(x, scale, shift, weight, bias, grid, patch, **options)
    blocks = video.unflatten(4, (-1, patch[2])).unflatten(3, (-1, patch[1]))
    return blocks.transpose(4, 6).flatten(5, 6).flatten(3, 4)


def _no_bias(video, weight, bias=None, **options):
    return pv.patch_embed3d(video, weight, **options)


def _gelu_without_bias(x, weight, bias=None, **options):
    return pv.linear_gelu(x, weight, **options)


def _no_gelu(x, weight, bias=None, **options):
    return torch.nn.functional.linear(x, weight, bias)


def _no_weight(x, weight=None, **options):
    return pv.rms_norm(x, **options)


MISTAKES = {
    "flipped rope sign": ("qk_norm_rope", _flipped_rope),
    "rope layout": ("qk_norm_rope", _half_layout),
    "q and k weights swapped": ("qk_norm_rope", _swapped_weights),
    "key not rotated": ("qk_norm_rope", _unrotated_key),
    "scale and shift swapped": ("layer_norm_modulate", _swapped_modulation),
    "scale and shift swapped, fused": ("gate_residual_norm_modulate", _swapped_fused_modulation),
    "gate dropped, fused": ("gate_residual_norm_modulate", _dropped_gate),
    "affine dropped": ("gate_residual_norm_modulate", _dropped_affine),
    "last gate dropped": ("gate_residual", _dropped_last_gate),
    "final scale and shift swapped": ("final_layer", _swapped_final_modulation),
    "pixels transposed in a patch": ("final_layer", _transposed_patches),
    "patch bias dropped": ("patch_embed3d", _no_bias),
    "feed-forward bias dropped": ("linear_gelu", _gelu_without_bias),
    "no activation": ("linear_gelu", _no_gelu),
    "cross-attention norm weight dropped": ("rms_norm", _no_weight),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_fails_the_parity_check(mistake, dtype, monkeypatch):
    op, wrong = MISTAKES[mistake]
    model = tiny().to(dtype)
    home = wan_attention if hasattr(wan_attention, op) else wan_forwards
    monkeypatch.setattr(home, op, wrong)
    with pytest.raises(Mismatch):
        check(model, inputs(dtype))
