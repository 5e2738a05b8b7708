"""Host memory: what it has room for, and what the link to it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...kernels.pinned import whole_pages
from .words import gib


def that_fit(sizes: Iterable[int], host: int) -> list[int]:
    """The positions of the values that host memory has room for, the first ones first."""
    found = []
    for i, size in enumerate(sizes):
        if (taken := whole_pages(size)) <= host:
            found.append(i)
            host -= taken
    return found


def too_little(sizes: Sequence[int], host: int) -> str:
    """What host memory is too small for, in words; nothing where it holds values of all these sizes."""
    needed, there = sum(map(whole_pages, sizes)), len(that_fit(sizes, host))
    if there == len(sizes):
        return ""
    return (
        f"host memory of {gib(host)} holds the residuals of {there} layers, and those of {len(sizes)} take "
        f"{gib(needed)}: the others stay on the device, and more is computed again instead"
    )


def waited_for(link: float, halves: Iterable[tuple[int, float]]) -> float:
    """Seconds that forward and backward wait for the link: of each the bytes that leave or come back, and the seconds
    that it is busy."""
    return sum(max(0.0, moved / link - busy) for moved, busy in halves)
