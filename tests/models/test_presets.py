"""Presets are the models they are named after, and their random weights leave nothing at a neutral value."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from unsloth.models import presets

TINY = [name for name in presets.SHAPES if name.startswith("tiny-")]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-30b-a3b-12", 8_099_779_584),  # of 30,532,122,624: 36 layers of 623,120,640 fewer
    ],
)
def test_real_shapes_have_the_published_size(name, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(presets.config(name))
    assert model.num_parameters() == parameters


def test_a_preset_can_be_cut_to_fewer_layers():
    assert presets.config("llama-8b@4").num_hidden_layers == 4
    whole, cut = presets.config("tiny-llama").to_dict(), presets.config("tiny-llama@1").to_dict()
    assert {k for k in whole if whole[k] != cut[k]} <= {"num_hidden_layers", "layer_types"}
    with pytest.raises(KeyError):
        presets.config("llama-9b@4")
    with pytest.raises(ValueError, match="four"):
        presets.config("tiny-llama@four")


@pytest.mark.parametrize("name", TINY)
def test_weights_are_random_and_repeatable(name):
    state = torch.get_rng_state()
    model, again, other = presets.build(name), presets.build(name), presets.build(name, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for (key, value), same, different in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(value, same), key
        assert value.std() > 0, key
        assert not torch.equal(value, different), key


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_gets_a_gradient(name):
    model = presets.build(name)
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dtype_and_attention():
    model = presets.build("tiny-llama", dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert presets.build("tiny-llama").config._attn_implementation == "sdpa"


def test_unknown_name():
    with pytest.raises(KeyError):
        presets.config("tiny-lama")
