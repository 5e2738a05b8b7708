"""Which rows a batch was made of, in words."""

from __future__ import annotations

import itertools
from typing import Any

SHOWN = 8
"""Rows of a batch that are described."""

BEGINNING = 24
"""Tokens of a row that are shown."""


def rows_of(trainer: Any, batches: Any, epoch: int, update: int) -> list[str]:
    """Describe the rows of one optimiser step, a line each: their place in the data and how they begin.

    Args:
        trainer: whose step it was.
        batches: its micro-batches, as the collator made them.
        epoch, update: passes and steps in this pass before it.
    """
    steps = trainer.args.gradient_accumulation_steps
    numbers = _numbers(trainer, epoch, update * steps, len(batches)) or []
    rows = [row for batch in batches for row in _tokens(batch)]
    known = len(numbers) == len(rows)
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    lines = []
    for i, row in enumerate(rows[:SHOWN]):
        begins = tokenizer.decode(row[:BEGINNING]) if hasattr(tokenizer, "decode") else str(row[:BEGINNING])
        lines.append(f"  {trainer.row_name(numbers[i]) if known else f'row {i + 1} of the batch'}: {begins!r} …")
    if len(rows) > SHOWN:
        others = ", ".join(trainer.row_name(n) for n in numbers[SHOWN:]) if known else f"{len(rows) - SHOWN} more"
        lines.append(f"  and {others}")
    return lines


def _tokens(batch: Any) -> list[list[int]]:
    """A batch's rows; of preferences the chosen answers alone."""
    if "chosen_input_ids" in batch:  # ORPO
        return batch["chosen_input_ids"].tolist()
    rows = batch["input_ids"].tolist() if "input_ids" in batch else []
    return rows[: len(rows) // 2] if "completion_mask" in batch else rows  # DPO: the chosen ones, then the others


def _numbers(trainer: Any, epoch: int, first: int, count: int) -> list[int] | None:
    """Positions, from 0, in the training data; None for a stream, or where several processes share a batch."""
    loader = trainer.callback_handler.train_dataloader
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(batches, "sampler", None)
    if batches is None or sampler is None or not hasattr(trainer.train_dataset, "__len__"):
        return None
    if not hasattr(sampler, "set_epoch"):
        return None
    now = sampler.epoch  # it shuffles anew for each pass, by its number
    sampler.set_epoch(epoch)
    try:
        return [n for batch in itertools.islice(iter(batches), first, first + count) for n in batch]
    finally:
        sampler.set_epoch(now)
