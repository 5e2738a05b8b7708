"""``unsloth train --dry-run``: everything that can be known in seconds is said, everything that is wrong is refused."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processor import seconds_of, slowness
from tests.runtime.test_train import checkpoint, command, rows  # noqa: F401
from tests.runtime.tiny import conversations
from unsloth.models import presets
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.runtime.trainer_settings import METHODS, OURS, problem, trainer_settings


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model without weights to speak of, data, and what can be in the way."""
    folder = tmp_path_factory.mktemp("place")
    presets.build("tiny-llama").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in conversations(4)))
    (folder / "answers.csv").write_text("question,answer,note\nWhat?,That,x\nWho?,,y\n")
    pairs = [{"question": f"{i}?", "chosen": f"It is {i}.", "rejected": "No." if i else ""} for i in range(3)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "done").mkdir()
    (folder / "done" / "adapter_config.json").write_text("{}")
    (folder / "a_file").write_text("")
    presets.config("tiny-llama").save_pretrained(folder / "empty_model")
    return folder


def config(place: Path, tmp_path: Path, text: str, **changes: Any) -> Path:
    """A good configuration with something added (from line 4 on) or changed."""
    good = {
        "model_name_or_path": place / "model",
        "dataset_name": place / "answers.csv",
        "output_dir": tmp_path / "out",
    }
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in {**good, **changes}.items()) + text)
    return path


def test_what_a_run_would_do(command, place, tmp_path) -> None:  # noqa: F811
    path = config(place, tmp_path, "max_steps: 20\nlora_r: 8\n")
    code, out, err = command(path, "--dry-run", "--gradient-accumulation-steps", 4)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith(f"model       {place / 'model'}: LlamaForCausalLM, 2 layers, hidden size 64")
    assert "training    LoRA of rank 8 on all-linear, 2 × 4 rows a step" in out and ", 20 steps, " in out
    assert "answers.csv: a question and its answer (question, answer; not used: note)" in out
    assert "1 of the first 2 rows would be left out" in out and "answers.csv:3: column 'answer' is empty" in out
    assert "first row   " in out and "<|im_start|>user" in out and "GiB free" in out and "device      cpu" in out
    assert not (tmp_path / "out").exists()


def test_what_a_preference_run_would_do(command, place, tmp_path) -> None:  # noqa: F811
    path = config(place, tmp_path, "method: dpo\n", dataset_name=place / "pairs.jsonl")
    code, out, err = command(path, "--dry-run", "--beta", 0.3)
    assert code == 0, err
    assert "training    DPO with beta 0.3: LoRA of rank 16" in out and "pairs a step" in out and "rate 1e-05" in out
    assert "pairs.jsonl: preference pairs (question, chosen, rejected)" in out
    assert "pairs.jsonl:1: column 'rejected' is empty" in out
    assert "<|im_start|>user" in out and "1?<|im_end|>" in out and "It is 1." in out
    code, out, err = command(path, "--dry-run", "--learning-rate", "1e-4", "--method", "orpo")
    assert code == 0 and "ORPO with beta 0.1" in out and "rate 0.0001" in out, err


PAIRS = {"dataset_name": "{place}/pairs.jsonl"}

ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("learning_rat: 1\n", {}, ":4: unknown setting 'learning_rat', did you mean 'learning_rate'?"),
    ("lora_r: many\n", {}, ":4: lora_r cannot be 'many'"),
    ("seed: 1\nlora_r: 0\n", {}, ":5: lora_r cannot be 0"),
    ("learning_rate: -1\n", {}, ":4: learning_rate cannot be -1"),
    ("lora_dropout: 1.5\n", {}, ":4: lora_dropout cannot be 1.5"),
    ("dtype: bf17\n", {}, ":4: dtype cannot be 'bf17'"),
    ("optim: adamw_tourch\n", {}, ":4: optim cannot be 'adamw_tourch', did you mean 'adamw_torch'?"),
    ("lr_scheduler_type: cosin\n", {}, ":4: lr_scheduler_type cannot be 'cosin', did you mean 'cosine'?"),
    ("save_strategy: step\n", {}, ":4: save_strategy cannot be 'step', did you mean 'steps'?"),
    ("report_to: [tensorbord]\n", {}, ":4: report_to cannot be 'tensorbord', did you mean 'tensorboard'?"),
    ("max_steps: ten\n", {}, ":4: max_steps cannot be 'ten': it takes a whole number"),
    ("max_steps: 2.5\n", {}, ":4: max_steps cannot be 2.5: it takes a whole number"),
    ("packing: perhaps\n", {}, ":4: packing cannot be 'perhaps': it takes true or false"),
    ("packing_strategy: bdf\n", {}, ":4: packing_strategy cannot be 'bdf', did you mean 'bfd'?"),
    (
        "gradient_accumulation_steps: 0\n",
        {},
        ":4: gradient_accumulation_steps cannot be 0: it has to be",
    ),
    ("weight_decay: -0.1\n", {}, ":4: weight_decay cannot be -0.1: it cannot be negative"),
    ("options: {memory_budge: 1}\n", {}, ":4: unknown option 'memory_budge', did you mean 'memory_budget'?"),
    ("options: {disable: [rms_norms]}\n", {}, ":4: disable names an unknown pass 'rms_norms'"),
    ("prompt_template: '{a.b}'\n", {}, ":4: prompt_template: '{a.b}': {a.b} is not allowed"),
    ("prompt_template: '{question}'\n", {}, ":4: prompt_template needs a completion_template"),
    (
        "prompt_template: '{questin}'\ncompletion_template: '{answer}'\n",
        {},
        ":4: {place}/answers.csv: prompt_template: unknown column 'questin', did you mean 'question'?",
    ),
    ("seed: 1\nseed: 2\n", {}, ":5: 'seed' was already given in line 4"),
    ("seed: [1\n", {}, ":5: not YAML"),
    ("trust_remote_code: true\n", {}, ":4: trust_remote_code is switched on by the flag"),
    ("load_in_4bit: true\nuse_peft: false\n", {}, ":4: load_in_4bit cannot be true without use_peft"),
    ("load_in_8bit: true\nload_in_4bit: true\n", {}, ":4: load_in_8bit and load_in_4bit cannot both be true"),
    ("eval_strategy: steps\n", {}, ":4: eval_strategy needs an eval_dataset_name"),
    ("load_best_model_at_end: true\n", {}, ":4: load_best_model_at_end needs eval_strategy and save_strategy to agree"),
    ("packing: true\nmax_length: null\n", {}, ":4: packing needs a max_length"),
    ("resume_from_checkpoint: true\n", {}, ":4: there is no checkpoint in"),
    ("strict_data: true\n", {}, ":2: 1 of the first 2 rows of"),
    (
        "",
        {"dataset_name": "{place}/answer.csv"},
        ":2: there is no file {place}/answer.csv, did you mean 'answers.csv'",
    ),
    ("", {"dataset_name": "{place}/a_file"}, ":2: {place}/a_file is no "),
    ("", {"model_name_or_path": "tiny-lama"}, ":1: no preset 'tiny-lama', did you mean 'tiny-llama'?"),
    ("", {"model_name_or_path": "{place}/nowhere"}, ":1: '{place}/nowhere' is no folder with a config.json"),
    ("", {"model_name_or_path": "{place}/empty_model"}, ":1: '{place}/empty_model' lacks weights: model.safetensors"),
    ("", {"output_dir": "{place}/a_file"}, ":3: output_dir {place}/a_file is a file"),
    ("", {"output_dir": "{place}/done"}, ":3: output_dir {place}/done already holds a model"),
    (
        "eval_dataset_name: {place}/rows.json\n",
        {},
        ":4: there is no file {place}/rows.json, did you mean 'rows.jsonl'",
    ),
    ("method: dop\n", {}, ":4: method cannot be 'dop'"),
    ("method: dpo\n", {}, ":4: data set '{place}/answers.csv' has the columns answer, note, question, and no chosen"),
    ("", {"dataset_name": "{place}/pairs.jsonl"}, "holds preference pairs (chosen, rejected): method: dpo (or orpo)"),
    ("method: dpo\npacking: true\n", PAIRS, ":5: 'packing' is a setting of method sft, not of dpo"),
    ("beta: 0.2\n", {}, ":4: 'beta' is a setting of method dpo and orpo, not of sft"),
    ("method: dpo\nbeta: -1\n", PAIRS, ":5: beta cannot be -1: it cannot be negative"),
    ("method: dpo\nloss_type: sigmiod\n", PAIRS, ":5: loss_type cannot be 'sigmiod', did you mean 'sigmoid'?"),
    (
        "method: orpo\ndisable_dropot: 1\n",
        PAIRS,
        ":5: unknown setting 'disable_dropot', did you mean 'disable_dropout'",
    ),
    ("method: dpo\nloss_weights: [1, 2]\n", PAIRS, ":5: loss_weights holds 2 numbers for 1 of loss_type"),
    ("method: dpo\nsync_ref_model: true\n", PAIRS, ":5: sync_ref_model needs use_peft: false"),
    ("method: orpo\ncompletion_template: '{note}'\n", PAIRS, ":5: completion_template is not for method orpo"),
]


@pytest.mark.parametrize(("text", "changes", "message"), ERRORS, ids=range(len(ERRORS)))
def test_seeded_errors_are_caught(command, place, tmp_path, text, changes, message) -> None:  # noqa: F811
    here = str(place)
    changes = {name: value.replace("{place}", here) for name, value in changes.items()}
    code, out, err = command(config(place, tmp_path, text.replace("{place}", here), **changes), "--dry-run")
    assert (code, out) == (2, ""), err
    assert message.replace("{place}", here) in err and "Traceback" not in err
    # Each by its own line alone: nothing is said that follows from another mistake.
    assert len([line for line in err.splitlines() if "run.yaml" in line]) == 1


def test_all_mistakes_at_once(command, place, tmp_path) -> None:  # noqa: F811
    path = config(place, tmp_path, "", dataset_name="absent.csv", model_name_or_path="tiny-lama")
    code, _, err = command(path, "--dry-run", "--output-dir", place / "done")
    assert code == 2
    assert (
        "run.yaml:1: no preset" in err and "run.yaml:2: there is no file" in err and "--output-dir: output_dir" in err
    )


def test_it_takes_less_than_five_seconds(place, tmp_path) -> None:
    """Of one processor: other tests may have the others."""
    words = [sys.executable, "-c", MAIN, "train", config(place, tmp_path, ""), "--dry-run"]
    found: list[float] = []
    while not found or (min(found) >= 5 and len(found) < 3):  # a busy machine slows a processor down as well
        seconds, done = seconds_of(*words, cwd=Path(__file__).resolve().parents[2])
        assert done.stdout.strip().endswith("0 []"), done.stderr
        found.append(seconds / slowness())
    assert min(found) < 5, found


# What takes long to import is left out.
MAIN = """
import sys
from unsloth.runtime.cli import main
try:
    main()
except SystemExit as left:
    print(left.code or 0, [name for name in ("trl", "peft", "transformers.modeling_utils") if name in sys.modules])
"""


def test_no_weight_is_read(command, place, tmp_path) -> None:  # noqa: F811
    weights = place / "model" / "model.safetensors"
    os.truncate(weights, 100)  # a run would fail
    assert command(config(place, tmp_path, ""), "--dry-run")[0] == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_settings_are_those_of_the_dataclass(method) -> None:
    module, name = METHODS[method]
    fields = {f.name: f for f in dataclasses.fields(getattr(importlib.import_module(module), name)) if f.init}
    settings = trainer_settings(method)
    assert settings.keys() == fields.keys() - OURS[method]
    for name, field in fields.items():
        if name in settings and field.default is not dataclasses.MISSING:
            value = getattr(field.default, "value", field.default)
            assert name == "output_dir" or problem(name, value, method) is None, (name, value)
