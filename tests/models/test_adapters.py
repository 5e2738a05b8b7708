"""LoRA goes where it is asked to go, and says so when it cannot."""

from __future__ import annotations

import warnings

import pytest
import torch

from unsloth.models import presets
from unsloth.models.adapters import ModelError, add_lora, is_checkpointing, linear_layers, with_lora

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model: torch.nn.Module) -> set[str]:
    """The layers that have an adapter, by their last name."""
    return {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in model.named_parameters() if ".lora_A." in n}


def test_linear_layers():
    assert linear_layers(presets.build("tiny-llama")) == [*LLAMA, "lm_head"]
    assert linear_layers(presets.build("tiny-phi3")) == ["o_proj", "qkv_proj", "gate_up_proj", "down_proj", "lm_head"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", set(LLAMA)),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ([*LLAMA, "lm_head"], {*LLAMA, "lm_head"}),
        ("q_proj", {"q_proj"}),
        (r".*layers\.1\.mlp\.(up|down)_proj", {"up_proj", "down_proj"}),
    ],
)
def test_targets(targets, expected):
    assert adapted(add_lora(presets.build("tiny-llama"), rank=2, target_modules=targets)) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_prj"], r"no layer 'v_prj' \(did you mean 'v_proj'\?\); its linear layers are q_proj, k_proj"),
        (["wq", "wv"], r"no layer 'wq' or 'wv'; its linear layers are .*lm_head"),
        ([], "no target_modules are given"),
        (r".*\.attn\..*", "matches no layer of the model; its linear layers are"),
        ("(", "is no regular expression"),
        (["input_layernorm"], "PEFT refuses: .*not supported"),
    ],
)
def test_targets_that_are_not_there(targets, message):
    with pytest.raises(ModelError, match=message):
        add_lora(presets.build("tiny-llama"), target_modules=targets)


def test_what_peft_refuses():
    with pytest.raises(ModelError, match="PEFT refuses: "):
        add_lora(presets.build("tiny-llama"), rank=0)


def test_adapters_are_not_stacked():
    with pytest.raises(ModelError, match="has adapters already"):
        add_lora(add_lora(presets.build("tiny-llama"), rank=2))


def test_the_base_is_frozen_and_the_start_is_seeded():
    state = torch.get_rng_state()
    one, same, other = (add_lora(presets.build("tiny-llama"), rank=4, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    a = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(one.get_parameter(a), same.get_parameter(a))
    assert not torch.equal(one.get_parameter(a), other.get_parameter(a))
    assert not any(p.any() for n, p in one.named_parameters() if "lora_B" in n)
    assert {n.split(".")[-3] for n, p in one.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_precision_of_the_adapters(autocast, dtype):
    model = presets.build("tiny-llama", dtype=torch.bfloat16)
    model = add_lora(model, rank=4, autocast_adapter_dtype=autocast)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_checkpointing_leaves_no_hook_on_the_embedding():
    """The hook would break the graph."""
    model = presets.build("tiny-llama")
    model.gradient_checkpointing_enable()
    assert model.get_input_embeddings()._forward_hooks
    adapted = add_lora(model, rank=4)
    assert not model.get_input_embeddings()._forward_hooks
    assert not is_checkpointing(model)
    assert not any(module._forward_hooks for module in adapted.modules())


def test_settings_are_pefts():
    model = add_lora(
        presets.build("tiny-llama"), rank=4, alpha=8, dropout=0.1, use_rslora=True, modules_to_save=["embed_tokens"]
    )
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 8, 0.1, True)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert layer.scaling["default"] == 8 / 4**0.5
    assert any("embed_tokens.modules_to_save" in n and p.requires_grad for n, p in model.named_parameters())


def test_with_lora_starts_random():
    model = with_lora(presets.build("tiny-llama"), rank=4)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert all("lora_" in name and p.any() for name, p in trained.items())


def test_nobody_is_told_of_an_older_name() -> None:
    model = presets.build("tiny-llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        add_lora(model, rank=4)
        assert not is_checkpointing(model)
