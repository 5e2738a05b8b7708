"""``FastLanguageModel`` takes what scripts give it, and returns ordinary models."""

from __future__ import annotations

import inspect
import json
import logging
from contextlib import nullcontext

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers

import unsloth
from unsloth.models import presets
from unsloth.models.load import random_batch
from unsloth.runtime.scripts import fast, old_names
from unsloth.runtime.scripts.fast import FastLanguageModel, FastModel, ModelError, default_dtype

CPU = {"device_map": "cpu"}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module", autouse=True)
def _undo():
    """Other tests of this process have TRL's classes as they were."""
    yield
    old_names.uninstall()


def test_it_is_exported():
    assert unsloth.FastLanguageModel is FastLanguageModel
    assert "FastLanguageModel" in dir(unsloth)


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_script(checkpoint, tmp_path, four_bits):
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(checkpoint), max_seq_length=512, dtype=None, load_in_4bit=four_bits
    )
    assert type(model) is transformers.LlamaForCausalLM
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == (14 if four_bits else 0)
    model = FastLanguageModel.get_peft_model(
        model,
        r=4,
        target_modules=LLAMA,
        lora_alpha=8,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    assert type(model) is peft.PeftModelForCausalLM
    assert (model.max_seq_length, model.use_gradient_checkpointing) == (512, "unsloth")

    batch = random_batch(model, 2, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    assert FastLanguageModel.for_inference(model) is model and not model.training
    inputs = tokenizer("Hello", return_tensors="pt").to(model.device)
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    assert FastLanguageModel.for_training(model) is model and model.training

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path), load_in_4bit=four_bits)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_the_graph_is_one(checkpoint):
    model, _ = FastLanguageModel.from_pretrained(str(checkpoint), dtype=torch.float32, **CPU)
    model = FastLanguageModel.get_peft_model(model, r=4)
    explanation = unsloth.explain(model, random_batch(model, 2, 16), options={"lowering": "eager"})
    assert "1 graph, 0 breaks" in str(explanation)


def test_padding_is_agreed_on(checkpoint):
    model, tokenizer = FastLanguageModel.from_pretrained(str(checkpoint), **CPU)
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id == 258


def test_a_tokenizer_that_is_too_large(copy_of):
    folder = copy_of()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="knows 261 tokens and its embedding only 260"):
        FastLanguageModel.from_pretrained(str(folder), **CPU)


def test_length_is_recorded_and_not_stretched(caplog):
    with caplog.at_level(logging.WARNING):
        model, _ = FastLanguageModel.from_pretrained("tiny-llama", 4096, **CPU)
    assert model.max_seq_length == 4096
    assert "max_seq_length 4096 is more than the 2048 positions" in caplog.text
    assert model.config.max_position_embeddings == 2048


def test_full_finetuning(caplog):
    model, _ = FastLanguageModel.from_pretrained("tiny-llama", full_finetuning=True, **CPU)
    assert all(p.requires_grad for p in model.parameters())
    with caplog.at_level(logging.WARNING):
        assert FastLanguageModel.get_peft_model(model) is model
    assert "gets no adapters" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, ModelError, "load_in_4bit and load_in_8bit cannot both be"),
        ({"load_in_8bit": True, "full_finetuning": True}, ModelError, "8-bit weights cannot be trained"),
        ({"load_in_4bit": True, "full_finetuning": True}, ModelError, "4-bit weights cannot be trained"),
        ({"max_seq_len": 1}, TypeError, "no argument 'max_seq_len', did you mean 'max_seq_length'"),
        ({"zzz": 1}, TypeError, "no argument 'zzz'; arguments are attn_implementation, device_map"),
        ({"rope_scaling": {"factor": 2}}, TypeError, "rope_scaling=.* is not supported, only None"),
        ({"dtype": "float17"}, ModelError, "'float17' is no dtype of weights"),
        ({"dtype": torch.int8}, ModelError, "is no dtype of weights"),
        ({"device_map": "gpu"}, ModelError, "there is no device 'gpu'"),
        ({"device_map": {"a": "cpu", "b": "meta"}}, ModelError, "not spread over several devices"),
    ],
)
def test_what_is_refused_in_loading(arguments, error, message):
    with pytest.raises(error, match=message):
        FastLanguageModel.from_pretrained("tiny-llama", **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lora_rank": 8}, TypeError, "no argument 'lora_rank', did you mean 'lora_alpha'"),
        ({"loftq_config": {"bits": 4}}, TypeError, "loftq_config=.* is not supported"),
        ({"target_modules": ["q_prj"]}, ModelError, "did you mean 'q_proj'"),
    ],
)
def test_what_is_refused_in_adapting(arguments, error, message):
    with pytest.raises(error, match=message):
        FastLanguageModel.get_peft_model(presets.build("tiny-llama"), **arguments)


def test_what_asks_for_nothing_is_accepted():
    model, _ = FastLanguageModel.from_pretrained(
        "tiny-llama",
        fast_inference=False,
        gpu_memory_utilization=0.6,
        max_lora_rank=64,
        random_state=1,
        rope_scaling=None,
        load_in_16bit=True,
        **CPU,
    )
    FastLanguageModel.get_peft_model(
        model, r=2, target_modules=LLAMA, layers_to_transform=[1], qat_scheme=None, loftq_config={}
    )
    assert not any("layers.0" in n for n, p in model.named_parameters() if p.requires_grad)


def test_what_is_not_needed_is_explained_once(caplog, monkeypatch):
    monkeypatch.setattr(old_names, "_explained", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            FastLanguageModel.from_pretrained("tiny-llama", max_lora_rank=64, offload_embedding=True, **CPU)
    assert caplog.text.count("max_lora_rank: fast_generate runs the model itself") == 1
    assert caplog.text.count("offload_embedding: ") == 1


def test_attention_is_chosen():
    model, _ = FastLanguageModel.from_pretrained("tiny-llama", attn_implementation="eager", **CPU)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("arguments", "adapted"),
    [
        ({}, {"self_attn", "mlp"}),
        ({"finetune_mlp_modules": False}, {"self_attn"}),
        ({"finetune_attention_modules": False}, {"mlp"}),
        ({"target_modules": ["q_proj"]}, {"self_attn"}),
    ],
)
def test_parts_of_a_model(arguments, adapted):
    model = FastModel.get_peft_model(presets.build("tiny-llama"), r=2, finetune_vision_layers=False, **arguments)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {part for part in ("self_attn", "mlp") if any(part in name for name in names)} == adapted


@pytest.mark.parametrize(
    "arguments",
    [
        {"finetune_language_layers": False},
        {"finetune_attention_modules": False, "finetune_mlp_modules": False},
    ],
)
def test_nothing_is_left_to_train(arguments):
    with pytest.raises(ModelError, match="leave nothing to train"):
        FastModel.get_peft_model(presets.build("tiny-llama"), **arguments)


def test_embedding_and_head_are_trained_whole():
    model, _ = FastLanguageModel.from_pretrained("tiny-llama", **CPU)
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj", "embed_tokens", "lm_head"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [n for n in trained if "modules_to_save" in n] and not [n for n in trained if "lora_embedding" in n]


def test_four_bits_are_what_scripts_rely_on(monkeypatch, checkpoint, tmp_path):
    """On a GPU, unless they ask for something else; tried with the loading itself left out."""
    asked = []

    class Loaded(Exception):
        pass

    def load_model(name, **settings):
        asked.append(settings["quantise"])
        raise Loaded

    monkeypatch.setattr(fast, "load_model", load_model)
    monkeypatch.setattr(fast, "_one_device", lambda device_map: torch.device("cuda"))
    monkeypatch.setattr(fast, "default_dtype", lambda device: torch.bfloat16)
    for arguments in ({}, {"load_in_16bit": True}, {"load_in_8bit": True}, {"full_finetuning": True}):
        with pytest.raises(Loaded):
            FastLanguageModel.from_pretrained(str(checkpoint), **arguments)
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path in checkpoint.glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(Loaded):
        FastLanguageModel.from_pretrained(str(tmp_path))
    assert asked == ["nf4", None, "int8", None, None]


def test_first_arguments_stand_where_scripts_expect_them():
    loading = list(inspect.signature(FastLanguageModel.from_pretrained).parameters)
    adapting = list(inspect.signature(FastLanguageModel.get_peft_model).parameters)
    assert loading[:4] == ["model_name", "max_seq_length", "dtype", "load_in_4bit"]
    assert adapting[:6] == ["model", "r", "target_modules", "lora_alpha", "lora_dropout", "bias"]


@pytest.mark.parametrize("given", [None, "auto", torch.float32, "float32", "torch.float32"])
def test_dtype(given):
    model, _ = FastLanguageModel.from_pretrained("tiny-llama", dtype=given, **CPU)
    assert model.dtype == torch.float32  # what a CPU gets by default


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_default_dtype_of_a_gpu(monkeypatch, bf16, dtype):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert default_dtype("cuda:0") == dtype


@pytest.mark.parametrize("given", [None, "auto", "sequential", "balanced"])
def test_device_without_and_with_gpu(monkeypatch, given):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fast._one_device(given) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert fast._one_device(given) == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert fast._one_device(given) == torch.device("cuda:3")


@pytest.mark.parametrize("given", ["cpu", torch.device("cpu"), {"": "cpu"}])
def test_a_device_that_is_named(given):
    assert fast._one_device(given) == torch.device("cpu")
