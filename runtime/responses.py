"""Which tokens of a conversation are the assistant's, for a loss on its answers alone.

What a chat template puts around an answer is found by rendering: conversations whose texts are known are compared with
what comes out. Then every answer of a row is found in the row's own rendering, in the order of its messages, so that a
user who writes the template's markers into a question fools nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from rich.text import Text

from ..models import turns
from ..models.turns import Markers
from .problems import BadRow, DataError, shown

CHECKED = 20
"""Rows whose answers are compared with what was found in them, before training."""

SHOWN = 1000
"""Characters of the first row that are shown."""


def find_markers(tokenizer: Any) -> Markers:
    """:func:`~unsloth.models.turns.find_markers`, with errors as data has them.

    Raises:
        DataError: when the template drops or changes texts, or puts nothing before an answer.
    """
    try:
        return turns.find_markers(tokenizer)
    except turns.TemplateError as error:
        raise DataError(str(error)) from None
    except jinja2.TemplateError as error:
        raise BadRow(f"the chat template refuses the row: {error}") from None


def answers(tokenizer: Any, markers: Markers, row: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the model sees it, and where the assistant's answers are in it, with what ends each.

    Args:
        row: ``messages``, and perhaps ``tools`` and ``chat_template_kwargs``, which go to the template.

    Raises:
        BadRow: when an answer is not found, because the template changed it.
    """
    messages = row["messages"]
    text = _rendered(tokenizer, messages, tools=row.get("tools"), **(row.get("chat_template_kwargs") or {}))
    return text, spans(text, markers, messages)


def spans(text: str, markers: Markers, messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Where the assistant's answers are in what a template has made of messages, with what ends each.

    Args:
        messages: with texts as contents, or lists of parts, of which the texts are looked for.

    Raises:
        BadRow: when an answer is not found.
    """
    found, position = [], 0
    for number, message in enumerate(messages, 1):
        texts = _texts(message.get("content"))
        if message["role"] != "assistant":
            for content in texts:
                place = text.find(content, position)
                position = place + len(content) if place >= 0 else position
            continue
        content = "".join(texts)
        start = text.find(markers.start, position)
        first = start + len(markers.start)
        place = text.find(content, first) if start >= 0 else -1
        if place < 0:
            raise BadRow(f"message {number} (assistant) is not found in what the chat template makes of the row")
        end = place + len(content)
        stop = text.find(markers.stop, end) if markers.stop else end
        position = stop + len(markers.stop) if stop >= 0 else end
        found.append((first, position))
    return found


def _texts(content: Any) -> list[str]:
    if isinstance(content, list):
        return [text for part in content if (text := (part.get("text") or "").strip())]
    return [(content or "").strip()]


def tokenized(tokenizer: Any, markers: Markers, row: Mapping[str, Any]) -> dict[str, list[int]]:
    """A conversation as TRL reads it: ``input_ids``, and ``assistant_masks`` with 1 for what is trained on.

    Raises:
        BadRow: when an answer is not found.
        DataError: when the tokenizer cannot say where in a text its tokens are.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("assistant_only_loss needs a fast tokenizer (tokenizer.json), which says where its tokens are")
    text, spans = answers(tokenizer, markers, row)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token that reaches into an answer belongs to it, even if it begins with the marker's last space.
    mask = [int(any(a < end and b > start for start, end in spans)) for a, b in encoded["offset_mapping"]]
    return {"input_ids": encoded["input_ids"], "assistant_masks": mask}


def check(tokenizer: Any, rows: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]]) -> None:
    """Compare what is trained on with the answers themselves, on the first rows.

    Raises:
        DataError: when they are not the same.
    """
    for row, tokens in zip(rows[:CHECKED], made[:CHECKED], strict=True):
        learnt = tokenizer.decode(
            [t for t, on in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if on]
        )
        wanted = [(m.get("content") or "").strip() for m in row["messages"] if m["role"] == "assistant"]
        if missing := [answer for answer in wanted if answer and answer not in learnt]:
            raise DataError(f"the answer {shown(missing[0])} would not be trained on, but {shown(learnt, 80)}")


def learnt(row: Mapping[str, Any]) -> list[tuple[str, Sequence[int], Sequence[int]]]:
    """What a trainer made of a row: (name, tokens, labels), one of SFT, and of preferences one for either answer."""
    if "chosen_ids" in row:  # DPO
        prompt = row["prompt_ids"]
        answers = [(name, row[f"{name}_ids"]) for name in ("chosen", "rejected")]
        return [(name, [*prompt, *answer], [-100] * len(prompt) + list(answer)) for name, answer in answers]
    if "chosen_input_ids" in row:  # ORPO
        return [(name, row[f"{name}_input_ids"], row[f"{name}_labels"]) for name in ("chosen", "rejected")]
    return [("first row", row["input_ids"], row.get("labels", row["input_ids"]))]


def coloured(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int], *, plain: bool) -> Text:
    """A row with what is trained on in green; on a console without colours in «quotes»."""
    text = Text()
    first = 0
    while first < len(input_ids) and len(text) < SHOWN:
        trained = labels[first] >= 0
        last = first
        while last < len(input_ids) and (labels[last] >= 0) == trained:
            last += 1
        part = tokenizer.decode(input_ids[first:last])
        text.append(f"«{part}»" if plain and trained else part, style="green" if trained else "dim")
        first = last
    if len(text) > SHOWN:
        text = text[:SHOWN]
        text.append(" …", style="dim")
    return text


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **settings: Any) -> str:
    try:
        return turns.rendered(tokenizer, messages, **settings)
    except jinja2.TemplateError as error:
        raise BadRow(f"the chat template refuses the row: {error}") from None
