"""The machinery: in place, under hooks, reversible, refusing what it does not know; and the report."""

import copy
import io
import subprocess
import sys
import types

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

import pyvideo_kernels as pv
from pyvideo_kernels.errors import ModelError, UnsupportedError, ValueOptionError
from pyvideo_kernels.integrations import swap
from pyvideo_kernels.integrations.diffusers import sources, wan

from .helpers import WAN_OPS, inputs, instance_dicts, run, tiny, used


def test_importing_the_package_and_asking_for_accelerate_imports_no_diffusers():
    code = (
        "import sys, pyvideo_kernels as pv\npv.accelerate, pv.restore, pv.Report\n"
        "loaded = {'diffusers', 'transformers', 'accelerate', 'rich'} & set(sys.modules)\n"
        "sys.exit(repr(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_restore_leaves_every_instance_dict_as_it_was():
    model = tiny()
    before = instance_dicts(model)
    pv.accelerate(model)
    changed = instance_dicts(model)
    assert changed != before and changed.keys() == before.keys()
    pv.restore(model)
    assert instance_dicts(model) == before
    pv.restore(model)  # nothing to undo is no error
    assert instance_dicts(model) == before


def test_accelerating_changes_no_types_names_or_parameters():
    model = tiny()
    state = {name: value.data_ptr() for name, value in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    pv.accelerate(model)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == state
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_twice_is_once_and_other_ops_reconfigure():
    model = tiny()
    before = instance_dicts(model)
    first = pv.accelerate(model)
    again = pv.accelerate(model)
    assert first.to_dict()["modules"] == again.to_dict()["modules"]
    run(model, inputs())
    assert again.calls()["gate_residual"] == {"cpu": 2} or again.calls()["gate_residual"] == {"reference": 2}
    other = pv.accelerate(model, ops={"rms_norm"})
    run(model, inputs())
    assert used(other) == {"rms_norm"}
    assert len(list(swap.swapped(model))) == len(other.to_dict()["modules"]) == 4
    pv.restore(model)
    assert instance_dicts(model) == before


class Doubled(ModelHook):
    def post_forward(self, module, output):
        return output * 2


class Replaced(ModelHook):
    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs) * 2


@pytest.mark.parametrize("hook", [Doubled, Replaced])
def test_diffusers_hooks_before_and_after(hook):
    """A hook that was there keeps running, its removal keeps our forward, and restore keeps the hook."""
    model, arguments = tiny(), inputs()
    plain = run(model, arguments)
    block = model.blocks[0]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(hook(), "test")
    hooked = run(model, arguments)
    before = instance_dicts(model)
    report = pv.accelerate(model)
    torch.testing.assert_close(run(model, arguments), hooked)
    assert used(report) == WAN_OPS and report.calls()["gate_residual"].popitem()[1] == 2
    pv.restore(model)
    assert instance_dicts(model) == before
    torch.testing.assert_close(run(model, arguments), hooked, rtol=0, atol=0)

    report = pv.accelerate(model)
    block._diffusers_hook.remove_hook("test")
    torch.testing.assert_close(run(model, arguments), plain)
    assert report.calls()["gate_residual"].popitem()[1] == 2
    # And the other way round: hooked after, restored under the hook, then unhooked.
    block._diffusers_hook.register_hook(hook(), "test")
    torch.testing.assert_close(run(model, arguments), hooked)
    pv.restore(model)
    torch.testing.assert_close(run(model, arguments), hooked, rtol=0, atol=0)
    block._diffusers_hook.remove_hook("test")
    torch.testing.assert_close(run(model, arguments), plain, rtol=0, atol=0)
    assert not list(swap.swapped(model)) and swap.obstacle(block) is None


@pytest.mark.parametrize("diffusers_first", [True, False])
def test_hooks_of_both_libraries_on_one_module(diffusers_first):
    model, arguments = tiny(), inputs()
    norm = model.blocks[0].norm2

    def accelerate_hook():
        add_hook_to_module(norm, AlignDevicesHook(execution_device="cpu", offload=True))

    def diffusers_hook():
        HookRegistry.check_if_exists_or_initialize(norm).register_hook(ModelHook(), "test")

    plain = run(model, arguments)
    first, second = (diffusers_hook, accelerate_hook) if diffusers_first else (accelerate_hook, diffusers_hook)
    first()
    second()
    before = instance_dicts(model)
    pv.accelerate(model, strict=True)
    assert norm.weight.device.type == "meta"
    torch.testing.assert_close(run(model, arguments), plain)
    pv.restore(model)
    assert instance_dicts(model) == before


def test_a_hook_of_accelerate_added_later_and_removed_again():
    model, arguments = tiny(), inputs()
    plain = run(model, arguments)
    report = pv.accelerate(model)
    add_hook_to_module(model.blocks[1].norm2, AlignDevicesHook(execution_device="cpu", offload=True))
    torch.testing.assert_close(run(model, arguments), plain)
    remove_hook_from_module(model.blocks[1].norm2)
    torch.testing.assert_close(run(model, arguments), plain)
    assert report.calls()["gate_residual_norm_modulate"].popitem()[1] == 8


def test_a_foreign_forward_is_left_and_named():
    model, arguments = tiny(), inputs()
    plain = run(model, arguments)

    def foreign(self, x):
        return 2 * type(self).forward(self, x)

    model.blocks[1].norm2.forward = types.MethodType(foreign, model.blocks[1].norm2)
    doubled = run(model, arguments)
    assert not torch.allclose(doubled, plain)
    before = instance_dicts(model)
    with pytest.raises(UnsupportedError, match=r"blocks\.1\.norm2: .*already replaced by .*foreign"):
        pv.accelerate(model, strict=True)
    assert instance_dicts(model) == before  # strict raises before anything is changed
    report = pv.accelerate(model)
    left = report.to_dict()["modules"]["blocks.1.norm2"]
    assert not left["runs"] and "foreign" in left["left"]["gate_residual_norm_modulate"] and not report.complete
    torch.testing.assert_close(run(model, arguments), doubled)


def test_subclasses_and_odd_weights_are_left():
    class Mine(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) * 0

    class Packed(nn.Parameter):
        pass

    model = tiny()
    model.blocks[0].attn1.norm_q.__class__ = Mine
    model.blocks[1].norm2.weight = Packed(model.blocks[1].norm2.weight.data)
    stock = run(model, inputs())
    report = pv.accelerate(model)
    modules = report.to_dict()["modules"]
    assert "Mine, not a plain RMSNorm" in modules["blocks.0.attn1.norm_q"]["left"]["qk_norm_rope"]
    assert "its weight is a Packed" in modules["blocks.1.norm2"]["left"]["gate_residual_norm_modulate"]
    torch.testing.assert_close(run(model, inputs()), stock)
    assert list(report.fallbacks()) == ["qk_norm_rope"]


def test_a_weight_that_becomes_odd_later_falls_back_and_is_counted():
    class Packed(nn.Parameter):
        pass

    model = tiny()
    stock = run(model, inputs())
    report = pv.accelerate(model)
    model.blocks[1].norm2.weight = Packed(model.blocks[1].norm2.weight.data)
    model.blocks[1].attn1.norm_k.weight = Packed(model.blocks[1].attn1.norm_k.weight.data)
    torch.testing.assert_close(run(model, inputs()), stock)
    counted = report.fallbacks()
    assert counted["gate_residual_norm_modulate"] == counted["qk_norm_rope"] == {"weight is a Packed": 1}
    strict = pv.accelerate(model, ops=WAN_OPS - {"gate_residual_norm_modulate", "qk_norm_rope"}, strict=False)
    assert strict.to_dict()["modules"]["blocks.1.norm2"]["left"]
    pv.restore(model)


def test_strict_refuses_a_call_that_would_fall_back():
    model = tiny()
    pv.accelerate(model, strict=True)
    model.blocks[0].attn1.set_processor(type("Other", (type(model.blocks[0].attn1.processor),), {})())
    with pytest.raises(UnsupportedError, match="strict, and this call cannot run: processor Other"):
        run(model, inputs())


def test_a_deep_copy_is_independent():
    model, arguments = tiny(), inputs()
    report = pv.accelerate(model)
    expected = run(model, arguments)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    before = report.calls()
    torch.testing.assert_close(run(twin, arguments), expected, rtol=0, atol=0)
    assert report.calls() != before
    settings = {id(s) for _, _, s in swap.swapped(model)}, {id(s) for _, _, s in swap.swapped(twin)}
    assert len(settings[0]) == len(settings[1]) == 1 and settings[0] != settings[1]
    pv.restore(model)
    assert list(swap.swapped(twin))
    torch.testing.assert_close(run(twin, arguments), expected, rtol=0, atol=0)
    pv.restore(twin)
    assert not list(swap.swapped(twin))
    torch.testing.assert_close(run(twin, arguments), expected)


def test_a_pickle_is_the_stock_model():
    model, arguments = tiny(), inputs()
    stock = run(model, arguments)
    pv.accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert not list(swap.swapped(loaded))
    torch.testing.assert_close(run(loaded, arguments), stock, rtol=0, atol=0)
    report = pv.accelerate(loaded, strict=True)
    run(loaded, arguments)
    assert used(report) == WAN_OPS


def test_unknown_sources_are_refused_with_the_class_and_the_remedy(monkeypatch):
    model = tiny()
    before = instance_dicts(model)
    place = "diffusers.models.transformers.transformer_wan:WanTransformerBlock"
    monkeypatch.setitem(wan.SOURCES, place, {"0123456789abcdef": "0.42.1"})
    with pytest.raises(ModelError, match=r"diffusers .*WanTransformerBlock .*pip install diffusers==0\.42\.1"):
        pv.accelerate(model)
    assert instance_dicts(model) == before


def test_known_sources_are_the_installed_ones():
    sources.check(wan.SOURCES)
    with pytest.raises(ModelError, match="cannot read the source of Gone"):
        sources.check({"diffusers.models.normalization:Gone": {"0": "0.42.1"}})


@pytest.mark.parametrize("target", [nn.Linear(2, 2), object(), None, "wan"])
def test_unknown_targets_are_refused(target):
    with pytest.raises(ModelError, match="must be one of WanPipeline, .*; got"):
        pv.accelerate(target)


def test_options_are_checked_before_anything_is_done():
    model = tiny()
    with pytest.raises(ValueOptionError, match="unknown op nom; there are layer_norm_modulate"):
        pv.accelerate(model, ops=["rms_norm", "nom"])
    with pytest.raises(ValueOptionError, match="'all' or a collection"):
        pv.accelerate(model, ops="rms_norm")
    with pytest.raises(ValueOptionError, match="`impl` must be one of"):
        pv.accelerate(model, impl="best")
    with pytest.raises(ValueOptionError, match="`attention` must be one of dense, .*; got 'sparse'"):
        pv.accelerate(model, attention="sparse")
    assert not list(swap.swapped(model))


def test_an_explicit_impl_never_falls_back():
    model = tiny()
    pv.accelerate(model, impl="cuda")
    with pytest.raises((UnsupportedError, pv.errors.DeviceError)):
        run(model, inputs())


def test_the_signature_is_that_of_the_stock_forward_and_more():
    import inspect

    model = tiny()
    stock = list(inspect.signature(model.blocks[0].forward).parameters)
    pv.accelerate(model)
    assert list(inspect.signature(model.blocks[0].forward).parameters)[: len(stock)] == stock


# Report ----------------------------------------------------------------------------------------------------------


def test_the_report_says_what_runs_where(monkeypatch):
    model = tiny()
    report = pv.accelerate(model)
    run(model, inputs())
    data = report.to_dict()
    assert data["modules"]["blocks.1.norm2"] == {"runs": ["gate_residual_norm_modulate"], "left": {}}
    assert data["complete"] and "blocks.*.ffn" in data["kept"] and data["calls"] == report.calls()
    text = str(report)
    assert "blocks.*.norm1 (2)" in text and "layer_norm_modulate: " in text and "module calls" in text
    assert "0 left" in repr(report)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    plain = str(report)
    assert plain == report.plain() and "blocks.*.norm1 (2) runs layer_norm_modulate" in " ".join(plain.split())


def test_calls_count_since_the_report_only():
    model = tiny()
    pv.accelerate(model)
    run(model, inputs())
    report = pv.accelerate(model)
    assert report.calls() == {} and report.fallbacks() == {}
