"""A model is loaded whole, as it was saved, or not at all."""

from __future__ import annotations

import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from unsloth.models import presets
from unsloth.models.load import ModelError, load, load_model, random_batch, with_lora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits(model: torch.nn.Module) -> torch.Tensor:
    batch = random_batch(model, 2, 17)
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], use_cache=False).logits


def four_bit_layers(model: torch.nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    return {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def dequantised(plain: torch.nn.Module, quantised: torch.nn.Module) -> torch.nn.Module:
    """The plain model with weights that are what the 4-bit layers stand for."""
    layers = four_bit_layers(quantised)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if name in layers:
                weight = layers[name].weight
                module.weight.copy_(bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
    return plain


def test_a_saved_model_comes_back(checkpoint):
    saved, loaded = presets.build("tiny-llama"), load_model(str(checkpoint))
    assert loaded.training
    assert loaded.name_or_path == str(checkpoint)
    for (name, value), other in zip(saved.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(value, other), name
    assert torch.equal(logits(saved), logits(loaded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_device(checkpoint, dtype):
    model = load_model(str(checkpoint), dtype=dtype, device=DEVICE)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype, DEVICE)}


@pytest.mark.parametrize("name", ["folder", "tiny-llama"])
def test_four_bits(checkpoint, name):
    name = str(checkpoint) if name == "folder" else name
    plain, model = load_model(name, device=DEVICE), load_model(name, quantise="nf4", device=DEVICE)
    layers = four_bit_layers(model)
    assert len(layers) == 2 * 7
    for layer in layers.values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.float32)
    assert "lm_head" not in layers
    assert model.is_loaded_in_4bit and model.training
    got, exact = logits(model), logits(plain)
    assert 1e-3 < (got - exact).norm() / exact.norm() < 0.3  # 4 bits are no copy, and no noise
    torch.testing.assert_close(got, logits(dequantised(plain, model)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["folder", "tiny-llama"])
def test_four_bits_can_be_trained_after_an_evaluation(checkpoint, name):
    """Some CPUs would repack the weights for evaluation, and then there would be no gradient."""

    def gradients(evaluated: bool) -> dict[str, torch.Tensor]:
        model = load_model(str(checkpoint) if name == "folder" else name, quantise="nf4", device=DEVICE)
        model = with_lora(model, rank=4)
        if evaluated:
            logits(model)
        model.train()(**random_batch(model, 2, 17)).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}

    expected, got = gradients(evaluated=False), gradients(evaluated=True)
    assert len(expected) == len(got) == 2 * 7 * 2
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-4, atol=1e-6)


def test_a_four_bit_checkpoint_stays_as_it_is(checkpoint, tmp_path):
    model = load_model(str(checkpoint), quantise="nf4", device=DEVICE)
    model.save_pretrained(tmp_path)
    for quantise in (None, "nf4"):
        again = load_model(str(tmp_path), quantise=quantise, device=DEVICE)
        assert len(four_bit_layers(again)) == 2 * 7
        torch.testing.assert_close(logits(again), logits(model))


def test_a_checkpoint_that_is_quantised_otherwise(copy_of):
    folder = copy_of()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised already, by gptq"):
        load_model(str(folder), quantise="nf4")
    with pytest.raises(ModelError, match="cannot quantise to 'int3': 'nf4' and 'int8' are"):
        load_model(str(folder), quantise="int3")


def test_weights_are_made_up_only_on_demand(copy_of):
    folder = copy_of("*.safetensors")
    with pytest.raises(ModelError, match=r"lacks weights: model\.safetensors"):
        load_model(str(folder))
    assert load(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(str(folder / "config.json")).training


@pytest.mark.parametrize("loads", [load, load_model])
def test_a_missing_shard(copy_of, loads):
    folder = copy_of("*.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks weights: model-00002-of-00002\.safetensors"):
        loads(str(folder))


def test_a_missing_weight_is_not_made_up(copy_of):
    folder = copy_of()
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are not in it, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(folder))


def test_a_damaged_file(copy_of):
    folder = copy_of()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(folder))


@pytest.mark.parametrize("loads", [load, load_model])
def test_pickles_are_not_opened(copy_of, loads):
    folder = copy_of("*.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/opened'\ntR.")
    with pytest.raises(ModelError, match=r"pickle \(pytorch_model\.bin\).*use_safetensors=False.*save_pretrained"):
        loads(str(folder))


def test_pickles_beside_safetensors_do_not_matter(copy_of):
    folder = copy_of()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    load_model(str(folder))


def test_a_checkpoints_code_is_not_run_unasked(copy_of):
    folder = copy_of()
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (folder / "code.py").write_text("raise SystemExit('ran')\n")
    (folder / "config.json").write_text(json.dumps(config))
    for loads in (load, load_model):
        with pytest.raises(ModelError, match="trust_remote_code=True"):
            loads(str(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not a valid JSON"),
        ('{"model_type": "no-such-type"}', "no-such-type"),
        ('{"model_type": "t5"}', "T5Config"),
    ],
)
def test_a_configuration_that_is_none(copy_of, config, message):
    folder = copy_of()
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=f"cannot load .*{message}") as caught:
        load_model(str(folder))
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no GGUF", b"GGUF\x03\x00\x00\x00" + b"\x01" * 64])
def test_a_damaged_gguf_file(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(tmp_path / "model.gguf"))


def test_unknown_models():
    with pytest.raises(ModelError, match="did you mean 'llama-8b'"):
        load_model("lama-8b")
    with pytest.raises(ModelError, match="cannot load 'a/b'"):
        load_model("a/b")


def test_an_adapter_comes_back_on_its_base(checkpoint, tmp_path):
    trained = with_lora(load_model(str(checkpoint)), rank=4)
    trained.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.training
    assert torch.equal(logits(trained), logits(loaded))
    trainable = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in trained.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("damage", ["no weights", "half of them", "another rank", "no base"])
def test_a_damaged_adapter(checkpoint, tmp_path, damage):
    with_lora(load_model(str(checkpoint)), rank=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    if damage == "no weights":
        path.unlink()
        message = r"has no adapter_model\.safetensors"
    elif damage == "half of them":
        weights = load_file(path)
        save_file({n: w for n, w in weights.items() if ".layers.0." in n}, path)
        message = "does not hold all of its weights"
    elif damage == "another rank":
        config["r"] = 8
        message = "cannot load"
    else:
        config["base_model_name_or_path"] = None
        message = "does not name its base model"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path))


def test_batch_is_seeded_and_within_the_vocabulary():
    model = presets.build("tiny-llama")
    one, two = random_batch(model, 3, 50), random_batch(model, 3, 50)
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert one["input_ids"].shape == (3, 50)
    assert int(one["input_ids"].max()) < 260
    assert one["labels"] is one["input_ids"]
