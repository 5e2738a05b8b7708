"""After running out of memory: the same batch in smaller parts, with the same loss and gradient.

The loss of a micro-batch is a sum over its tokens, divided by the number of tokens in the whole accumulated batch. So
its parts' losses add up to it whatever the lengths of their rows, and nothing else of the run changes: not the data's
order, not the optimiser's steps, not what a log says.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .finite import TrainingError

logger = logging.getLogger(__name__)

HALVINGS = 3
"""So often a run may halve its micro-batches. What needs more should be started with other settings."""

Run = Callable[[dict[str, Any], Any, float], Tensor]
"""Forward and backward of (inputs, the loss's divisor, share of the micro-batch's rows); returns the loss."""


class SmallerBatches:
    """Runs micro-batches whole or, once memory was short, in parts.

    Attributes:
        parts: in which every micro-batch is run: 1, 2, 4 or 8.
    """

    def __init__(self) -> None:
        self.parts = 1

    def run(
        self,
        run: Run,
        batch: dict[str, Any],
        items: Any,
        start_again: Callable[[], Iterable[dict[str, Any]]],
        spare: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            run: does it for a part.
            batch: with rows along the first dimension of its tensors.
            items: the loss's divisor; None for the number of trained tokens in this micro-batch.
            start_again: called when memory was short: forgets what this accumulated step has done so far, its gradient
                included, since backward may have stopped anywhere, and gives the micro-batches before this one.
            spare: asked first: frees memory that the run can do without, and says whether there was any.

        Raises:
            TrainingError: when there is not enough memory after three halvings, or for one row.
        """
        again: Iterable[dict[str, Any]] = ()
        while True:
            try:
                for earlier in again:
                    self._in_parts(run, earlier, items)
                return self._in_parts(run, batch, items)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            # Only here, after the exception is gone with its traceback, are the step's tensors free.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if not spare():
                self._halve(batch, reason)
            again = start_again()

    def _in_parts(self, run: Run, batch: dict[str, Any], items: Any) -> Tensor:
        if self.parts == 1:
            return run(batch, items, 1.0)
        if items is None:
            items = (batch["labels"][..., 1:] != -100).sum()
        rows = len(batch["input_ids"])
        losses = [run(part, items, len(part["input_ids"]) / rows) for part in split(batch, self.parts)]
        return torch.stack(losses).sum()

    def _halve(self, batch: dict[str, Any], reason: str) -> None:
        rows, length = batch["input_ids"].shape
        now = -(-rows // self.parts)  # in the largest part
        advice = "A smaller max_length, memory_budget or per_device_train_batch_size, or load_in_4bit, needs less"
        if now == 1:
            raise TrainingError(f"out of memory with one row of {length:,} tokens: {reason}. {advice}")
        if self.parts == 2**HALVINGS:
            raise TrainingError(f"out of memory after {HALVINGS} halvings of the micro-batch: {reason}. {advice}")
        self.parts *= 2
        logger.warning(
            "out of memory with %d rows of %d tokens (%s): from now on %d at a time, accumulated to the same batch and "
            "the same loss",
            *(now, length, reason, -(-rows // self.parts)),
        )


def split(batch: dict[str, Any], parts: int) -> Iterator[dict[str, Any]]:
    """A batch's rows in up to ``parts`` parts of (nearly) the same size; what has no rows goes with each."""
    rows = len(batch["input_ids"])
    size = -(-rows // parts)
    for first in range(0, rows, size):
        yield {
            name: value[first : first + size] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
            for name, value in batch.items()
        }
