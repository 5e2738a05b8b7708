"""How much memory a step holds at every operator, from a joint graph and what of it is kept: nothing is run.

The walk follows the two graphs as they will be cut: forward in its order, backward in its own with each value that it
computes again made right before its first use. Tensors are freed after their last use, as Inductor's code does. What
Inductor fuses is modelled as far as it matters here: a value between elementwise operators never lies in memory, and an
elementwise operator overwrites an input of its result's size that nobody reads any more.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .costs import LIBRARY_WORKSPACE, Sizes
from .joint import MOVERS, Joint, base, is_free, is_value, is_view, layers, maker, tokens, unpacks
from .slices import Slicing, Stretch
from .timeline import Standing, Timeline

MOMENTS = 2
"""Tensors per trained one that the optimiser holds: AdamW's two moments, in the parameter's dtype."""

aten = torch.ops.aten
_REDUCTIONS = {aten.sum, aten.mean, aten.amax, aten.amin, aten.var_mean, aten._softmax, aten._log_softmax, aten.any}


@dataclass(frozen=True)
class _Together:
    """A stretch that runs on a few tokens at a time, and the bytes that it holds meanwhile."""

    stretch: Stretch
    workspace: int

    @classmethod
    def of(cls, stretch: Stretch, share: float) -> _Together:
        return cls(stretch, stretch.whole + int(stretch.most * share))


def _collapsed(
    order: list[fx.Node], together: Sequence[_Together], reads: Mapping[fx.Node, Sequence[fx.Node]]
) -> list[fx.Node]:
    """The order with each stretch as its last operator, as soon as it may start; what reads of it waits for that."""
    if not together:
        return order
    unit = {op: t.stretch.last for t in together for op in t.stretch.operations}
    sources = {t.stretch.last: t.stretch.reads for t in together}
    there, done = set(order), set()
    waiting: list[fx.Node] = []
    found: list[fx.Node] = []
    for operation in order:
        head = unit.get(operation, operation)
        if head in done or head in waiting:
            continue
        waiting.append(head)
        moved = True
        while moved:
            moved = False
            for op in list(waiting):
                makers = (maker(v) for v in sources.get(op, reads[op]))
                if all(unit.get(m, m) in done for m in makers if m in there):
                    found.append(op)
                    done.add(op)
                    waiting.remove(op)
                    moved = True
    return found


@dataclass
class _Walk:
    names: list[str] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    working: list[int] = field(default_factory=list)
    operations: list[fx.Node] = field(default_factory=list)


class Liveness:
    """Timelines of a joint graph.

    Args:
        joint: the graph.
        gradients: its outputs that backward returns, one per input or None.
        sizes: what a value measures.
        fused: whether elementwise operators are fused, as Inductor does; else each writes its result.
        moments: see :data:`MOMENTS`.
    """

    def __init__(
        self, joint: Joint, gradients: Sequence[Any], sizes: Sizes, *, fused: bool = True, moments: float = MOMENTS
    ) -> None:
        self.joint, self.sizes, self.fused, self.moments = joint, sizes, fused, moments
        (output,) = joint.graph.find_nodes(op="output")
        flat = [n for n in pytree.tree_leaves(output.args) if isinstance(n, fx.Node)]
        self.gradients = {root(n) for n in gradients if isinstance(n, fx.Node) and is_value(n)}
        self.results = {root(n) for n in flat if is_value(n)} - self.gradients
        forward = set(joint.forward)
        self.backward = [n for n in joint.graph.nodes if n not in forward and n.op == "call_function"]
        self.order = {n: i for i, n in enumerate(joint.graph.nodes)}
        self.reads: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.writes: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self.size: dict[fx.Node, int] = {}
        for node in joint.graph.nodes:
            if is_value(node) and root(node) is node:
                self.size[node] = sizes.bytes(node)
                if node.op == "call_function":
                    self.writes[maker(node)].append(node)
            if self.is_operation(node):
                self.reads[node] = tuple(dict.fromkeys(root(n) for n in node.all_input_nodes if is_value(n)))
        self.standing = self._standing(gradients, [n for n in joint.forward if n.op == "placeholder"])
        # A recomputed output that nobody reads, and a tuple's member without a node, are alive with the others.
        self.made = {op: self._made(op) for op in self.reads}

    def is_operation(self, node: fx.Node) -> bool:
        return node.op == "call_function" and maker(node) is node and not _shows(node)

    def _made(self, operation: fx.Node) -> int:
        values = [v for v in pytree.tree_leaves(operation.meta.get("val")) if isinstance(v, Tensor)]
        return sum(self.sizes._nbytes(v) for v in values)

    def _standing(self, gradients: Sequence[Any], inputs: list[fx.Node]) -> Standing:
        trained = [p for p, g in zip(inputs, gradients, strict=False) if isinstance(g, fx.Node) and is_value(p)]
        bytes_of = {root(p): self.size.get(root(p), 0) for p in inputs if is_value(p)}
        learned = sum(bytes_of[root(p)] for p in dict.fromkeys(trained))
        on_gpu = any(p.meta["val"].device.type == "cuda" for p in inputs if is_value(p))
        library = LIBRARY_WORKSPACE if on_gpu else 0
        return Standing(sum(bytes_of.values()) - learned, learned, int(self.moments * learned), library)

    def timeline(self, kept: Iterable[fx.Node], away: Iterable[fx.Node] = (), rows: int = 0) -> Timeline:
        """The timeline of a step that keeps those values, some of them away in host memory until they are read.

        What is away stays until the next one leaves, and comes back one at a time, each while backward works with the
        one before.

        Args:
            rows: how many tokens the stretches of ``slicing`` are run on at a time; 0 for all.
        """
        kept, away = {root(n) for n in kept}, {root(n) for n in away}
        walk = _Walk()
        forward, backward = self._forward_order(kept), self._backward_order(kept)
        made = {n for op in forward for n in self.writes[op]}
        leaving = sorted(away & made, key=self.order.__getitem__)
        together: list[list[_Together]] = [[], []]
        self.last_stretches = ([], [])
        if rows and (found := self.slicing) is not None:
            outside = kept | self.results
            self.last_stretches = found.forward(forward, outside), found.backward(backward, self.gradients)
            together = [[_Together.of(s, found.share(rows)) for s in half] for half in self.last_stretches]
        self._walk(walk, forward, set(), (kept - away) | self.results, kept, leaving=leaving, together=together[0])
        turn = len(walk.names)
        tangents = {n for n in self.size if n.op == "placeholder" and n not in self.joint.forward_set}
        there = (kept - away) | tangents | {*leaving[-1:]}
        self._walk(walk, backward, there, self.gradients, kept, away, together=together[1])
        self.last_walk, self.last_turn = walk, turn
        return Timeline(self.standing, walk.names, turn, walk.kept, walk.gradients, walk.working)

    @functools.cached_property
    def slicing(self) -> Slicing | None:
        """What finds stretches that can be run on a few tokens at a time; None where there are no tokens."""
        if (shape := tokens(self.joint)) is None:
            return None
        return Slicing(self.joint, shape, layers(self.joint), self.reads, self.writes, self.size, self.sizes)

    def again(self) -> list[fx.Node]:
        """The operators of forward that backward ran again in the last timeline."""
        turn, joint = self.last_turn, self.joint
        return [n for n in self.last_walk.operations[turn:] if n in joint.needed or n in joint.copies]

    # -- in which order ------------------------------------------------------------------------------------------------

    def _forward_order(self, kept: Collection[fx.Node]) -> list[fx.Node]:
        todo, seen = [maker(n) for n in kept if not is_free(n)], set()
        while todo:
            operation = todo.pop()
            if operation not in seen and operation in self.reads:
                seen.add(operation)
                todo += [maker(n) for n in self.reads[operation]]
        return [n for n in self.joint.forward if n in self.reads and (n in seen or n in self.joint.needed)]

    def _backward_order(self, kept: Collection[fx.Node]) -> list[fx.Node]:
        """As backward is laid out: what it computes again stands right before the first operator that reads it."""
        done: set[fx.Node] = set()
        order: list[fx.Node] = []
        roots = [n for n in self.gradients if n.op == "call_function"]
        for node in [*(n for n in self.backward if n in self.reads), *map(maker, roots)]:
            found, todo = set(), [node]
            while todo:
                operation = todo.pop()
                if operation in found or operation in done or operation not in self.reads:
                    continue
                found.add(operation)
                todo += [maker(n) for n in self.reads[operation] if n not in kept and not is_free(n)]
            done |= found
            order += sorted(found, key=self.order.__getitem__)
        return order

    # -- what is alive -------------------------------------------------------------------------------------------------

    def _walk(
        self,
        walk: _Walk,
        order: list[fx.Node],
        alive: set[fx.Node],
        held: set[fx.Node],
        kept: set[fx.Node],
        away: Collection[fx.Node] = (),
        leaving: Sequence[fx.Node] = (),
        together: Sequence[_Together] = (),
    ) -> None:
        whole = {t.stretch.last: t for t in together}
        order = _collapsed(order, together, self.reads)
        unpacked = {op for op in order if unpacks(op.target) and all(map(is_free, op.all_input_nodes))}
        sources = self._sources([op for op in order if op not in unpacked], held | {*leaving}, whole)
        last = {s: i for i, op in enumerate(order) if op in sources for s in sources[op]}
        place = {op: i for i, op in enumerate(order)}
        leave: dict[int, list[fx.Node]] = defaultdict(list)
        for s, following in zip(leaving, [*leaving[1:], None], strict=False):
            until = len(order) if following is None else place[maker(following)]
            if until > last.get(s, -1):  # its copy is under way
                last[s] = until
                leave[until].append(s)
        live = sum(self.size[n] for n in alive)
        counted = {n for n in alive if n in kept}  # what leaves for the host is at work until it has left
        kept_bytes = sum(self.size[n] for n in counted)
        finished = 0
        alive = set(alive)
        back, doubled = self._arrivals(order, sources, away)
        for i, operation in enumerate(order):
            if operation in unpacked or (operation not in sources):
                continue
            for s in back.get(i, ()):
                if s not in alive:
                    alive.add(s)
                    counted.add(s)
                    live += self.size[s]
                    kept_bytes += self.size[s]
            read = [s for s in sources[operation] if not is_free(s) or s in alive]
            weights = sum(self.size[s] for s in read if maker(s) in unpacked)
            dying = [s for s in read if last[s] == i and s in alive and s not in held]
            gone = [s for s in leave[i] if s in alive and s not in read]
            if (stretch := whole.get(operation)) is None:
                members, writes, made = [operation], self.writes[operation], self.made[operation]
                workspace = self.sizes.workspace(operation) - self._overwrites(operation, made, dying)
            else:
                members, writes, workspace = stretch.stretch.operations, stretch.stretch.writes, stretch.workspace
                made = sum(self.size[n] for n in writes)
            new = [n for n in writes if n not in alive]
            grown = live + made + weights + workspace + doubled.get(i, 0)
            for member in members:
                if member not in unpacked:
                    walk.names.append(member.name)
                    walk.operations.append(member)
                    walk.kept.append(kept_bytes)
                    walk.gradients.append(finished)
                    walk.working.append(grown - kept_bytes - finished)
            wanted = [n for n in new if n in last or n in held]  # outputs that nobody wants go at once
            live += sum(self.size[n] for n in wanted)
            alive.update(wanted)
            saved = [n for n in wanted if n in kept and n in held]
            counted.update(saved)
            kept_bytes += sum(self.size[n] for n in saved)
            finished += sum(self.size[n] for n in wanted if n in self.gradients and n in held)
            for s in (*dying, *gone):
                alive.discard(s)
                live -= self.size[s]
                if s in counted:
                    kept_bytes -= self.size[s]

    def _arrivals(
        self, order: list[fx.Node], sources: dict[fx.Node, tuple[fx.Node, ...]], away: Collection[fx.Node]
    ) -> tuple[dict[int, list[fx.Node]], dict[int, int]]:
        """Which values come back from the host when: the first when it is read, the others when the one before is.

        What a layer that runs twice is given comes twice, for each of its turns; its first copy goes after the first.

        Returns:
            the values by moment, and the bytes of those that are there twice.
        """
        turns: dict[tuple[fx.Node, bool], tuple[int, int]] = {}
        for i, op in enumerate(order):
            for s in sources.get(op, ()):
                if s in away:
                    key = (s, op in self.joint.early)
                    turns[key] = (turns.get(key, (i, i))[0], i)
        arrivals: dict[int, list[fx.Node]] = defaultdict(list)
        doubled: dict[int, int] = defaultdict(int)
        moment, there = None, {}
        for (s, _), (first, last) in sorted(turns.items(), key=lambda item: item[1]):
            if s not in there:
                arrivals[first if moment is None else moment].append(s)
            elif moment is not None:
                for i in range(moment, there[s] + 1):
                    doubled[i] += self.size[s]
            moment, there[s] = first, last
        self.last_fetched = sum(self.size[s] for s, _ in turns)
        return arrivals, doubled

    def _overwrites(self, operation: fx.Node, made: int, dying: list[fx.Node]) -> int:
        if self.fused and _fuses(operation) and any(self.size[s] == made for s in dying):
            return made
        return 0

    def _sources(
        self, order: list[fx.Node], held: set[fx.Node], whole: Mapping[fx.Node, _Together]
    ) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """What each operator reads from memory, fused operators' inputs followed to where they lie; those left out."""
        reads = {op: whole[op].stretch.reads if op in whole else self.reads[op] for op in order}
        if not self.fused:
            return reads
        readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for op in order:
            for s in reads[op]:
                readers[s].append(op)
        virtual: dict[fx.Node, tuple[fx.Node, ...]] = {}
        found: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for op in order:
            read = tuple(dict.fromkeys(t for s in reads[op] for t in virtual.get(s, (s,))))
            results = self.writes[op]
            passed = op not in whole and _is_elementwise(op) and not any(n in held for n in results)
            fused = [r for n in results for r in readers[n]]
            if passed and all(readers[n] for n in results) and all(_fuses(r) and r not in whole for r in fused):
                virtual.update(dict.fromkeys(results, read))
            else:
                found[op] = read
        return found


def root(node: fx.Node) -> fx.Node:
    """The value whose bytes a node shows, reshaped ones included."""
    node = base(node)
    while node.target is aten._unsafe_view.default:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = base(source)
    return node


def _shows(node: fx.Node) -> bool:
    return is_view(node) or node.target is aten._unsafe_view.default


def _is_elementwise(node: fx.Node) -> bool:
    """Whether an operator makes each element from few others, so that it can be computed where it is read."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target.overloadpacket in MOVERS or torch.Tag.pointwise in node.target.tags


def _fuses(node: fx.Node) -> bool:
    target = node.target
    return _is_elementwise(node) or (isinstance(target, torch._ops.OpOverload) and target.overloadpacket in _REDUCTIONS)
