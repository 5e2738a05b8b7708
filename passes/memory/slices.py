"""Which stretches of a layer are run on a few tokens at a time, where the widest of its values are too large to lie in
memory as a whole.

A stretch is grown, in the graph that forward or backward runs, around the operators that make and read a layer's widest
values (those of a gated MLP, say): a neighbour joins it where it treats tokens apart (rowwise.py) and fewer bytes are
alive while the stretch runs, or as many. Every path from one of its operators to another stays within it. So a norm
that only the MLP reads joins, and attention never does.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ...kernels.slices import slice_rows
from .costs import LAUNCH_SECONDS, Sizes
from .joint import Joint, is_view, maker
from .rowwise import Kind, Ruled, Rules, Tokens

ROWS = (8192, 2048)
"""Rows of a slice. Products of a model's widths are as fast with 8192 as with all; 2048 are for when memory is short.
"""


@dataclass(frozen=True, eq=False)
class Stretch:
    """Operators of one layer that are run on a few tokens at a time.

    Attributes:
        layer: (container, index).
        operations: in the order in which they run.
        reads: values from outside, weights and such included.
        writes: values that something outside reads.
        whole: bytes of what is made once for all slices: unpacked weights, float32 sums.
        most: bytes of the rest at its worst moment, if all tokens ran at once.
        launches: how many of the operators run for each slice.
    """

    layer: tuple[str, int]
    operations: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]
    whole: int
    most: int
    launches: int

    @property
    def last(self) -> fx.Node:
        return self.operations[-1]


class Slicing:
    """Finds stretches of one joint graph.

    Args:
        joint: the graph.
        shape: sequences and tokens in each.
        home: the layer of each node of forward.
        reads, writes, size: as :class:`~.liveness.Liveness` has them: roots that an operator reads, roots that it
            makes, bytes of a root.
        sizes: workspaces.

    Attributes:
        reasons: why a layer's widest values have to lie in memory as a whole, by layer.
    """

    def __init__(
        self,
        joint: Joint,
        shape: tuple[object, object],
        home: Mapping[fx.Node, tuple[str, int]],
        reads: Mapping[fx.Node, Sequence[fx.Node]],
        writes: Mapping[fx.Node, Sequence[fx.Node]],
        size: Mapping[fx.Node, int],
        sizes: Sizes,
    ) -> None:
        self.joint, self.home, self.reads, self.writes, self.size, self.sizes = joint, home, reads, writes, size, sizes
        self.maker = {v: op for op, made in writes.items() for v in made}
        self.tokens = Tokens(*shape)  # type: ignore[arg-type]
        self.count = sizes.number(shape[0]) * sizes.number(shape[1])
        self.rules = Rules(self.tokens)
        self.rules.read(joint.graph)
        self.wide: dict[tuple[str, int], frozenset[fx.Node]] = {}
        self.members: dict[tuple[str, tuple[str, int]], frozenset[fx.Node]] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        self.copy_of = {node: copy for copy, node in joint.copies.items()}
        self._links: dict[tuple[fx.Node, fx.Node], str | None] = {}

    def share(self, rows: int) -> float:
        """Of all tokens, those of one slice."""
        return min(1.0, slice_rows(self.count, rows) / max(1, self.count))

    def seconds(self, stretch: Stretch, rows: int) -> float:
        """What slices add to a stretch: launches, and results moved to where they belong."""
        slices = -(-self.count // slice_rows(self.count, rows))
        moved = sum(self.size[w] for w in stretch.writes)
        return stretch.launches * (slices - 1) * LAUNCH_SECONDS + 2 * moved / self.sizes.device.bandwidth

    # -- stretches of one order ----------------------------------------------------------------------------------------

    def forward(self, order: Sequence[fx.Node], held: Collection[fx.Node]) -> list[Stretch]:
        """The stretches of forward, in that order.

        Args:
            held: values that are alive to the end.
        """
        graph = _Order(self, order, held)
        for layer, widest in self._widest(graph).items():
            if layer not in self.wide:
                self.wide[layer] = frozenset(widest)
        return self._stretches("forward", graph)

    def backward(self, order: Sequence[fx.Node], held: Collection[fx.Node]) -> list[Stretch]:
        """The stretches of backward, around what reads the values that forward's are around; asked after those."""
        return self._stretches("backward", _Order(self, order, held))

    def _widest(self, graph: _Order) -> dict[tuple[str, int], list[fx.Node]]:
        """By layer its widest values that need not lie in memory as a whole."""
        found: dict[tuple[str, int], list[fx.Node]] = defaultdict(list)
        most: dict[tuple[str, int], int] = {}
        refusals: dict[tuple[str, int], tuple[int, str]] = {}
        for operation in graph.order:
            layer = self.home.get(operation)
            if layer is None or layer in self.wide:
                continue
            for v in self.writes[operation]:
                size, readers = self.size[v], graph.readers.get(v, ())
                if self.rules.of(v) is not Kind.ROWS or not readers or v in graph.held:
                    continue
                refused = [r for r in (self.why_not(operation), *(self.link(reader, v) for reader in readers)) if r]
                if refused:
                    refusals[layer] = max(refusals.get(layer, (0, "")), (size, refused[0]))
                elif size >= most.get(layer, 0):
                    if size > most.get(layer, 0):
                        found[layer].clear()
                    most[layer] = size
                    found[layer].append(v)
        wider = {layer: reason for layer, (size, reason) in refusals.items() if size >= most.get(layer, 0)}
        self.reasons |= wider
        return found

    def _stretches(self, kind: str, graph: _Order) -> list[Stretch]:
        found = []
        for layer, widest in self.wide.items():
            for turn, values in self._turns(kind, widest):
                key = (turn, layer)
                if key not in self.members:
                    self.members[key] = frozenset(self._grown(graph, values, layer))
                operations = [op for op in self.members[key] if op in graph.place]
                if operations and (stretch := self._stretch(graph, layer, operations)) is not None:
                    found.append(stretch)
        return found

    def _turns(self, kind: str, widest: Collection[fx.Node]) -> list[tuple[str, Collection[fx.Node]]]:
        """A layer's widest values, for each time that a half makes them: backward does so twice where it has copies."""
        if kind != "backward" or not any(v in self.copy_of for v in widest):
            return [(kind, widest)]
        return [("early", widest), (kind, [self.copy_of.get(v, v) for v in widest])]

    def _grown(self, graph: _Order, values: Collection[fx.Node], layer: tuple[str, int]) -> set[fx.Node]:
        seeds = {op for v in values for op in (maker(v), *graph.readers.get(v, ())) if op in graph.place}
        around = graph.closed({op for op in seeds if self.why_not(op) is None})
        if not around or (refused := self._refused(graph, around)):
            if around:
                self.reasons[layer] = refused
            return set()
        grown = True
        while grown:
            grown = False
            for candidate in graph.neighbours(around):
                if candidate in self.joint.forward_set and self.home.get(candidate) != layer:
                    continue
                if self.why_not(candidate) is not None:
                    continue
                larger = graph.closed(around | {candidate})
                if not self._refused(graph, larger) and graph.gain(around, larger) >= 0:
                    around, grown = larger, True
        return around

    def why_not(self, operation: fx.Node) -> str | None:
        """Why an operator cannot be run on a few tokens."""
        found = self.rules.ruled.get(operation, "it is not an operator")
        return None if isinstance(found, Ruled) else found

    def link(self, reader: fx.Node, value: fx.Node) -> str | None:
        """Why an operator cannot read a value of which only a few tokens are there."""
        if (reader, value) not in self._links:
            self._links[reader, value] = self._link(reader, value)
        return self._links[reader, value]

    def _link(self, reader: fx.Node, value: fx.Node) -> str | None:
        if (refused := self.why_not(reader)) is not None:
            return refused
        for source in reader.all_input_nodes:
            path = []
            while source is not value and (is_view(source) or _shows(source)):
                if source.target is not operator.getitem:
                    path.append(source)
                source = source.args[0]
                assert isinstance(source, fx.Node)
            if source is value:
                if self.rules.of(value) is Kind.SUM:
                    return f"{reader.target} reads a sum over tokens"
                for view in path:
                    if (refused := self.why_not(view)) is not None:
                        return refused
        return None

    def _refused(self, graph: _Order, around: set[fx.Node]) -> str:
        """Why these operators cannot be run together on a few tokens; nothing where they can."""
        for op in around:
            if (refused := self.why_not(op)) is not None:
                return refused
            for v in self.reads[op]:
                if self.maker.get(v) in around and (refused := self.link(op, v)) is not None:
                    return refused
        reads, writes = graph.border(around)
        for v in writes:
            kind = self.rules.of(v)
            if kind is Kind.SUM or (kind is Kind.ROWS and _is_contiguous(v)):
                continue
            return f"{v.target} is read elsewhere in another arrangement"
        leads = {self.rules.lead(v) for v in reads if self.rules.of(v) is Kind.ROWS}
        if not leads or any(self.rules.of(v) is Kind.ROWS and self.rules.lead(v) not in {1, *leads} for v in writes):
            return "nothing that it reads has batch and length apart"
        for v in reads:
            if self.rules.of(v) is Kind.COLUMNS:
                return f"{v.target} has tokens last"
            if self.size.get(v, 0) * 4 >= self.count and "random" in str(maker(v).target):
                return "a dropout's random numbers are drawn for all tokens at once"
        return ""

    def _stretch(self, graph: _Order, layer: tuple[str, int], operations: Sequence[fx.Node]) -> Stretch | None:
        inside = set(operations)
        if graph.closed(inside) != inside or self._refused(graph, inside):
            return None  # something that one plan keeps splits it
        ordered = sorted(inside, key=graph.place.__getitem__)
        reads, writes = graph.border(inside)
        whole, most, alive, launches = 0, 0, 0, 0
        results = {op: self._results(op) for op in ordered}
        last = {v: i for i, op in enumerate(ordered) for v in self.reads[op]}
        for i, op in enumerate(ordered):
            rows, sums, once = results[op]
            whole += once
            if not rows and not sums:
                continue
            launches += 1
            whole += sum(2 * self.size[v] if v.meta["val"].element_size() == 2 else self.size[v] for v in sums)
            made = sum(self.size[v] for v in rows)
            most = max(most, alive + made + self.sizes.workspace(op))
            alive += sum(self.size[v] for v in rows if v in last or v in writes)
            done = [v for v in self.reads[op] if last[v] == i and self.maker.get(v) in inside and v not in writes]
            alive -= sum(self.size[v] for v in done if self.rules.of(v) is Kind.ROWS)
        if most <= sum(self.size[v] for v in writes):
            return None  # nothing in it is wider than what it hands on
        return Stretch(layer, tuple(ordered), tuple(reads), tuple(writes), whole, most, launches)

    def _results(self, operation: fx.Node) -> tuple[list[fx.Node], list[fx.Node], int]:
        """Rows that it makes, sums, and bytes of what is made once for all slices."""
        rows = [v for v in self.writes[operation] if self.rules.of(v) is Kind.ROWS]
        sums = [v for v in self.writes[operation] if self.rules.of(v) is Kind.SUM]
        once = sum(self.size[v] for v in self.writes[operation] if self.rules.of(v) is Kind.WHOLE)
        return rows, sums, once


class _Order:
    """One half of a step, as the operators that run in it, in their order."""

    def __init__(self, slicing: Slicing, order: Sequence[fx.Node], held: Collection[fx.Node]) -> None:
        self.slicing, self.order, self.held = slicing, list(order), held
        self.place = {op: i for i, op in enumerate(self.order)}
        self.readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for op in self.order:
            for v in slicing.reads[op]:
                self.readers[v].append(op)

    def closed(self, around: set[fx.Node]) -> set[fx.Node]:
        """With all that lies on a path from one of these operators to another."""
        if not around:
            return around
        places = [self.place[op] for op in around]
        window = self.order[min(places) : max(places) + 1]
        slicing, after, made = self.slicing, set(), set()
        for op in window:
            if op in around or any(v in made for v in slicing.reads[op]):
                after.add(op)
                made.update(slicing.writes[op])
        wanted: set[fx.Node] = set()
        between = set()
        for op in reversed(window):
            if op in around or any(v in wanted for v in slicing.writes[op]):
                wanted.update(slicing.reads[op])
                if op in after:
                    between.add(op)
        return between

    def border(self, around: Collection[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """What these operators read from outside, and what they make that something outside reads."""
        slicing, readers, held = self.slicing, self.readers, self.held
        ordered = sorted(around, key=self.place.__getitem__)
        reads = {v: None for op in ordered for v in slicing.reads[op] if slicing.maker.get(v) not in around}
        writes = [
            v for op in ordered for v in slicing.writes.get(op, ())
            if v in held or any(r not in around for r in readers.get(v, ()))
        ]  # fmt: skip
        return list(reads), writes

    def neighbours(self, around: set[fx.Node]) -> list[fx.Node]:
        """Operators that make what these read, or read what they make."""
        reads, writes = self.border(around)
        makers = (self.slicing.maker.get(v) for v in reads)
        found = dict.fromkeys(op for op in makers if op in self.place)
        found |= dict.fromkeys(r for v in writes for r in self.readers.get(v, ()) if r not in around)
        return [op for op in found if op is not None]

    def gain(self, around: set[fx.Node], larger: set[fx.Node]) -> int:
        """How many bytes fewer are alive while the larger stretch runs."""
        size = self.slicing.size
        borders = [set().union(*self.border(s)) for s in (around, larger)]
        either = set().union(*borders)
        alive = []
        for inside, border in zip((around, larger), borders, strict=True):
            first = min(map(self.place.__getitem__, inside))
            last = max(map(self.place.__getitem__, inside))
            there = [
                v
                for v in either
                if v in border or (self.slicing.maker.get(v) not in inside and self._spans(v, first, last))
            ]
            alive.append(sum(size.get(v, 0) for v in there))
        return alive[0] - alive[1]

    def _spans(self, value: fx.Node, first: int, last: int) -> bool:
        """Whether a value is alive anyway while something runs between two places."""
        if value.op == "placeholder" and value in self.slicing.joint.forward_set:
            return True
        made = self.place.get(self.slicing.maker.get(value, value), -1)
        until = (
            len(self.order) if value in self.held else max(map(self.place.__getitem__, self.readers[value]), default=-1)
        )
        return made < last and until > first


def _shows(node: fx.Node) -> bool:
    return getattr(node.target, "_opname", "") == "_unsafe_view"


def _is_contiguous(node: fx.Node) -> bool:
    """Whether a value's rows are known to lie one behind the other."""
    value, expected = node.meta["val"], 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if isinstance(size, int) and size == 1:
            continue
        if str(stride) != str(expected):
            return False
        expected = size * expected
    return True
