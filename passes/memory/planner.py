"""The fastest plan within a byte budget.

Every repeated layer chooses one of its patterns (patterns.py). What a step needs while it is in layer i of backward is
what the layers up to i keep, and what layer i itself takes; so the choice is a shortest path over the layers with the
bytes kept so far as its state, and exact up to the width of a bucket of bytes (the multiple-choice knapsack, Kellerer
et al. 2004, with a limit per layer). It places what is recomputed in the first layers, whose backward runs when little
else is alive. Where values may wait in host memory, what that or the link still holds is a second state (shortest.py).

Plans form a ladder from the smallest to the fastest that does not depend on the budget: a larger budget stands on a
rung at least as high, so it is never slower.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from torch import fx

from ...kernels.pinned import whole_pages
from .costs import Sizes
from .joint import Joint, is_statistic, layers
from .liveness import MOMENTS, Liveness, Timeline, busy, root
from .patterns import Layer, Pattern, members, patterns, read_layers, sent_patterns
from .plan import Plan, Tag, keep_plan, plan_of, recompute_plan
from .shortest import Sending, least_held, shortest
from .words import gib

RUNGS = 1024
STRIDES = (16, 128)
"""A rung is compared with the next lower one that is a multiple of one of these."""
CARRIED = 0.95
"""The share of the link's speed that plans count on."""
TRIES = 8
"""How often a plan is looked for that keeps to a limit."""


class Planner:
    """Plans for one joint graph.

    Args:
        joint: the graph.
        gradients: its outputs that backward returns.
        sizes: what values cost, and on which device.
        moments: tensors per trained one that the optimiser holds.
        fused: whether elementwise operators are fused.

    Attributes:
        host: bytes of host memory that plans may take; 0 for none.
    """

    def __init__(
        self, joint: Joint, gradients: Sequence[Any], sizes: Sizes, *, moments: float = MOMENTS, fused: bool = True
    ) -> None:
        self.joint, self.sizes = joint, sizes
        self.by_name = {n.name: n for n in joint.forward}
        self.home = layers(joint)
        self.liveness = Liveness(joint, gradients, sizes, moments=moments, fused=fused, home=self.home)
        self.host = 0
        self.alone: Planner | None = None  # the same without host memory
        self.rungs: dict[int, tuple[Plan, Timeline]] = {}
        self.others: dict[int, Planner] = {}

    @functools.cached_property
    def residuals(self) -> list[fx.Node]:
        """What crosses the borders of layers and may wait in host memory: all but the last one's, which backward reads
        first."""
        nodes = (self.by_name[name] for name in self.smallest[0].saved)
        return [n for n in nodes if n in self.home and root(n) is n and not is_statistic(n)][:-1]

    def offloading(self, host: int) -> Planner | None:
        """A planner whose plans may leave values in host memory: what crosses the borders of layers first.

        The last layer's values stay: backward reads them first.

        Args:
            host: bytes of host memory that may be taken.

        Returns:
            None where there is nothing to offload, or no room for it.
        """
        if not that_fit(map(self.sizes.bytes, self.residuals), host):
            return None
        if host not in self.others:
            _ = self.layers, self.choices, self.fastest  # which both share
            self.others[host] = other = copy.copy(self)
            other.host, other.rungs = host, {}
            for name in ("smallest", "choices", "needs"):
                vars(other).pop(name, None)
            other.alone = self
        return self.others[host]

    def short_of_host(self, host: int) -> str:
        """What host memory is too small for, in words; nothing where it is not."""
        return too_little([self.sizes.bytes(n) for n in self.residuals], host)

    def price(self, plan: Plan) -> tuple[Plan, Timeline]:
        """The plan with its peak and its seconds, and the step's timeline."""
        kept, away = ([self.by_name[name] for name in names] for names in (plan.saved, plan.offloaded))
        timeline = self.liveness.timeline(kept, away)
        seconds = self.again() + self.liveness.last_waited
        moved = sum(map(self.sizes.bytes, away))
        priced = dataclasses.replace(plan, peak_bytes=timeline.peak, seconds=seconds, parts=timeline.parts)
        return dataclasses.replace(priced, saved_bytes=plan.saved_bytes - moved, host_bytes=moved), timeline

    def again(self) -> float:
        """Seconds of what backward ran again in the last timeline."""
        return sum(self.sizes.seconds(n) for n in self.liveness.again())

    @functools.cached_property
    def fastest(self) -> tuple[Plan, Timeline]:
        """Everything kept."""
        return self.price(keep_plan(self.joint))

    @functools.cached_property
    def smallest(self) -> tuple[Plan, Timeline]:
        """As little on the device as can be."""
        if self.alone is None:
            return self.price(recompute_plan(self.joint))
        found = [self.alone.smallest, *(self.price(self.assembled(ranks)) for ranks in self.least())]
        return min(found, key=lambda f: (f[0].peak_bytes, f[0].seconds))

    def least(self) -> list[list[int]]:
        """Choices of which one holds the least on the device."""
        return least_held(self.choices, self.unsent, self.needs[0], self.host)

    def within(self, budget: int) -> tuple[Plan, Timeline]:
        """The fastest plan whose peak is at most so many bytes; the smallest one where none is."""
        if self.fastest[0].peak_bytes <= budget:
            return self.fastest
        if not self.layers or self.smallest[0].peak_bytes > budget:
            return min(self.smallest, self.fastest, key=lambda found: found[0].peak_bytes)
        return self.rung(highest_rung(self.smallest[0].peak_bytes, self.fastest[0].peak_bytes, budget))

    def rung(self, step: int) -> tuple[Plan, Timeline]:
        """A step of the ladder: the fastest plan within that share of the way from the smallest to the fastest."""
        if step not in self.rungs:
            least, most = self.smallest[0].peak_bytes, self.fastest[0].peak_bytes
            limit = least + (most - least) * step // RUNGS
            found = fastest_of(limit, self.choices, self.needs, self._choose, self._built) if step else None
            if found is None or step % STRIDES[-1]:  # what a layer's neighbours send may have been in the way
                below = self.rung(lower_rung(step)) if step else self.smallest
                found = below if found is None else min(found, below, key=lambda f: f[0].seconds)
            self.rungs[step] = min(found, self.smallest, key=lambda f: f[0].seconds)
        return self.rungs[step]

    # -- the layers' choices -------------------------------------------------------------------------------------------

    @functools.cached_property
    def layers(self) -> list[Layer]:
        """In the order of forward; the same with and without host memory."""
        least, most = ([self.by_name[name] for name in plan.saved] for plan, _ in (self.smallest, self.fastest))
        return read_layers(self.joint, self.home, (least, most), self.sizes)

    @functools.cached_property
    def choices(self) -> list[list[Pattern]]:
        """Per layer its patterns, as many for each (the last repeated), so that patterns of one rank make a plan."""
        solved: dict[Any, list[Pattern]] = {}
        for i, layer in enumerate(self.layers):
            if (key := self._kind(i)) not in solved:
                if self.alone is None:
                    solved[key] = patterns(layer, self.joint, self.sizes) or self._extremes(layer)
                else:
                    solved[key] = sent_patterns(layer, self.joint, self.sizes) if key[1] else []
                    solved[key] = solved[key] or self.alone.choices[i][:1]
        longest = max(map(len, solved.values()))
        padded = {key: [*found, *[found[-1]] * (longest - len(found))] for key, found in solved.items()}
        if self.alone is not None:  # the others come first
            kinds = {self._kind(i): choice for i, choice in enumerate(self.alone.choices)}
            padded = {key: kinds[key] + found for key, found in padded.items()}
        return [padded[self._kind(i)] for i in range(len(self.layers))]

    def _kind(self, layer: int) -> tuple[Any, bool]:
        """What layers have in common whose patterns are the same; the last one's values do not leave."""
        return self.layers[layer].signature, self.alone is not None and layer < len(self.layers) - 1

    @property
    def unsent(self) -> int:
        """How many patterns keep everything on the device; they are each layer's first ones, by bytes."""
        return len((self.alone or self).choices[0])

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
            _, inside[:, rank], beside = self._built([rank] * len(self.layers))
            outside = max(outside, beside)
        return inside, outside

    def _built(self, chosen: list[int]) -> tuple[tuple[Plan, Timeline], np.ndarray, int]:
        """The plan of each layer's pattern, and what it needs, as :attr:`needs` has it."""
        found = self.price(self.assembled(chosen))
        bytes_of = [choice[rank].bytes for choice, rank in zip(self.choices, chosen, strict=True)]
        return found, *held(found[1], self.places(), bytes_of)

    def places(self) -> list[int | None]:
        """By operator of the last walk the layer it belongs to: its own, that of what it reads, or the one before's."""
        position = {layer.name: i for i, layer in enumerate(self.layers)}
        places: list[int | None] = []
        last: int | None = None
        for i, operation in enumerate(self.liveness.last_walk.operations):
            if operation in self.joint.forward_set:
                if operation in self.home:
                    last = position.get(self.home[operation])
                elif i < self.liveness.last_turn:  # else something outside of the layers, made again for one of them
                    last = None
            else:
                read = [self.home[s] for s in self.liveness.reads[operation] if s in self.home]
                last = position.get(read[-1], last) if read else last
            places.append(last)
        return places

    def _choose(self, limit: int, inside: np.ndarray, outside: int) -> list[int] | None:
        """Each layer's pattern, the fastest together within a limit; None where there are none."""
        room = limit - self.liveness.standing.total
        sending = self.sending(self.host) if self.alone is not None else None
        return shortest(self.choices, inside, outside, room, sending)

    def sending(self, host: int) -> Sending:
        """What bounds that which plans send, with so much host memory."""
        busiest = sum(busy(n, self.sizes) for n in self.joint.forward if n in self.home and n in self.joint.needed)
        return Sending(host, self.sizes.device.link * CARRIED, busiest / len(self.layers))

    def assembled(self, chosen: Sequence[int]) -> Plan:
        """The plan in which each layer keeps its chosen pattern, and the rest of the model as little as it can."""
        alone = self.alone or self
        least = [self.by_name[name] for name in alone.smallest[0].saved]
        kept = {n for n in least if n not in self.home}
        away: list[fx.Node] = []
        for layer, choice, rank in zip(self.layers, self.choices, chosen, strict=True):
            kept.update(members(layer, choice[rank]))
            away += [layer.values[i] for i in choice[rank].away]
        plan = plan_of("mixed", self.joint, kept, "")
        gone = {n.name: Tag.OFFLOAD for n in away if n.name in plan.tags}
        return dataclasses.replace(plan, tags={**plan.tags, **gone})


def highest_rung(least: int, most: int, budget: int) -> int:
    """The highest rung of a ladder from one peak to another that is within a budget."""
    return min(RUNGS, (budget - least) * RUNGS // max(1, most - least))


def lower_rung(step: int) -> int:
    """One below, which many have in common."""
    return next((step // stride * stride for stride in STRIDES if step % stride), step & (step - 1))


def fastest_of(
    limit: int,
    choices: Sequence[Sequence[Pattern]],
    needs: tuple[np.ndarray, int],
    choose: Callable[[int, np.ndarray, int], list[int] | None],
    build: Callable[[list[int]], tuple[tuple[Plan, Timeline], np.ndarray, int]],
) -> tuple[Plan, Timeline] | None:
    """The fastest plan found whose peak is within a limit; None where there is none.

    What a layer holds depends a little on what its neighbour sends, so a plan may miss its limit: what was overlooked
    is noted, and the choice made again.

    Args:
        choices: per layer its patterns.
        needs: bytes by layer and pattern, and outside of them, as :attr:`Planner.needs` has them.
        choose: the patterns of each layer for a limit and such needs.
        build: their plan, and its needs.
    """
    inside, outside, room = needs[0].copy(), needs[1], limit
    for _ in range(TRIES):
        if (chosen := choose(room, inside, outside)) is None:
            break
        found, there, beside = build(chosen)
        if (miss := found[0].peak_bytes - limit) <= 0:
            return found
        known = beside <= outside
        outside = max(outside, beside)
        for choice, rank, taken in zip(choices, chosen, there, strict=True):
            alike = [i for i, other in enumerate(choices) if other is choice]
            known = known and taken <= inside[alike, rank].min()
            inside[alike, rank] = np.maximum(inside[alike, rank], taken)
        if known:  # what is kept was rounded to buckets
            room -= miss
    return None


def held(timeline: Timeline, places: Sequence[int | None], bytes_of: Sequence[int]) -> tuple[np.ndarray, int]:
    """What a step holds in each layer beside what the layers up to it keep, and outside of them beside all of that.

    Args:
        places: by operator the layer that it belongs to.
        bytes_of: what each layer keeps.
    """
    prefix = np.cumsum(bytes_of)
    inside, outside = np.zeros(len(prefix)), 0
    totals = np.add(np.add(timeline.kept, timeline.gradients), timeline.working)
    for total, place in zip(totals, places, strict=True):
        if place is None:
            outside = max(outside, int(total - prefix[-1]))
        else:
            inside[place] = max(inside[place], total - prefix[place])
    return inside, outside


def fastest_within(planner: Plans, budget: int, host: int) -> tuple[Plan, Timeline]:
    """The fastest plan within a budget; host memory is used where that makes it faster, or possible.

    Args:
        budget: peak bytes on the device.
        host: bytes of host memory that may be taken; 0 for none.

    Returns:
        the plan and its timeline. Where nothing fits it is the one that needs least. Its note says what host memory was
        too small for, where there was some to be used.
    """
    if not host or planner.fastest[0].peak_bytes <= budget:
        return planner.within(budget)
    found = [(planner.offloading(host) or planner).within(budget)]
    if found[0][0].peak_bytes > budget:
        found.append(planner.within(budget))
    plan, timeline = min(found, key=lambda f: f[0].peak_bytes)
    return dataclasses.replace(plan, note=planner.short_of_host(host)), timeline


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
