"""The other two shapes that a training batch comes in: packed documents, and rows padded to one length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that the loss leaves out, in transformers and in PyTorch."""


def packed(batch: dict[str, Any]) -> dict[str, Any]:
    """The rows of a batch one behind the other in a single row, as documents.

    Position ids restart where a document begins and there is no attention mask: that is how transformers is told of
    packed documents. The first token of a document is no target of the document before it.

    Args:
        batch: ``input_ids`` and ``labels``, [rows, length].

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, [1, rows · length], and whatever else is no tensor.
    """
    ids, labels = batch["input_ids"], batch["labels"].clone()
    labels[:, 0] = IGNORED
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    rest = {name: value for name, value in batch.items() if not isinstance(value, Tensor)}
    rows = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {**rest, **{name: value.reshape(1, -1) for name, value in rows.items()}}


def padded(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with every row but the first shorter than the one before, padded on the right.

    Args:
        batch: ``input_ids`` and ``labels``, [rows, length].

    Returns:
        The batch with an ``attention_mask``, [rows, length], and labels that leave the padding out.
    """
    rows, length = batch["input_ids"].shape
    step = max(1, length // (rows + 1))
    lengths = torch.tensor([max(1, length - row * step) for row in range(rows)], device=batch["input_ids"].device)
    if rows == 1:
        lengths -= step  # a single row is padded too
    mask = (torch.arange(length, device=lengths.device) < lengths[:, None]).long()
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, IGNORED)}
