"""Residuals that span two layers: what the first of the two hands on is not kept, and computed again in backward.

Backward of the second layer reads it, and so runs the first one's forward, from what the layer before both handed on
(checkpoints of segments: Chen et al. 2016, arXiv:1604.06174). If what it met on its way were held until the first
layer's own backward, two layers' values would lie in memory at one time. So that backward computes them once more: the
joint graph gets copies of their operators, which only the layer's backward reads. Copies and originals are ordinary
nodes to whoever plans, walks, slices or cuts the graph.

A layer that runs twice keeps nothing but what every plan keeps. What it kept would be bytes that another layer's
residual could have.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from .joint import Joint, base, is_free, is_pinned, is_statistic, is_value, maker, unpacks

Home = Mapping[fx.Node, tuple[str, int]]

AGAIN = "_again"
"""What a copy's name ends in."""


@dataclass(frozen=True)
class Doubled:
    """A joint graph in which some layers' forward stands twice.

    Attributes:
        joint: the graph, with :attr:`~.joint.Joint.copies`.
        gradients: its outputs that backward returns.
        inner: names of the residuals that are computed again.
        layers: of those that make them.
        home: the layer of each node.
    """

    joint: Joint
    gradients: list[Any]
    inner: tuple[str, ...]
    layers: frozenset[tuple[str, int]]
    home: Home

    def of(self, kept: Collection[str], least: Collection[str]) -> set[fx.Node]:
        """What of the kept values a plan with these spans keeps.

        Args:
            kept: names.
            least: names of what the smallest plan without spans keeps. A layer that runs again wants these: the seeds
                of masks, say, which a plan that keeps all masks does not keep.
        """
        chosen, always, home = {*kept, *least} - set(self.inner), set(least), self.home
        return {
            n for n in self.joint.forward if n.name in chosen and (n.name in always or home.get(n) not in self.layers)
        }


def inner_residuals(
    joint: Joint, home: Home, layers: Sequence[tuple[str, int]], kept: Sequence[fx.Node]
) -> dict[int, list[fx.Node]]:
    """What a layer hands on, by the layers that may run twice: each would make a span together with the next one.

    Not the first layer, which is given what costs nothing, nor a stack's last two, which hand on what the rest of the
    model reads.

    Args:
        home: the layer of each node.
        layers: in the order in which forward runs them.
        kept: what the smallest plan keeps.
    """
    handed: dict[tuple[str, int], list[fx.Node]] = {}
    for node in kept:
        if node in home and not is_statistic(node) and not is_pinned(node, joint):
            handed.setdefault(home[node], []).append(node)
    found = {}
    for i in range(1, len(layers) - 2):
        one_stack = len({container for container, _ in layers[i - 1 : i + 3]}) == 1
        residuals = handed.get(layers[i], [])
        if residuals and one_stack and all(_stays_within(n, joint, home, layers[i : i + 2]) for n in residuals):
            found[i] = residuals
    return found


def every_second(layers: Iterable[int]) -> list[int]:
    """As many of these layers as make spans that do not overlap, the first ones first."""
    chosen: list[int] = []
    for i in layers:
        if not chosen or i > chosen[-1] + 1:
            chosen.append(i)
    return chosen


def _stays_within(node: fx.Node, joint: Joint, home: Home, layers: Collection[tuple[str, int]]) -> bool:
    """Whether forward reads a value, or a view of it, in these layers only."""
    todo, seen = [node], set()
    while todo:
        value = todo.pop()
        for user in value.users:
            if user.op == "output":
                return False
            if _is_backward(user, joint) or user in seen:
                continue
            seen.add(user)
            if home.get(user) not in layers:
                return False
            if is_value(user) and base(user) is base(node):
                todo.append(user)
    return True


def double(
    joint: Joint, gradients: Sequence[Any], inner: Collection[str], home: Home, kept: Collection[str]
) -> Doubled:
    """A copy of a joint graph in which the layers that make the inner residuals stand twice.

    Args:
        gradients: outputs of the graph that backward returns.
        inner: names of the residuals.
        home: the layer of each node.
        kept: names of what the smallest plan keeps.
    """
    graph, there = fx.Graph(), {}
    result = graph.graph_copy(joint.graph, there)
    graph.output(result)
    (old,), (new,) = (g.find_nodes(op="output") for g in (joint.graph, graph))
    new.meta = dict(old.meta)
    moved = Joint(
        graph,
        [there[n] for n in joint.forward],
        frozenset(there[n] for n in joint.needed),
        [],
        frozenset(there[n] for n in joint.mutated),
    )
    homes = {there[n]: layer for n, layer in home.items()}
    copies, early = run_twice(moved, inner, homes, kept)
    forward = [n for n in graph.nodes if n in moved.forward_set or n in copies]
    results = [there.get(g, g) if isinstance(g, fx.Node) else g for g in gradients]
    backward = [n for n in graph.nodes if n not in moved.forward_set and n not in copies and n.op != "output"]
    read = {i for n in backward for i in n.all_input_nodes} | {n for n in results if isinstance(n, fx.Node)}
    # The layer above reads inner residuals, or what it makes of them: either way they are had in backward.
    wanted = [n for n in forward if (n in read or n.name in inner) and is_value(n) and not is_free(n)]
    full = replace(moved, forward=forward, wanted=wanted, copies=copies, early=early)
    named = {n.name: n for n in graph.nodes}
    layers = frozenset(homes[named[n]] for n in inner)
    return Doubled(full, results, tuple(inner), layers, homes | {copy: homes[node] for copy, node in copies.items()})


def run_twice(
    joint: Joint, inner: Collection[str], home: Home, kept: Collection[str]
) -> tuple[dict[fx.Node, fx.Node], frozenset[fx.Node]]:
    """Have backward of the layers that make the inner residuals read copies of what it would share; in place.

    Args:
        inner: names of the residuals.
        home: the layer of each node.
        kept: names of values that are not computed again.

    Returns:
        the copies, each with what it is a copy of; and the nodes that backward runs for inner residuals alone.
    """
    kept = {*kept, *inner}
    copies: dict[fx.Node, fx.Node] = {}
    early: set[fx.Node] = set()
    by_layer: dict[tuple[str, int], list[fx.Node]] = {}
    for node in joint.forward:
        if node.name in inner:
            by_layer.setdefault(home[node], []).append(node)
    order = {n: i for i, n in enumerate(joint.graph.nodes)}
    for layer, residuals in by_layer.items():

        def is_inside(node: fx.Node, layer: tuple[str, int] = layer) -> bool:
            shared = unpacks(node.target) and all(map(is_free, node.all_input_nodes))  # made where it is used anyway
            again = node.op == "call_function" and maker(node) in joint.needed and node.name not in kept
            return again and not shared and home.get(node) == layer

        chain = _upwards(residuals, lambda n, r=residuals: n in r or is_inside(n))
        read = [n for n in order if is_inside(n) and any(_is_backward(u, joint) for u in n.users)]
        own = sorted(_upwards(read, is_inside), key=order.__getitem__)
        twice: dict[fx.Node, fx.Node] = {}
        for node in own:
            if node in chain or any(n in twice for n in node.all_input_nodes):
                assert not is_value(node) or not is_pinned(node, joint), f"{node.name} must not run again"
                with joint.graph.inserting_after(node):
                    twice[node] = copy = joint.graph.node_copy(node, lambda n, twice=twice: twice.get(n, n))
                copy.name = node.name + AGAIN  # the same in whichever graph it is done
                copies[copy] = node
        for node, copy in twice.items():
            for user in [u for u in node.users if u not in copies and _is_backward(u, joint)]:
                user.replace_input_with(node, copy)
        early |= chain
    return copies, frozenset(early)


def _upwards(start: Sequence[fx.Node], goes_on: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Those nodes, and what they are computed from as far as it goes on."""
    found, todo = set(), list(start)
    while todo:
        node = todo.pop()
        if node not in found and goes_on(node):
            found.add(node)
            todo += node.all_input_nodes
    return found


def _is_backward(node: fx.Node, joint: Joint) -> bool:
    """Whether only backward runs a node. A member of what forward runs is no such node, whoever reads it."""
    return node.op != "output" and maker(node) not in joint.needed
