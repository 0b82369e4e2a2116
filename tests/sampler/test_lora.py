"""LoRA files in the spellings people have, folded into the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pyvideo_kernels.error_types import ModelError
from pyvideo_kernels.sampler.lora import check, fold, names_of
from pyvideo_kernels.sampler.modeldir import read_model

MODULES = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj", "proj_out")


@pytest.fixture
def target(pipe: Any) -> Any:
    class Pipe:
        transformer = copy.deepcopy(pipe.transformer)
        transformer_2 = None

    return Pipe()


def parts(pipe: Any, rank: int = 2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    out = {}
    for name in MODULES:
        weight = pipe.transformer.get_submodule(name).weight
        out[name] = torch.randn(rank, weight.shape[1]), torch.randn(weight.shape[0], rank)
    return out


def written(path: Path, pipe: Any, spelling: str) -> Path:
    tensors = {}
    for name, (down, up) in parts(pipe).items():
        original = next(n for n in names_of(name) if "." in n and n != name) if name != "proj_out" else "head.head"
        if spelling == "diffusers":
            pair = f"transformer.{name}.lora_A.weight", f"transformer.{name}.lora_B.weight"
        elif spelling == "peft":
            pair = f"base_model.model.{name}.lora_A.default.weight", f"base_model.model.{name}.lora_B.default.weight"
        elif spelling == "wan":
            pair = f"diffusion_model.{original}.lora_down.weight", f"diffusion_model.{original}.lora_up.weight"
        else:
            flat = "lora_unet_" + original.replace(".", "_")
            pair = f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"
            tensors[f"{flat}.alpha"] = torch.tensor(1.0)
        tensors[pair[0]], tensors[pair[1]] = down, up
    save_file(tensors, str(path))
    return path


@pytest.mark.parametrize("spelling", ["diffusers", "peft", "wan", "kohya"])
def test_every_spelling_lands_on_the_same_weights(tmp_path: Path, target: Any, spelling: str) -> None:
    before = copy.deepcopy(target.transformer)
    assert fold(target, written(tmp_path / "l.safetensors", target, spelling), 0.5) == len(MODULES)
    ratio = 0.5 if spelling == "kohya" else 1.0  # alpha 1 of rank 2
    for name, (down, up) in parts(target).items():
        expected = before.get_submodule(name).weight + 0.5 * ratio * up @ down
        torch.testing.assert_close(target.transformer.get_submodule(name).weight, expected)
    for name, parameter in before.named_parameters():
        if name.removesuffix(".weight") not in MODULES:
            assert torch.equal(parameter, target.transformer.get_parameter(name)), name


@pytest.mark.parametrize("spelling", ["diffusers", "kohya"])
def test_keys_are_checked_by_the_headers_alone(tmp_path: Path, model_dir: Path, target: Any, spelling: str) -> None:
    model = read_model(model_dir)
    check(model, written(tmp_path / "l.safetensors", target, spelling))
    for name in ("transformer_2.proj_out.diff", "blocks.0.attn1.to_x.diff"):
        save_file({"proj_out.diff": torch.ones(16, 32), name: torch.ones(1)}, str(tmp_path / "l.safetensors"))
        with pytest.raises(ModelError, match=f"it has no place for {name};"):
            check(model, tmp_path / "l.safetensors")


def test_original_names_are_wans() -> None:
    for name, original in (
        ("blocks.3.attn1.to_q", "blocks.3.self_attn.q"),
        ("blocks.3.attn1.to_out.0", "blocks.3.self_attn.o"),
        ("blocks.3.attn2.add_k_proj", "blocks.3.cross_attn.k_img"),
        ("blocks.3.attn2.norm_q", "blocks.3.cross_attn.norm_q"),
        ("blocks.3.ffn.net.2", "blocks.3.ffn.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("proj_out", "head.head"),
    ):
        assert original in names_of(name)


def test_the_same_as_peft(tmp_path: Path, pipe: Any) -> None:
    pytest.importorskip("peft", reason="PEFT is the other implementation")
    file = written(tmp_path / "l.safetensors", pipe, "diffusers")

    class Ours:
        transformer = copy.deepcopy(pipe.transformer)
        transformer_2 = None

    fold(Ours, file, 1.0)
    theirs = copy.deepcopy(pipe.transformer)
    theirs.load_lora_adapter(str(file), prefix="transformer")
    x = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, 16), "return_dict": False,
    }  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(Ours.transformer(**x)[0], theirs(**x)[0], rtol=1e-4, atol=1e-5)


def test_differences_of_weight_and_bias(tmp_path: Path, target: Any) -> None:
    before = copy.deepcopy(target.transformer.proj_out)
    tensors = {"proj_out.diff": torch.ones_like(before.weight), "proj_out.diff_b": torch.ones_like(before.bias)}
    save_file(tensors, str(tmp_path / "d.safetensors"))
    fold(target, tmp_path / "d.safetensors", 2.0)
    torch.testing.assert_close(target.transformer.proj_out.weight, before.weight + 2)
    torch.testing.assert_close(target.transformer.proj_out.bias, before.bias + 2)


@pytest.mark.parametrize(
    "tensors, wanted",
    [
        ({"transformer.blocks.9.attn1.to_q.lora_A.weight": (2, 32)}, "it has no place for transformer.blocks.9"),
        ({"unet.x": (1,)}, "it has no place for unet.x"),
        ({"transformer_2.proj_out.lora_A.weight": (2, 32)}, "it has no place for transformer_2.proj_out"),
        ({"proj_out.lora_A.weight": (2, 32)}, "one half of a pair"),
        ({"proj_out.lora_A.weight": (2, 48), "proj_out.lora_B.weight": (16, 2)}, r"the model's weight is \[16, 32\]"),
        ({"proj_out.diff": (1, 1)}, r"the weight is \[16, 32\]"),
        ({}, "the file is empty"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    tmp_path: Path, target: Any, tensors: dict[str, tuple[int, ...]], wanted: str
) -> None:
    before = copy.deepcopy(target.transformer.state_dict())
    good = {"blocks.0.attn1.to_q.diff": torch.ones(32, 32)} if tensors else {}
    save_file(good | {k: torch.ones(s) for k, s in tensors.items()}, str(tmp_path / "l.safetensors"))
    with pytest.raises(ModelError, match=wanted):
        fold(target, tmp_path / "l.safetensors", 1.0)
    for name, value in target.transformer.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_torn_file_is_one_sentence(tmp_path: Path, target: Any) -> None:
    (tmp_path / "l.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nothing")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        fold(target, tmp_path / "l.safetensors", 1.0)
