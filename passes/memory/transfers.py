"""When values leave for the host and come back, by a model of the step's time and of the link: nothing is run.

Operators follow one another, and copies run beside them, one after the other in each direction. A value leaves when it
is made, and its memory is given back when its copy should be done. A value is fetched when backward first reads it, and
its copy starts as late as lets it arrive in time with some to spare, behind those that are read before it. To the host
no more is under way than two layers send, and from it no more than one: then arithmetic waits for the link.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

SLACK = 1.25
"""Copies are taken to be slower by this when it is decided where one starts or is done."""
LATENCY = 50e-6
"""Seconds that are allowed for each copy beside."""


@dataclass(frozen=True)
class Copy:
    """A value that crosses the link.

    Attributes:
        size: bytes.
        place: in forward the position of the operator that makes it, in backward of that which reads it first.
        layer: any key; values of one layer have the same.
    """

    size: int
    place: int
    layer: Any = None


@dataclass(frozen=True)
class Departures:
    """Of values in the order in which they are made.

    Attributes:
        until: the position of the operator before which a value's memory is given back, if nobody reads it later; as
            many as there are operators for the end of forward.
        waited: seconds that arithmetic waits for the link.
    """

    until: list[int]
    waited: float


@dataclass(frozen=True)
class Arrivals:
    """Of values in the order in which they are read.

    Attributes:
        start: the position of the operator before which a value's copy starts.
        waited: seconds that arithmetic waits for the link.
    """

    start: list[int]
    waited: float


def depart(seconds: Sequence[float], copies: Sequence[Copy], link: float) -> Departures:
    """When the memory of values that leave is given back.

    Args:
        seconds: of each operator of forward.
        copies: in the order in which the values are made.
        link: bytes per second.
    """
    clock = [0.0, *accumulate(seconds)]
    room = 2 * _of_one_layer(copies)
    until = [len(seconds)] * len(copies)
    waited = free = careful = 0.0
    first = flying = 0  # copies[first:] are not given back; of them so many bytes are under way
    done: list[tuple[float, float]] = []  # when a copy ends, and when it surely does
    for i, copy in enumerate(copies):
        now = clock[copy.place + 1] + waited
        while first < i and (done[first][1] <= now or flying + copy.size > room):
            late = max(0.0, done[first][0] - now)
            now, waited = now + late, waited + late
            until[first] = min(copy.place + 1, bisect_left(clock, done[first][1] - waited))
            flying -= copies[first].size
            first += 1
        flying += copy.size
        free, careful = max(now, free) + copy.size / link, max(now, careful) + _careful(copy, link)
        done.append((free, careful))
    for i in range(first, len(copies)):
        until[i] = min(len(seconds), bisect_left(clock, done[i][1] - waited))
    return Departures(until, waited + max(0.0, free - clock[-1] - waited))


def arrive(seconds: Sequence[float], copies: Sequence[Copy], link: float) -> Arrivals:
    """When the copies of values that come back are started.

    Args:
        seconds: of each operator of backward.
        copies: in the order in which the values are read.
        link: bytes per second.
    """
    clock = [0.0, *accumulate(seconds)]
    room = _of_one_layer(copies)
    start = [0] * len(copies)
    latest, place = float("inf"), len(seconds)
    for i in reversed(range(len(copies))):
        latest = min(latest, clock[copies[i].place]) - _careful(copies[i], link)
        place = min(place, copies[i].place)
        while place > 0 and clock[place] > latest:
            place -= 1
        start[i] = place
    waited = free = 0.0
    first = flying = 0  # copies[first:i] are under way, so many bytes
    for i, copy in enumerate(copies):
        flying += copy.size
        start[i] = max(start[i], start[i - 1] if i else 0)
        while first < i and (flying > room or copies[first].place <= start[i]):
            start[i] = max(start[i], copies[first].place)
            flying -= copies[first].size
            first += 1
        free = max(free, clock[start[i]] + waited) + copy.size / link
        waited += max(0.0, free - clock[copy.place] - waited)
    return Arrivals(start, waited)


def _careful(copy: Copy, link: float) -> float:
    return SLACK * copy.size / link + LATENCY


def _of_one_layer(copies: Sequence[Copy]) -> int:
    """The most bytes that one layer sends."""
    sizes: dict[Any, int] = {}
    for i, copy in enumerate(copies):
        key = (i,) if copy.layer is None else copy.layer
        sizes[key] = sizes.get(key, 0) + copy.size
    return max(sizes.values(), default=0)
