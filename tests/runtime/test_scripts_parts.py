"""What stands behind scripts written for Unsloth: chat templates, answers only, names of arguments, saving, the hub."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset

import unsloth
from tests.runtime.tiny import conversations
from unsloth.chat_templates import (
    get_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
    train_on_responses_only,
)
from unsloth.models import presets
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.models.load import ModelError
from unsloth.runtime.data import DataError
from unsloth.runtime.scripts import old_names, saving
from unsloth.runtime.scripts.fast import FastLanguageModel
from unsloth.runtime.scripts.trainers import UnslothTrainer, UnslothTrainingArguments

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module", autouse=True)
def _undo():
    """Other tests of this process have TRL's classes as they were."""
    yield
    old_names.uninstall()


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def model() -> Any:
    loaded, _ = FastLanguageModel.from_pretrained("tiny-llama", 64, device_map="cpu")
    return FastLanguageModel.get_peft_model(loaded, r=2, init_lora_weights=False)


# -- chat templates ----------------------------------------------------------------------------------------------------


def test_a_format_that_the_tokenizer_speaks_keeps_its_template(tokenizer):
    own = tokenizer.chat_template
    assert get_chat_template(tokenizer, "qwen-2.5").chat_template == own


def test_another_format_replaces_it(tokenizer):
    given = get_chat_template(tokenizer, "llama-3.1")
    text = given.apply_chat_template(CHAT, tokenize=False)
    assert "<|start_header_id|>assistant<|end_header_id|>\n\nHello" in text
    # <|eot_id|> is no token here: turns end with what is one.
    assert "<|eot_id|>" not in text and text.endswith("Hello" + tokenizer.eos_token)


def test_eos_is_what_ends_a_turn(tokenizer):
    tokenizer.eos_token = "<|pad|>"
    assert get_chat_template(tokenizer, "chatml").eos_token == "<|im_end|>"
    tokenizer.eos_token = "<|pad|>"
    assert get_chat_template(tokenizer, "chatml", map_eos_token=False).eos_token == "<|pad|>"


def test_messages_as_sharegpt_writes_them(tokenizer):
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    given = get_chat_template(tokenizer, "chatml", mapping=mapping, system_message='Say "no".')
    theirs = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    text = given.apply_chat_template(theirs, tokenize=False)
    assert text == given.apply_chat_template(CHAT, tokenize=False)  # the usual form is still read
    assert text.startswith('<|im_start|>system\nSay "no".<|im_end|>\n<|im_start|>user\nHi<|im_end|>')
    ruled = [{"role": "system", "content": "Yes."}, *CHAT]
    assert '"no"' not in given.apply_chat_template(ruled, tokenize=False)


def test_a_template_itself_and_its_end(tokenizer):
    written = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|unk|>{% endfor %}"
    given = get_chat_template(tokenizer, (written, "<|unk|>"))
    assert given.chat_template == written and given.eos_token == "<|unk|>"
    with pytest.raises(DataError, match="'vicuna' is no file, and none of alpaca, chatml"):
        get_chat_template(tokenizer, "vicuna")


# -- data sets ---------------------------------------------------------------------------------------------------------


def test_standardize():
    rows = Dataset.from_list(
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "n": 1}]
    )
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert standardize_sharegpt(rows)[0] == {"conversations": expected, "n": 1}
    assert standardize_data_formats(standardize_sharegpt(rows))[0]["conversations"] == expected
    pirates = Dataset.from_list(
        [{"messages": [{"role": "pirate", "content": "a"}, {"role": "parrot", "content": "b"}]}]
    )
    found = standardize_sharegpt(pirates, aliases_for_user=["pirate"], aliases_for_assistant=["parrot"])
    assert found[0]["messages"] == expected
    with pytest.raises(DataError, match="row 1: message 1 has the role 'pirate'"):
        standardize_sharegpt(pirates)
    with pytest.raises(DataError, match="no conversations: its columns are a"):
        standardize_sharegpt(Dataset.from_dict({"a": ["b"]}))


def test_to_sharegpt():
    rows = Dataset.from_dict({"q": ["1", "2", "3"], "c": ["x", None, ""], "a": ["one", "two", "three"]})
    found = to_sharegpt(rows, merged_prompt="{q}[[ ({c})]]?", output_column_name="a")
    assert [row["conversations"][0]["value"] for row in found] == ["1 (x)?", "2?", "3?"]
    assert found[0]["conversations"][1] == {"from": "gpt", "value": "one"} and found.column_names == ["conversations"]
    longer = to_sharegpt(rows, merged_prompt="{q}", output_column_name="a", conversation_extension=3)
    assert [len(row["conversations"]) for row in longer] == [6, 6, 6]
    again = to_sharegpt(rows, merged_prompt="{q}", output_column_name="a", conversation_extension=3)
    assert longer[:] == again[:]
    with pytest.raises(DataError, match="output_column_name: unknown column 'output'"):
        to_sharegpt(rows, merged_prompt="{q}")


# -- answers only ------------------------------------------------------------------------------------------------------


def learnt(tokenizer: Any, row: Any) -> str:
    return tokenizer.decode([token for token in row["labels"] if token != -100])


def test_labels_of_answers(tokenizer):
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    chat = [*CHAT, {"role": "user", "content": "ünï 🙂"}, {"role": "assistant", "content": "🙂 ö"}]
    row = {"input_ids": tokenizer(tokenizer.apply_chat_template(chat, tokenize=False)).input_ids}
    mask = train_on_responses_only(None, **parts, tokenizer=tokenizer, return_function=True)
    assert learnt(tokenizer, mask(row)) == "Hello<|im_end|>\n🙂 ö<|im_end|>\n"
    batch = mask({"input_ids": [row["input_ids"]]})
    assert batch == {"labels": [mask(row)["labels"]]}
    last = train_on_responses_only(None, **parts, tokenizer=tokenizer, return_function=True, last_response_only=True)
    assert learnt(tokenizer, last(row)) == "🙂 ö<|im_end|>\n"
    found = train_on_responses_only(None, tokenizer=tokenizer, return_function=True)  # asks the template
    assert learnt(tokenizer, found(row)) == "Hello<|im_end|>🙂 ö<|im_end|>"
    hidden = mask({**row, "labels": [-100] * len(row["input_ids"])})
    assert set(hidden["labels"]) == {-100}  # what was not trained on before is not now


def test_rows_without_answers(tokenizer):
    class Trainer:
        processing_class = tokenizer

    def rows(*texts: str) -> Dataset:
        return Dataset.from_dict({"input_ids": [tokenizer(text).input_ids for text in texts]})

    trainer: Any = Trainer()
    trainer.train_dataset, trainer.eval_dataset = rows("Q:1 A:2", "nothing"), {"one": rows("Q:3 A:4")}
    train_on_responses_only(trainer, "Q:", "A:")
    assert [learnt(tokenizer, row) for row in trainer.train_dataset] == ["2"]
    assert learnt(tokenizer, trainer.eval_dataset["one"][0]) == "4"
    with pytest.raises(DataError, match="no row of train_dataset has an answer between those parts; the first is"):
        train_on_responses_only(trainer, "X:", "Y:")
    with pytest.raises(DataError, match="belong together"):
        train_on_responses_only(trainer, "X:")
    trainer.train_dataset = Dataset.from_dict({"text": ["a"]})
    with pytest.raises(DataError, match="holds no tokens"):
        train_on_responses_only(trainer, "Q:", "A:")


# -- old names ---------------------------------------------------------------------------------------------------------


def test_importing_changes_nothing():
    code = """
import trl, transformers, unsloth, unsloth.chat_templates
from unsloth import FastLanguageModel, UnslothTrainer
print([name for cls in (trl.SFTTrainer, trl.DPOTrainer, trl.SFTConfig, trl.DPOConfig, transformers.TrainingArguments)
       for name in vars(cls) if name == "__new__"], unsloth.compiler.shims.declared())
FastLanguageModel.from_pretrained("tiny-llama", device_map="cpu")
print("__new__" in vars(trl.SFTTrainer), len(unsloth.compiler.shims.declared()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[] ()", "True 1"]


def test_trl_trainers_become_ours_for_our_models_only(model, tokenizer, tmp_path):
    rows = Dataset.from_list(conversations(4))
    trainer: Any = trl.SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=rows, max_seq_length=32, packing=True, dataset_num_proc=None
    )
    assert type(trainer) is UnslothTrainer and isinstance(trainer, unsloth.SFTTrainer)
    assert trainer.args.max_length == 32 and trainer.args.packing and not trainer.args.bf16
    assert trainer.processing_class is tokenizer
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    args = trl.SFTConfig(**settings)
    plain: Any = trl.SFTTrainer(presets.build("tiny-llama"), args, train_dataset=rows, processing_class=tokenizer)
    assert type(plain) is trl.SFTTrainer
    with pytest.raises(TypeError, match="tokenizer"):
        trl.SFTTrainer(presets.build("tiny-llama"), args, train_dataset=rows, tokenizer=tokenizer)

    class Mine(trl.SFTTrainer):
        pass

    assert type(Mine(model, args, train_dataset=rows, processing_class=tokenizer)) is Mine
    with pytest.raises(TypeError, match="max_seq_len"):
        trl.SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, max_seq_len=3)


def test_everything_is_given_back(model, tokenizer, tmp_path):
    rows = Dataset.from_list(conversations(2))
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    old_names.uninstall()
    assert unsloth.compiler.shims.declared() == ()
    assert type(trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)) is trl.SFTTrainer
    with pytest.raises(TypeError, match="tokenizer"):
        trl.SFTTrainer(model=model, args=args, tokenizer=tokenizer, train_dataset=rows)
    with pytest.raises(TypeError, match="max_seq_length"):
        trl.SFTConfig(output_dir=str(tmp_path), max_seq_length=3)
    old_names.install()
    assert type(trl.SFTTrainer(model=model, args=args, tokenizer=tokenizer, train_dataset=rows)) is not trl.SFTTrainer


def test_the_models_length_is_the_default(model, tokenizer):
    trainer: Any = trl.SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=Dataset.from_list(conversations(2)))
    assert trainer.args.max_length == 64


def test_configurations_take_old_names(model, tmp_path):
    given: Any = {"max_seq_length": 5, "evaluation_strategy": "no", "warmup_ratio": 0.25, "group_by_length": True}
    config: Any = trl.SFTConfig(output_dir=str(tmp_path), **given, logging_dir="x")
    assert isinstance(config, trl.SFTConfig) and config.max_length == 5
    assert config.warmup_steps == 0.25 and config.train_sampling_strategy == "group_by_length"
    assert copy.deepcopy(config).max_length == copy.copy(config).max_length == 5
    assert "max_length" in config.to_json_string()
    plain: Any = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert type(plain) is trl.SFTConfig
    for each in (plain, config):  # as Trainer saves it
        assert pickle.loads(pickle.dumps(each)).output_dir == str(tmp_path)
    exact: Any = trl.SFTConfig(output_dir=str(tmp_path), bf16=False)
    assert type(exact) is trl.SFTConfig
    with pytest.raises(TypeError, match="max_seq_len"):
        trl.SFTConfig(output_dir=str(tmp_path), max_seq_len=3)
    arguments: Any = transformers.TrainingArguments(output_dir=str(tmp_path), no_cuda=True, overwrite_output_dir=True)
    assert arguments.use_cpu
    ours: Any = UnslothTrainingArguments(output_dir=str(tmp_path), embedding_learning_rate=1e-5, max_seq_length=7)
    assert (ours.embedding_learning_rate, ours.max_length) == (1e-5, 7)


def test_what_a_version_still_has_keeps_its_name():
    assert old_names.renamed({"max_seq_length": 3}, {"max_seq_length", "max_length"}) == {"max_seq_length": 3}
    assert old_names.renamed({"warmup_ratio": 0.1, "warmup_steps": 5}, {"warmup_steps"}) == {"warmup_steps": 5}
    assert old_names.renamed({"zzz": 1}, {"a"}) == {"zzz": 1}


def test_explain_names_the_shim(model):
    from unsloth.models.load import random_batch

    explanation = unsloth.explain(model, random_batch(model, 1, 8))
    assert "\nshim        trl: SFTTrainer, DPOTrainer, ORPOTrainer of a model from FastLanguageModel" in str(
        explanation
    )
    assert explanation.to_dict()["shims"] == list(explanation.shims)


# -- saving ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(12)[None], use_cache=False).logits.float()


def test_methods_save_the_adapters_too(model, tokenizer, tmp_path):
    model.save_pretrained_merged(str(tmp_path / "a"), tokenizer, max_shard_size="100KB")
    assert (tmp_path / "a" / "model.safetensors.index.json").is_file()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    expected = logits(model)
    assert ((logits(merged) - expected).norm() / expected.norm()) < 5e-2
    model.save_pretrained_gguf(tmp_path / "b", tokenizer, quantization_method="not_quantized")
    assert len(list((tmp_path / "b").glob("*.BF16.gguf"))) == 1
    model.save_pretrained_merged(tmp_path / "c", tokenizer, save_method="lora")
    assert (tmp_path / "c" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, p: m.save_pretrained_merged(p, save_method="merged_2bit"), ModelError, "is none of lora, merged_16"),
        (lambda m, p: m.save_pretrained_merged(p, max_shard_size="5 apples"), ModelError, "is no size such as '5GB'"),
        (lambda m, p: m.save_pretrained_merged(p, safe_serialisation=True), TypeError, "'safe_serialisation'"),
        (lambda m, p: m.save_pretrained_gguf(p), ModelError, "holds the tokenizer as well"),
        (lambda m, p: m.save_pretrained_gguf(p, byte_tokenizer(), "iq2_xxs"), ModelError, "llama-quantize"),
        (lambda m, p: m.push_to_hub_merged("../../x"), ModelError, "is no name of a repository"),
        (lambda m, p: m.push_to_hub_gguf("a/b/c"), ModelError, "is no name of a repository"),
    ],
)
def test_what_saving_refuses(model, tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_the_hub_gets_what_was_written(model, tokenizer, monkeypatch):
    uploaded: dict[str, Any] = {}

    class Hub:
        def __init__(self, token=None):
            uploaded["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return type("Url", (str,), {"repo_id": f"me/{repo_id}"})(f"https://hub/{repo_id}")

        def upload_folder(self, *, folder_path, repo_id, commit_message, ignore_patterns):
            uploaded[repo_id] = sorted(p.name for p in Path(folder_path).iterdir() if p.name not in ignore_patterns)

    monkeypatch.setattr(saving.huggingface_hub, "HfApi", Hub)
    assert model.push_to_hub_merged("merged", tokenizer, token="t") == "https://hub/merged"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(uploaded["me/merged"])
    assert "manifest.json" not in uploaded["me/merged"] and uploaded["token"] == "t"
    model.push_to_hub_gguf("gguf", tokenizer, quantization_method=["f16", "q8_0"])
    assert len([name for name in uploaded["me/gguf"] if name.endswith(".gguf")]) == 2
