"""Pairs of answers after running out of memory: a micro-batch in smaller parts, with the same loss and the same log.

A preference loss is a mean over pairs, and the micro-batch's is the parts' weighted by their pairs. What TRL averages
over tokens (ORPO's likelihood of the chosen answers; entropy and accuracy in DPO's log) is weighted by theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .smaller import Rows, SmallerBatches, Whole

INSEPARABLE = {
    "aot": "it sorts the pairs of a micro-batch",
    "aot_unpaired": "it sorts the answers of a micro-batch",
    "bco_pair": "it follows the mean over micro-batches",
    "sft": "it is a mean over the tokens of a micro-batch",
}
"""Losses of DPO that the parts of a micro-batch do not add up to."""


class Pairs(Rows):
    """Batches of TRL's collators: ``input_ids`` of the chosen answers above the rejected (DPO), or one of each (ORPO).

    What has a row for every answer or for every pair is cut; lists with an entry for every pair are as well.
    """

    def shape(self, batch: dict[str, Any]) -> tuple[int, int]:
        if "input_ids" in batch:
            answers, length = batch["input_ids"].shape
            return answers // 2, length
        chosen, rejected = batch["chosen_input_ids"], batch["rejected_input_ids"]
        return len(chosen), max(chosen.shape[1], rejected.shape[1])

    def kind(self, batch: dict[str, Any]) -> tuple[str, int]:
        return "pairs", self.shape(batch)[0]

    def divisor(self, batch: dict[str, Any], items: Any) -> Any:
        return items  # the trainers of pairs do not use it

    def parts(self, batch: dict[str, Any], parts: int) -> Iterator[tuple[dict[str, Any], float]]:
        pairs, _ = self.shape(batch)
        size = -(-pairs // parts)
        for first in range(0, pairs, size):
            chosen = range(first, min(first + size, pairs))
            yield {name: _taken(value, chosen, pairs) for name, value in batch.items()}, len(chosen) / pairs


def _taken(value: Any, chosen: range, pairs: int) -> Any:
    if not isinstance(value, Tensor | list | tuple) or len(value) not in (pairs, 2 * pairs):
        return value
    first, last = chosen.start, chosen.stop
    if len(value) == pairs:
        return value[first:last]
    if not isinstance(value, Tensor):
        return [*value[first:last], *value[pairs + first : pairs + last]]
    return value.unflatten(0, (2, pairs))[:, first:last].flatten(0, 1)


class TokenCounts(NamedTuple):
    """Over how many tokens each mean runs."""

    chosen: int
    rejected: int

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> TokenCounts:
        """Those of the answers in DPO's batch; of the whole chosen texts, prompts included, in ORPO's."""
        if "completion_mask" in batch:
            chosen, rejected = (int(half.sum()) for half in batch["completion_mask"][:, 1:].chunk(2))
            return cls(chosen, rejected)
        return cls(*(int(batch[f"{name}_attention_mask"][:, 1:].sum()) for name in ("chosen", "rejected")))


class SmallerPairs:
    """Runs the micro-batches of a trainer of pairs by :class:`~.smaller.SmallerBatches`, and keeps its log true.

    Attributes:
        share: of the running part in its micro-batch's pairs.
        token_share: of its chosen answers in the micro-batch's tokens of them.
    """

    def __init__(self) -> None:
        self.batches = SmallerBatches(rows=Pairs())
        self.share = self.token_share = 1.0
        self._tokens = 1  # of the chosen answers in the running micro-batch, once there are parts
        self._known: dict[str, int] = {}  # entries of the trainer's metrics before the running micro-batch

    def run(
        self,
        step: Any,
        batch: dict[str, Any],
        items: Any,
        sums: dict[str, list[float]],
        start_again: Any,
        spare: Callable[[], bool] = lambda: False,
        whole: str = "",
    ) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            step: of (part, items): forward and backward, which weighs the loss by :attr:`share`.
            batch: as TRL's collators make it.
            items: handed to ``step``.
            sums: the trainer's metrics of training, by name; every forward pass appends to them.
            start_again, spare: as :meth:`SmallerBatches.run` takes them.
            whole: why the micro-batch cannot be cut; empty where it can.
        """
        self.batches.rows = Whole(whole) if whole else Pairs()
        self.settle(sums)
        weights: list[tuple[float, TokenCounts]] = []

        def run(part: dict[str, Any], items: Any, share: float) -> Tensor:
            whole = share == 1
            counts = TokenCounts(1, 1) if whole else TokenCounts.of(part)
            self.share, self.token_share = share, 1.0 if whole else counts.chosen / max(self._tokens, 1)
            weights.append((share, counts))
            return step(part, items)

        def again() -> Iterable[dict[str, Any]]:
            for earlier in start_again():
                self._count(earlier)
                yield earlier
            _forget(sums, self._known)
            weights.clear()
            self._count(batch)

        self._count(batch)
        try:
            loss = self.batches.run(run, batch, items, again, spare)
        finally:
            self.share = self.token_share = 1.0
        if len(weights) > 1:
            _merge(sums, self._known, weights)
        return loss

    def settle(self, sums: dict[str, list[float]]) -> None:
        """What the metrics hold now stays when the running micro-batch is done again."""
        self._known = {name: len(values) for name, values in sums.items()}

    def _count(self, batch: dict[str, Any]) -> None:
        """Counting waits for the device, so it is done only for what may be cut: not before memory was short."""
        self._tokens = TokenCounts.of(batch).chosen if self.batches.parts > 1 else 1


def _forget(sums: dict[str, list[float]], known: Mapping[str, int]) -> None:
    """What was added since."""
    for name, values in sums.items():
        del values[known.get(name, 0) :]


def _merge(sums: dict[str, list[float]], known: Mapping[str, int], weights: list[tuple[float, TokenCounts]]) -> None:
    """One entry of what the parts have added: their mean, weighted as the micro-batch's own would be."""
    by_kind = {
        "entropy": [sum(counts) for _, counts in weights],
        "mean_token_accuracy": [counts.chosen for _, counts in weights],
    }
    if "entropy" in sums:  # DPO's logits are a mean over the answers' tokens, ORPO's over all places
        by_kind["logits/chosen"] = by_kind["mean_token_accuracy"]
        by_kind["logits/rejected"] = [counts.rejected for _, counts in weights]
    pairs = [share for share, _ in weights]
    for name, values in sums.items():
        added = values[known.get(name, 0) :]
        if len(added) != len(weights):  # a total, not a mean
            continue
        by = by_kind.get(name, pairs)
        values[known.get(name, 0) :] = [sum(w * v for w, v in zip(by, added, strict=True)) / (sum(by) or 1)]
