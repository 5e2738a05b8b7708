"""Prompts that leave no room for an answer, found before anything is generated."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset

from .problems import DataError

logger = logging.getLogger(__name__)

CERTAIN = 4
"""A prompt of fewer bytes than this share of the context is not counted in tokens: no template makes it too long."""


def context_of(model: Any) -> int | None:
    """Tokens that a model was made for, or None if its configuration does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def check_prompts(trainer: Any, dataset: Any, context: int | None) -> None:
    """Refuse data with a prompt that fills the context.

    Args:
        trainer: TRL's; its template and tools are part of a prompt.
        dataset: with a column ``prompt``; streams, and prompts that an environment writes, are checked as they come.
        context: tokens that prompt and completion share.

    Raises:
        DataError: naming the row.
    """
    known = isinstance(dataset, Dataset) and "prompt" in dataset.column_names and trainer.environment_factories is None
    if context is None or not known or "image" in dataset.column_names or "images" in dataset.column_names:
        return
    prompts = dataset["prompt"]
    long = [i for i, prompt in enumerate(prompts) if len(str(prompt).encode()) * CERTAIN >= context]
    lengths = {}
    for start in range(0, len(long), 1000):
        rows = long[start : start + 1000]
        ids, *_ = trainer._tokenize_prompts([prompts[i] for i in rows])
        lengths |= {row: len(tokens) for row, tokens in zip(rows, ids, strict=True)}
    for row, length in lengths.items():
        refuse_too_long(length, context, trainer.row_name(row))
    answer = trainer.max_completion_length or 0
    if tight := [row for row, length in lengths.items() if length + answer > context]:
        logger.warning(
            "%d prompts and max_completion_length=%d do not fit into the model's context of %d tokens together; "
            "the first is %s",
            *(len(tight), answer, context, trainer.row_name(tight[0])),
        )


def refuse_too_long(length: int, context: int, name: str) -> None:
    """Raise DataError for a prompt after which no token can come."""
    if length >= context:
        raise DataError(
            f"{name}: its prompt has {length} tokens, and the model's context is {context}: there is no room for an "
            "answer. Shorten the prompt or leave the row out"
        )
