"""A plan for a deep model from the joint graph of a shallow one.

Layers repeat, and so does what a step holds while it is in one. A model of a few layers is traced; its inner layers
stand for as many as the real one has. Every layer's stretch of the timeline, forward and backward, comes from a plan in
which all traced layers choose alike, and is put on top of what the layers before it keep.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .liveness import Standing, Timeline
from .plan import Plan
from .planner import RUNGS, STRIDES, Planner, fastest_of, held, highest_rung, lower_rung, that_fit, too_little
from .shortest import least_held, shortest, waited
from .words import in_words


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """Bytes while the step is in one part of the model, beside what is kept and finished elsewhere."""

    names: list[str]
    kept: np.ndarray
    gradients: np.ndarray
    working: np.ndarray
    foreign: np.ndarray
    """Bytes among those of other parts' values whose copies are under way."""
    finished: int
    """Bytes of gradients that it leaves."""
    seconds: float

    @property
    def most(self) -> int:
        return int((self.kept + self.gradients + self.working).max(initial=0))

    def beside(self, other: _Stretch | None) -> _Stretch:
        """The same beside what of other parts is under way in another plan's stretch of this part."""
        if other is None or other is self:
            return self
        there, found, last = dict(zip(other.names, other.foreign, strict=True)), [], 0
        for name in self.names:
            last = there.get(name, last)  # operators that only one of them runs again
            found.append(last)
        return dataclasses.replace(
            self, working=self.working - self.foreign + np.array(found, dtype=self.working.dtype)
        )


Planned = tuple[Plan, Timeline]


class Deep:
    """Plans for a model whose layers are those of a traced one, repeated.

    Args:
        planner: of the traced joint graph.
        like: for each layer of the real model the traced one that it is like; the first and the last traced layer
            stand for themselves.
        standing: what lies on the device all through the step, of the real model.
        host: bytes of host memory that plans may take, where the planner's layers may send values there.
    """

    def __init__(self, planner: Planner, like: Sequence[int], standing: Standing, host: int = 0) -> None:
        self.planner, self.like, self.standing, self.host = planner, list(like), standing, host
        self.choices = [planner.choices[i] for i in self.like]
        self.ranks = range(len(planner.choices[0]))
        self.outside: dict[int, float] = {}  # by rank, seconds of what backward runs again of the rest of the model
        self.parts = [self._stretches(rank) for rank in self.ranks]
        self.others: dict[int, Deep] = {}
        self.rungs: dict[int, Planned] = {}

    @functools.cached_property
    def fastest(self) -> Planned:
        """Everything kept."""
        return self.of([self.planner.unsent - 1] * len(self.like))

    @functools.cached_property
    def smallest(self) -> Planned:
        """As little on the device as can be."""
        found = [self.of([0] * len(self.like))]
        if self.host:
            found += map(self.of, least_held(self.choices, self.planner.unsent, self.needs[0], self.host))
        return min(found, key=lambda f: (f[0].peak_bytes, f[0].seconds))

    @property
    def residuals(self) -> list[int]:
        """Per layer but the last the bytes that it hands on to the next one."""
        traced: dict[int, int] = defaultdict(int)
        position = {layer.name: i for i, layer in enumerate(self.planner.layers)}
        for node in self.planner.residuals:
            traced[position[self.planner.home[node]]] += self.planner.sizes.bytes(node)
        return [traced[i] for i in self.like[:-1]]

    def offloading(self, host: int) -> Deep | None:
        """The same whose layers may leave values in host memory.

        Args:
            host: bytes of host memory that may be taken.

        Returns:
            None where there is no room.
        """
        away = self.planner.offloading(1 << 62) if that_fit(self.residuals, host) else None
        if away is None:
            return None
        if host not in self.others:
            self.others[host] = Deep(away, self.like, self.standing, host)
        return self.others[host]

    def short_of_host(self, host: int) -> str:
        """What host memory is too small for, in words; nothing where it is not."""
        return too_little(self.residuals, host)

    def within(self, budget: int) -> Planned:
        """The fastest plan whose peak is at most so many bytes; the smallest one where none is."""
        fastest, smallest = self.fastest, self.smallest
        if fastest[0].peak_bytes <= budget:
            return fastest
        if smallest[0].peak_bytes > budget:
            return smallest
        return self._rung(highest_rung(smallest[0].peak_bytes, fastest[0].peak_bytes, budget), smallest, fastest)

    def _rung(self, step: int, smallest: Planned, fastest: Planned) -> Planned:
        if step not in self.rungs:
            least, most = smallest[0].peak_bytes, fastest[0].peak_bytes
            limit = least + (most - least) * step // RUNGS
            found = fastest_of(limit, self.choices, self.needs, self._choose, self._built) if step else None
            if found is None or step % STRIDES[-1]:
                below = self._rung(lower_rung(step), smallest, fastest) if step else smallest
                found = below if found is None else min(found, below, key=lambda f: f[0].seconds)
            self.rungs[step] = min(found, smallest, key=lambda f: f[0].seconds)
        return self.rungs[step]

    def of(self, ranks: Sequence[int]) -> Planned:
        """The plan in which each layer keeps the pattern of that rank, and the step's timeline."""
        timeline, halves = self._composed(ranks)
        patterns = [choice[rank] for choice, rank in zip(self.choices, ranks, strict=True)]
        layers = [self.planner.layers[i] for i in self.like]
        kept, away = (
            [{layer.values[i] for i in getattr(p, name)} for layer, p in zip(layers, patterns, strict=True)]
            for name in ("kept", "away")
        )
        policy = "mixed"
        if all(rank == self.planner.unsent - 1 for rank in ranks):
            policy = "keep"
        elif not any(ranks):
            policy = "recompute"
        sent = [sum(self.planner.sizes.bytes(n) for n in gone) for gone in away]
        link = self.planner.sizes.device.link
        late = waited(sent, halves[0], link) + waited(sent[::-1], halves[1], link)
        plan = Plan(
            policy,
            {},
            sum(p.bytes for p in patterns),
            "",
            peak_bytes=timeline.peak,
            seconds=sum(p.seconds for p in patterns) + self.outside[ranks[-1]] + late,
            parts=timeline.parts,
            words=in_words(layers, kept, away),
            host_bytes=sum(sent),
        )
        return plan, timeline

    # -- stretches -----------------------------------------------------------------------------------------------------

    def _stretches(self, rank: int) -> dict[Any, _Stretch]:
        """By ("forward" or "backward", layer or "before", "head", "after"): its stretch under a plan of one rank."""
        planner, count = self.planner, len(self.planner.layers)
        _, timeline = planner.price(planner.assembled([rank] * count))
        self.outside[rank] = planner.again() - sum(choice[rank].seconds for choice in planner.choices)
        position = {layer.name: i for i, layer in enumerate(planner.layers)}
        walk = planner.liveness.last_walk
        places, operations = planner.places(), walk.operations
        bytes_of = [choice[rank].bytes for choice in planner.choices]
        before = np.concatenate([[0], np.cumsum(bytes_of)])
        moments: dict[Any, list[int]] = {}
        for i, key in enumerate(_keys(places, timeline.turn)):
            moments.setdefault(key, []).append(i)
        found = {}
        kept, gradients, working = (np.array(x) for x in (timeline.kept, timeline.gradients, timeline.working))
        for key, at in moments.items():
            _, place = key
            below = {"before": 0, "after": 0, "head": before[-1]}.get(place)
            below = before[place] if below is None else below
            start = gradients[at[0]]
            # What the last operator of a stretch finishes shows when the next one starts.
            end = gradients[at[-1] + 1] if at[-1] + 1 < len(gradients) else gradients[at[-1]]
            finished = max(0, int(end - start)) if key[0] == "backward" else 0
            names = [timeline.names[i] for i in at]
            seconds = sum(planner.sizes.seconds(operations[i]) for i in at)
            others = [[n for n in walk.flying[i] if position.get(planner.home.get(n, ("", -1))) != place] for i in at]
            foreign = np.array([sum(map(planner.sizes.bytes, there)) for there in others], dtype=working.dtype)
            mine = kept[at] - below, gradients[at] - start, working[at], foreign
            found[key] = _Stretch(names, *mine, finished, seconds)
        return found

    def _composed(self, ranks: Sequence[int]) -> tuple[Timeline, tuple[list[float], list[float]]]:
        """The step's timeline, and the seconds of each layer's forward, and of each one's backward from the last on."""
        bytes_of = [choice[rank].bytes for choice, rank in zip(self.choices, ranks, strict=True)]
        before = np.concatenate([[0], np.cumsum(bytes_of)])
        count = len(ranks)

        def part(phase: str, i: int) -> tuple[_Stretch | None, int, int | None]:
            """Layer i, or the head; beside it the values of the layer before are under way."""
            key = phase, self.like[i] if i < count else "head"
            own, neighbour = ranks[min(i, count - 1)], ranks[max(0, min(i, count - 1) - 1)]
            stretch = self.parts[own].get(key)
            return (stretch and stretch.beside(self.parts[neighbour].get(key))), before[i], i if i < count else None

        forward: list[tuple[_Stretch | None, int, int | None]]
        forward = [(self.parts[ranks[0]].get(("forward", "before")), 0, None)]
        forward += [part("forward", i) for i in range(count + 1)]
        backward = [part("backward", i) for i in reversed(range(count + 1))]
        backward.append((self.parts[ranks[0]].get(("backward", "after")), 0, None))
        self.places: list[int | None] = []
        names: list[str] = []
        kept: list[int] = []
        gradients: list[int] = []
        working: list[int] = []
        finished = length = 0
        seconds = []
        for half in (forward, backward):
            length = len(names)
            seconds.append([stretch.seconds if stretch else 0.0 for stretch, *_ in half])
            for stretch, below, place in half:
                if stretch is None:
                    continue
                names += stretch.names
                self.places += [place] * len(stretch.names)
                kept += [int(k + below) for k in stretch.kept]
                gradients += [int(g + finished) for g in stretch.gradients]
                working += [int(w) for w in stretch.working]
                finished += stretch.finished
        # What the head takes goes to the last layer: the link works meanwhile.
        _, *forth, head = seconds[0]
        first, *back, _ = seconds[1]
        halves = [*forth[:-1], forth[-1] + head], [back[0] + first, *back[1:]]
        return Timeline(self.standing, names, length, kept, gradients, working), halves

    # -- the choice ----------------------------------------------------------------------------------------------------

    def _choose(self, limit: int, inside: np.ndarray, outside: int) -> list[int] | None:
        sending = self.planner.sending(self.host) if self.host else None
        return shortest(self.choices, inside, outside, limit - self.standing.total, sending)

    def _built(self, chosen: list[int]) -> tuple[Planned, np.ndarray, int]:
        """The plan of each layer's pattern, and what it needs, as :attr:`needs` has it."""
        found = self.of(chosen)
        bytes_of = [choice[rank].bytes for choice, rank in zip(self.choices, chosen, strict=True)]
        return found, *held(found[1], self.places, bytes_of)

    @functools.cached_property
    def needs(self) -> tuple[np.ndarray, int]:
        """Bytes that a step holds in layer i under its pattern p beside what the layers up to i keep, [i, p]; and
        those that it holds outside of the layers beside all that is kept."""
        grown = [max(self._finished(parts, ("backward", i)) for parts in self.parts) for i in self.like]
        head = max(self._finished(parts, ("backward", "head")) for parts in self.parts)
        above = [head + sum(grown[i + 1 :]) for i in range(len(grown))]
        inside = np.array(
            [
                [self._inside(parts, t, over, choice[rank].bytes) for rank, parts in enumerate(self.parts)]
                for choice, t, over in zip(self.choices, self.like, above, strict=True)
            ]
        )
        ends = [("forward", "head"), ("backward", "head")]
        return inside, max(parts[k].most for parts in self.parts for k in ends if k in parts)

    @staticmethod
    def _finished(parts: Mapping[Any, _Stretch], key: Any) -> int:
        stretch = parts.get(key)
        return stretch.finished if stretch is not None else 0

    @staticmethod
    def _inside(parts: Mapping[Any, _Stretch], traced: int, above: int, own: int) -> int:
        """Bytes while the step is in a layer, beside what the layers up to and with it keep."""
        forward, backward = (parts.get((phase, traced)) for phase in ("forward", "backward"))
        most = [part.most + extra for part, extra in ((forward, 0), (backward, above)) if part is not None]
        return max(most, default=0) - own


@dataclasses.dataclass(frozen=True)
class Floor:
    """What the smallest plan needs by the tokens of a step, which is a straight line in them.

    Attributes:
        alone: bytes without host memory, (at no tokens, per token).
        away: the same with the residuals of all layers but the last in host memory.
        residuals: bytes per token that each of those layers hands on.
    """

    alone: tuple[float, float]
    away: tuple[float, float]
    residuals: list[float]

    @classmethod
    def through(cls, tokens: tuple[int, int], plans: tuple[Deep, Deep]) -> Floor:
        """The lines through two points.

        Args:
            tokens: two different numbers of tokens.
            plans: of steps of so many.
        """
        peaks = []
        for deep in plans:
            other = deep.offloading(1 << 62) or deep
            peaks.append((deep.smallest[0].peak_bytes, other.smallest[0].peak_bytes))
        lines = []
        for a, b in zip(*peaks, strict=True):
            slope = (b - a) / (tokens[1] - tokens[0])
            lines.append((a - slope * tokens[0], slope))
        return cls(lines[0], lines[1], [size / tokens[0] for size in plans[0].residuals])

    def at(self, tokens: int, host: int) -> float:
        """Peak bytes of a step of so many tokens, with so many bytes of host memory."""
        alone, away = (fixed + slope * tokens for fixed, slope in (self.alone, self.away))
        there = that_fit((int(size * tokens) for size in self.residuals), host)
        return alone - max(0.0, alone - away) * len(there) / max(1, len(self.residuals))

    def tokens_within(self, budget: int, host: int) -> int:
        """The most tokens whose smallest plan is within so many bytes."""
        low, high = 0, 1
        while self.at(high, host) <= budget and high < 1 << 40:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(middle, host) <= budget else (low, middle)
        return low


def _keys(places: Iterable[int | None], turn: int) -> list[tuple[str, Any]]:
    """What each moment belongs to: before the layers, a layer, the head, or after the last layer's backward."""
    keys: list[tuple[str, Any]] = []
    found = list(places)
    last_layer = max((i for i, p in enumerate(found[:turn]) if p is not None), default=-1)
    for i, place in enumerate(found):
        phase = "forward" if i < turn else "backward"
        if place is None:
            started = any(p is not None for p in found[(0 if i < turn else turn) : i])
            if phase == "forward":
                place = "head" if i > last_layer else ("before" if not started else keys[-1][1])
            else:
                place = "after" if started else "head"
        keys.append((phase, place))
    return keys
