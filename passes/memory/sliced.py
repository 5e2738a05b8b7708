"""Stretches of a half become one call each, which runs them on a few tokens at a time (kernels/slices.py).

The stretch is taken out as a graph of its own first, so that what is done to halves (norms joined with their sums,
backward of adapted layers in pieces) is done to it as well.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...kernels.operator import launched
from ...kernels.slices import MEMBER, by_slices
from .adapters import fuse_adapter_gradients
from .costs import Sizes
from .joint import is_value, is_view
from .norms import merge_norms
from .rowwise import Count, Kind, Ruled, Rules, Tokens
from .slices import Slicing


class NotSliced(RuntimeError):
    """A stretch that was to be run on a few tokens at a time cannot be, against what was planned."""


def run_in_slices(graph: fx.Graph, stretches: Sequence[Collection[str]], slicing: Slicing, rows: int) -> int:
    """Replace each stretch by one call; in place.

    Args:
        stretches: names of the operators of each.
        slicing: of the joint graph, whose names the half has.
        rows: about how many tokens are to be run at a time.

    Returns:
        how many calls there are.

    Raises:
        NotSliced: where something of a stretch does not treat tokens apart.
    """
    rules, sizes = slicing.rules, slicing.sizes
    made, kinds = 0, {n.name: rules.of(n) for n in rules.kind}
    for names in stretches:
        inside = [n for n in graph.nodes if n.name in names]
        if inside:
            _replace(graph, _Body(inside, rules.tokens, kinds), sizes, rows)
            made += 1
    if made:
        graph.eliminate_dead_code()
        graph.lint()
    return made


class _Body:
    """A stretch as a graph of its own.

    Attributes:
        graph: its inputs are named after the half's values, which are ``given``.
        given: what it reads, by the name of the input.
        outputs: what others read of it.
    """

    def __init__(self, operations: list[fx.Node], tokens: Tokens, kinds: Mapping[str, Kind]) -> None:
        self.tokens, self.kinds = tokens, kinds
        self.inside = {*operations, *(n for op in operations for n in op.users if n.target is operator.getitem)}
        self.graph = fx.Graph()
        self.given: dict[str, fx.Node] = {}
        self.env: dict[fx.Node, fx.Node] = {}
        inner = self._inner_views(operations[0].graph)
        self.outputs = [
            n for n in operations[0].graph.nodes
            if n in self.inside and is_value(n) and any(u not in self.inside and u not in inner for u in n.users)
        ]  # fmt: skip
        for node in operations[0].graph.nodes:
            if node in self.inside:
                self._copy(node)
        self.graph.output(tuple(self.env[n] for n in self.outputs))
        _inputs_first(self.graph)
        merge_norms(self.graph)
        fuse_adapter_gradients(self.graph)
        self.graph.eliminate_dead_code()

    def _inner_views(self, graph: fx.Graph) -> set[fx.Node]:
        """Views of inner values that nothing outside reads."""
        inner: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            shown = _shows(node) and node not in self.inside and base_of(node) in self.inside
            if shown and all(u in self.inside or u in inner for u in node.users):
                inner.add(node)
        return inner

    def _copy(self, node: fx.Node) -> fx.Node:
        if node not in self.env:
            for source in node.all_input_nodes:
                self._source(source)
            self.env[node] = self.graph.node_copy(node, lambda n: self.env[n])
            for member in node.users:  # right behind it, as whoever takes an operator apart expects
                if member.target is operator.getitem and member in self.inside:
                    self._copy(member)
        return self.env[node]

    def _source(self, node: fx.Node) -> None:
        """What an inner operator reads: inner values and their views, and inputs."""
        if node in self.env:
            return
        seen = _shows(node) and (base_of(node) in self.inside or self.kinds.get(node.name) is Kind.COLUMNS)
        if node in self.inside or seen:
            self._copy(node)
            return
        self.env[node] = new = self.graph.placeholder(node.name)
        new.meta = dict(node.meta)
        self.given[new.name] = node


def _inputs_first(graph: fx.Graph) -> None:
    """Let an operator that is rewritten read any of them: what its last neighbour reads, say; in place."""
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for node in graph.find_nodes(op="placeholder"):
        first.prepend(node)


def base_of(node: fx.Node) -> fx.Node:
    """The value that a view shows, ``_unsafe_view`` taken for one."""
    while _shows(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _shows(node: fx.Node) -> bool:
    named = getattr(node.target, "_opname", "") == "_unsafe_view"
    return node.op == "call_function" and (named or is_view(node))


# -- the program -------------------------------------------------------------------------------------------------------


def _replace(graph: fx.Graph, body: _Body, sizes: Sizes, rows: int) -> None:
    given = {name: body.kinds.get(node.name, Kind.WHOLE) for name, node in body.given.items()}
    rules = Rules(body.tokens, {n: Kind.ROWS if k is Kind.ROWS else Kind.WHOLE for n, k in given.items()})
    rules.read(body.graph)
    inputs = [n for n in body.graph.find_nodes(op="placeholder") if is_value(n)]
    with_rows = [n for n in inputs if rules.of(n) is Kind.ROWS]
    whole = [n for n in inputs if rules.of(n) is not Kind.ROWS]
    if not with_rows:
        raise NotSliced("nothing that it reads has tokens")
    program, read = _program(body, rules, sizes, with_rows, whole)
    sources = [[body.given[n.name] for n in part] for part in (with_rows, [whole[i] for i in read])]
    place, behind = _place(graph, body, [n for part in sources for n in part])
    with graph.inserting_after(place):
        call = graph.call_function(by_slices.overload, (sources[0][0], sources[0][1:], sources[1], program, rows))
    call.meta = {"val": [n.meta["val"] for n in body.outputs]}
    last = call
    members = []
    for i in range(len(body.outputs)):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (call, i))
        members.append(last)
    for node in behind:
        last.append(node)
        last = node
    for old, new in zip(body.outputs, members, strict=True):
        new.meta = {"val": old.meta["val"]}
        old.replace_all_uses_with(new)
    names = [n.name for n in body.outputs]
    for node in reversed(list(graph.nodes)):
        if not node.users and (node in body.inside or (_shows(node) and base_of(node) in body.inside)):
            graph.erase_node(node)
    for new, name in zip(members, names, strict=True):
        new.name = name  # as backward, and whoever looks for a saved value, knows it


def _place(graph: fx.Graph, body: _Body, sources: Sequence[fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
    """The node behind which the call may stand, and what has to move behind the call."""
    order = list(graph.nodes)
    at = {n: i for i, n in enumerate(order)}
    first = min(at[n] for n in body.inside)
    place = max([first, *(at[n] for n in sources)])
    late, behind = set(body.outputs), []
    for node in order[first : place + 1]:
        if node not in body.inside and any(n in late for n in node.all_input_nodes):
            late.add(node)
            behind.append(node)
    return order[place], behind


def _program(
    body: _Body, rules: Rules, sizes: Sizes, with_rows: Sequence[fx.Node], whole: Sequence[fx.Node]
) -> tuple[str, list[int]]:
    """The text, and which of the whole inputs it reads."""
    calls = rules.ruled
    for node, ruled in calls.items():
        if not isinstance(ruled, Ruled):
            raise NotSliced(f"{node.name}: {ruled}")
    (output,) = body.graph.find_nodes(op="output")
    results: list[fx.Node] = list(output.args[0])
    nodes = [n for n in body.graph.nodes if n.op == "call_function"]
    arguments = {n: _call(n, calls.get(n)) for n in nodes}
    read_by = {n: [m for m in pytree.tree_leaves(arguments[n][1:]) if isinstance(m, fx.Node)] for n in nodes}
    everything = {m for n in nodes for m in read_by[n]}
    read = [i for i, n in enumerate(whole) if n in everything]
    number = {n: i for i, n in enumerate([*with_rows, *(whole[i] for i in read), *nodes])}
    once = [n for n in nodes if all(_is_whole(m, rules) for m in (n, *read_by[n]))]
    each = [n for n in nodes if n not in once]
    if any(n in once for n in results):
        raise NotSliced("it makes something that has no tokens")
    return json.dumps(
        {
            "rows": [n.meta["val"].dim() - rules.lead(n) for n in with_rows],
            "whole": len(read),
            "once": _calls(once, arguments, read_by, number, {m for n in each for m in read_by[n]}),
            "each": _calls(each, arguments, read_by, number, {*results}),
            "results": [_result(n, number[n], rules, with_rows) for n in results],
            "flops": sum(sizes.flops(n) for n in each) / max(1, sizes.number(body.tokens.total)),
        },
        separators=(",", ":"),
    ), read


def _is_whole(node: fx.Node, rules: Rules) -> bool:
    kind = rules.kind[node]
    return all(k is Kind.WHOLE for k in (kind if isinstance(kind, tuple) else (kind,)))


def _call(node: fx.Node, ruled: Any) -> tuple[str, Any, Any]:
    if node.target is operator.getitem:
        return MEMBER, node.args, {}
    target = launched(ruled.target)
    return f"{target.namespace}::{target._opname}.{target._overloadname}", ruled.args, ruled.kwargs


def _calls(
    nodes: Sequence[fx.Node], arguments: Mapping[fx.Node, Any], read_by: Mapping[fx.Node, Sequence[fx.Node]],
    number: Mapping[fx.Node, int], kept: Collection[fx.Node],
) -> list[dict[str, Any]]:  # fmt: skip
    last: dict[fx.Node, fx.Node] = {m: n for n in nodes for m in (*read_by[n], n)}
    ends: dict[fx.Node, list[int]] = {}
    for value, node in last.items():
        if value not in kept:
            ends.setdefault(node, []).append(number[value])
    return [
        {
            "call": arguments[n][0],
            "args": [_told(a, number) for a in arguments[n][1]],
            "kwargs": {k: _told(v, number) for k, v in arguments[n][2].items()},
            "makes": number[n],
            "last": ends.get(n, []),
        }
        for n in nodes
    ]


def _told(argument: Any, number: Mapping[fx.Node, int]) -> Any:
    if isinstance(argument, fx.Node):
        return {"value": number[argument]}
    if isinstance(argument, (list, tuple)):
        return [_told(a, number) for a in argument]
    if isinstance(argument, torch.dtype):
        return {"dtype": str(argument).removeprefix("torch.")}
    if isinstance(argument, torch.device):
        return {"device": str(argument)}
    if argument is Count.TOKENS:
        return {"tokens": 0}
    if argument is None or isinstance(argument, (bool, int, float, str)):
        return argument
    raise NotSliced(f"{argument!r} cannot be written down")


def _result(node: fx.Node, number: int, rules: Rules, with_rows: Sequence[fx.Node]) -> dict[str, Any]:
    value: Tensor = node.meta["val"]
    told = {"value": number, "dtype": str(value.dtype).removeprefix("torch.")}
    if rules.of(node) is Kind.SUM and all(isinstance(s, int) for s in value.shape):
        return {**told, "shape": list(value.shape)}
    features = rules.tokens.features(value.shape)
    like = [i for i, n in enumerate(with_rows) if rules.lead(n) == rules.lead(node)]
    if rules.of(node) is not Kind.ROWS or features is None or not (like or rules.lead(node) == 1):
        raise NotSliced(f"{node.name} has no tokens, or in no arrangement that is known")
    return {**told, "features": list(features), "like": like[0] if like else None}
