"""Models by name: what is loaded, and what is said when nothing can be."""

from __future__ import annotations

import json

import pytest
import torch

from unsloth.models import presets
from unsloth.models.load import ModelError, load, random_batch, with_lora


def test_a_folder_with_weights_is_loaded(tmp_path):
    saved = presets.build("tiny-llama")
    saved.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert loaded.training
    for (name, value), other in zip(saved.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_dtype_is_honoured(tmp_path):
    presets.config("tiny-llama").save_pretrained(tmp_path)
    assert load(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_checkpoints_code_is_not_run_unasked(tmp_path):
    config = presets.config("tiny-llama").to_dict() | {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (tmp_path / "code.py").write_text("raise SystemExit('ran')\n")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="trust_remote_code"):
        load(str(tmp_path))


def test_lora_freezes_the_base_and_starts_random():
    model = with_lora(presets.build("tiny-llama"), rank=4)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert all("lora_" in name and p.any() for name, p in trained.items())


def test_batch_is_seeded_and_within_the_vocabulary():
    model = presets.build("tiny-llama")
    one, two = random_batch(model, 3, 50), random_batch(model, 3, 50)
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert one["input_ids"].shape == (3, 50)
    assert int(one["input_ids"].max()) < 260
    assert one["labels"] is one["input_ids"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("lama-8b", "did you mean 'llama-8b'"), ("/no/such/folder", "no folder"), ("a/b", "cannot load 'a/b'")],
)
def test_unknown_models(name, message):
    with pytest.raises(ModelError, match=message):
        load(name)
