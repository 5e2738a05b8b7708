"""The fastest plan within a byte budget.

Every repeated layer chooses one of its patterns (patterns.py). What a step needs while it is in layer i of backward is
what the layers up to i keep, and what layer i itself takes; so the choice is a shortest path over the layers with the
bytes kept so far as its state, and exact up to the width of a bucket of bytes (the multiple-choice knapsack, Kellerer
et al. 2004, with a limit per layer). It places what is recomputed in the first layers, whose backward runs when little
else is alive.

Plans form a ladder from the smallest to the fastest that does not depend on the budget: a larger budget stands on a
rung at least as high, so it is never slower.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import fx

from .costs import Sizes
from .host import that_fit, too_little, waited_for
from .joint import Joint, is_statistic, layers, maker
from .liveness import MOMENTS, Liveness, root
from .patterns import Layer, Pattern, members, patterns, read_layers
from .plan import Plan, Tag, keep_plan, plan_of, recompute_plan
from .spans import double, every_second, inner_residuals
from .timeline import Timeline
from .words import sliced_in_words

RUNGS = 256
BUCKETS = 4096


class Planner:
    """Plans for one joint graph.

    Args:
        joint: the graph.
        gradients: its outputs that backward returns.
        sizes: what values cost, and on which device.
        moments: tensors per trained one that the optimiser holds.
        fused: whether elementwise operators are fused.

    Attributes:
        away: values that wait in host memory wherever a plan keeps them.
        rows: tokens that stretches of layers are run on at a time; 0 for all.
        inner: residuals that are computed again, by name, so that others span two layers.
        plain: the planner without them.
    """

    def __init__(
        self, joint: Joint, gradients: Sequence[Any], sizes: Sizes, *, moments: float = MOMENTS, fused: bool = True
    ) -> None:
        self.joint, self.gradients, self.sizes = joint, gradients, sizes
        self.liveness = Liveness(joint, gradients, sizes, moments=moments, fused=fused)
        self.by_name = {n.name: n for n in joint.forward}
        self.home = layers(joint)
        self.away: frozenset[fx.Node] = frozenset()
        self.rows = 0
        self.inner: tuple[str, ...] = ()
        self.plain: Planner | None = None
        self.solved: dict[Any, list[Pattern]] = {}  # by signature, of all that are made of this one
        self.rungs: dict[int, tuple[Plan, Timeline]] = {}
        self.others: dict[Any, Planner] = {}

    @functools.cached_property
    def residuals(self) -> list[fx.Node]:
        """What crosses the borders of layers and may wait in host memory: all but the last one's, which backward reads
        first."""
        nodes = (self.by_name[name] for name in self.smallest[0].saved)
        return [n for n in nodes if n in self.home and root(n) is n and not is_statistic(n)][:-1]

    def offloading(self, host: int) -> Planner | None:
        """A planner whose plans leave what crosses the borders of layers in host memory, as far as it goes.

        The last layer's value stays, and the last ones' do where not all can go.

        Args:
            host: bytes of host memory that may be taken.

        Returns:
            None where there is nothing to offload, or no room for it.
        """
        residuals = self.residuals
        away = frozenset(residuals[i] for i in that_fit(self.residual_sizes(), host))
        if not away:
            return None
        return self._other(away, self.rows)

    @functools.cached_property
    def spans(self) -> dict[int, list[fx.Node]]:
        """What a layer hands on, by the layers whose residual may be computed again (spans.py)."""
        kept = [self.by_name[name] for name in self.smallest[0].saved]
        return inner_residuals(self.joint, self.home, [layer.name for layer in self.layers], kept)

    def pairs(self) -> int:
        """How many pairs of layers a residual can span."""
        return len(every_second(self.spans))

    def spanning(self, count: int) -> Planner | None:
        """A planner whose plans have residuals span two layers in the first pairs of them; None where there are none.

        Args:
            count: how many pairs.
        """
        return self.with_inner(self.inner_of(every_second(self.spans)[:count]))

    def inner_of(self, chosen: Iterable[int]) -> tuple[str, ...]:
        """The names of what those layers hand on."""
        return tuple(n.name for i in chosen for n in self.spans[i])

    def with_inner(self, inner: tuple[str, ...]) -> Planner | None:
        """A planner whose plans compute those residuals again; None for none."""
        if not inner:
            return None
        if inner not in self.others:
            least, most = (plan.saved for plan, _ in (self.smallest, self.fastest))
            doubled = double(self.joint, self.gradients, inner, self.home, least)
            moments, fused = self.liveness.moments, self.liveness.fused
            self.others[inner] = other = Planner(
                doubled.joint, doubled.gradients, self.sizes, moments=moments, fused=fused
            )
            named = (("recompute", least), ("mixed", most))
            least, most = (plan_of(policy, other.joint, doubled.of(kept, least), "") for policy, kept in named)
            other.inner, other.extremes, other.plain, other.solved = inner, (least, most), self, self.solved
        return self.others[inner]

    def slicing(self, rows: int) -> Planner | None:
        """A planner whose plans run stretches of layers on a few tokens at a time, where their widest values lie.

        Sums over tokens then round in another order. A plan of this planner is for where no other one fits.

        Args:
            rows: tokens at a time, about.

        Returns:
            None where there are not as many tokens, or no stretches.
        """
        found = self.liveness.slicing
        if found is None or found.count <= rows or not self.layers:
            return None
        other = self._other(self.away, rows)
        return other if any(other.smallest[0].stretches) else None

    def why_not_sliced(self) -> str:
        """Why a layer's widest values lie in memory as a whole; nothing where none does, or where nobody has asked."""
        found = self.liveness.slicing
        return "" if found is None else next(iter(found.reasons.values()), "")

    def in_slices(self, plan: Plan, like: Sequence[int] | None = None) -> str:
        """What a plan runs in slices, in words.

        Args:
            plan: of this planner.
            like: for each layer of a deeper model the layer here that it is like.
        """
        found = self.liveness.slicing
        names = {name for half in plan.stretches for stretch in half for name in stretch}
        if not names or found is None:
            return ""
        wide = [v for values in found.wide.values() for v in values if maker(v).name in names]
        sliced = {self.home[maker(v)] for v in wide}
        layers = [self.layers[i].name for i in (range(len(self.layers)) if like is None else like)]
        return sliced_in_words(
            map(maker, wide), [i for i, name in enumerate(layers) if name in sliced], len(layers), plan.rows
        )

    def _other(self, away: frozenset[fx.Node], rows: int) -> Planner:
        if (away, rows) == (self.away, self.rows):
            return self
        if (away, rows) not in self.others:
            self.others[away, rows] = other = copy.copy(self)
            other.away, other.rows, other.rungs, other.others = away, rows, {}, {}
            for name in ("fastest", "smallest", "choices", "needs"):
                vars(other).pop(name, None)
        return self.others[away, rows]

    def residual_sizes(self) -> list[int]:
        """Bytes of what crosses the borders of layers and may wait in host memory."""
        return [self.sizes.bytes(n) for n in self.residuals]

    def short_of_host(self, host: int) -> str:
        """What host memory is too small for, in words; nothing where it is not."""
        return too_little(self.residual_sizes(), host)

    def price(self, plan: Plan) -> tuple[Plan, Timeline]:
        """The plan with its peak and its seconds, and the step's timeline."""
        away = {n for name in plan.saved if (n := self.by_name[name]) in self.away}
        timeline = self.liveness.timeline((self.by_name[name] for name in plan.saved), away, self.rows)
        names = [tuple(tuple(n.name for n in s.operations) for s in half) for half in self.liveness.last_stretches]
        priced = dataclasses.replace(
            plan,
            peak_bytes=timeline.peak,
            seconds=self.again(),
            parts=timeline.parts,
            rows=self.rows,
            stretches=(names[0], names[1]),
            inner=self.inner,
        )
        return (self._offloaded(priced, away) if away else priced), timeline

    def again(self) -> float:
        """Seconds of what backward ran again in the last timeline, and of what slices cost."""
        return sum(self.sizes.seconds(n) for n in self.liveness.again()) + sum(self.slices().values())

    def slices(self) -> dict[tuple[str, int], float]:
        """Seconds that slices add to each layer in the last timeline."""
        added: dict[tuple[str, int], float] = {}
        if self.rows and (found := self.liveness.slicing) is not None:
            for half in self.liveness.last_stretches:
                for stretch in half:
                    added[stretch.layer] = added.get(stretch.layer, 0.0) + found.seconds(stretch, self.rows)
        return added

    def _offloaded(self, plan: Plan, away: set[fx.Node]) -> Plan:
        """The same plan with those values in host memory; the link is waited for where arithmetic does not hide it."""
        walk, turn = self.liveness.last_walk, self.liveness.last_turn
        moved = sum(map(self.sizes.bytes, away))
        halves = [sum(map(self.sizes.seconds, part)) for part in (walk.operations[:turn], walk.operations[turn:])]
        tags = {**plan.tags, **{n.name: Tag.OFFLOAD for n in away}}
        fetched = self.liveness.last_fetched
        waited = waited_for(self.sizes.device.link, zip((moved, fetched), halves, strict=True))
        seconds, saved = plan.seconds + waited, plan.saved_bytes - moved
        return dataclasses.replace(plan, tags=tags, seconds=seconds, saved_bytes=saved, host_bytes=moved)

    @functools.cached_property
    def extremes(self) -> tuple[Plan, Plan]:
        """As little kept as can be, and everything, without a price. Values away and slices change only that."""
        return recompute_plan(self.joint), keep_plan(self.joint)

    @functools.cached_property
    def fastest(self) -> tuple[Plan, Timeline]:
        """Everything kept."""
        return self.price(self.extremes[1])

    @functools.cached_property
    def smallest(self) -> tuple[Plan, Timeline]:
        """As little kept as can be."""
        return self.price(self.extremes[0])

    def within(self, budget: int) -> tuple[Plan, Timeline]:
        """The fastest plan whose peak is at most so many bytes; the smallest one where none is."""
        if self.fastest[0].peak_bytes <= budget:
            return self.fastest
        low, high = 0, RUNGS
        if not self.layers or self.smallest[0].peak_bytes > budget:
            return min(self.smallest, self.fastest, key=lambda found: found[0].peak_bytes)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.rung(middle)[0].peak_bytes <= budget else (low, middle)
        return self.rung(low)

    def rung(self, step: int) -> tuple[Plan, Timeline]:
        """A step of the ladder: the fastest plan within that share of the way from the smallest to the fastest."""
        if step not in self.rungs:
            least, most = self.smallest[0].peak_bytes, self.fastest[0].peak_bytes
            chosen = self._choose(least + (most - least) * step // RUNGS) if step else None
            found = self.price(self.assembled(chosen)) if chosen else self.smallest
            # What the model of the ladder overlooks shall not make a plan that is larger and slower than the smallest.
            if found[0].seconds > self.smallest[0].seconds:
                found = self.smallest
            self.rungs[step] = found
        return self.rungs[step]

    # -- the layers' choices -------------------------------------------------------------------------------------------

    @functools.cached_property
    def layers(self) -> list[Layer]:
        least, most = ([self.by_name[name] for name in plan.saved] for plan, _ in (self.smallest, self.fastest))
        return read_layers(self.joint, self.home, (least, most), self.sizes)

    @functools.cached_property
    def choices(self) -> list[list[Pattern]]:
        """Per layer its patterns, as many for each (the last repeated), so that patterns of one rank make a plan; with
        spans as many as without."""
        solved: dict[Any, list[Pattern]] = {}
        for layer in self.layers:
            if layer.signature not in self.solved:
                self.solved[layer.signature] = patterns(layer, self.joint, self.sizes)
            if layer.signature not in solved:
                solved[layer.signature] = self.solved[layer.signature] or self._extremes(layer)
        longest = max(*map(len, solved.values()), len(self.plain.choices[0]) if self.plain else 0)
        layer_choices: list[list[Pattern]] = []
        padded = {s: [*found, *[found[-1]] * (longest - len(found))] for s, found in solved.items()}
        there: dict[Any, list[Pattern]] = {}  # bytes on the device
        self.price(self.smallest[0])
        added = self.slices()
        for layer in self.layers:
            gone, more = frozenset(i for i, n in enumerate(layer.values) if n in self.away), added.get(layer.name, 0.0)
            key = (layer.signature, gone, more)
            if key not in there:
                there[key] = [self._without(p, layer, gone, more) for p in padded[layer.signature]]
            layer_choices.append(there[key])
        return layer_choices

    def _without(self, pattern: Pattern, layer: Layer, gone: frozenset[int], more: float) -> Pattern:
        """The pattern with what is away from the device, and with what slices cost the layer."""
        moved = sum(self.sizes.bytes(layer.values[i]) for i in pattern.kept & gone)
        if not moved and not more:
            return pattern
        return dataclasses.replace(pattern, bytes=pattern.bytes - moved, seconds=pattern.seconds + more)

    def _extremes(self, layer: Layer) -> list[Pattern]:
        """Without a solver: all or nothing. The figures are those of the plans as a whole, shared evenly."""
        count = len(self.layers)
        bytes_of = [sum(self.sizes.bytes(layer.values[i]) for i in kept) for kept in (layer.must, layer.most)]
        seconds = [plan.seconds / count for plan, _ in (self.smallest, self.fastest)]
        kept = (layer.must, layer.most)
        return [Pattern(k, b, s) for k, b, s in zip(kept, bytes_of, seconds, strict=True)]

    @functools.cached_property
    def needs(self) -> tuple[np.ndarray, int]:
        """Bytes that a step holds in layer i under its pattern p beside what the layers up to i keep, [i, p]; and
        those that it holds outside of the layers beside all that is kept."""
        count = len(self.choices[0])
        inside = np.zeros((len(self.layers), count))
        outside = 0
        for rank in range(count):
            plan = self.assembled([rank] * len(self.layers))
            timeline = self.price(plan)[1]
            prefix = np.cumsum([choice[rank].bytes for choice in self.choices])
            totals = np.add(np.add(timeline.kept, timeline.gradients), timeline.working)
            for total, place in zip(totals, self.places(), strict=True):
                if place is None:
                    outside = max(outside, int(total - prefix[-1]))
                else:
                    inside[place, rank] = max(inside[place, rank], total - prefix[place])
        return inside, outside

    def places(self) -> list[int | None]:
        """By operator of the last walk the layer it belongs to: its own, that of what it reads, or the one before's."""
        position = {layer.name: i for i, layer in enumerate(self.layers)}
        places: list[int | None] = []
        last: int | None = None
        for i, operation in enumerate(self.liveness.last_walk.operations):
            if operation in self.joint.forward_set:
                if operation in self.home:
                    last = position.get(self.home[operation])
                    if last is not None and i >= self.liveness.last_turn and operation in self.joint.early:
                        last += 1  # it is the layer above that needs it
                elif i < self.liveness.last_turn:  # else something outside of the layers, made again for one of them
                    last = None
            else:
                read = [self.home[s] for s in self.liveness.reads[operation] if s in self.home]
                last = position.get(read[-1], last) if read else last
            places.append(last)
        return places

    def _choose(self, limit: int) -> list[int] | None:
        """Each layer's pattern, the fastest together within a limit; None where there are none."""
        return self.shortest(self.choices, *self.needs, limit - self.liveness.standing.total)

    @staticmethod
    def shortest(choices: Sequence[Sequence[Pattern]], inside: np.ndarray, outside: int, room: int) -> list[int] | None:
        """A pattern per layer, so that their seconds are fewest and no moment needs more than ``room`` bytes.

        Args:
            choices: per layer its patterns.
            inside: [layer, pattern], bytes in that layer beside those that the layers up to it keep.
            outside: bytes elsewhere beside all that is kept.
            room: bytes.
        """
        bucket = max(1, -(-sum(max(p.bytes for p in choice) for choice in choices) // BUCKETS))
        levels = np.arange(BUCKETS + len(choices) + 1) * bucket
        best = np.full(len(levels), np.inf)
        best[0] = 0.0
        taken = []
        for i, choice in enumerate(choices):
            after, which = np.full(len(levels), np.inf), np.zeros(len(levels), dtype=int)
            for p, pattern in enumerate(choice):
                shift = round(pattern.bytes / bucket)
                moved = np.full(len(levels), np.inf)
                moved[shift:] = best[: len(levels) - shift] + pattern.seconds
                moved[levels + inside[i, p] > room] = np.inf
                better = moved < after
                after[better], which[better] = moved[better], p
            best = after
            taken.append(which)
        best[levels + outside > room] = np.inf
        at = int(np.argmin(best))
        if not np.isfinite(best[at]):
            return None
        chosen = []
        for choice, which in zip(reversed(choices), reversed(taken), strict=True):
            chosen.append(int(which[at]))
            at -= round(choice[chosen[-1]].bytes / bucket)
        return _ascending(choices, chosen[::-1])

    def assembled(self, chosen: Sequence[int]) -> Plan:
        """The plan in which each layer keeps its chosen pattern, and the rest of the model as little as it can."""
        least = [self.by_name[name] for name in self.smallest[0].saved]
        kept = {n for n in least if n not in self.home}
        for layer, choice, rank in zip(self.layers, self.choices, chosen, strict=True):
            kept.update(members(layer, choice[rank]))
        return plan_of("mixed", self.joint, kept, "")


def _ascending(choices: Sequence[Sequence[Pattern]], chosen: list[int]) -> list[int]:
    """The same patterns, those that keep less in the earlier of layers that are alike.

    Of plans that are equally fast this one keeps the least at every moment, and reads best.
    """
    alike: dict[int, list[int]] = {}
    for i, choice in enumerate(choices):
        alike.setdefault(id(choice[0]), []).append(i)
    result = list(chosen)
    for places in alike.values():
        ranks = sorted((chosen[i] for i in places), key=lambda rank, at=places[0]: choices[at][rank].bytes)
        for i, rank in zip(places, ranks, strict=True):
            result[i] = rank
    return result
