"""The settings of a training run: a YAML file, overridden by flags, checked before anything is loaded.

Names are those of transformers and TRL. What is not listed here but is a field of TRL's ``SFTConfig`` (or of
``DPOConfig``, ``ORPOConfig``, as ``method`` says) is handed on to it under its own name: ``warmup_ratio``, ``packing``,
``beta``, ``save_steps``, …
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from ..compiler.options import OptionError, Options
from ..passes.recognise import RECOGNISERS
from .problems import DataError
from .templates import Template
from .trainer_settings import METHODS, problem, trainer_settings

PREFERENCE_LEARNING_RATE = 1e-5
"""Unless one is given. What two answers differ in is little, and a policy that moves fast unlearns to write."""

TEMPLATES = ("prompt_template", "completion_template", "system_template")


class ConfigError(ValueError):
    """A setting is unknown, missing or cannot have its value; says where it was given."""


class TrainConfig(BaseModel):
    """Settings of ``unsloth train``. Unlisted names are those of TRL's config for the method."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    model_name_or_path: str = Field(description="Hub id, folder, GGUF file, or a preset with random weights.")
    gguf_file: str | None = Field(None, description="Name of the GGUF file in that folder or hub repository.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the model's weights; auto is bfloat16 on a GPU and float32 on a CPU."
    )
    load_in_4bit: bool = Field(False, description="QLoRA: hold the frozen weights in NF4 (bitsandbytes).")
    load_in_8bit: bool = Field(False, description="Hold the frozen weights in 8 bits, LLM.int8() (bitsandbytes).")
    trust_remote_code: bool = Field(
        False, description="Run Python code that the checkpoint brings along; as a flag only, never in a file."
    )

    method: Literal["sft", "dpo", "orpo"] = Field(
        "sft", description="sft learns to write the answers; dpo and orpo learn which of two answers to prefer."
    )
    use_peft: bool = Field(True, description="Train LoRA adapters; false trains every parameter.")
    lora_r: int = Field(16, ge=1, description="Rank of the adapters.")
    lora_alpha: int = Field(16, ge=1, description="The adapters are scaled by alpha / rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    lora_target_modules: str | list[str] = Field("all-linear", description="Names of the layers that get adapters.")
    use_rslora: bool = Field(False, description="Scale by alpha / √rank instead (rank-stabilised LoRA).")
    use_dora: bool = Field(False, description="Adapters of direction, and a trained magnitude (DoRA).")
    modules_to_save: list[str] | None = Field(
        None, description="Layers trained whole beside the adapters, such as [embed_tokens, lm_head]."
    )
    loraplus_lr_ratio: float | None = Field(None, gt=0, description="B learns so many times as fast as A (LoRA+).")
    embedding_learning_rate: float | None = Field(
        None, gt=0, description="Of embeddings and head, where they are trained; smaller than the others'."
    )

    finetune_vision_layers: bool = Field(True, description="Of a model that takes images: adapt towers and projectors.")
    finetune_language_layers: bool = Field(True, description="Likewise its language model.")
    finetune_attention_modules: bool = Field(True, description="Likewise the linear layers of attention.")
    finetune_mlp_modules: bool = Field(True, description="Likewise all other linear layers.")
    autocast_adapter_dtype: bool = Field(
        True, description="Adapters in float32 under autocast; false holds them in the model's dtype, without autocast."
    )

    dataset_name: str = Field(
        description="A .jsonl, .json, .csv, .tsv, .xlsx, .parquet, .arrow or .txt file, a folder of images with a "
        "metadata.csv, or a hub id."
    )
    dataset_config: str | None = Field(None, description="Configuration of a hub data set, or an Excel file's sheet.")
    dataset_train_split: str = Field("train", description="Its split to train on.")
    eval_dataset_name: str | None = Field(None, description="Held-out data, likewise; evaluated before and after.")
    eval_dataset_split: str = Field("train", description="Its split to evaluate on.")
    prompt_template: str | None = Field(
        None, description='Columns as one prompt: "{question} [[Context: {context}]]"; [[…]] goes if a column is empty.'
    )
    completion_template: str | None = Field(None, description='What is learnt, likewise: "{answer}".')
    system_template: str | None = Field(None, description="The system message of such pairs, likewise.")
    chat_template: str | None = Field(
        None, description="Instead of the tokenizer's own: chatml, llama-3, gemma, mistral, phi-3, …, or a .jinja file."
    )
    image_size: int | None = Field(None, ge=1, description="Reduce images to so many pixels on their longer side.")
    convert_images: bool = Field(
        False, description="Take animated images (their first frame), CMYK and 16 bits; false leaves such rows out."
    )
    allow_image_urls: bool = Field(False, description="Fetch images that are given by a URL, before training.")
    strict_data: bool = Field(False, description="Refuse data with a bad row; false drops the row and says so.")

    output_dir: Path = Field(Path("outputs"), description="Where the adapter, the curve and checkpoints go.")
    overwrite: bool = Field(False, description="Replace a model that is already in output_dir.")
    sample_prompt: str | None = Field(None, description="A question to answer before and after training.")
    learning_rate: float = Field(
        2e-4, gt=0, description="Peak learning rate; unless given, 1e-5 where the method is dpo or orpo."
    )
    per_device_train_batch_size: int = Field(2, ge=1, description="Rows per step and device.")
    max_length: int | None = Field(2048, ge=2, description="Longer rows are cut off at this many tokens.")
    logging_steps: float = Field(1, gt=0, description="Steps between two lines of the log.")
    seed: int = Field(3407, ge=0, description="Of the adapters' start and the order of the data.")

    doctor: bool = Field(
        True, description="Look for silent errors before training, and refuse what is certain to go wrong; false: not."
    )
    compile: bool = Field(True, description="Run the step through the backend; false runs it eagerly.")
    cuda_graphs: bool = Field(
        True, description="Record steps whose batches have one shape, and replay them; false launches every step."
    )
    trace_memory: bool = Field(
        False, description="Record the memory of one step; memory.png draws it over the plan (method sft, on a GPU)."
    )
    options: dict[str, Any] = Field({}, description='The backend\'s options, such as {memory_budget: "20GiB"}.')

    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("dtype", mode="before")
    @classmethod
    def _spelled_out(cls, value: Any) -> Any:
        short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
        return short.get(value, value) if isinstance(value, str) else value

    @field_validator(*TEMPLATES, mode="before")
    @classmethod
    def _template(cls, value: Any) -> Any:
        if isinstance(value, dict | list):  # how YAML reads {answer} and [[…]] without quotes
            raise DataError('a template stands in quotes, such as "{answer}"')
        if isinstance(value, str):
            Template.parse(value)
        return value

    @field_validator("options")
    @classmethod
    def _known_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        Options.parse(value, passes=[r.name for r in RECOGNISERS])  # an OptionError is a ValueError
        return value

    def place_of(self, name: str) -> str:
        """Where a setting was given: ``file:line``, its flag, or where it should have been."""
        return self._places.get(name, f"--{name.replace('_', '-')}")

    @property
    def prefers(self) -> bool:
        """Whether rows are to be preference pairs: ``chosen`` and ``rejected``."""
        return self.method != "sft"

    @property
    def trainer(self) -> dict[str, Any]:
        """The settings that are handed on to TRL's config."""
        shared = {
            name: getattr(self, name) for name in type(self).model_fields if name in trainer_settings(self.method)
        }
        if self.prefers and "learning_rate" not in self.model_fields_set:
            shared["learning_rate"] = PREFERENCE_LEARNING_RATE
        return {**shared, "output_dir": str(self.output_dir), **(self.model_extra or {})}


def read_config(path: Path | None, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Read and check a configuration.

    Args:
        path: a YAML file with one mapping, or None when flags say everything.
        overrides: settings that win over the file's.

    Raises:
        ConfigError: naming file and line (or the flag) of everything that is wrong, with the closest valid name.
    """
    given, lines = _read_yaml(path) if path is not None else ({}, {})
    foreign = [
        f"{path}:{lines[name]}: trust_remote_code is switched on by the flag --trust-remote-code alone: a file may "
        "come from somebody else"
        for name, value in given.items()
        if _trusts({name: value})
    ]
    if foreign:
        raise ConfigError("\n".join(foreign))
    given = {**given, **(overrides or {})}

    def where(name: str) -> str:
        if overrides and name in overrides:
            return f"--{name.replace('_', '-')}"
        return f"{path}:{lines[name]}" if name in lines else str(path or "the command line")

    method = given.get("method")
    method = method if isinstance(method, str) and method in METHODS else "sft"  # the model says what is wrong with it
    settings = trainer_settings(method)
    known = {*TrainConfig.model_fields, *settings}
    problems = [f"{where(n)}: {_unknown(n, method, known)}" for n in given if n not in known]
    others = [name for name in given if name in settings and name not in TrainConfig.model_fields]
    problems += [f"{where(n)}: {n} {wrong}" for n in others if (wrong := problem(n, given[n], method)) is not None]
    try:
        config = TrainConfig.model_validate(given)
    except ValidationError as error:
        problems += [_worded(e, where) for e in error.errors()]
        raise ConfigError("\n".join(problems)) from None
    config._places = {name: where(name) for name in given}
    problems += [f"{where(name)}: {name} {wrong}" for name, wrong in _together(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _together(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Settings that are fine by themselves and do not go together."""
    given = config.trainer
    saves, evaluates = given.get("save_strategy", "steps"), given.get("eval_strategy", "no")
    for bits in (4, 8):
        if getattr(config, f"load_in_{bits}bit") and not config.use_peft:
            yield f"load_in_{bits}bit", f"cannot be true without use_peft: {bits}-bit weights cannot be trained"
    if config.load_in_4bit and config.load_in_8bit:
        yield "load_in_8bit", "and load_in_4bit cannot both be true"
    if evaluates != "no" and config.eval_dataset_name is None:
        yield "eval_strategy", "needs an eval_dataset_name"
    if given.get("load_best_model_at_end") and saves not in (evaluates, "best"):
        yield "load_best_model_at_end", f"needs eval_strategy and save_strategy to agree: {evaluates!r} and {saves!r}"
    for word in _words(given.get("report_to")):
        package = {"azure_ml": "azureml", "flyte": "flytekitplugins"}.get(word, word)
        known = word in trainer_settings()["report_to"].words and word not in ("none", "all")
        if known and importlib.util.find_spec(package) is None:
            yield "report_to", f"{word} needs its package: pip install {word}"
    if config.embedding_learning_rate is not None and config.use_peft and not config.modules_to_save:
        yield "embedding_learning_rate", "needs modules_to_save: [embed_tokens], without which nothing trains them"
    if config.trace_memory and not (config.method == "sft" and config.compile):
        yield "trace_memory", "needs method sft and compile: true, whose steps are planned"
    if given.get("packing") and config.max_length is None:
        yield "packing", "needs a max_length, to which rows are packed"
    if given.get("bf16") and given.get("fp16"):
        yield "fp16", "and bf16 cannot both be true"
    if config.prefers:
        yield from _preferences(config)
    elif (config.prompt_template is None) != (config.completion_template is None):
        there, missing = ("prompt", "completion") if config.prompt_template is not None else ("completion", "prompt")
        yield f"{there}_template", f"needs a {missing}_template beside it, such as '{{answer}}'"


def _preferences(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """What does not go with ``method: dpo`` or ``orpo``, and TRL would find when the model is loaded, or never."""
    given = config.trainer
    if config.completion_template is not None:
        yield "completion_template", f"is not for method {config.method}: its answers are the columns chosen, rejected"
    losses = given.get("loss_type", ["sigmoid"])
    count = 1 if isinstance(losses, str) else len(losses)
    if (weights := given.get("loss_weights")) is not None and len(weights) != count:
        yield "loss_weights", f"holds {len(weights)} numbers for {count} of loss_type"
    if given.get("sync_ref_model") and config.use_peft:
        yield "sync_ref_model", "needs use_peft: false; with adapters the reference is the model without them"
    if given.get("sync_ref_model") and given.get("precompute_ref_log_probs"):
        yield "sync_ref_model", "and precompute_ref_log_probs cannot both be true"
    if given.get("generate_during_eval") and not any(map(importlib.util.find_spec, ("wandb", "comet_ml"))):
        yield "generate_during_eval", "shows its texts in wandb or comet_ml: pip install wandb"


def parse_flags(words: Sequence[str]) -> dict[str, Any]:
    """``["--max-steps", "20", "--packing", "--lora-r=8"]`` as settings; values are read as YAML.

    Raises:
        ConfigError: for a word that is no flag.
    """
    aliases = {"model": "model_name_or_path", "data": "dataset_name", "eval_data": "eval_dataset_name"}
    settings: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} is no flag; settings are given as --name value")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        settings[aliases.get(name, name)] = value if name in TEMPLATES else _yaml_value(value)
    return settings


def _yaml_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    try:
        return float(value) if isinstance(value, str) else value  # YAML 1.1 takes 2e-4 for a string
    except ValueError:
        return value


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's mapping, and the line that each of its names stands in."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        node, values = yaml.compose(text), yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not YAML: {error.problem}") from None
    if values is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:1: the file has to hold 'name: value' lines")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            raise ConfigError(f"{path}:{line}: {name!r} was already given in line {lines[name]}")
        lines[name] = line
    return {str(k): v if k in TEMPLATES else _number(v) for k, v in values.items()}, lines


def _trusts(value: Any) -> bool:
    """Whether a setting asks for foreign code, wherever in it."""
    if isinstance(value, dict):
        return any((name == "trust_remote_code" and inner) or _trusts(inner) for name, inner in value.items())
    return isinstance(value, list) and any(map(_trusts, value))


def _number(value: Any) -> Any:
    return _yaml_value(value) if isinstance(value, str) and value[:1].isdigit() else value


def _worded(error: Any, where: Any) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "missing":
        flags = {"model_name_or_path": "--model", "dataset_name": "--data"}
        return f"{where(name)}: {name} is missing ({flags.get(name, '--' + name.replace('_', '-'))})"
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, OptionError):
        return f"{where(name)}: {cause}"
    if isinstance(cause, DataError):
        return f"{where(name)}: {name}: {cause}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{where(name)}: {name} cannot be {error['input']!r}: {message}"


def _words(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _unknown(name: str, method: str, known: set[str]) -> str:
    others = [other for other in METHODS if name in trainer_settings(other)]
    if others:
        return f"{name!r} is a setting of method {' and '.join(others)}, not of {method}"
    return f"unknown setting {name!r}{_did_you_mean(name, known)}"


def _did_you_mean(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
