"""A plan for a deep model from the joint graph of a shallow one.

Layers repeat, and so does what a step holds while it is in one. A model of a few layers is traced; its inner layers
stand for as many as the real one has. Every layer's stretch of the timeline, forward and backward, comes from a plan in
which all traced layers choose alike, and is put on top of what the layers before it keep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .liveness import Standing, Timeline
from .plan import Plan
from .planner import RUNGS, Planner
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
    """

    def __init__(self, planner: Planner, like: Sequence[int], standing: Standing) -> None:
        self.planner, self.like, self.standing = planner, list(like), standing
        self.choices = [planner.choices[i] for i in self.like]
        self.ranks = range(len(planner.choices[0]))
        self.outside = 0.0  # seconds of what backward runs again of the rest of the model
        self.parts = [self._stretches(rank) for rank in self.ranks]

    @property
    def fastest(self) -> Planned:
        """Everything kept."""
        return self.of([self.ranks[-1]] * len(self.like))

    @property
    def smallest(self) -> Planned:
        """As little kept as can be."""
        return self.of([0] * len(self.like))

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

    def _rung(self, step: int, smallest: tuple[Plan, Timeline], fastest: tuple[Plan, Timeline]) -> Planned:
        least, most = smallest[0].peak_bytes, fastest[0].peak_bytes
        chosen = self._choose(least + (most - least) * step // RUNGS)
        found = self.of(chosen) if chosen else smallest
        return found if found[0].seconds <= smallest[0].seconds else smallest

    def of(self, ranks: Sequence[int]) -> Planned:
        """The plan in which each layer keeps the pattern of that rank, and the step's timeline."""
        timeline = self._composed(ranks)
        patterns = [choice[rank] for choice, rank in zip(self.choices, ranks, strict=True)]
        layers = [self.planner.layers[i] for i in self.like]
        kept = [{layer.values[i] for i in p.kept} for layer, p in zip(layers, patterns, strict=True)]
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
            seconds=sum(p.seconds for p in patterns) + self.outside,
            parts=timeline.parts,
            words=in_words(layers, kept),
        )
        return plan, timeline

    # -- stretches -----------------------------------------------------------------------------------------------------

    def _stretches(self, rank: int) -> dict[Any, _Stretch]:
        """By ("forward" or "backward", layer or "before", "head", "after"): its stretch under a plan of one rank."""
        planner = self.planner
        count = len(planner.layers)
        plan, timeline = planner.price(planner.assembled([rank] * count))
        self.outside = plan.seconds - sum(choice[rank].seconds for choice in planner.choices)
        places = planner.places()
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
            found[key] = _Stretch(names, kept[at] - below, gradients[at] - start, working[at], finished)
        return found

    def _composed(self, ranks: Sequence[int]) -> Timeline:
        bytes_of = [choice[rank].bytes for choice, rank in zip(self.choices, ranks, strict=True)]
        before = np.concatenate([[0], np.cumsum(bytes_of)])
        order: list[tuple[Any, int, int]] = [(("forward", "before"), ranks[0], 0)]
        layers = list(enumerate(zip(self.like, ranks, strict=True)))
        order += [(("forward", traced), rank, before[i]) for i, (traced, rank) in layers]
        order.append((("forward", "head"), ranks[-1], before[-1]))
        turn = len(order)
        order.append((("backward", "head"), ranks[-1], before[-1]))
        order += [(("backward", traced), rank, before[i]) for i, (traced, rank) in reversed(layers)]
        order.append((("backward", "after"), ranks[0], 0))
        names: list[str] = []
        kept: list[int] = []
        gradients: list[int] = []
        working: list[int] = []
        finished = length = 0
        for i, (key, rank, below) in enumerate(order):
            if i == turn:
                length = len(names)
            stretch = self.parts[rank].get(key)
            if stretch is None:
                continue
            names += stretch.names
            kept += [int(k + below) for k in stretch.kept]
            gradients += [int(g + finished) for g in stretch.gradients]
            working += [int(w) for w in stretch.working]
            finished += stretch.finished
        return Timeline(self.standing, names, length, kept, gradients, working)

    # -- the choice ----------------------------------------------------------------------------------------------------

    def _choose(self, limit: int) -> list[int] | None:
        grown = [max(self._finished(key, rank) for rank in self.ranks) for key in (("backward", i) for i in self.like)]
        head = max(self._finished(("backward", "head"), rank) for rank in self.ranks)
        above = [head + sum(grown[i + 1 :]) for i in range(len(grown))]
        inside = np.array(
            [
                [self._inside(traced, rank, over, self.choices[i][rank].bytes) for rank in self.ranks]
                for i, (traced, over) in enumerate(zip(self.like, above, strict=True))
            ]
        )
        ends = [("forward", "head"), ("backward", "head")]
        outside = max(self.parts[r][k].most for r in self.ranks for k in ends if k in self.parts[r])
        return self.planner.shortest(self.choices, inside, outside, limit - self.standing.total)

    def _finished(self, key: Any, rank: int) -> int:
        stretch = self.parts[rank].get(key)
        return stretch.finished if stretch is not None else 0

    def _inside(self, traced: int, rank: int, above: int, own: int) -> int:
        """Bytes while the step is in a layer, beside what the layers up to and with it keep."""
        forward, backward = (self.parts[rank].get((phase, traced)) for phase in ("forward", "backward"))
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
