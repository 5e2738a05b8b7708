"""The fastest plan within a budget, with what it may make use of: the device, host memory, slices of tokens, residuals
that span two layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from .host import that_fit
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

    def residual_sizes(self) -> list[int]:
        """Bytes of what crosses the borders of layers and may wait in host memory."""
        ...

    def pairs(self) -> int:
        """How many pairs of layers a residual can span."""
        ...

    def spanning(self, count: int) -> Plans | None:
        """The same with residuals that span two layers in so many pairs; None where there are none."""
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
    found = _whole_or_sliced(planner, budget, host)
    if found[0].peak_bytes <= budget:
        return found
    return _best([found, *_with_spans(planner, budget, host)], budget)


def _with_spans(planner: Plans, budget: int, host: int) -> list[tuple[Plan, Timeline]]:
    """Plans in which residuals span two layers, in about as few pairs of them as it takes.

    Each pair costs one layer's forward and spares one residual. Where host memory has room for the others, a further
    pair would spare nothing.
    """
    sizes = planner.residual_sizes()
    count = min(planner.pairs(), len(sizes) - len(that_fit(sizes, host)))
    if not count or (other := planner.spanning(count)) is None:
        return []
    floor = _whole_or_sliced(other, 0, host, short=True)
    if (spare := budget - floor[0].peak_bytes) < 0:
        return [floor]
    fewer = planner.spanning(max(0, count - spare // max(sizes)))
    if fewer is not None and fewer is not other:
        found = _whole_or_sliced(fewer, budget, host, short=True)
        if found[0].peak_bytes <= budget:
            return [found]
    return [_whole_or_sliced(other, budget, host, short=True)]


def _whole_or_sliced(planner: Plans, budget: int, host: int, *, short: bool = False) -> tuple[Plan, Timeline]:
    """The fastest plan; in slices where it does not fit otherwise.

    Args:
        short: whether it is known that all of host memory is needed.
    """
    found = _fastest_within(planner, budget, host, short)
    if found[0].peak_bytes <= budget:
        return found
    sliced = [other for rows in ROWS if (other := planner.slicing(rows)) is not None]
    return _best([found, *(_fastest_within(other, budget, host, short) for other in sliced)], budget)


def _fastest_within(planner: Plans, budget: int, host: int, short: bool) -> tuple[Plan, Timeline]:
    other = planner.offloading(host) if short and host else None
    found = (other or planner).within(budget)
    if not host or (found[0].policy == "keep" and found[0].peak_bytes <= budget):
        return found
    candidates = [found]
    if other is None and (other := planner.offloading(host)) is not None:
        candidates.append(other.within(budget))
    plan, timeline = _best(candidates, budget)
    return dataclasses.replace(plan, note=planner.short_of_host(host)), timeline


def _best(candidates: Sequence[tuple[Plan, Timeline]], budget: int) -> tuple[Plan, Timeline]:
    """The fastest that fits; the smallest where none does."""
    fit = [c for c in candidates if c[0].peak_bytes <= budget]
    return min(fit, key=lambda c: c[0].seconds) if fit else min(candidates, key=lambda c: c[0].peak_bytes)
