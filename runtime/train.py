"""One training run from a configuration: load, adapt, compile, train, save."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback, set_seed

from ..compiler.explain import Explanation
from ..models.adapters import add_lora
from ..models.load import load_model, load_tokenizer
from ..models.parts import outer_parts, targets
from . import checkpoints, responses
from .card import run_record, write_card
from .chat_templates import chat_template
from .config import ConfigError, TrainConfig
from .curves import plot_loss
from .data import Data, DataError, Templates, is_conversational, load_data
from .doctor import before_training, report
from .images import ImageRules
from .memory_trace import MemoryTrace
from .outputs import check_output, check_space, save_strategy
from .problems import BadRow
from .progress import ProgressBar
from .quiet import quiet
from .trainer import SFTTrainer
from .vision_data import collator_for, first_row, processor_for, usable

REFERENCE = "ref"
"""TRL's name for the adapter that a policy is compared with."""


class SavingError(OSError):
    """The results could not be written after training."""


@dataclass
class TrainResult:
    """What a run did; ``print`` it.

    Attributes:
        output_dir: where the adapter (or the model), ``loss.png`` and ``log.json`` are.
        steps: optimiser steps.
        tokens_per_second: real tokens, the first step left out; None for a run of one step.
        first_step_seconds: compilation included.
        peak_bytes: peak of the device's memory; None on a CPU.
        held_out: mean loss on the held-out rows before and after, nats per token; None without such rows.
        answers: what the model said to ``sample_prompt`` before and after; None without one.
        history: the trainer's log.
        explanation: what the compiler recognised.
        record: what the model card says of the run.
        memory: that of one step, where ``trace_memory`` was asked for.
    """

    output_dir: Path
    steps: int
    tokens_per_second: float | None
    first_step_seconds: float | None
    peak_bytes: int | None
    held_out: tuple[float, float] | None
    answers: tuple[str, str] | None
    explanation: Explanation
    history: list[dict[str, Any]] = field(repr=False)
    is_adapter: bool = True
    record: dict[str, Any] = field(default_factory=dict, repr=False)
    memory: MemoryTrace | None = None

    def __str__(self) -> str:
        rate = f"{self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else "no rate: one step only"
        lines = [f"steps       {self.steps}, {rate}, first step {self.first_step_seconds or 0:.1f} s"]
        if self.peak_bytes is not None:
            lines.append(f"memory      {self.peak_bytes / 2**30:.2f} GiB at the peak")
        if self.memory is not None:
            lines.append(f"traced      {self.memory}")
        if self.held_out is not None:
            before, after = self.held_out
            lines.append(f"held out    loss {before:.3f} before, {after:.3f} after ({(after - before) / before:+.1%})")
        if self.answers is not None:
            lines += [f"before      {self.answers[0]}", f"after       {self.answers[1]}"]
        lines.append(f"saved       {self.output_dir}  (curve: {self.output_dir / 'loss.png'})")
        call = "PeftModel.from_pretrained(base_model, " if self.is_adapter else "AutoModelForCausalLM.from_pretrained("
        if self.record.get("images"):
            call = call.replace("CausalLM", "ImageTextToText")
        lines.append(f'load        {call}"{self.output_dir}")')
        return "\n".join(lines)


def train(config: TrainConfig, *, console: Console | None = None) -> TrainResult:
    """Run a configuration.

    Everything that can be wrong with the question is found before the first step. Results appear in ``output_dir`` only
    when they are whole.

    Raises:
        DoctorError: when training would certainly go wrong, and it can be seen beforehand.
        DataError, ModelError, OutputError: when the data, the model or the place for the results cannot be used.
        CheckpointError: when there is nothing to resume from.
        SavingError: when the results could not be written after training.
        TrainingError: when the loss or the gradient is not finite three steps in a row.
        KeyboardInterrupt, SystemExit: after SIGINT and SIGTERM (143), when a checkpoint is written.
    """
    console = console or Console(stderr=True)
    with quiet():
        return _train(config, console)


def _train(config: TrainConfig, console: Console) -> TrainResult:
    set_seed(config.seed)
    check_output(config)
    data = _data(config)
    device = torch.device("cuda" if torch.cuda.is_available() and not config.trainer.get("use_cpu") else "cpu")
    if config.trace_memory and device.type != "cuda":
        raise ConfigError(
            f"{config.place_of('trace_memory')}: trace_memory needs a CUDA device, whose allocator tells what a step "
            "takes; unsloth plan --png draws what is predicted without one"
        )
    template = None if config.chat_template is None else chat_template(config.chat_template)
    has_template = template is not None or "chat_template_path" in config.trainer
    of_images = next((each.name for each in data if each.has_images), None)
    images = of_images is not None
    with console.status(f"loading {config.model_name_or_path}"):
        processor = processor_for(config, of_images, template) if of_images is not None else None
        tokenizer = (
            processor.tokenizer
            if processor is not None
            else load_tokenizer(
                config.model_name_or_path,
                gguf_file=config.gguf_file,
                trust_remote_code=config.trust_remote_code,
                require_chat_template=not has_template
                and any(is_conversational(d.rows) and not d.is_pairs for d in data),
            )
        )
        if template is not None:
            tokenizer.chat_template = template
        if not has_template and not tokenizer.chat_template:
            data = [d.without_chat() if d.is_pairs else d for d in data]
        model = _model(config, device, images)
    check_space(config, model)
    collator = None
    if processor is not None:
        collator = collator_for(config, processor)
        data = [usable(each, collator, config.strict_data) for each in data]
    elif config.trainer.get("assistant_only_loss"):
        data = [_answers_only(each, tokenizer, config.strict_data) for each in data]
    for each in data:
        console.print(str(each), markup=False, highlight=False, soft_wrap=True)
    if processor is not None and (wrong := next((n for n in ("packing", "padding_free") if config.trainer.get(n)), "")):
        raise DataError(f"{wrong} is for texts; the rows of {data[0].name!r} have images")
    trainer_class, config_class = _trainer(config)
    trainer = trainer_class(
        model,
        args=config_class(**_precision(config, device), **_unlogged(config, images), use_cpu=device.type == "cpu"),
        train_dataset=data[0].rows,
        eval_dataset=data[1].rows if len(data) > 1 else None,
        processing_class=processor or tokenizer,
        **({} if collator is None else {"data_collator": collator}),
        compile=config.compile,
        options=config.options,
        embedding_learning_rate=config.embedding_learning_rate,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
        **({"cuda_graphs": config.cuda_graphs} if config.method == "sft" else {}),
    )
    moved = any(getattr(trainer.args, name, False) for name in ("packing", "shuffle_dataset"))
    if len(trainer.train_dataset) == len(data[0].rows) and not moved:
        trainer.row_name = data[0].row_name
    if config.trace_memory:
        trainer.memory_trace = MemoryTrace()
        torch._functorch.config.enable_autograd_cache = False  # type: ignore[attr-defined]  whose graphs have no plan
    if config.doctor:
        report(before_training(trainer, tokenizer, data[0], config, collator), console)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressBar(console))
    shown = next(iter(trainer.train_dataset))
    _show_first_row(trainer, tokenizer, shown if collator is None else first_row(collator, shown), console)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    first = _answer(trainer.model, tokenizer, config.sample_prompt)
    before = _held_out_loss(trainer, console)
    history = list(trainer.state.log_history)  # training starts it anew
    try:
        trainer.train(resume_from_checkpoint=config.trainer.get("resume_from_checkpoint"))
    except (KeyboardInterrupt, SystemExit):
        console.print(_stopped(trainer), markup=False, highlight=False, soft_wrap=True)
        raise
    after = _held_out_loss(trainer, console)
    second = _answer(trainer.model, tokenizer, config.sample_prompt)

    result = TrainResult(
        output_dir=config.output_dir,
        steps=trainer.state.global_step,
        tokens_per_second=trainer.pace.tokens_per_second,
        first_step_seconds=trainer.pace.first_step_seconds,
        peak_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        held_out=(before, after) if before is not None and after is not None else None,
        answers=(first, second) if first is not None and second is not None else None,
        explanation=trainer.explanation,
        history=[*history, *trainer.state.log_history],
        is_adapter=config.use_peft,
        memory=getattr(trainer, "memory_trace", None),
    )
    result.record = run_record(config, data, result)
    try:
        _save(trainer, result)
    except OSError as error:
        raise SavingError(f"the results could not be saved in {config.output_dir}: {error}") from error
    return result


def _trainer(config: TrainConfig) -> tuple[Any, Any]:
    """The trainer of a method, and TRL's configuration for it."""
    if config.method == "sft":
        return SFTTrainer, trl.SFTConfig
    from . import preferences  # imports more of TRL, which costs a second

    return preferences.TRAINERS[config.method]


def _data(config: TrainConfig) -> list[Data]:
    """What to train on and, if there is, what to evaluate on."""
    shared: dict[str, Any] = {
        "text_field": config.trainer.get("dataset_text_field", "text"),
        "templates": Templates.parse(
            *(config.prompt_template, config.completion_template, config.system_template), preferences=config.prefers
        ),
        "strict": config.strict_data,
        "preferences": config.prefers,
        "images": ImageRules(urls=config.allow_image_urls, convert=config.convert_images, resize=config.image_size),
    }
    name, split = config.dataset_name, config.dataset_train_split
    data = [load_data(name, config=config.dataset_config, split=split, **shared)]
    if config.eval_dataset_name is not None:
        data.append(load_data(config.eval_dataset_name, split=config.eval_dataset_split, **shared))
    return data


def _answers_only(data: Data, tokenizer: Any, strict: bool) -> Data:
    """Conversations as tokens of which the assistant's are trained on; pairs are so already."""
    if "completion" in data.rows.column_names:
        return data
    if "messages" not in data.rows.column_names:
        raise DataError(f"{data.name}: assistant_only_loss is for conversations; these rows are {data.shape.name}")
    markers = responses.find_markers(tokenizer)
    kept, made, numbers = [], [], []
    for index, row in enumerate(data.rows):
        number = data.numbers[index] if data.numbers else index + 1
        try:
            made.append(responses.tokenized(tokenizer, markers, row))  # type: ignore[arg-type]
            numbers.append(number)
            if len(kept) < responses.CHECKED:
                kept.append(row)
        except BadRow as reason:
            data.problems.add(data.name, number, reason)
    if not made or (strict and data.problems.count):
        raise DataError(f"{data.problems.count:,} rows of {data.name!r} cannot be used:\n{data.problems}")
    responses.check(tokenizer, kept, made)
    return replace(data, rows=Dataset.from_list(made), numbers=numbers)


def _show_first_row(trainer: Any, tokenizer: Any, row: dict[str, Any], console: Console) -> None:
    """What the model sees of the first row, and what it learns of it; and what was cut off."""
    for name, ids, labels in responses.learnt(row):
        console.print(f"{name:<12}", end="")
        console.print(responses.coloured(tokenizer, ids, labels, plain=not console.is_terminal), soft_wrap=True)
    for name, cut in trainer.truncated.items():
        if cut.rows:
            gone = f", and {cut.dropped:,} dropped, of which nothing is left to train on" if cut.dropped else ""
            console.print(
                f"cut off     {cut.rows:,} of {cut.of:,} {name} rows are longer than {trainer.args.max_length:,} tokens"
                f" (max_length){gone}",
                highlight=False,
                soft_wrap=True,
            )


def _model(config: TrainConfig, device: torch.device, images: bool) -> Any:
    model = load_model(
        config.model_name_or_path,
        dtype=_weights(config, device),
        device=device,
        quantise="nf4" if config.load_in_4bit else "int8" if config.load_in_8bit else None,
        gguf_file=config.gguf_file,
        trust_remote_code=config.trust_remote_code,
        images=images or None,
    )
    if not config.use_peft:
        return model
    target_modules = config.lora_target_modules
    if target_modules == "all-linear" and outer_parts(model):
        target_modules = targets(
            model,
            vision=config.finetune_vision_layers and images,  # of texts they would learn nothing
            language=config.finetune_language_layers,
            attention=config.finetune_attention_modules,
            mlp=config.finetune_mlp_modules,
        )
    return add_lora(
        model,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=target_modules,
        seed=config.seed,
        autocast_adapter_dtype=config.autocast_adapter_dtype,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=config.modules_to_save,
    )


def _weights(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Frozen weights in bfloat16; trained ones in float32, because bfloat16 rounds small updates away."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if device.type == "cuda" and config.use_peft else torch.float32


def _precision(config: TrainConfig, device: torch.device) -> dict[str, bool]:
    """Autocast on a GPU, unless everything is in one dtype already or the user says."""
    given = {name: config.trainer[name] for name in ("bf16", "fp16") if name in config.trainer}
    if given:
        return {"bf16": False, "fp16": False, **given}
    uniform = not config.autocast_adapter_dtype or config.dtype == "float32"
    half = config.dtype == "float16"
    return {"bf16": device.type == "cuda" and not uniform and not half, "fp16": half and not uniform}


def _unlogged(config: TrainConfig, images: bool) -> dict[str, Any]:
    """The trainer's own settings, without its bars. Of images the collator makes all that it is given."""
    saving = {"save_strategy": save_strategy(config), "save_total_limit": 2}
    settings = {"report_to": "none", "disable_tqdm": True, **saving, **config.trainer}
    if images:
        settings["remove_unused_columns"] = False
    return {
        name: value
        for name, value in settings.items()
        if name not in ("bf16", "fp16", "use_cpu", "assistant_only_loss")
    }


def _stopped(trainer: Any) -> str:
    saved = checkpoints.checkpoints(Path(str(trainer.args.output_dir)))
    step = trainer.state.global_step
    if not saved or checkpoints.step_of(saved[0]) < step:
        return f"stopped at step {step}, without a checkpoint of it"
    return f"stopped at step {step}: {saved[0]}; --resume-from-checkpoint true goes on from there"


def _held_out_loss(trainer: Any, console: Console) -> float | None:
    if trainer.eval_dataset is None:
        return None
    with console.status("loss on the held-out rows"):
        return float(trainer.evaluate()["eval_loss"])


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, prompt: str | None, tokens: int = 64) -> str | None:
    """What the model says to a question, greedily."""
    if prompt is None:
        return None
    was_training = model.training
    model.eval()
    try:
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
        with torch.compiler.set_stance("force_eager"):  # a body that is compiled for training would be once a token
            generated = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, use_cache=True)
    finally:
        model.train(was_training)
    return tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# -- results -----------------------------------------------------------------------------------------------------------


def _save(trainer: Any, result: TrainResult) -> None:
    """Write everything beside its place and move it there when it is whole."""
    folder = result.output_dir
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        aside = Path(name)
        trainer.save_model(str(aside))
        shutil.rmtree(aside / REFERENCE, ignore_errors=True)  # the adapter that DPO started from, if from one
        (aside / "log.json").write_text(json.dumps(result.history, indent=1), encoding="utf-8")
        plot_loss(result.history, aside / "loss.png")
        write_card(aside, result.record, is_adapter=result.is_adapter, title=folder.name)
        if result.memory is not None:
            result.memory.write(aside)
        for path in sorted(aside.iterdir()):
            os.replace(path, folder / path.name)
