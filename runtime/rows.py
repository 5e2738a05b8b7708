"""What the columns of a data set mean: the shapes of rows that are known, and each row in the form that TRL reads.

==========================  ==========================================  =================================
Shape                       Columns                                     becomes
==========================  ==========================================  =================================
a conversation              messages or conversations: role, content    messages
ShareGPT                    conversations or messages: from, value      messages
a prompt and completion     prompt, completion (texts or messages)      the same; a plain text stays plain
Alpaca                      instruction, output; input, system          prompt, completion (one message each)
a question and its answer   question/query/…, answer/response/…         likewise
templates                   whatever they name                          likewise
preferences                 chosen, rejected                            see :mod:`.preference_rows`
plain text                  text                                        text
tokens                      input_ids                                   the same
==========================  ==========================================  =================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .problems import BadRow, DataError, kind
from .templates import Part, Template, check_unicode, column_text, nothing

Row = Mapping[str, Any]

FORMS = {
    "messages": "a conversation",
    "conversations": "ShareGPT",
    "completion + prompt": "a prompt and its completion",
    "instruction + output": "Alpaca",
    "question + answer": "a question and its answer",
    "text": "plain text",
    "input_ids": "tokens",
}

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function": "tool",
}
"""What a message's author is called, and what chat templates call them."""

QUESTIONS = ("question", "query", "instruction", "problem", "prompt", "input")
ANSWERS = ("answer", "response", "output", "solution", "completion", "reply")
SYSTEMS = ("system", "system_prompt")

EXTRAS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""What chat templates read of a message besides its role and content."""

BESIDE = ("tools", "chat_template_kwargs")
"""Columns that TRL hands to the chat template, beside the messages."""


@dataclass(frozen=True)
class Templates:
    """How a user says that columns become a prompt and its completion.

    Attributes:
        prompt, completion: both or none.
        system: of the system message; goes with detected pairs as well.
    """

    prompt: Template | None = None
    completion: Template | None = None
    system: Template | None = None

    @classmethod
    def parse(
        cls,
        prompt: str | None = None,
        completion: str | None = None,
        system: str | None = None,
        *,
        preferences: bool = False,
    ) -> Templates:
        """Read the settings. Preferences have their two answers in columns, and only their prompt may be a template.

        Raises:
            DataError: naming the setting that is missing, or what is wrong in a template.
        """
        if not preferences and (prompt is None) != (completion is None):
            there, missing = ("prompt", "completion") if completion is None else ("completion", "prompt")
            raise DataError(f"{there}_template needs a {missing}_template beside it, such as '{{answer}}'")
        return cls(*(None if text is None else Template.parse(text) for text in (prompt, completion, system)))

    @property
    def columns(self) -> set[str]:
        """All columns that they name."""
        return {column for t in (self.prompt, self.completion, self.system) if t is not None for column in t.columns}


@dataclass(frozen=True)
class Shape:
    """What the rows of a data set are.

    Attributes:
        name: in words.
        columns: those that are used.
        convert: a row in the form that TRL reads; raises :class:`BadRow`.
        gap: what stands between a pair's prompt and its completion where no chat template does; None if the rows are
            no pairs. A user's templates say it themselves.
        images: whether rows have ``images``; see :mod:`.image_rows`.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any]]
    gap: str | None = None
    images: bool = False


def detect(
    name: str, columns: Sequence[str], sample: Sequence[Row], *, templates: Templates, text_field: str = "text"
) -> Shape:
    """Find out what rows are, by the names of their columns and, for conversations, what is in them.

    Args:
        name: of the data set, for the message.
        columns: all names.
        sample: the first few rows.
        templates: what the user said about them; wins.
        text_field: the column of plain text. One that is not called ``text`` was asked for, and wins over pairs.

    Raises:
        DataError: when no shape fits, or a template names a column that is not there.
    """
    if templates.prompt is not None and templates.completion is not None:
        for setting, template in vars(templates).items():
            if template is not None:
                template.check(f"{name}: {setting}_template", columns)
        used = tuple(column for column in columns if column in templates.columns)
        return Shape("by templates", used, _pair(templates.prompt, templates.completion, templates.system), gap="")
    shape = _detect(columns, sample, templates.system, text_field)
    if shape is None and {"chosen", "rejected"} <= set(columns):
        raise DataError(
            f"data set {name!r} holds preference pairs (chosen, rejected): method: dpo (or orpo) trains on them"
        )
    if shape is None:
        wanted = "; ".join(f"{text_field if c == 'text' else c} ({form})" for c, form in FORMS.items())
        raise DataError(
            f"data set {name!r} has the columns {', '.join(sorted(columns))}, and none of these: {wanted}. "
            "The settings prompt_template and completion_template make pairs of any columns"
        )
    if templates.system is not None:
        if shape.gap is None:
            raise DataError(f"{name}: system_template is for pairs; these rows are {shape.name}")
        templates.system.check(f"{name}: system_template", columns)
    return shape


def _detect(columns: Sequence[str], sample: Sequence[Row], system: Template | None, text_field: str) -> Shape | None:
    by_name = {column.strip().lower(): column for column in reversed(columns)}

    def first_of(names: Iterable[str], besides: str | None = None) -> str | None:
        return next((by_name[n] for n in names if n in by_name and by_name[n] != besides), None)

    def there(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if name in columns)

    # Rows of JSON may have it later on, where the others have none.
    system_column = first_of(SYSTEMS) or "system"
    if "input_ids" in columns:
        return Shape("tokens", tuple(columns), _tokens)
    for column in ("messages", "conversations"):
        if column in columns and (found := _conversation(column, sample)):
            return Shape(found, there(column, *BESIDE, system_column), _messages(column, system_column))
    if text_field in columns and text_field != "text":
        return Shape("plain text", (text_field,), _plain(text_field))
    if {"prompt", "completion"} <= set(columns):
        return Shape("a prompt and its completion", there("prompt", "completion", *BESIDE), _prompt_completion(sample))
    system = system or column_template(system_column, optional=True)
    pairs = [("Alpaca", "instruction", "input", ("output",)), ("Alpaca", "instruction", "context", ("response",))]
    for form, question, more, answers in pairs:
        if question in by_name and (answer := first_of(answers)):
            more = by_name.get(more, more)
            used = there(by_name[question], more, answer, *system.columns)
            return Shape(form, used, _pairs(by_name[question], more, answer, system), gap="\n\n")
    question = first_of(QUESTIONS)
    answer = first_of(ANSWERS, besides=question)
    if question and answer:
        used = there(question, answer, *system.columns)
        return Shape("a question and its answer", used, _pairs(question, None, answer, system), gap="\n\n")
    if text_field in columns:
        return Shape("plain text", (text_field,), _plain(text_field))
    return None


# -- pairs -------------------------------------------------------------------------------------------------------------


def column_template(name: str, *, optional: bool = False, before: str = "") -> Template:
    return Template((Part(((before, name),), optional),), numbers=False)


def _pairs(question: str, more: str | None, answer: str, system: Template) -> Callable[[Row], dict[str, Any]]:
    prompt = column_template(question)
    if more is not None:
        prompt = Template((*prompt.parts, *column_template(more, optional=True, before="\n\n").parts), numbers=False)
    return _pair(prompt, column_template(answer), system)


def _pair(prompt: Template, completion: Template, system: Template | None) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        question, answer = prompt.fill(row), completion.fill(row)
        for text, part in ((question, "prompt"), (answer, "completion")):
            if not text.strip():
                raise BadRow(f"the {part} is empty")
        rules = system.fill(row) if system is not None else ""
        opening = [{"role": "system", "content": rules}] if rules.strip() else []
        return {
            "prompt": [*opening, {"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }

    return convert


def unchatted(row: Row, gap: str) -> dict[str, str]:
    """A pair (or a preference) as plain texts, for a model without a chat template."""
    *opening, question = (message["content"] for message in row["prompt"])
    prompt = "".join(text + "\n\n" for text in opening) + question + gap
    return {"prompt": prompt, **{name: row[name][0]["content"] for name in row if name != "prompt"}}


def _prompt_completion(sample: Sequence[Row]) -> Callable[[Row], dict[str, Any]]:
    """Texts or messages, as the first row has them: a column holds one of the two."""

    def texts(row: Row) -> dict[str, Any]:
        return {column: required(row, column) for column in ("prompt", "completion")}

    def messages(row: Row) -> dict[str, Any]:
        prompt, completion = (turns_of(unpacked(row.get(column)), column) for column in ("prompt", "completion"))
        check_assistant(completion)
        return {"prompt": prompt, "completion": completion, **beside(row)}

    first = next((row["completion"] for row in sample if row.get("completion") is not None), None)
    return messages if isinstance(first, list) else texts


def required(row: Row, column: str) -> str:
    text = column_text(row.get(column), column)
    if text is None:
        raise BadRow(nothing(row, column))
    return text


# -- text and tokens ---------------------------------------------------------------------------------------------------


def _plain(column: str) -> Callable[[Row], dict[str, Any]]:
    return lambda row: {column: required(row, column)}


def _tokens(row: Row) -> dict[str, Any]:
    ids = row.get("input_ids")
    if not isinstance(ids, list) or not ids:
        raise BadRow(f"column 'input_ids' holds {kind(ids)}, not a list of tokens" if ids else "'input_ids' is empty")
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise BadRow("column 'input_ids' holds something that is no token's number")
    return dict(row)


# -- conversations -----------------------------------------------------------------------------------------------------


def _conversation(column: str, sample: Sequence[Row]) -> str | None:
    """Whether a column holds conversations, by the first row that shows it."""
    values = [row[column] for row in sample if row.get(column) is not None]
    for value in values:
        messages = unpacked(value)
        if isinstance(messages, list) and messages and isinstance(messages[0], dict):
            return "ShareGPT" if "from" in messages[0] else "a conversation"
    # Strings are another thing called messages; nothing at all is no reason to look for another shape.
    return None if any(isinstance(value, str) for value in values) else "a conversation"


def unpacked(value: Any) -> Any:
    """Messages as JSON, which is how a CSV file or a sheet holds them."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _messages(column: str, system: str) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        messages = turns_of(unpacked(row.get(column)), column)
        rules = column_text(row.get(system), system)
        if rules is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": rules}, *messages]
        check_assistant(messages)
        return {"messages": messages, **beside(row)}

    return convert


def turns_of(value: Any, column: str) -> list[dict[str, Any]]:
    if value is None:
        raise BadRow(f"column {column!r} is null")
    if not isinstance(value, list):
        raise BadRow(f"column {column!r} holds {kind(value)}, not a list of messages")
    if not value:
        raise BadRow(f"column {column!r} is empty")
    turns = [_turn(message, f"message {number}") for number, message in enumerate(value, 1)]
    # An empty system message is how many data sets say that there is none.
    return [turn for turn in turns if turn["role"] != "system" or turn["content"]] or turns


def _turn(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"{where} is {'null' if message is None else kind(message)}, not an object with role and content")
    role = message.get("role", message.get("from"))
    if role is None:
        raise BadRow(f"{where} has no role")
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise BadRow(f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
    content = _content(message.get("content", message.get("value")), where)
    extras = {key: message[key] for key in EXTRAS if message.get(key) is not None}
    if not content.strip() and known != "system" and not extras.get("tool_calls"):
        raise BadRow(f"{where} ({known}) has no content")
    return {"role": known, "content": content.strip() and content, **extras}


def _content(value: Any, where: str) -> str:
    """A message's text; a list of parts, as of vision models, if all of them are text."""
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        value = "".join(part["text"] for part in value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{where} has {kind(value)} as content, not text")
    check_unicode(value, where)
    return value


def check_assistant(messages: Sequence[Row]) -> None:
    if all(message["role"] != "assistant" for message in messages):
        raise BadRow("no message is the assistant's: there is nothing to learn")


def beside(row: Row) -> dict[str, Any]:
    return {column: row[column] for column in BESIDE if row.get(column) is not None}
