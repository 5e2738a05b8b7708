"""What a chat template puts around an answer, found by rendering conversations whose texts are known."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class TemplateError(ValueError):
    """A chat template whose answers cannot be told from its questions."""


@dataclass(frozen=True)
class Markers:
    """What a template puts around an answer.

    Attributes:
        start: the last thing before it, such as ``<|im_start|>assistant\\n``: the generation prompt, if there is one.
        stop: what ends it and has to be learnt, such as ``<|im_end|>``; empty where the template has no end.
    """

    start: str
    stop: str


QUESTIONS, ANSWERS = ("QUESTIONONE", "QUESTIONTWO"), ("ANSWERONE", "ANSWERTWO")
"""Texts that no template has."""


def known_chat() -> list[dict[str, str]]:
    """Two questions and their answers."""
    return [
        {"role": role, "content": text}
        for pair in zip(QUESTIONS, ANSWERS, strict=True)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def find_markers(tokenizer: Any) -> Markers:
    """Compare renderings of known conversations.

    Raises:
        TemplateError: when the template drops or changes texts, or puts nothing before an answer.
        jinja2.TemplateError: when it refuses them.
    """
    chat = known_chat()
    whole = rendered(tokenizer, chat)
    if not all(whole.count(text) == 1 for text in (*QUESTIONS, *ANSWERS)):
        raise TemplateError("the chat template drops or repeats messages: answers cannot be told from questions in it")
    before = _between(whole, QUESTIONS[0], ANSWERS[0])
    asked = rendered(tokenizer, chat[:1]).partition(QUESTIONS[0])[2]
    prompted = rendered(tokenizer, chat[:1], add_generation_prompt=True).partition(QUESTIONS[0])[2]
    start = prompted.removeprefix(asked) if prompted.startswith(asked) else ""
    if not start or not before.startswith(asked + start):
        start = before  # there is no generation prompt, or another one: all that stands there
    if not start.strip():
        raise TemplateError("the chat template puts nothing between a question and its answer")
    inner, last = _between(whole, ANSWERS[0], QUESTIONS[1]), whole.partition(ANSWERS[1])[2]
    both = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(inner, last, strict=False))
    return Markers(start, "".join(one for one, _ in both).rstrip())


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **settings: Any) -> str:
    """A conversation as text.

    Raises:
        jinja2.TemplateError: when the template refuses it.
    """
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **settings)


def _between(text: str, first: str, second: str) -> str:
    return text.partition(first)[2].partition(second)[0]
