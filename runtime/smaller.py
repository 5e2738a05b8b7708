"""After running out of memory: the same batch in smaller parts, with the same loss and gradient.

The loss of a micro-batch is a sum over its tokens, divided by the number of tokens in the whole accumulated batch. So
its parts' losses add up to it whatever the lengths of their rows, and nothing else of the run changes: not the data's
order, not the optimiser's steps, not what a log says.
"""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from .finite import TrainingError

logger = logging.getLogger(__name__)

HALVINGS = 3
"""So often a run may halve its micro-batches. What needs more should be started with other settings."""

Run = Callable[[dict[str, Any], Any, float], Tensor]
"""Forward and backward of (inputs, the loss's divisor, share of the micro-batch's rows); returns the loss."""


class Processes(Protocol):
    """What processes that train together have to agree on; :class:`OneProcess` and :class:`DataParallel` do."""

    def anyone(self, here: bool) -> bool:
        """Whether it is so in any of them."""
        ...

    def alone(self) -> AbstractContextManager[Any]:
        """Forward and backward inside wait for no other process: gradients stay what this process has computed."""
        ...

    def reduce(self) -> None:
        """What backward does outside of :meth:`alone`: make gradients the mean over the processes."""
        ...


class OneProcess:
    """Nobody to agree with."""

    def anyone(self, here: bool) -> bool:
        return here

    def alone(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def reduce(self) -> None:
        """There is nothing to reduce."""


class DataParallel:
    """The processes of ``DistributedDataParallel``.

    They agree through gloo, whatever reduces their gradients: a question between hosts, for which no device waits. All
    have to ask it at the same place.

    Args:
        synchronises: whether the running micro-batch is the last of its step, after which gradients are reduced.
    """

    def __init__(self, model: DistributedDataParallel, synchronises: Callable[[], bool]) -> None:
        self.model, self.synchronises = model, synchronises
        self.group = distributed.new_group(backend="gloo")

    def anyone(self, here: bool) -> bool:
        flag = torch.tensor(int(here))
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def alone(self) -> AbstractContextManager[Any]:
        return self.model.no_sync()

    def reduce(self) -> None:
        if not self.synchronises():
            return
        group = self.model.process_group
        for parameter in self.model.module.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(distributed.get_world_size(group))
                distributed.all_reduce(parameter.grad, group=group)


class Rows:
    """What :class:`SmallerBatches` asks of a batch: rows of ``input_ids`` and ``labels``, or one row of documents."""

    def shape(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Rows, and tokens in the longest."""
        rows, length = batch["input_ids"].shape
        return rows, length

    def kind(self, batch: dict[str, Any]) -> tuple[str, int]:
        """Of what it consists, in the plural, and of how many."""
        rows, _ = self.shape(batch)
        return ("documents", len(documents(batch))) if rows == 1 else ("rows", rows)

    def divisor(self, batch: dict[str, Any], items: Any) -> Any:
        """By what the loss of each part is divided."""
        return (batch["labels"][..., 1:] != -100).sum() if items is None else items

    def parts(self, batch: dict[str, Any], parts: int) -> Iterator[tuple[dict[str, Any], float]]:
        """Up to so many parts, each with its share of the batch."""
        for part in split(batch, parts):
            yield part, part["input_ids"].numel() / batch["input_ids"].numel()


class Whole(Rows):
    """Batches that are not cut.

    Args:
        because: why not.
    """

    def __init__(self, because: str) -> None:
        self.because = because

    def shape(self, batch: Any) -> tuple[int, int]:
        return 0, 0  # which no batch exceeds: nobody is asked


class SmallerBatches:
    """Runs micro-batches whole or, once memory was short, in parts.

    Processes halve together. One that ran out of memory never comes to the reduction of the gradients, where the others
    would wait for it; so a micro-batch that is larger than all before it is run without reduction first, and the
    gradients are reduced when every process is through.

    Args:
        processes: those that have to agree.
        rows: how a batch is cut.

    Attributes:
        parts: in which every micro-batch is run: 1, 2, 4 or 8.
    """

    def __init__(self, processes: Processes | None = None, rows: Rows | None = None) -> None:
        self.parts = 1
        self.rows = rows or Rows()
        self.processes = processes or OneProcess()
        self._fits = (0, 0)  # tokens, and tokens in a row, of micro-batches that went through

    def can_run(self, model: Any, synchronises: Callable[[], bool]) -> bool:
        """Whether it knows how the processes of a model, as the trainer has wrapped it, would agree.

        Args:
            synchronises: whether the running micro-batch is the last of its step.
        """
        if isinstance(model, DistributedDataParallel):
            if getattr(self.processes, "model", None) is not model:
                self.processes, self._fits = DataParallel(model, synchronises), (0, 0)
            return True
        return not (distributed.is_initialized() and distributed.get_world_size() > 1)

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
            batch: with rows along the first dimension of its tensors; or one row of documents, with ``position_ids``
                that begin anew with each.
            items: the loss's divisor; None for the number of trained tokens in this micro-batch.
            start_again: called when memory was short: forgets what this accumulated step has done so far, its gradient
                included, since backward may have stopped anywhere, and gives the micro-batches before this one.
            spare: asked first: frees memory that the run can do without, or plans for less, and says whether it did.

        Raises:
            TrainingError: when there is not enough memory after three halvings, or for one row.
        """
        rows, length = self.rows.shape(batch)
        together = self.processes.anyone(rows * length > self._fits[0] or length > self._fits[1])
        again: Iterable[dict[str, Any]] = ()
        while True:
            loss, reason = None, ""
            try:
                with self.processes.alone():
                    for earlier in again:
                        self._in_parts(run, earlier, items)
                with self.processes.alone() if together else nullcontext():
                    loss = self._in_parts(run, batch, items)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
                if not together and not isinstance(self.processes, OneProcess):
                    raise TrainingError(f"out of memory with a batch that fitted before: {reason}. {ADVICE}") from None
            if not self.processes.anyone(loss is None) if together else loss is not None:
                assert loss is not None
                if together:
                    self.processes.reduce()
                self._fits = (max(self._fits[0], rows * length), max(self._fits[1], length))
                return loss
            # Only here, after the exception is gone with its traceback, are the step's tensors free.
            del loss
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if not self.processes.anyone(spare()):  # one process that needs less lets all try again
                self._halve(batch, reason or "in another process")
            self._fits, together = (0, 0), True
            again = start_again()

    def _in_parts(self, run: Run, batch: dict[str, Any], items: Any) -> Tensor:
        if self.parts == 1:
            return run(batch, items, 1.0)
        items = self.rows.divisor(batch, items)
        parts = list(self.rows.parts(batch, self.parts))
        losses = []
        for i, (part, share) in enumerate(parts, 1):
            with self.processes.alone() if i < len(parts) else nullcontext():
                losses.append(run(part, items, share))
        return torch.stack(losses).sum()

    def _halve(self, batch: dict[str, Any], reason: str) -> None:
        if isinstance(self.rows, Whole):
            raise TrainingError(
                f"out of memory: {reason}. The micro-batch is not made smaller by itself, because {self.rows.because}. "
                "A smaller per_device_train_batch_size with as much more gradient_accumulation_steps, a smaller "
                "max_length, or load_in_4bit, needs less"
            )
        _, length = self.rows.shape(batch)
        kind, all_of_them = self.rows.kind(batch)
        one = "pair" if kind == "pairs" else "row"
        now = -(-all_of_them // self.parts)  # in the largest part
        if now <= 1:
            raise TrainingError(f"out of memory with one {one} of {length:,} tokens: {reason}. {ADVICE}")
        if self.parts == 2**HALVINGS:
            raise TrainingError(f"out of memory after {HALVINGS} halvings of the micro-batch: {reason}. {ADVICE}")
        self.parts *= 2
        logger.warning(
            "out of memory with %d %s of %d tokens (%s): from now on %d at a time, accumulated to the same batch and "
            "the same loss",
            *(now, kind, length, reason, -(-all_of_them // self.parts)),
        )


ADVICE = "A smaller max_length, memory_budget or per_device_train_batch_size, or load_in_4bit, needs less"


def split(batch: dict[str, Any], parts: int) -> Iterator[dict[str, Any]]:
    """A batch's rows in up to ``parts`` parts of (nearly) the same size; what has no rows goes with each.

    One row of documents is cut between two of them, near where parts of one size would end.
    """
    rows, length = batch["input_ids"].shape
    if rows > 1:
        size = -(-rows // parts)
        yield from (_slice(batch, 0, first, first + size) for first in range(0, rows, size))
        return
    starts = documents(batch)
    ends: set[int] = set()
    if len(starts) > 1:
        ends = {min(starts[1:], key=lambda start: abs(start - n * length / parts)) for n in range(1, parts)}
    for first, last in itertools.pairwise([0, *sorted(ends), length]):
        part = _slice(batch, 1, first, last)
        if "cu_seq_lens_q" in part:  # TRL's own list of the documents, for kernels that read it
            bounds = torch.tensor([*(s - first for s in starts if first <= s < last), last - first], dtype=torch.int32)
            part["cu_seq_lens_q"] = part["cu_seq_lens_k"] = bounds.to(batch["cu_seq_lens_q"].device)
            part["max_length_q"] = part["max_length_k"] = int(bounds.diff().max())
            part["seq_idx"] = part["seq_idx"] - part["seq_idx"][:, :1]
        yield part


def documents(batch: dict[str, Any]) -> list[int]:
    """Where the documents of the first row begin, the first at 0; read from the device."""
    positions = batch.get("position_ids")
    starts = [] if positions is None else (positions[0] == 0).nonzero().flatten().tolist()
    return [0, *(start for start in starts if start)]


def _slice(batch: dict[str, Any], dim: int, first: int, last: int) -> dict[str, Any]:
    shape = batch["input_ids"].shape[: dim + 1]
    return {
        name: value.narrow(dim, first, min(last, shape[dim]) - first)
        if isinstance(value, Tensor) and value.shape[: dim + 1] == shape
        else value
        for name, value in batch.items()
    }
