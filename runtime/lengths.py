"""How long the rows of a data set are, and what follows for batches of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow.compute
from datasets import Dataset
from torch import Tensor

SHORT_ROWS = 0.05
"""Share of rows of other lengths up to which a graph is compiled for the usual length first."""


class WithoutIdleMask:
    """A collator whose batches have no attention mask where nothing is masked: attention is then known to be causal.

    Here the batch is still on the host; asking a mask on the device would make every step wait for it.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: Any) -> Any:
        batch = self.collator(rows)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and not mask.is_cuda and bool(mask.all()):
            del batch["attention_mask"]  # pyright: ignore[reportIndexIssue]
        return batch


def one_length(dataset: Any) -> bool:
    """Whether the rows have one number of tokens, as after packing into full blocks, but for a few such as the last."""
    columns = getattr(dataset, "column_names", None) or ()
    if "input_ids" not in columns or not isinstance(dataset, Dataset):
        return False
    compute: Any = pyarrow.compute  # its functions are made at import, which its stubs do not know
    lengths = token_counts(dataset, "input_ids")
    others = compute.sum(compute.not_equal(lengths, compute.max(lengths))).as_py() or 0
    return others <= max(1, SHORT_ROWS * len(dataset))


def token_counts(dataset: Dataset, column: str) -> Any:
    """The length of each row's list in a column, as an Arrow array in the data set's order.

    That is not the order of its table, which keeps what was filtered out.
    """
    rows: Any = dataset.select_columns([column]).with_format("arrow")[:][column]
    compute: Any = pyarrow.compute
    return compute.list_value_length(rows)
