"""Finds a formula everywhere in a graph: outermost first, no node twice, near misses reported once."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .pattern import Attempt, Found, Pattern, any_of, is_cast
from .rewrite import Miss, Region, regions, source_line


def search(
    graph: fx.Graph,
    patterns: Mapping[str, Pattern],
    *,
    heart: frozenset[Any],
    close: int,
    near: Mapping[str, Pattern] | None = None,
) -> Iterator[tuple[fx.Node, Found] | Miss]:
    """Match all patterns over a graph: the outermost nodes first, no node twice.

    Args:
        graph: it is only read.
        patterns: by variant; earlier ones are preferred.
        heart: the targets without which the formula is not even close (``rsqrt`` of a norm). A node of that kind that
            ended up in no match is reported once, with the dead end that came furthest.
        close: how many nodes a dead end must have consumed to be worth reporting.
        near: well-known relatives that are *not* the formula, by the reason to report.

    Yields:
        Anchors with their assignment, and near misses, in graph order. Conversions and views of captured values that
        others use as well are left out of ``interior``: the operator reads the captured value, and they stay.
    """
    order, region = {node: i for i, node in enumerate(graph.nodes)}, regions(graph)
    roots = any_of((*patterns.values(), *(near or {}).values()))
    taken: set[fx.Node] = set()
    matches: list[tuple[fx.Node, Found]] = []
    misses: dict[fx.Node, Miss] = {}
    for node in reversed(graph.nodes):
        if node in taken or node.op != "call_function" or (roots is not None and node.target not in roots):
            continue
        attempt = Attempt(node)
        if found := attempt.first(patterns):
            taken |= found.interior
            matches.append((node, replace(found, interior=_consumed(node, found, order, region))))
            continue
        dead_ends = [(attempt.consumed, attempt.miss())] if len(attempt.consumed) >= close else []
        if near and (found := Attempt(node).first(near)):
            dead_ends.append((found.interior, Miss(found.variant, node, source_line(node), len(found.interior))))
        for consumed, miss in dead_ends:
            for key in (n for n in consumed if n.target in heart):
                if key not in misses or miss.how_far > misses[key].how_far:
                    misses[key] = miss
    missed = {id(miss): miss for key, miss in misses.items() if key not in taken}
    yield from sorted([*matches, *missed.values()], key=lambda r: order[r.node if isinstance(r, Miss) else r[0]])


def _consumed(
    anchor: fx.Node, found: Found, order: Mapping[fx.Node, int], region: Mapping[fx.Node, Region]
) -> frozenset[fx.Node]:
    known = {v for v in found.captures.values() if isinstance(v, fx.Node) and v not in found.interior}
    free = []
    for node in sorted(found.interior - {anchor}, key=order.__getitem__):
        read = node.args[:1] if is_cast(node) else node.all_input_nodes  # type_as reads its second tensor's type alone
        if (is_cast(node) or _is_view(node)) and known.issuperset(read):
            known.add(node)
            free.append(node)
    interior = set(found.interior)
    for node in reversed(free):
        if region[node] == region[anchor] and not interior.issuperset(node.users):
            interior.remove(node)
    return frozenset(interior)


def _is_view(node: fx.Node) -> bool:
    """Whether a node only looks at its input's memory."""
    if node.target is operator.getitem:
        return _is_view(node.args[0]) if isinstance(node.args[0], fx.Node) else False
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
