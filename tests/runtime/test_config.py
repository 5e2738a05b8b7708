"""Settings: names of TRL, errors that say where, flags over files."""

from __future__ import annotations

from pathlib import Path

import pytest

from unsloth.runtime.config import ConfigError, TrainConfig, parse_flags, read_config

NEEDED = "model_name_or_path: tiny-llama\ndataset_name: rows.jsonl\n"


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_and_flags_over_it(tmp_path) -> None:
    path = file(tmp_path, NEEDED + "learning_rate: 2e-4\nlora_r: 8\noptions: {memory_budget: 3GiB}\n")
    config = read_config(path, parse_flags(["--lora-r", "32", "--packing", "--max-steps=20", "--model", "llama-1b"]))
    assert (config.model_name_or_path, config.lora_r, config.learning_rate) == ("llama-1b", 32, 2e-4)
    assert (
        config.trainer["packing"] is True and config.trainer["max_steps"] == 20 and config.trainer["max_length"] == 2048
    )
    assert "lora_r" not in config.trainer and config.options == {"memory_budget": "3GiB"}


def test_flags_alone() -> None:
    config = read_config(None, parse_flags(["--model", "tiny-llama", "--data", "rows.jsonl", "--dtype", "bf16"]))
    assert config.dtype == "bfloat16" and config.use_peft


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NEEDED + "learning_rat: 1e-4\n", "run.yaml:3: unknown setting 'learning_rat', did you mean 'learning_rate'?"),
        (NEEDED + "\nlora_r: none\n", "run.yaml:4: lora_r cannot be 'none'"),
        (NEEDED + "lora_r: 0\n", "run.yaml:3: lora_r cannot be 0: input should be greater than or equal to 1"),
        (NEEDED + "options: {memory_budge: 1}\n", "run.yaml:3: unknown option 'memory_budge', did you mean"),
        (NEEDED + "options: {disable: [rope_norm]}\n", "run.yaml:3: disable names an unknown pass 'rope_norm'"),
        (NEEDED + "seed: 1\nseed: 2\n", "run.yaml:4: 'seed' was already given in line 3"),
        (NEEDED + "prompt_template: '{a.b}'\n", "run.yaml:3: prompt_template: '{a.b}': {a.b} is not allowed"),
        (NEEDED + "completion_template: {answer}\n", "run.yaml:3: completion_template: a template stands in quotes"),
        (NEEDED + "prompt_template: [[{answer}]]\n", "run.yaml:3: prompt_template: a template stands in quotes"),
        (NEEDED + "strict_data: maybe\n", "run.yaml:3: strict_data cannot be 'maybe'"),
        ("dataset_name: x.jsonl\n", "model_name_or_path is missing (--model)"),
        ("- a\n- b\n", "run.yaml:1: the file has to hold 'name: value' lines"),
        ("a: [1, 2\nb: 3", "run.yaml:2: not YAML"),
        ("", "dataset_name is missing (--data)"),
    ],
)
def test_what_is_wrong_and_where(tmp_path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_config(file(tmp_path, text))
    assert message in str(error.value)


def test_everything_wrong_is_said_at_once(tmp_path) -> None:
    with pytest.raises(ConfigError) as error:
        read_config(file(tmp_path, "lora_r: -1\nlearning_rat: 3\n"), {"max_lenght": 5})
    said = str(error.value).splitlines()
    assert len(said) == 5 and any(line.startswith("--max-lenght: unknown setting") for line in said)


def test_no_such_file(tmp_path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        read_config(tmp_path / "absent.yaml")


def test_templates_are_text_and_not_yaml(tmp_path) -> None:
    words = [
        "--prompt-template",
        "{question} [[Context: {context}]]",
        "--completion-template={answer}",
        "--strict-data",
    ]
    given = read_config(file(tmp_path, NEEDED + "system_template: '1 {a}'\n"), parse_flags(words))
    assert given.prompt_template == "{question} [[Context: {context}]]" and given.completion_template == "{answer}"
    assert given.system_template == "1 {a}" and given.strict_data
    assert not {"prompt_template", "completion_template", "system_template", "strict_data"} & given.trainer.keys()


def test_a_flag_that_is_none() -> None:
    with pytest.raises(ConfigError, match="'lora' is no flag"):
        parse_flags(["lora", "--seed", "1"])


def test_every_setting_is_described() -> None:
    assert all(setting.description for setting in TrainConfig.model_fields.values())
