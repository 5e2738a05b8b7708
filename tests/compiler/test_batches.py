"""Packed and padded batches are what a data collator would make of the same rows."""

from __future__ import annotations

import torch
from transformers import DataCollatorWithFlattening

from unsloth.compiler.batches import IGNORED, packed, padded


def rows(count: int = 3, length: int = 8) -> dict:
    ids = torch.arange(1, count * length + 1).view(count, length)
    return {"input_ids": ids, "labels": ids.clone(), "use_cache": False}


def test_packed_is_what_the_flattening_collator_makes() -> None:
    batch = rows()
    features = [{"input_ids": r.tolist(), "labels": r.tolist()} for r in batch["input_ids"]]
    expected = DataCollatorWithFlattening()(features)
    ours = packed(batch)
    assert ours.pop("use_cache") is False
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    assert torch.equal(batch["labels"], rows()["labels"])  # the batch itself stays


def test_padded_rows_get_shorter() -> None:
    batch = padded(rows())
    assert batch["attention_mask"].sum(1).tolist() == [8, 6, 4]
    assert torch.equal(batch["labels"] == IGNORED, batch["attention_mask"] == 0)
    assert padded(rows(1, 4))["attention_mask"].tolist() == [[1, 1, 0, 0]]
