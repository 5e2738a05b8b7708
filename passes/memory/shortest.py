"""One pattern for each layer, so that their seconds are fewest: a shortest path over the layers.

The state is the bytes that are kept so far on the device, in buckets. Where values may leave for the host there is a
second one: the bytes that are sent so far, where host memory is the limit; those that the link is behind with, where
the link is. What it is behind with by more than one layer's is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .patterns import Pattern

BUCKETS = 4096
BUCKETS_OF_TWO = 256
"""Of bytes on the device where there is a second state, and at most of that."""
BEHIND = 64
"""Buckets of bytes that the link is behind with."""


@dataclass(frozen=True)
class Sending:
    """What bounds that which is sent to the host.

    Attributes:
        host: bytes of host memory.
        link: bytes per second.
        seconds: of one layer's forward.
    """

    host: int
    link: float
    seconds: float


def shortest(
    choices: Sequence[Sequence[Pattern]],
    inside: np.ndarray,
    outside: int,
    room: int,
    sending: Sending | None = None,
) -> list[int] | None:
    """A pattern per layer, so that their seconds are fewest and no moment needs more than ``room`` bytes.

    Args:
        choices: per layer its patterns.
        inside: [layer, pattern], bytes in that layer beside those that the layers up to it keep.
        outside: bytes elsewhere beside all that is kept.
        room: bytes.
        sending: None where no pattern sends anything.

    Returns:
        None where there are none.
    """
    if sending is None:
        chosen = _path(choices, inside, outside, room, None)
        return chosen and _in_order(choices, chosen)
    carried = len(choices) * sending.seconds * sending.link
    chosen = _path(choices, inside, outside, room, _Behind(choices, sending)) if sending.host >= carried else None
    if chosen is None or _sent(choices, chosen) > sending.host:
        chosen = _path(choices, inside, outside, room, _InHost(choices, sending))
        chosen = chosen and _in_order(choices, chosen)
    return chosen


def least_held(choices: Sequence[Sequence[Pattern]], unsent: int, inside: np.ndarray, host: int) -> list[list[int]]:
    """Choices of which one holds the least at its peak: in every layer the pattern that takes least of the link, or the
    one with which a layer needs least.

    Args:
        unsent: how many patterns of each layer send nothing; they are the first ones.
        inside: bytes by layer and pattern.
        host: bytes of host memory: where it has no room for more, the last layers keep what crosses their border.
    """
    sent = range(unsent, inside.shape[1])
    found = []
    for rank in {unsent, min(sent, key=lambda rank: inside[:-1, rank].max(initial=0))}:
        left, chosen = host, []
        for i, choice in enumerate(choices):
            fits = 0 < choice[rank].host <= left
            left -= choice[rank].host if fits else 0
            stays = range(unsent) if not choice[rank].host else range(1)
            chosen.append(rank if fits else min(stays, key=lambda r, i=i, c=choice: inside[i, r] + c[r].bytes))
        found.append(chosen)
    return found


def waited(sent: Sequence[int], seconds: Sequence[float], link: float) -> float:
    """Seconds that layers wait for the link, which may be behind by as much as one layer sends.

    Args:
        sent: bytes of each layer.
        seconds: that each is busy.
        link: bytes per second.
    """
    most = max(sent, default=0) / link
    behind = late = 0.0
    for size, busy in zip(sent, seconds, strict=True):
        behind = max(0.0, behind + size / link - busy)
        wait = max(0.0, behind - most)
        late, behind = late + wait, behind - wait
    return late


def _sent(choices: Sequence[Sequence[Pattern]], chosen: Sequence[int]) -> int:
    return sum(choice[rank].host for choice, rank in zip(choices, chosen, strict=True))


class _InHost:
    """The bytes in host memory as a state."""

    def __init__(self, choices: Sequence[Sequence[Pattern]], sending: Sending) -> None:
        smallest = int(np.gcd.reduce([p.host for choice in choices for p in choice]))
        self.unit = max(smallest, -(-sending.host // BUCKETS_OF_TWO), 1)
        self.count = sending.host // self.unit + 1

    def moves(self, pattern: Pattern) -> list[_Move]:
        """From the states that may take the pattern to those that follow."""
        taken = -(-pattern.host // self.unit)
        return [_Move(slice(0, self.count - taken), slice(taken, self.count))] if taken < self.count else []


class _Behind:
    """The bytes that the link is behind with as a state."""

    def __init__(self, choices: Sequence[Sequence[Pattern]], sending: Sending) -> None:
        self.link, self.count = sending.link, BEHIND
        most = max(p.host for choice in choices for p in choice)
        self.unit = max(1.0, most / (self.count - 1))
        self.carried = int(sending.seconds * sending.link / self.unit)

    def moves(self, pattern: Pattern) -> list[_Move]:
        """From each state to the one that follows: all that the link has caught up with to 0, and all that it is too
        far behind with to the last one, after some waiting."""
        grown, last = round(pattern.host / self.unit) - self.carried, self.count - 1
        if grown < 0:
            caught_up = min(self.count, 1 - grown)
            moves = [_Move(slice(0, caught_up), slice(0, 1))]
            if caught_up < self.count:
                moves.append(_Move(slice(caught_up, self.count), slice(1, self.count + grown)))
            return moves
        moves = [_Move(slice(0, self.count - grown), slice(grown, self.count))] if grown <= last else []
        if grown:
            late = np.arange(max(0, self.count - grown), self.count) + grown - last
            seconds = late[:, None] * self.unit / self.link
            moves.append(_Move(slice(max(0, self.count - grown), self.count), slice(last, self.count), seconds))
        return moves


@dataclass(frozen=True)
class _Move:
    """States of the first kind, and those that follow: as many, or one; and the seconds that each takes beside."""

    sources: slice
    targets: slice
    seconds: np.ndarray | float = 0.0


def _path(
    choices: Sequence[Sequence[Pattern]],
    inside: np.ndarray,
    outside: int,
    room: int,
    sent: _InHost | _Behind | None,
) -> list[int] | None:
    most = sum(max(p.bytes for p in choice) for choice in choices)
    buckets, rows = (BUCKETS, 1) if sent is None else (BUCKETS_OF_TWO, sent.count)
    bucket = max(1, -(-min(most, max(room, 1)) // buckets))
    levels = np.arange(buckets + len(choices) + 1) * bucket
    best = np.full((rows, len(levels)), np.inf)
    best[0, 0] = 0.0
    taken, came = [], []
    for i, choice in enumerate(choices):
        after = np.full(best.shape, np.inf)
        which, origin = np.zeros(best.shape, dtype=np.int16), np.zeros(best.shape, dtype=np.int16)
        for p, pattern in enumerate(choice):
            if p and pattern is choice[p - 1] and inside[i, p] >= inside[i, p - 1]:
                continue
            shift = round(pattern.bytes / bucket)
            end = min(len(levels), int(np.searchsorted(levels, room - inside[i, p], side="right")))
            if end <= shift:
                continue
            for move in sent.moves(pattern) if sent is not None else [_Move(slice(0, 1), slice(0, 1))]:
                part = best[move.sources, : end - shift] + move.seconds
                rows = np.arange(move.sources.start, move.sources.stop)[:, None]
                if move.targets.stop - move.targets.start == 1:
                    nearest = np.argmin(part, axis=0)
                    part, rows = part[nearest, np.arange(end - shift)][None], rows[nearest].T
                part = part + pattern.seconds
                there = after[move.targets, shift:end]
                better = part < there
                np.copyto(there, part, where=better)
                np.copyto(which[move.targets, shift:end], p, where=better)
                np.copyto(origin[move.targets, shift:end], rows, where=better, casting="same_kind")
        best = after
        taken.append(which)
        came.append(origin)
    best[:, levels + outside > room] = np.inf
    row, at = np.unravel_index(int(np.argmin(best)), best.shape)
    if not np.isfinite(best[row, at]):
        return None
    chosen = []
    for choice, which, origin in zip(reversed(choices), reversed(taken), reversed(came), strict=True):
        rank = int(which[row, at])
        chosen.append(rank)
        row, at = origin[row, at], at - round(choice[rank].bytes / bucket)
    return chosen[::-1]


def _in_order(choices: Sequence[Sequence[Pattern]], chosen: list[int]) -> list[int]:
    """The same patterns, those that keep less on the device in the earlier of layers that are alike, and of those that
    keep the same those that send much between those that send little.

    Of plans that are equally fast this one keeps the least at every moment, and reads best.
    """
    alike: dict[int, list[int]] = {}
    for i, choice in enumerate(choices):
        alike.setdefault(id(choice), []).append(i)
    result = list(chosen)
    for places in alike.values():
        choice = choices[places[0]]
        grain = max(1, max(p.bytes for p in choice) // 16)
        ranks = sorted((chosen[i] for i in places), key=lambda rank, of=choice, step=grain: of[rank].bytes // step)
        groups: dict[int, list[int]] = {}
        for rank in ranks:
            groups.setdefault(choice[rank].bytes // grain, []).append(rank)
        ordered = [rank for group in groups.values() for rank in _spread(choice, group)]
        for i, rank in zip(places, ordered, strict=True):
            result[i] = rank
    return result


def _spread(choice: Sequence[Pattern], ranks: list[int]) -> list[int]:
    """The same ranks, so that what was sent is at every one as near to its mean as can be."""
    left = sorted(ranks, key=lambda rank: (choice[rank].bytes, -choice[rank].host))
    mean = sum(choice[rank].host for rank in left) / len(left)
    sent, ordered = 0.0, []
    while left:
        ahead = sent - mean * len(ordered)
        rank = min(left, key=lambda rank: abs(ahead + choice[rank].host - mean))
        left.remove(rank)
        ordered.append(rank)
        sent += choice[rank].host
    return ordered
