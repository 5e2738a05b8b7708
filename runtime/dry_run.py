"""What a run would do, found out in seconds: settings, data, model, place and device, without any weight.

What takes long to import, TRL and PEFT and the models' code, is left out as well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat_templates import chat_template
from .checkpoints import CheckpointError
from .config import ConfigError, TrainConfig
from .data import DataError, Preview, Templates, preview
from .doctor import before_loading, told
from .images import ImageRules
from .outputs import OutputError, check_output
from .vision_data import collator_for, first_row, processor_for

if TYPE_CHECKING:
    from .vision import VisionCollator

SHOWN = 400
"""Characters of the first row that are shown as the model will see it."""


@dataclass
class DryRun:
    """What was found; ``print`` it.

    Attributes:
        lines: (name, text) in order.
    """

    lines: list[tuple[str, str]]

    def __str__(self) -> str:
        shown = [(name, part) for name, text in self.lines for name, part in _continued(name, text)]
        return "\n".join(f"{name:<12}{part}" for name, part in shown)


def dry_run(config: TrainConfig) -> DryRun:
    """Resolve everything that a run needs to know before it loads a weight.

    Raises:
        ConfigError: with everything that is wrong, each with file and line, or its flag.
        DoctorError: when training would certainly go wrong.
    """
    from ..models.source import ModelError

    problems: list[str] = []

    def attempt(setting: str, find: Callable[[], Any]) -> Any:
        try:
            return find()
        except (DataError, ModelError, OutputError, CheckpointError) as error:
            # An error of a template names it; its own line is closer to the mistake.
            named = next((n for n in config.model_fields_set if f"{n}:" in str(error)), setting)
            if isinstance(error, CheckpointError):
                named = "resume_from_checkpoint"
            elif config.chat_template is not None and "chat template" in str(error).replace("_", " "):
                named = "chat_template"
            problems.append(f"{config.place_of(named)}: {error}")
            return None

    output = attempt("output_dir", lambda: check_output(config, make=False))
    data = [attempt(setting, find) for setting, find in _data(config)]
    model = attempt("model_name_or_path", lambda: _model(config))
    tokenizer = model and attempt("model_name_or_path", lambda: _tokenizer(config, data[0]))
    collator = None
    if not problems and tokenizer is not None and data[0].shape is not None and data[0].shape.images:
        collator = attempt("model_name_or_path", lambda: collator_for(config, tokenizer))
        tokenizer = tokenizer.tokenizer
    if problems:
        raise ConfigError("\n".join(problems))
    lines = [("model", model), ("training", _training(config))]
    lines += [("data" if i == 0 else "held out", str(found)) for i, found in enumerate(data)]
    if (example := _example(tokenizer, data[0], collator)) is not None:
        lines.append(("first row", example))
    if config.doctor and tokenizer is not None:
        lines.append(("doctor", "\n".join(told(before_loading(tokenizer, data[0], config, collator)))))
    free = shutil.disk_usage(output).free
    state = "is there" if config.output_dir.exists() else "will be made"
    lines += [("output", f"{config.output_dir} {state}, {free / 2**30:,.1f} GiB free"), ("device", _device(config))]
    return DryRun(lines)


def _continued(name: str, text: str) -> list[tuple[str, str]]:
    first, *rest = text.splitlines() or [""]
    return [(name, first), *(("", line) for line in rest)]


def _data(config: TrainConfig) -> list[tuple[str, Callable[[], Preview]]]:
    shared: dict[str, Any] = {
        "text_field": config.trainer.get("dataset_text_field", "text"),
        "strict": config.strict_data,
        "preferences": config.prefers,
        "images": ImageRules(urls=config.allow_image_urls, convert=config.convert_images, resize=config.image_size),
    }

    def look(name: str, sheet: str | None) -> Preview:
        given = (config.prompt_template, config.completion_template, config.system_template)
        templates = Templates.parse(*given, preferences=config.prefers)
        return preview(name, config=sheet, templates=templates, **shared)

    found = [("dataset_name", lambda: look(config.dataset_name, config.dataset_config))]
    if (held_out := config.eval_dataset_name) is not None:
        found.append(("eval_dataset_name", lambda: look(held_out, None)))
    return found


def _model(config: TrainConfig) -> str:
    from ..models import presets
    from ..models.source import ModelError, locate, missing_weights, pickles

    name = config.model_name_or_path
    source = locate(name, gguf_file=config.gguf_file, tokenizer_only=True)
    if source.folder is None:
        return f"{name}: {_described(presets.config(name).to_dict())}, random weights"
    if source.gguf:
        return f"{name}: {source.files / source.gguf}, {(source.files / source.gguf).stat().st_size / 1e6:,.0f} MB"
    if source.adapter:
        return f"{name}: an adapter of {source.base_model}"
    described = _described(json.loads((source.files / "config.json").read_text(encoding="utf-8")))
    if not Path(name).expanduser().exists():
        return f"{name}: {described}, from the hub"
    if missing := missing_weights(source.files):
        unsafe = pickles(source.files)
        raise ModelError(
            f"{name!r} holds its weights as pickle ({unsafe[0]}), which is not read"
            if unsafe
            else f"{name!r} lacks weights: {', '.join(missing)}"
        )
    size = sum(path.stat().st_size for path in source.files.glob("model*.safetensors"))
    return f"{name}: {described}, {size / 1e6:,.0f} MB"


def _described(settings: dict[str, Any]) -> str:
    inner = settings.get("text_config") or settings
    kind = (settings.get("architectures") or [settings.get("model_type", "unknown")])[0]
    layers, hidden = inner.get("num_hidden_layers"), inner.get("hidden_size")
    return f"{kind}, {layers} layers, hidden size {hidden}, vocabulary {inner.get('vocab_size', 0):,}"


def _tokenizer(config: TrainConfig, data: Preview | None) -> Any:
    from ..models.tokenizer import load_tokenizer

    if config.gguf_file or config.model_name_or_path.endswith(".gguf"):
        return None  # takes seconds to read
    template = None if config.chat_template is None else chat_template(config.chat_template)
    if data is not None and data.shape is not None and data.shape.images:
        return processor_for(config, data.name, template)
    chats = data is not None and data.is_chat and template is None and "chat_template_path" not in config.trainer
    tokenizer = load_tokenizer(config.model_name_or_path, require_chat_template=chats)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _example(tokenizer: Any, data: Preview, collator: VisionCollator | None) -> str | None:
    """The first row as the model will see it, and how many tokens it has."""
    row = data.first
    if tokenizer is None or row is None or "input_ids" in row:
        return None
    if collator is not None:
        count = collator.check(row)
        text = tokenizer.decode(first_row(collator, row)["input_ids"])
        return f"{count:,} tokens (an image is shown as one)\n{text[:SHOWN]}{' …' if len(text) > SHOWN else ''}"
    answer = row.get("chosen", row.get("completion", ""))
    messages = row.get("messages") or [*row.get("prompt", ""), *answer]
    if isinstance(messages, list) and messages and isinstance(messages[0], dict):
        if not tokenizer.chat_template:
            return None
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        text = row.get("text") or row["prompt"] + answer
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return f"{tokens:,} tokens\n{text[:SHOWN]}{' …' if len(text) > SHOWN else ''}"


def _training(config: TrainConfig) -> str:
    given = config.trainer
    modules = config.lora_target_modules
    layers = modules if isinstance(modules, str) else ", ".join(modules)
    what = f"LoRA of rank {config.lora_r} on {layers}" if config.use_peft else "all parameters"
    weights = "4-bit weights, " if config.load_in_4bit else "8-bit weights, " if config.load_in_8bit else ""
    batch, steps = config.per_device_train_batch_size, given.get("gradient_accumulation_steps", 1)
    length = f"at most {config.max_length:,} tokens a row" if config.max_length else "rows of any length"
    epochs = f"{given.get('num_train_epochs', 3):g} epochs"
    duration = f"{given['max_steps']:,} steps" if given.get("max_steps", -1) > 0 else epochs
    method = f"{config.method.upper()} with beta {given.get('beta', 0.1):g}: " if config.prefers else ""
    rows = "pairs" if config.prefers else "rows"
    return (
        f"{method}{what}, {weights}{batch} × {steps} {rows} a step, {length}, {duration}, "
        f"learning rate {given['learning_rate']:g}"
    )


def _device(config: TrainConfig) -> str:
    import torch

    if config.trainer.get("use_cpu") or not torch.cuda.is_available():
        return "cpu" + ("" if config.trainer.get("use_cpu") else " (torch sees no GPU)")
    card = torch.cuda.get_device_properties(0)
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
