"""Preference pairs: a prompt with the answer that is preferred to another, in the form that TRL's trainers read.

==============================  ======================================  ================================================
Shape                           chosen, rejected                        the prompt
==============================  ======================================  ================================================
texts                           texts                                   prompt; or what both texts begin with
a question and two answers      texts                                   question/instruction/… (and input, system)
a template                      texts                                   prompt_template
conversations                   messages, or the last message           prompt, messages or conversations; or what both
                                                                        begin with
==============================  ======================================  ================================================

All become ``prompt``, ``chosen``, ``rejected``: three texts, or three lists of messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .problems import BadRow, DataError
from .rows import (
    QUESTIONS,
    SYSTEMS,
    Row,
    Shape,
    Templates,
    beside,
    check_assistant,
    column_template,
    required,
    turns_of,
    unpacked,
)
from .templates import Template, column_text

ANSWERS = ("chosen", "rejected")

Message = dict[str, Any]


def detect_preferences(
    name: str, columns: Sequence[str], sample: Sequence[Row], *, templates: Templates, text_field: str = "text"
) -> Shape:
    """Find out what the rows of preferences are; arguments as of :func:`~unsloth.runtime.rows.detect`.

    Raises:
        DataError: when there are no two answers, or a template names a column that is not there.
    """
    if missing := [answer for answer in ANSWERS if answer not in columns]:
        raise DataError(
            f"data set {name!r} has the columns {', '.join(sorted(columns))}, and no {' and no '.join(missing)}: "
            "preferences are rows of prompt, chosen and rejected. Rows with one answer are for method: sft"
        )
    for setting, template in vars(templates).items():
        if template is not None:
            template.check(f"{name}: {setting}_template", columns)
    prompts = [column for column in ("prompt", "messages", "conversations") if column in columns]
    system = templates.system or column_template(next((c for c in SYSTEMS if c in columns), "system"), optional=True)
    value = next((row["chosen"] for row in sample if row.get("chosen") is not None), None)
    if isinstance(unpacked(value), list | dict):
        if templates.prompt is not None:
            raise DataError(f"{name}: prompt_template is for answers that are texts; chosen holds messages")
        used = _there(columns, *prompts, *ANSWERS, *system.columns)
        return Shape("preference pairs, as conversations", used, _conversations(prompts, system))
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    question = next((by_name[q] for q in QUESTIONS if q in by_name), None)
    if templates.prompt is None and (question == "prompt" or question is None):
        used = _there(columns, "prompt", *ANSWERS)
        return Shape("preference pairs", used, _texts("prompt" if question else None))
    prompt = templates.prompt
    if prompt is None:
        assert question is not None
        prompt = column_template(question)
        if (more := by_name.get("input")) not in (None, question):
            parts = column_template(more, optional=True, before="\n\n").parts
            prompt = Template((*prompt.parts, *parts), numbers=False)
    used = _there(columns, *prompt.columns, *ANSWERS, *system.columns)
    return Shape("preference pairs", used, _questions(prompt, system), gap="\n\n")


def _there(columns: Sequence[str], *names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name in columns))


def _texts(prompt: str | None) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        chosen, rejected = (required(row, answer) for answer in ANSWERS)
        if prompt is not None:
            question = required(row, prompt)
        else:
            question = chosen[: _shared(chosen, rejected)]
            # Not in the middle of a word: the space before a word is part of its token.
            question = question[: max(0, question.rfind(" "), question.rfind("\n"))]
            if not question.strip():
                raise BadRow("there is no column 'prompt', and chosen and rejected do not begin with the same words")
            chosen, rejected = chosen[len(question) :], rejected[len(question) :]
        _check_differ(chosen, rejected)
        return {"prompt": question, "chosen": chosen, "rejected": rejected}

    return convert


def _questions(prompt: Template, system: Template) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        question, rules = prompt.fill(row), system.fill(row)
        if not question.strip():
            raise BadRow("the prompt is empty")
        chosen, rejected = (required(row, answer) for answer in ANSWERS)
        _check_differ(chosen, rejected)
        opening = [{"role": "system", "content": rules}] if rules.strip() else []
        return {
            "prompt": [*opening, {"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }

    return convert


def _conversations(prompts: Sequence[str], system: Template) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        chosen, rejected = (_answer(row, answer) for answer in ANSWERS)
        prompt = _prompt(row, prompts)
        if isinstance(prompt, str):
            # Beside whole conversations the prompt stands once more as a text.
            prompt = [{"role": "user", "content": prompt}] if chosen[0]["role"] == "assistant" else None
        if prompt is None:
            prompt = chosen[: _shared(chosen, rejected)]
        if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if not prompt:
            raise BadRow("there is no prompt, and chosen and rejected do not begin with the same message")
        _check_differ(chosen, rejected)
        for column, answer in zip(ANSWERS, (chosen, rejected), strict=True):
            try:
                check_assistant(answer)
            except BadRow:
                raise BadRow(f"column {column!r} has no message of the assistant's after the prompt") from None
        rules = system.fill(row)
        if rules.strip() and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": rules}, *prompt]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **beside(row)}

    return convert


def _answer(row: Row, column: str) -> list[Message]:
    value = unpacked(row.get(column))
    return turns_of([value] if isinstance(value, dict) else value, column)


def _prompt(row: Row, columns: Sequence[str]) -> list[Message] | str | None:
    """The first of the columns that holds something: messages, or a text."""
    for column in columns:
        value = unpacked(row.get(column))
        if isinstance(value, list):
            return turns_of(value, column)
        if text := column_text(value, column):
            return text
    return None


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many messages two conversations begin with together, or characters two texts."""
    pairs = zip(chosen, rejected, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))


def _check_differ(chosen: Any, rejected: Any) -> None:
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same: there is nothing to prefer")
