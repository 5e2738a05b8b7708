"""The fastest plan within a budget, with what it may make use of: the device, host memory, slices of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from .plan import Plan
from .slices import ROWS
from .timeline import Timeline


class Plans(Protocol):
    """What makes plans, and others that leave values in host memory: :class:`Planner`, and
    :class:`~.repeated.Deep` for a model that was not traced as a whole."""

    def within(self, budget: int) -> tuple[Plan, Timeline]:
        """The fastest plan whose peak is at most so many bytes; the smallest one where none is."""
        ...

    def offloading(self, host: int) -> Plans | None:
        """The same with values in host memory; None where there is no room."""
        ...

    def short_of_host(self, host: int) -> str:
        """What host memory is too small for, in words; nothing where it is not."""
        ...

    def slicing(self, rows: int) -> Plans | None:
        """The same with stretches of layers run on so many tokens at a time; None where there are none."""
        ...


def fastest_within(planner: Plans, budget: int, host: int) -> tuple[Plan, Timeline]:
    """The fastest plan within a budget; host memory is used where that makes it faster, or possible.

    Stretches of layers are run on a few tokens at a time only where nothing fits otherwise: sums over slices round in
    another order. A budget just above the floor of whole stretches may so be slower than one just below it.

    Args:
        budget: peak bytes on the device.
        host: bytes of host memory that may be taken; 0 for none.

    Returns:
        the plan and its timeline. Where nothing fits it is the one that needs least. Its note says what host memory was
        too small for, where there was some to be used.
    """
    found = _fastest_within(planner, budget, host)
    if found[0].peak_bytes <= budget:
        return found
    sliced = (planner.slicing(rows) for rows in ROWS)
    return _best([found, *(_fastest_within(other, budget, host) for other in sliced if other is not None)], budget)


def _fastest_within(planner: Plans, budget: int, host: int) -> tuple[Plan, Timeline]:
    found = planner.within(budget)
    if not host or (found[0].policy == "keep" and found[0].peak_bytes <= budget):
        return found
    candidates = [found]
    if (other := planner.offloading(host)) is not None:
        candidates.append(other.within(budget))
    plan, timeline = _best(candidates, budget)
    return dataclasses.replace(plan, note=planner.short_of_host(host)), timeline


def _best(candidates: Sequence[tuple[Plan, Timeline]], budget: int) -> tuple[Plan, Timeline]:
    """The fastest that fits; the smallest where none does."""
    fit = [c for c in candidates if c[0].peak_bytes <= budget]
    return min(fit, key=lambda c: c[0].seconds) if fit else min(candidates, key=lambda c: c[0].peak_bytes)
