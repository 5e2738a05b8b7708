"""The memory that one training step really took, allocation by allocation, beside what was planned for it.

PyTorch's allocator tells of every block that it gives and takes back. One step is followed, after the one that compiles
and before any is recorded as a CUDA graph, in which nothing is allocated any more. Sizes are those that were asked for;
the allocator's own figures round each up to 512 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..compiler.report import GraphReport
from ..passes.memory.timeline import Timeline
from ..passes.memory.words import gib
from .timelines import Picture, draw

FOLLOWED = 2
"""Which micro-batch is followed: libraries have taken their workspaces in the first."""
POINTS = 2000
"""At most so many moments are kept of forward, and of backward: of each stretch the worst."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Taken:
    """Bytes on the device during a step.

    Attributes:
        before: when it began.
        forward, backward: after each allocation and release.
    """

    before: int
    forward: Sequence[int]
    backward: Sequence[int]

    @property
    def peak(self) -> int:
        return max([self.before, *self.forward, *self.backward])


class MemoryTrace:
    """Follows one micro-batch of a trainer; :meth:`write` tells of it.

    Attributes:
        taken: what was found; None before.
        planned: the step's timeline as it was predicted, and its budget; None for a graph that an earlier process has
            planned.
    """

    def __init__(self) -> None:
        self.taken: Taken | None = None
        self.planned: tuple[Timeline, int | None] | None = None
        self._runs = self._turn = 0
        self._following = False

    def run(self, step: Callable[[], Result], reports: Sequence[GraphReport]) -> Result:
        """Forward and backward of a micro-batch, followed if it is its turn.

        Args:
            reports: of the graphs compiled so far.
        """
        self._runs += 1
        if self.taken is not None or self._runs < FOLLOWED:
            return step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.memory._record_memory_history(enabled="all", context=None)
        start, self._turn, self._following = len(_events()), 0, True
        try:
            result = step()
            deltas = list(_deltas(_events()[start:]))
        finally:
            self._following = False
            torch.cuda.memory._record_memory_history(enabled=None)
        self._note(before, deltas, self._turn - start, reports)
        return result

    def turn(self) -> None:
        """Forward is done."""
        if self._following:
            self._turn = len(_events())

    def _note(self, before: int, deltas: list[int], turn: int, reports: Sequence[GraphReport]) -> None:
        """Keep what was found: changes in bytes, of which so many were forward's."""
        bytes_at = before + np.cumsum(deltas, dtype=np.int64)
        self.taken = Taken(before, _worst(bytes_at[:turn]), _worst(bytes_at[turn:]))
        partitioners = [r.partitioner for r in reports if r.partitioner is not None and r.partitioner.last_timeline]
        if partitioners:
            self.planned = partitioners[-1].last_timeline, partitioners[-1].budget

    def write(self, folder: Path) -> None:
        """Write ``memory.json`` and, where a plan is known, ``memory.png``; nothing where no step was followed."""
        if self.taken is None:
            return
        facts: dict[str, Any] = {"measured": {"peak": self.taken.peak, **vars(self.taken)}}
        if self.planned is not None:
            timeline, budget = self.planned
            facts["predicted"] = {
                "peak": timeline.peak,
                "budget": budget,
                "parts": timeline.parts,
                "standing": vars(timeline.standing),
                **{n: list(getattr(timeline, n)) for n in ("names", "kept", "gradients", "working")},
                "turn": timeline.turn,
            }
            title = f"peak {gib(self.taken.peak)} measured, {gib(timeline.peak)} predicted"
            picture = Picture(timeline, title, budget or None, self.taken.forward, self.taken.backward)
            draw(picture, folder / "memory.png")
        (folder / "memory.json").write_text(json.dumps(facts), encoding="utf-8")

    def __str__(self) -> str:
        if self.taken is None:
            return f"not recorded: fewer than {FOLLOWED} micro-batches were run"
        told = f"{gib(self.taken.peak)} at the peak of the recorded step"
        if self.planned is None:
            return f"{told}; its plan is an earlier process's, and not known in this one"
        predicted = self.planned[0].peak
        return f"{told}, {gib(predicted)} predicted ({predicted / self.taken.peak - 1:+.1%}): memory.png, memory.json"


def _events() -> list[dict[str, Any]]:
    """What the allocator of the current device has done since its history is kept."""
    snapshot: Any = torch.cuda.memory._snapshot()
    return snapshot["device_traces"][torch.cuda.current_device()]


def _deltas(events: Iterable[dict[str, Any]]) -> Iterable[int]:
    """By how many bytes each event changes what is allocated."""
    for event in events:
        yield event["size"] * ((event["action"] == "alloc") - (event["action"] == "free_completed"))


def _worst(bytes_at: np.ndarray) -> list[int]:
    """At most :data:`POINTS` of a series, each the largest of its stretch."""
    stretches = np.array_split(bytes_at, min(len(bytes_at), POINTS)) if len(bytes_at) else []
    return [int(stretch.max()) for stretch in stretches]
