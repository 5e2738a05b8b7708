"""Subjects to diagnose: clean ones, and the parts to plant a bug into."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unsloth.models import presets
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.models.doctor import RULES, Row, Subject
from unsloth.models.doctor.rule import Evidence
from unsloth.models.doctor.tensors import Entry, Tensors

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def tokenizer(template: str | None = None, **special: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of bytes, with another template or other special tokens."""
    made = byte_tokenizer()
    if template is not None:
        made.chat_template = template
    for name, value in special.items():
        setattr(made, name, value)
    return made


def rows(tokens: PreTrainedTokenizerBase, *chats: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Conversations as rows, all of which is trained on."""
    made = []
    for number, chat in enumerate(chats or ([*CHAT], [{"role": "user", "content": "Why?"}, CHAT[1]]), 1):
        text = str(tokens.apply_chat_template(list(chat), tokenize=False))
        ids = tokens(text, add_special_tokens=False)["input_ids"]
        made.append(Row(f"rows:{number}", ids, ids, text, chat))
    return made


def subject(preset: str = "tiny-llama", *, tokens: PreTrainedTokenizerBase | None = None, **given: Any) -> Subject:
    """A clean subject without weights; settings of its configuration by their names, parts of it by theirs."""
    tokens = tokens or byte_tokenizer()
    config = copy.deepcopy(presets.config(preset))
    parts = {name: given.pop(name) for name in list(given) if name in Subject.__dataclass_fields__}
    for name, value in given.items():
        setattr(config, name, value)
    parts = {"config": config, "tokenizer": tokens, **parts}
    if "rows" not in parts:
        parts["rows"] = rows(tokens)
    return Subject("planted", **parts)


def tensors(**by_name: Tensor) -> Tensors:
    """Weights of a checkpoint; two underscores stand for a dot."""
    return Tensors({n.replace("__", "."): Entry(tuple(t.shape), lambda t=t: t) for n, t in by_name.items()})


def evidence(rule: str, planted: Subject) -> list[str]:
    """What a rule finds, which has to be able to look."""
    assert not [reason for part in RULES[rule].looks_at if (reason := planted.lacks(part))]
    return [e.text if isinstance(e, Evidence) else e for e in RULES[rule].check(planted)]


def severities(rule: str, planted: Subject) -> set[str]:
    """How bad a rule finds it."""
    found = [e if isinstance(e, Evidence) else Evidence(e) for e in RULES[rule].check(planted)]
    return {str(e.severity or RULES[rule].severity) for e in found}
