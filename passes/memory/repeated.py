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
from .spans import every_second
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
        period: after how many layers they repeat, of which two stand before and one behind those that do; 0 where
            every layer was traced.
        gone: the layers of the real model that leave their residuals in host memory.
        inner: the layers of the real model whose residuals are computed again.
        rows: tokens that stretches of layers are run on at a time; 0 for all.
    """

    def __init__(
        self,
        planner: Planner,
        like: Sequence[int],
        standing: Standing,
        period: int = 0,
        *,
        gone: Collection[int] = (),
        inner: Collection[int] = (),
        rows: int = 0,
    ) -> None:
        self.traced, self.standing, self.period, self.rows = planner, standing, period, rows
        self.gone, self.inner = frozenset(gone), frozenset(inner)
        self.given, self.planner = list(like), self._in_slices_of(planner)
        found = [self._source(i, traced) for i, traced in enumerate(like)]
        self.like = [traced for _, traced in found]
        self.holders = [i for i in range(len(self.like) - 1) if i not in self.inner]
        everyone = len(self.gone) >= len(self.holders)
        # Where some stay, the last that leaves is on the device until backward asks for it, and by then the one before
        # is on its way back.
        absent = {*range(len(self.like))} if self.gone and everyone else {*sorted(self.gone)[:-2]}
        absent |= {i for i in self.inner if i + 1 in absent}
        self.sources = [
            (source.offloading(1 << 62) if i in absent else None) or source for i, (source, _) in enumerate(found)
        ]
        self.choices = [source.choices[i] for source, i in zip(self.sources, self.like, strict=True)]
        self.ranks = range(len(self.planner.choices[0]))
        self.outside = 0.0  # seconds of what backward runs again of the rest of the model
        self._parts: dict[tuple[Planner, int], dict[Any, _Stretch]] = {}
        self.others: dict[Any, Deep] = {}
        self.rungs: dict[int, Planned] = {}

    def _in_slices_of(self, planner: Planner) -> Planner:
        return planner.slicing(self.rows) or planner if self.rows else planner

    def _source(self, i: int, traced: int) -> tuple[Planner, int]:
        """Where the figures of a layer come from: plans of the traced model, and one of its layers."""
        first = next((j for j in (i, i - 1) if j in self.inner), None)
        if first is None:
            return self.planner, traced
        place = self._place(first)
        inner = [place] if self.period else sorted(self.inner)
        spanned = self.traced.with_inner(self.traced.inner_of(inner))
        assert spanned is not None
        return self._in_slices_of(spanned), place + i - first

    def _place(self, i: int) -> int:
        """The traced layer that runs twice where a layer does; not one at an end, as no residual would come back."""
        return 2 * self.period + i % self.period if self.period else i

    def _other(self, **changed: Any) -> Deep:
        """The same under another arrangement, made once."""
        given = {"gone": self.gone, "inner": self.inner, "rows": self.rows, **changed}
        key = tuple(given.values())
        if key not in self.others:
            self.others[key] = Deep(self.traced, self.given, self.standing, self.period, **given)
        return self.others[key]

    @functools.cached_property
    def fastest(self) -> Planned:
        """Everything kept."""
        return self.of([self.ranks[-1]] * len(self.like))

    @functools.cached_property
    def smallest(self) -> Planned:
        """As little kept as can be."""
        return self.of([0] * len(self.like))

    def residual_sizes(self) -> list[int]:
        """Per layer but the last, and those that run twice, the bytes that it hands on to the next one."""
        return [self._handed_on[self.like[i]] for i in self.holders]

    @functools.cached_property
    def _handed_on(self) -> dict[int, int]:
        """By traced layer."""
        traced: dict[int, int] = defaultdict(int)
        position = {layer.name: i for i, layer in enumerate(self.traced.layers)}
        for node in self.traced.residuals:
            traced[position[self.traced.home[node]]] += self.traced.sizes.bytes(node)
        return traced

    def offloading(self, host: int) -> Deep | None:
        """The same with residuals in host memory, those of the last layers left out where not all have room there.

        Args:
            host: bytes of host memory that may be taken.

        Returns:
            None where there is no room.
        """
        gone = frozenset(self.holders[i] for i in that_fit(self.residual_sizes(), host))
        return self._other(gone=gone) if gone and self.traced.offloading(1 << 62) is not None else None

    def slicing(self, rows: int) -> Deep | None:
        """The same with stretches of layers run on so many tokens at a time; None where there are none."""
        return self._other(rows=rows) if self.traced.slicing(rows) is not None else None

    @functools.cached_property
    def _pairs(self) -> list[int]:
        """The layers that run twice where as many do as can."""
        return every_second(i for i in range(1, len(self.like) - 2) if self._place(i) in self.traced.spans)

    def pairs(self) -> int:
        """How many pairs of layers a residual can span."""
        return len(self._pairs)

    def spanning(self, count: int) -> Deep | None:
        """The same with residuals that span two layers in the first pairs of them; None where there are none.

        Args:
            count: how many pairs.
        """
        inner = frozenset(self._pairs[:count])
        return self._other(inner=inner) if inner else None

    def short_of_host(self, host: int) -> str:
        """What host memory is too small for, in words; nothing where it is not."""
        return too_little(self.residual_sizes(), host)

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
        layers = [source.layers[i] for source, i in zip(self.sources, self.like, strict=True)]
        kept = [{layer.values[i] for i in p.kept} for layer, p in zip(layers, patterns, strict=True)]
        moved = sum(self._handed_on[self.like[i]] for i in self.gone)
        fetched = moved + sum(self._handed_on[self.like[i - 1]] for i in self.inner if i - 1 in self.gone)
        seconds = sum(p.seconds for p in patterns) + self.outside
        policy = "mixed"
        if all(rank == self.ranks[-1] for rank in ranks):
            policy = "mixed" if self.inner else "keep"
        elif not any(ranks):
            policy = "recompute"
        plan = Plan(
            policy,
            {},
            sum(p.bytes for p in patterns),
            "",
            peak_bytes=timeline.peak,
            seconds=seconds + waited_for(self.planner.sizes.device.link, zip((moved, fetched), halves, strict=True)),
            parts=timeline.parts,
            words="; ".join(
                filter(None, (in_words(layers, kept, sorted(self.gone), sorted(self.inner)), self._in_slices))
            ),
            host_bytes=moved,
            rows=self.rows,
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
        if not planner.inner:
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
