"""Chat templates by Unsloth's names, and its functions that bring data sets into the form of conversations."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from .. import chat_templates, responses
from ..problems import BadRow, DataError
from ..rows import ROLES, turns_of, unpacked
from ..templates import Template
from .old_names import explain_once

ALIASES = {
    **dict.fromkeys(("llama3", "llama-3.1", "llama-31", "llama-3.2", "llama-32", "llama-3.3", "llama-33"), "llama-3"),
    **dict.fromkeys(("gemma2", "gemma-2", "gemma3", "gemma-3", "gemma-3n", "gemma3n"), "gemma"),
    **dict.fromkeys(("gemma_chatml", "gemma2_chatml"), "chatml"),
    **dict.fromkeys(("phi-35", "phi-3.5"), "phi-3"),
    "phi4": "phi-4",
    **dict.fromkeys(("qwen-2.5", "qwen-25", "qwen25", "qwen2.5", "qwen-3", "qwen3", "qwen3-instruct"), "chatml"),
}
"""Names by which scripts ask for a format, and ours of it."""

_COLUMNS = ("conversations", "messages", "conversation", "texts", "text")
_MAPPING = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}


def get_chat_template(
    tokenizer: Any,
    chat_template: str | Sequence[str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Give a tokenizer a chat template; returns the tokenizer.

    Args:
        chat_template: a name, of ours or Unsloth's; a template itself; or a pair of one and the token that ends a turn.
            A tokenizer that brings a template of that format keeps its own, which knows more (tools, dates).
        mapping: how messages are written that the template will be given: what their "role" and "content" are called,
            and "user" and "assistant"; ShareGPT's is {"role": "from", "content": "value", "user": "human",
            "assistant": "gpt"}.
        map_eos_token: EOS becomes what ends a turn, if that is a token; where the vocabulary does not have it, turns
            end with EOS.
        system_message: of conversations without one.

    Raises:
        DataError: when the name is not known, or the template cannot be used.
    """
    stop = None
    if not isinstance(chat_template, str):
        chat_template, stop = chat_template
    own = tokenizer.chat_template
    if "{%" in chat_template or "{{" in chat_template:
        template = chat_template
    else:
        name = chat_template.lower()
        template = chat_templates.chat_template(ALIASES.get(name, name))
    tokenizer.chat_template = template
    markers = responses.find_markers(tokenizer)
    if isinstance(own, str) and template is not chat_template:
        tokenizer.chat_template = own
        try:
            if responses.find_markers(tokenizer) != markers:
                tokenizer.chat_template = template
        except (DataError, BadRow):
            tokenizer.chat_template = template
    stop = (stop or markers.stop).strip()
    if map_eos_token and stop and stop != tokenizer.eos_token:
        if stop in tokenizer.get_vocab():
            tokenizer.eos_token = stop
        elif isinstance(tokenizer.chat_template, str) and stop in tokenizer.chat_template:
            tokenizer.chat_template = tokenizer.chat_template.replace(stop, tokenizer.eos_token)
    tokenizer.chat_template = _opening(mapping, system_message) + tokenizer.chat_template
    return tokenizer


def _opening(mapping: Mapping[str, str] | None, system_message: str | None) -> str:
    """Statements before a template that bring its messages into the form that it reads."""
    text = ""
    if mapping is not None and {**_MAPPING, **mapping} != _MAPPING:
        names = {**_MAPPING, **mapping}
        roles = {names[role]: role for role in ("user", "assistant", *(k for k in names if k in ROLES))}
        role, content = json.dumps(names["role"]), json.dumps(names["content"])
        text += (
            f"{{% set roles = {json.dumps(roles)} %}}{{% set turned = namespace(messages=[]) %}}"
            "{% for message in messages %}"
            # What is in the usual form already stays.
            f"{{% set role = message[{role}] if {role} in message else message['role'] %}}"
            f"{{% set content = message[{content}] if {content} in message else message['content'] %}}"
            "{% set turned.messages = turned.messages + "
            "[{'role': roles[role] if role in roles else role, 'content': content}] %}"
            "{% endfor %}{% set messages = turned.messages %}"
        )
    if system_message is not None:
        text += (
            "{% if not messages or messages[0]['role'] != 'system' %}"
            f"{{% set messages = [{{'role': 'system', 'content': {json.dumps(system_message)}}}] + messages %}}"
            "{% endif %}"
        )
    return text


def standardize_sharegpt(
    dataset: Dataset,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = (),
    aliases_for_user: Sequence[str] = (),
    aliases_for_assistant: Sequence[str] = (),
    **others: Any,
) -> Dataset:
    """Conversations with ``from`` and ``value``, or other names, as ``role`` and ``content``.

    Args:
        dataset: with a column of messages, which keeps its name: conversations, messages, ….
        aliases_for_system, aliases_for_user, aliases_for_assistant: names of authors besides the usual ones.

    Raises:
        DataError: when there is no such column, or a row's messages cannot be read.
    """
    _explain(others)
    column = next((name for name in _COLUMNS if name in dataset.column_names and _holds_messages(dataset, name)), None)
    if column is None:
        if any(name in dataset.column_names for name in _COLUMNS):
            return dataset  # texts already
        raise DataError(f"the data set has no conversations: its columns are {', '.join(dataset.column_names)}")
    authors = {
        **dict.fromkeys(aliases_for_system, "system"),
        **dict.fromkeys(aliases_for_user, "user"),
        **dict.fromkeys(aliases_for_assistant, "assistant"),
    }

    def turned(row: dict[str, Any], index: int) -> dict[str, Any]:
        messages = unpacked(row[column])
        if authors and isinstance(messages, list):
            messages = [
                {**m, "role": authors.get(who, who)} for m in messages for who in [m.get("role", m.get("from"))]
            ]
        try:
            return {column: turns_of(messages, column)}
        except BadRow as reason:
            raise DataError(f"row {index + 1}: {reason}") from None

    return dataset.map(turned, with_indices=True, remove_columns=[column], desc="Standardizing")


standardize_data_formats = standardize_sharegpt


def to_sharegpt(
    dataset: Dataset,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Dataset:
    """Columns as conversations: ``conversations`` with ``from`` (human, gpt) and ``value``.

    Args:
        merged_prompt: the question's template, such as ``"{question} [[Context: {context}]]"``; a part in double
            brackets goes when a column of it is empty. Empty takes the column ``merged_column_name``.
        output_column_name: of the answer.
        remove_unused_columns: keep nothing else.
        conversation_extension: how many rows, drawn at random, make one conversation.
        random_state: of the draw.

    Raises:
        DataError: for a template that cannot be read, a column that is not there, and a row that cannot be used.
    """
    if "conversations" in dataset.column_names:
        explain_once("to_sharegpt", "the data set has conversations already")
        return dataset
    if conversation_extension < 1:
        raise DataError(f"conversation_extension cannot be {conversation_extension}")
    prompt = Template.parse(merged_prompt or f"{{{merged_column_name}}}")
    answer = Template.parse(f"{{{output_column_name}}}")
    for setting, template in (("merged_prompt", prompt), ("output_column_name", answer)):
        template.check(setting, dataset.column_names)
    pairs = []
    for index, row in enumerate(dataset):
        try:
            pairs.append(
                [{"from": "human", "value": prompt.fill(row)}, {"from": "gpt", "value": answer.fill(row)}]  # type: ignore
            )
        except BadRow as reason:
            raise DataError(f"row {index + 1}: {reason}") from None
    conversations = pairs
    draws = random.Random(random_state)
    for _ in range(conversation_extension - 1):
        order = draws.sample(range(len(pairs)), len(pairs))
        conversations = [whole + pairs[other] for whole, other in zip(conversations, order, strict=True)]
    if remove_unused_columns:
        return Dataset.from_dict({"conversations": conversations})
    return dataset.add_column("conversations", conversations)  # type: ignore[call-arg]


def _holds_messages(dataset: Dataset, column: str) -> bool:
    return len(dataset) > 0 and isinstance(unpacked(dataset[0][column]), list)


def _explain(others: Mapping[str, Any]) -> None:
    for name in others:
        if name not in ("batch_size", "num_proc", "desc"):
            raise TypeError(f"there is no argument {name!r}")
