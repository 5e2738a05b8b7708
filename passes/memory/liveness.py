"""How much memory a step holds at every operator, from a joint graph and what of it is kept: nothing is run.

The walk follows the two graphs as they will be cut: forward in its order, backward in its own with each value that it
computes again made right before its first use. Tensors are freed after their last use, as Inductor's code does. What
Inductor fuses is modelled as far as it matters here: a value between elementwise operators never lies in memory, and an
elementwise operator overwrites an input of its result's size that nobody reads any more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .costs import LIBRARY_WORKSPACE, Sizes
from .joint import MOVERS, Joint, base, is_free, is_value, is_view, maker, unpacks
from .transfers import Arrivals, Copy, Departures, arrive, depart

MOMENTS = 2
"""Tensors per trained one that the optimiser holds: AdamW's two moments, in the parameter's dtype."""

aten = torch.ops.aten
_REDUCTIONS = {aten.sum, aten.mean, aten.amax, aten.amin, aten.var_mean, aten._softmax, aten._log_softmax, aten.any}


@dataclass(frozen=True)
class Standing:
    """What lies on the device all through the step, in bytes.

    Attributes:
        weights: of the model, those that are trained left out; the batch and the buffers are among them.
        trained: weights that are trained (all, or the adapters).
        optimiser: its state.
        library: workspace that libraries hold.
    """

    weights: int
    trained: int
    optimiser: int
    library: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.optimiser + self.library


@dataclass(frozen=True)
class Timeline:
    """Bytes alive while each operator runs, beside what stands there all the time.

    Attributes:
        standing: what is there all the time.
        names: the operators, forward's and then backward's.
        turn: how many of them are forward's.
        kept, gradients, working: per operator, bytes of values kept for backward, of finished gradients, and of all
            else: what operators read and write, and their workspace.
    """

    standing: Standing
    names: Sequence[str]
    turn: int
    kept: Sequence[int]
    gradients: Sequence[int]
    working: Sequence[int]

    @property
    def peak(self) -> int:
        """Bytes at the worst moment, everything counted."""
        moments = zip(self.kept, self.gradients, self.working, strict=True)
        return self.standing.total + max(map(sum, moments), default=0)

    @property
    def worst(self) -> int:
        """The index of the worst moment."""
        moments = list(map(sum, zip(self.kept, self.gradients, self.working, strict=True)))
        return moments.index(max(moments)) if moments else 0

    @property
    def parts(self) -> dict[str, int]:
        """The peak by category."""
        there, i = self.standing, self.worst
        moment = (self.kept[i], self.gradients[i], self.working[i]) if self.names else (0, 0, 0)
        return {
            "weights": there.weights,
            "adapters" if there.trained < there.weights else "trained weights": there.trained,
            "optimiser": there.optimiser,
            "gradients": moment[1],
            "kept for backward": moment[0],
            "working": moment[2] + there.library,
        }


@dataclass
class _Walk:
    names: list[str] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    working: list[int] = field(default_factory=list)
    operations: list[fx.Node] = field(default_factory=list)
    flying: list[tuple[fx.Node, ...]] = field(default_factory=list)
    """By operator the values that are on the device only because their copy is under way."""


class Liveness:
    """Timelines of a joint graph.

    Args:
        joint: the graph.
        gradients: its outputs that backward returns, one per input or None.
        sizes: what a value measures.
        fused: whether elementwise operators are fused, as Inductor does; else each writes its result.
        moments: see :data:`MOMENTS`.
        home: the layer of each value, of which one sends at most all that it sends at one time.
    """

    def __init__(
        self,
        joint: Joint,
        gradients: Sequence[Any],
        sizes: Sizes,
        *,
        fused: bool = True,
        moments: float = MOMENTS,
        home: Mapping[fx.Node, Any] | None = None,
    ) -> None:
        self.joint, self.sizes, self.fused, self.moments = joint, sizes, fused, moments
        self.home = home or {}
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

    def timeline(self, kept: Iterable[fx.Node], away: Iterable[fx.Node] = ()) -> Timeline:
        """The timeline of a step that keeps those values, some of them away in host memory until they are read.

        When they leave and come back is what :mod:`.transfers` says; ``last_waited`` are the seconds that it takes.
        """
        kept, away = {root(n) for n in kept}, {root(n) for n in away}
        walk = _Walk()
        forward, backward = self._forward_order(kept), self._backward_order(kept)
        place = {n: i for i, op in enumerate(forward) for n in self.writes[op] if n in away}
        leaving = sorted(place, key=place.__getitem__)
        gone = depart(self._seconds(forward), [self._copy(n, place[n]) for n in leaving], self.sizes.device.link)
        self._walk(walk, forward, set(), (kept - away) | self.results, kept, leaving=(leaving, gone))
        turn = len(walk.names)
        tangents = {n for n in self.size if n.op == "placeholder" and n not in self.joint.forward_set}
        first = self._first_reads(backward, away)
        back = arrive(self._seconds(backward), [self._copy(n, i) for n, i in first.items()], self.sizes.device.link)
        self._walk(walk, backward, (kept - away) | tangents, self.gradients, kept, coming=([*first], back))
        self.last_walk, self.last_turn, self.last_waited = walk, turn, gone.waited + back.waited
        return Timeline(self.standing, walk.names, turn, walk.kept, walk.gradients, walk.working)

    def _copy(self, value: fx.Node, place: int) -> Copy:
        return Copy(self.size[value], place, self.home.get(value))

    def _seconds(self, order: list[fx.Node]) -> list[float]:
        return [busy(op, self.sizes) for op in order]

    def _first_reads(self, order: list[fx.Node], away: Collection[fx.Node]) -> dict[fx.Node, int]:
        """Where each value that is away is read first, in that order."""
        first: dict[fx.Node, int] = {}
        for i, op in enumerate(order):
            for s in self.reads[op]:
                if s in away:
                    first.setdefault(s, i)
        return first

    def again(self) -> list[fx.Node]:
        """The operators of forward that backward ran again in the last timeline."""
        turn = self.last_turn
        return [n for n in self.last_walk.operations[turn:] if n in self.joint.needed]

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
        *,
        leaving: tuple[Sequence[fx.Node], Departures] = ((), Departures([], 0.0)),
        coming: tuple[Sequence[fx.Node], Arrivals] = ((), Arrivals([], 0.0)),
    ) -> None:
        unpacked = {op for op in order if unpacks(op.target) and all(map(is_free, op.all_input_nodes))}
        sources = self._sources([op for op in order if op not in unpacked], held | {*leaving[0], *coming[0]})
        last = {s: i for i, op in enumerate(order) if op in sources for s in sources[op]}
        first = {s: i for i, op in reversed([*enumerate(order)]) if op in sources for s in sources[op]}
        read_last, leave, sent = dict(last), defaultdict(list), set()
        for s, until in zip(leaving[0], leaving[1].until, strict=True):
            if until - 1 > last.get(s, -1):  # its copy is under way
                last[s] = until - 1
                leave[until - 1].append(s)
                sent.add(s)
        back = defaultdict(list)
        for s, i in zip(coming[0], coming[1].start, strict=True):
            back[i].append(s)
        live = sum(self.size[n] for n in alive)
        counted = {n for n in alive if n in kept}  # what leaves for the host is at work until it has left
        kept_bytes = sum(self.size[n] for n in counted)
        finished = 0
        alive = set(alive)
        flying: set[fx.Node] = set()
        for i, operation in enumerate(order):
            for s in back.get(i, ()):
                alive.add(s)
                counted.add(s)
                flying.add(s)
                live += self.size[s]
                kept_bytes += self.size[s]
            if operation in unpacked or (operation not in sources):
                continue
            read = [s for s in sources[operation] if not is_free(s) or s in alive]
            weights = sum(self.size[s] for s in read if maker(s) in unpacked)
            dying = [s for s in read if last[s] == i and s in alive and s not in held]
            gone = [s for s in leave.get(i, ()) if s in alive and s not in read]
            new = [n for n in self.writes[operation] if n not in alive]
            made = self.made[operation]
            grown = live + made - self._overwrites(operation, made, dying) + weights + self.sizes.workspace(operation)
            flying -= {s for s in flying if first.get(s, -1) == i}
            walk.names.append(operation.name)
            walk.operations.append(operation)
            walk.kept.append(kept_bytes)
            walk.gradients.append(finished)
            walk.working.append(grown - kept_bytes - finished)
            walk.flying.append(tuple(flying))
            wanted = [n for n in new if n in last or n in held]  # outputs that nobody wants go at once
            live += sum(self.size[n] for n in wanted)
            alive.update(wanted)
            saved = [n for n in wanted if n in kept and n in held]
            counted.update(saved)
            kept_bytes += sum(self.size[n] for n in saved)
            finished += sum(self.size[n] for n in wanted if n in self.gradients and n in held)
            flying.update(s for s in (*new, *read) if s in sent and read_last.get(s, i) <= i)
            for s in (*dying, *gone):
                alive.discard(s)
                flying.discard(s)
                live -= self.size[s]
                if s in counted:
                    kept_bytes -= self.size[s]

    def _overwrites(self, operation: fx.Node, made: int, dying: list[fx.Node]) -> int:
        if self.fused and _fuses(operation) and any(self.size[s] == made for s in dying):
            return made
        return 0

    def _sources(self, order: list[fx.Node], held: set[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """What each operator reads from memory, fused operators' inputs followed to where they lie; those left out."""
        if not self.fused:
            return {op: self.reads[op] for op in order}
        readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for op in order:
            for s in self.reads[op]:
                readers[s].append(op)
        virtual: dict[fx.Node, tuple[fx.Node, ...]] = {}
        found: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for op in order:
            read = tuple(dict.fromkeys(t for s in self.reads[op] for t in virtual.get(s, (s,))))
            results = self.writes[op]
            passed = _is_elementwise(op) and not any(n in held for n in results)
            if passed and all(readers[n] and all(map(_fuses, readers[n])) for n in results):
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


def busy(node: fx.Node, sizes: Sizes) -> float:
    """Seconds that an operator keeps the device busy; those are none that Inductor fuses, or that unpack a weight for
    the operator that reads it (whose seconds they are among)."""
    if node.op != "call_function" or _shows(node) or _is_elementwise(node) or unpacks(node.target):
        return 0.0
    return sizes.seconds(node) if maker(node) is node else 0.0


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
