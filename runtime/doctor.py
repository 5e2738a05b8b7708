"""Errors that raise nothing and only make a model worse: looked for before training, or by ``unsloth doctor``.

The rules stand in :mod:`unsloth.models.doctor`; here is what only training knows: the data, as tokens and labels, and
the settings of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from torch import nn

from ..models.doctor import RULES, Diagnosis, Finding, Row, Run, diagnose, of_loaded, read
from ..models.doctor.subject import written_json
from ..models.source import locate
from ..models.turns import Markers, rendered
from . import responses
from .chat_templates import chat_template as template_of
from .problems import BadRow, DataError
from .rows import Shape, Templates, detect, unchatted

if TYPE_CHECKING:  # to import datasets takes longer than to ask all rules
    from datasets import Dataset
    from rich.console import Console

    from .config import TrainConfig
    from .data import Data, Preview
    from .vision import VisionCollator


class DoctorError(ValueError):
    """Training would certainly go wrong."""


def doctor(
    model: str | nn.Module,
    tokenizer: Any = None,
    data: str | Dataset | Sequence[Mapping[str, Any]] | None = None,
    *,
    weights: bool | None = None,
    chat_template: str | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    packing: str | None = None,
    attn_implementation: str | None = None,
    target_modules: Sequence[str] | None = None,
    modules_to_save: Sequence[str] = (),
    assistant_only: bool = False,
    plots: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Diagnosis:
    """Look for errors that raise nothing: in configuration, tokenizer, chat template, weights, code and data.

    Args:
        model: a name as :func:`~unsloth.models.load.load_model` takes it, of which no weights are loaded; or a model of
            transformers in memory, PEFT-wrapped or not.
        tokenizer: instead of the one that the name has; needed for a model in memory.
        data: rows that it is to be trained on: a file, a hub id, or rows in any form that ``unsloth train`` takes. The
            first :data:`~unsloth.runtime.data.SAMPLE` are looked at.
        weights: read the embedding, the head and the norms; None reads them where they are on this machine.
        chat_template: instead of the tokenizer's: a name or a file, as ``unsloth train`` takes it.
        max_length, dtype, packing, target_modules, modules_to_save: of the run that is meant, as far as it is known:
            tokens, "float32", "bfloat16" or "float16", None, "bfd" or "wrapped", and what LoRA is put on.
        attn_implementation: what the model is to run with; None is its own choice.
        assistant_only: only the assistant's answers are trained on.
        plots: a folder for plots of what was looked at.
        trust_remote_code: run Python code that the checkpoint brings along.

    Raises:
        ModelError, DataError: when the model or the data cannot be read.
    """
    if isinstance(model, str):
        local = Path(model).expanduser().exists()
        subject = read(
            model,
            weights=local and _has_weights(Path(model).expanduser()) if weights is None else weights,
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
        )
        subject.attn_implementation = attn_implementation
    else:
        subject = of_loaded(model, tokenizer)
        subject.attn_implementation = attn_implementation or subject.attn_implementation
    if chat_template is not None and subject.tokenizer is not None:
        subject.tokenizer.chat_template = template_of(chat_template)
    meant = (max_length, dtype, packing, target_modules, modules_to_save or None)
    if any(setting is not None for setting in meant):
        subject.run = Run(dtype or "bfloat16", max_length, packing, target_modules, tuple(modules_to_save))
    if data is not None:
        if subject.tokenizer is None:
            raise DataError(f"{subject.name!r} has no tokenizer, so that nothing can be said about data")
        subject.rows = sample(data, subject.tokenizer, assistant_only=assistant_only)
    found = diagnose(subject)
    if plots is not None:
        from .doctor_plots import draw

        draw(subject, Path(plots))
    return found


def _has_weights(path: Path) -> bool:
    return path.suffix == ".gguf" or any(path.glob("model*.safetensors"))


# -- data --------------------------------------------------------------------------------------------------------------


def sample(
    data: str | Dataset | Iterable[Mapping[str, Any]], tokenizer: Any, *, assistant_only: bool = False
) -> list[Row]:
    """The first rows, as tokens and labels, the way the trainer makes them.

    Raises:
        DataError: when there is no such data, or its rows are none that can be trained on.
    """
    name, shape, rows, numbers = _first_rows(data)
    return _made(tokenizer, name, shape, zip(numbers, rows, strict=True), assistant_only)


def _made(
    tokenizer: Any, name: str, shape: Shape, rows: Iterable[tuple[int, dict[str, Any]]], assistant_only: bool
) -> list[Row]:
    gap = None if tokenizer.chat_template else shape.gap
    markers = responses.find_markers(tokenizer) if assistant_only else None
    found = []
    for number, row in rows:
        plain = row if gap is None else unchatted(row, gap)
        try:
            found.append(_tokens(tokenizer, plain, f"{name}:{number}", markers))
        except BadRow as reason:
            raise DataError(f"{name}:{number}: {reason}") from None
    return found


def _first_rows(data: Any) -> tuple[str, Shape, list[dict[str, Any]], Sequence[int]]:
    """(name, what the rows are, the rows, their numbers)."""
    from .data import SAMPLE, load_data, preview

    if isinstance(data, str):
        seen = preview(data)
        if seen.shape is not None:
            return data, seen.shape, list(seen.rows), seen.numbers
        whole = load_data(data)
        rows = [dict(row) for row in whole.rows.select(range(min(SAMPLE, len(whole.rows))))]
        return data, whole.shape, rows, (whole.numbers or range(1, len(rows) + 1))[: len(rows)]
    given = [dict(row) for _, row in zip(range(SAMPLE), data, strict=False)]
    if not given:
        raise DataError("the data has no rows")
    shape = detect("data", list(dict.fromkeys(c for row in given for c in row)), given, templates=Templates())
    converted, numbers = [], []
    for number, row in enumerate(given, 1):
        try:
            converted.append(shape.convert(row))
            numbers.append(number)
        except BadRow as reason:
            if number == len(given) and not converted:
                raise DataError(f"no row of the data can be used; row {number}: {reason}") from None
    return "row", shape, converted, numbers


def _tokens(tokenizer: Any, row: Mapping[str, Any], name: str, markers: Markers | None) -> Row:
    """One row as TRL's trainer tokenises it: conversations without special tokens, plain texts with EOS behind them."""
    if "input_ids" in row:
        return Row(name, row["input_ids"], row.get("labels", row["input_ids"]))
    if "chosen" in row:
        row = {"prompt": row["prompt"], "completion": row["chosen"]}
    if "messages" in row:
        messages = row["messages"]
        text = _text(tokenizer, messages, row)
        if markers is None:
            ids = _ids(tokenizer, text, special=False)
            return Row(name, ids, ids, text, messages)
        made = responses.tokenized(tokenizer, markers, row)
        ids, mask = made["input_ids"], made["assistant_masks"]
        return Row(name, ids, [i if on else -100 for i, on in zip(ids, mask, strict=True)], text, messages)
    if "prompt" not in row:
        text = _ended(tokenizer, next(iter(row.values())))
        ids = _ids(tokenizer, text, special=True)
        return Row(name, ids, ids, text)
    prompt, completion = row["prompt"], row["completion"]
    chat = isinstance(prompt, list)
    if chat:
        messages = [*prompt, *completion]
        asked, text = _text(tokenizer, prompt, row, add_generation_prompt=True), _text(tokenizer, messages, row)
    else:
        messages, asked, text = [], prompt, prompt + _ended(tokenizer, completion)
    before, ids = (_ids(tokenizer, t, special=not chat) for t in (asked, text))
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False)))
    return Row(name, ids, [-100] * shared + ids[shared:], text, messages)


def _text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any], **settings: Any) -> str:
    if not tokenizer.chat_template:
        raise DataError("the rows are conversations, and the tokenizer has no chat template: --chat-template chatml")
    try:
        return rendered(
            tokenizer, messages, tools=row.get("tools"), **(row.get("chat_template_kwargs") or {}), **settings
        )
    except jinja2.TemplateError as error:
        raise BadRow(f"the chat template refuses the row: {error}") from None


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _ended(tokenizer: Any, text: str) -> str:
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


# -- before training ---------------------------------------------------------------------------------------------------


def before_loading(
    tokenizer: Any, data: Preview, config: TrainConfig, collator: VisionCollator | None = None
) -> Diagnosis:
    """Ask what can be asked of a run without its weights: its files, and the first rows of its data.

    Args:
        collator: of rows that have images.

    Raises:
        ModelError, DataError: when they cannot be read.
    """
    subject = read(config.model_name_or_path, weights=False, gguf_file=config.gguf_file, tokenizer=tokenizer)
    subject.run = _run(config)
    if collator is not None:
        subject.rows = _with_images(data.rows, data, collator)
    elif data.shape is not None:
        masked = bool(config.trainer.get("assistant_only_loss")) and "messages" in (data.first or {})
        subject.rows = _made(tokenizer, data.name, data.shape, zip(data.numbers, data.rows, strict=True), masked)
    return diagnose(subject, only=lambda rule: rule.cheap)


def _run(config: TrainConfig, dtype: str | None = None) -> Run:
    given = config.trainer
    return Run(
        dtype=dtype or ("float16" if given.get("fp16") or config.dtype == "float16" else "bfloat16"),
        max_length=config.max_length,
        packing=given.get("packing_strategy", "bfd") if given.get("packing") else None,
        adapted=None,
        saved_modules=tuple(config.modules_to_save or ()),
        trainer="unsloth",
    )


def before_training(
    trainer: Any, tokenizer: Any, data: Data, config: TrainConfig, collator: VisionCollator | None = None
) -> Diagnosis:
    """Ask the cheap rules about a run that is about to begin: those that run no model.

    Args:
        collator: makes the rows where these are not tokens yet, because they have images.
    """
    subject = of_loaded(trainer.model, tokenizer, name=config.model_name_or_path)
    subject.written = _written(config)
    subject.run = _run(config, "float16" if trainer.args.fp16 else "bfloat16" if trainer.args.bf16 else config.dtype)
    made = trainer.train_dataset
    subject.rows = _prepared(made, data) if collator is None else _with_images(made, data, collator)
    return diagnose(subject, only=lambda rule: rule.cheap)


def _prepared(made: Any, data: Data) -> list[Row]:
    """The first rows that a trainer has made; with their names where they are still in the data's order."""
    from datasets import Dataset

    from .data import SAMPLE

    in_order = isinstance(made, Dataset) and len(made) == len(data.rows)
    found = []
    for index, row in zip(range(SAMPLE), made, strict=False):
        name = data.row_name(index) if in_order else f"row {index + 1}"
        messages = data.rows[index].get("messages") or () if in_order else ()
        found += [Row(name, ids, labels, messages=messages) for _, ids, labels in responses.learnt(dict(row))]
    return found


def _with_images(rows: Any, data: Data | Preview, collator: VisionCollator) -> list[Row]:
    from .data import Data
    from .vision_data import first_row

    found: dict[tuple[int, ...], Row] = {}  # two that differ in their images alone are no repetition
    for index, row in zip(range(responses.CHECKED), rows, strict=False):
        made = first_row(collator, row)
        name = data.row_name(index) if isinstance(data, Data) else f"{data.name}:{data.numbers[index]}"
        found.setdefault(tuple(made["input_ids"]), Row(name, made["input_ids"], made["labels"]))
    return [*found.values()]


def _written(config: TrainConfig) -> Mapping[str, Any]:
    """``config.json`` of the model, where it has one."""
    return written_json(locate(config.model_name_or_path, gguf_file=config.gguf_file, tokenizer_only=True))


def report(found: Diagnosis, console: Console) -> None:
    """Print what was found before a run, a few lines.

    Raises:
        DoctorError: when training would certainly go wrong.
    """
    for line in told(found):
        console.print(f"doctor      {line}", markup=False, highlight=False, soft_wrap=True)


def told(found: Diagnosis) -> list[str]:
    """What was found before a run, a line each.

    Raises:
        DoctorError: when training would certainly go wrong.
    """
    if found.stops:
        told = "\n".join(map(_told, found.stops))
        raise DoctorError(f"{told}\n--doctor false trains all the same")
    return [*map(_told, found.findings)] or [f"{len(found.silent)} rules, nothing found"]


def _told(finding: Finding) -> str:
    evidence = finding.told.replace("\n", "; ")
    return f"{finding.severity} {finding.rule.id}: {evidence} → {finding.rule.remedy}"


# -- the rules ---------------------------------------------------------------------------------------------------------


def rule_list() -> str:
    """Every rule, a line each."""
    width = max(map(len, RULES)) + 2
    return "\n".join(f"{r.severity:<9}{r.id:<{width}}{r.wrong}" for r in RULES.values())


def rule_table() -> str:
    """Every rule as the table of docs/doctor.md."""
    lines = ["| Rule | | Looks at | What is wrong | What to do |", "|---|---|---|---|---|"]
    for rule in RULES.values():
        stops = ", stops training" if rule.stops else ""
        wrong, remedy = (text.replace("|", "\\|") for text in (rule.wrong, rule.remedy))
        lines.append(f"| `{rule.id}` | {rule.severity}{stops} | {', '.join(rule.looks_at)} | {wrong} | {remedy} |")
    return "\n".join(lines)
