"""A plan for a deep model from the joint graph of a shallow one.

Layers repeat, and so does what a step holds while it is in one. A model of a few layers is traced; its inner layers
stand for as many as the real one has. Every layer's stretch of the timeline, forward and backward, comes from a plan in
which all traced layers choose alike, and is put on top of what the layers before it keep.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .host import that_fit, too_little, waited_for
from .plan import Plan
from .planner import RUNGS, Planner
from .slices import ROWS
from .timeline import Standing, Timeline
from .words import in_words


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """Bytes while the step is in one part of the model, beside what is kept and finished elsewhere."""

    names: list[str]
    kept: np.ndarray
    gradients: np.ndarray
    working: np.ndarray
    finished: int
    """Bytes of gradients that it leaves."""
    seconds: float

    @property
    def most(self) -> int:
        return int((self.kept + self.gradients + self.working).max(initial=0))


Planned = tuple[Plan, Timeline]


class Deep:
    """Plans for a model whose layers are those of a traced one, repeated.

    Args:
        planner: of the traced joint graph.
        like: for each layer of the real model the traced one that it is like; the first and the last traced layer
            stand for themselves.
        standing: what lies on the device all through the step, of the real model.
        away: a planner of the same graph whose layers leave their residuals in host memory.
        gone: the layers of the real model that do so.
    """

    def __init__(
        self,
        planner: Planner,
        like: Sequence[int],
        standing: Standing,
        away: Planner | None = None,
        gone: Collection[int] = (),
    ) -> None:
        self.planner, self.like, self.standing = planner, list(like), standing
        self.away, self.gone = away if gone else None, frozenset(gone)
        everyone = len(self.gone) >= len(self.like) - 1
        # Where some stay, the last that leaves is on the device until backward asks for it, and by then the one before
        # is on its way back.
        absent = {*range(len(self.like))} if everyone else {*sorted(self.gone)[:-2]}
        self.sources = [self.away if self.away and i in absent else planner for i in range(len(self.like))]
        self.choices = [source.choices[i] for source, i in zip(self.sources, self.like, strict=True)]
        self.ranks = range(len(planner.choices[0]))
        self.outside = 0.0  # seconds of what backward runs again of the rest of the model
        self._parts: dict[tuple[Planner, int], dict[Any, _Stretch]] = {}
        self.others: dict[Any, Deep] = {}
        self.rungs: dict[int, Planned] = {}

    @functools.cached_property
    def fastest(self) -> Planned:
        """Everything kept."""
        return self.of([self.ranks[-1]] * len(self.like))

    @functools.cached_property
    def smallest(self) -> Planned:
        """As little kept as can be."""
        return self.of([0] * len(self.like))

    @property
    def residuals(self) -> list[int]:
        """Per layer but the last the bytes that it hands on to the next one."""
        traced: dict[int, int] = defaultdict(int)
        position = {layer.name: i for i, layer in enumerate(self.planner.layers)}
        for node in self.planner.residuals:
            traced[position[self.planner.home[node]]] += self.planner.sizes.bytes(node)
        return [traced[i] for i in self.like[:-1]]

    def offloading(self, host: int) -> Deep | None:
        """The same with residuals in host memory, those of the last layers left out where not all have room there.

        Args:
            host: bytes of host memory that may be taken.

        Returns:
            None where there is no room.
        """
        gone = frozenset(that_fit(self.residuals, host))
        away = self.planner.offloading(1 << 62) if gone else None
        if away is None:
            return None
        if gone not in self.others:
            self.others[gone] = Deep(self.planner, self.like, self.standing, away, gone)
        return self.others[gone]

    def slicing(self, rows: int) -> Deep | None:
        """The same with stretches of layers run on so many tokens at a time; None where there are none."""
        if ("rows", rows) not in self.others:
            if (planner := self.planner.slicing(rows)) is None:
                return None
            self.others["rows", rows] = Deep(planner, self.like, self.standing)
        return self.others["rows", rows]

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
        low, high, best = 0, RUNGS, smallest
        while high - low > 1:
            middle = (low + high) // 2
            found = self._rung(middle, smallest, fastest)
            low, high, best = (middle, high, found) if found[0].peak_bytes <= budget else (low, middle, best)
        return best

    def _rung(self, step: int, smallest: Planned, fastest: Planned) -> Planned:
        if step not in self.rungs:
            least, most = smallest[0].peak_bytes, fastest[0].peak_bytes
            chosen = self._choose(least + (most - least) * step // RUNGS)
            found = self.of(chosen) if chosen else smallest
            self.rungs[step] = found if found[0].seconds <= smallest[0].seconds else smallest
        return self.rungs[step]

    def of(self, ranks: Sequence[int]) -> Planned:
        """The plan in which each layer keeps the pattern of that rank, and the step's timeline."""
        timeline, halves = self._composed(ranks)
        patterns = [choice[rank] for choice, rank in zip(self.choices, ranks, strict=True)]
        layers = [self.planner.layers[i] for i in self.like]
        kept = [{layer.values[i] for i in p.kept} for layer, p in zip(layers, patterns, strict=True)]
        moved = sum(size for i, size in enumerate(self.residuals) if i in self.gone)
        seconds = sum(p.seconds for p in patterns) + self.outside
        policy = "mixed"
        if all(rank == self.ranks[-1] for rank in ranks):
            policy = "keep"
        elif not any(ranks):
            policy = "recompute"
        plan = Plan(
            policy,
            {},
            sum(p.bytes for p in patterns),
            "",
            peak_bytes=timeline.peak,
            seconds=seconds + waited_for(moved, self.planner.sizes.device.link, halves),
            parts=timeline.parts,
            words="; ".join(filter(None, (in_words(layers, kept, sorted(self.gone)), self._in_slices))),
            host_bytes=moved,
            rows=self.planner.rows,
        )
        return plan, timeline

    @functools.cached_property
    def _in_slices(self) -> str:
        return self.planner.in_slices(self.planner.smallest[0], self.like)

    # -- stretches -----------------------------------------------------------------------------------------------------

    def _part(self, source: Planner, rank: int) -> dict[Any, _Stretch]:
        if (source, rank) not in self._parts:
            self._parts[source, rank] = self._stretches(source, rank)
        return self._parts[source, rank]

    def _end(self, rank: int) -> dict[Any, _Stretch]:
        """What is outside of the layers."""
        return self._part(self.sources[-1], rank)

    def _stretches(self, planner: Planner, rank: int) -> dict[Any, _Stretch]:
        """By ("forward" or "backward", layer or "before", "head", "after"): its stretch under a plan of one rank."""
        count = len(planner.layers)
        _, timeline = planner.price(planner.assembled([rank] * count))
        self.outside = planner.again() - sum(choice[rank].seconds for choice in planner.choices)
        places, operations = planner.places(), planner.liveness.last_walk.operations
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
            found[key] = _Stretch(names, kept[at] - below, gradients[at] - start, working[at], finished, seconds)
        return found

    def _composed(self, ranks: Sequence[int]) -> tuple[Timeline, tuple[float, float]]:
        """The step's timeline, and the seconds of forward and of backward."""
        bytes_of = [choice[rank].bytes for choice, rank in zip(self.choices, ranks, strict=True)]
        before = np.concatenate([[0], np.cumsum(bytes_of)])
        layers = list(enumerate(zip(self.sources, self.like, ranks, strict=True)))

        def layer(phase: str, i: int, source: Planner, traced: int, rank: int) -> tuple[_Stretch | None, int]:
            return self._part(source, rank).get((phase, traced)), before[i]

        forward = [(self._end(ranks[0]).get(("forward", "before")), 0)]
        forward += [layer("forward", i, *rest) for i, rest in layers]
        forward.append((self._end(ranks[-1]).get(("forward", "head")), before[-1]))
        backward = [(self._end(ranks[-1]).get(("backward", "head")), before[-1])]
        backward += [layer("backward", i, *rest) for i, rest in reversed(layers)]
        backward.append((self._end(ranks[0]).get(("backward", "after")), 0))
        names: list[str] = []
        kept: list[int] = []
        gradients: list[int] = []
        working: list[int] = []
        finished = length = 0
        seconds = []
        for half in (forward, backward):
            length = len(names)
            there = [(stretch, below) for stretch, below in half if stretch is not None]
            seconds.append(sum(stretch.seconds for stretch, _ in there))
            for stretch, below in there:
                names += stretch.names
                kept += [int(k + below) for k in stretch.kept]
                gradients += [int(g + finished) for g in stretch.gradients]
                working += [int(w) for w in stretch.working]
                finished += stretch.finished
        return Timeline(self.standing, names, length, kept, gradients, working), (seconds[0], seconds[1])

    # -- the choice ----------------------------------------------------------------------------------------------------

    def _choose(self, limit: int) -> list[int] | None:
        traced = list(zip(self.sources, self.like, strict=True))
        grown = [max(self._finished(self._part(s, rank), ("backward", i)) for rank in self.ranks) for s, i in traced]
        head = max(self._finished(self._end(rank), ("backward", "head")) for rank in self.ranks)
        above = [head + sum(grown[i + 1 :]) for i in range(len(grown))]
        inside = np.array(
            [
                [self._inside(self._part(s, rank), t, over, self.choices[i][rank].bytes) for rank in self.ranks]
                for i, ((s, t), over) in enumerate(zip(traced, above, strict=True))
            ]
        )
        ends = [("forward", "head"), ("backward", "head")]
        outside = max(self._end(r)[k].most for r in self.ranks for k in ends if k in self._end(r))
        return self.planner.shortest(self.choices, inside, outside, limit - self.standing.total)

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
    """What the smallest plan needs by the tokens of a step: straight lines in them.

    Attributes:
        lines: with all tokens at once, and in slices. Of each, bytes without host memory, (at no tokens, per token),
            and the same with the residuals of all layers but the last in host memory.
        residuals: bytes per token that each of those layers hands on.
    """

    lines: list[tuple[tuple[float, float], tuple[float, float]]]
    residuals: list[float]

    @classmethod
    def through(cls, tokens: tuple[int, int], plans: tuple[Deep, Deep]) -> Floor:
        """The lines through two points.

        Args:
            tokens: two different numbers of tokens.
            plans: of steps of so many.
        """
        lines = []
        for rows in (0, *ROWS):
            peaks = []
            for deep in plans:
                sliced = deep.slicing(rows) if rows else deep
                if sliced is not None:
                    other = sliced.offloading(1 << 62) or sliced
                    peaks.append((sliced.smallest[0].peak_bytes, other.smallest[0].peak_bytes))
            if len(peaks) == len(plans):
                both = []
                for a, b in zip(*peaks, strict=True):
                    slope = (b - a) / (tokens[1] - tokens[0])
                    both.append((a - slope * tokens[0], slope))
                lines.append((both[0], both[1]))
        return cls(lines, [size / tokens[0] for size in plans[0].residuals])

    def at(self, tokens: int, host: int) -> float:
        """Peak bytes of a step of so many tokens, with so many bytes of host memory."""
        there = that_fit((int(size * tokens) for size in self.residuals), host)
        found = []
        for lines in self.lines:
            alone, away = (fixed + slope * tokens for fixed, slope in lines)
            found.append(alone - max(0.0, alone - away) * len(there) / max(1, len(self.residuals)))
        return min(found)

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
