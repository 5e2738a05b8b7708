"""What a recogniser finds, and how a find becomes one operator.

A recogniser only *reads* the graph: it yields a :class:`Match` (these nodes are that operator of these arguments) or
a :class:`Miss` (they nearly are, and this is why not). All mutation happens in :func:`apply`, in one place, behind the
soundness checks, so no pattern has to get them right by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import fx
from torch._ops import OpOverload

from ..kernels.operator import Operator
from .calls import Call, Known, Refused, called, evaluate, insert, nodes_in, substitute
from .gradients import may_want_gradient
from .nodes import Region, is_boundary, is_random, value
from .nodes import is_tensor as is_tensor
from .nodes import module_path as module_path
from .nodes import regions as regions
from .nodes import source_line as source_line
from .soundness import same_layout, same_sizes


@dataclass(frozen=True)
class Match:
    """A subgraph that computes an operator.

    Attributes:
        operator: what replaces the subgraph: an operator of ours, or of ATen.
        args: its arguments in schema order: graph nodes, plain values, and :class:`Call` for what is to be computed.
        outputs: each node whose value the operator returns, with the index of that output.
        interior: every node that the formula consumed, ``outputs`` included. Nodes other than outputs may have no
            user outside (soundness rule 1).
        variant: which spelling of the formula it was, for ``explain``.
        autocast: positions in ``args`` that the original operators would cast to the ambient autocast dtype. They are
            cast to the first output's dtype where they differ from it.
    """

    operator: Operator | OpOverload
    args: tuple[Any, ...]
    outputs: dict[fx.Node, int]
    interior: frozenset[fx.Node]
    variant: str = ""
    autocast: tuple[int, ...] = ()

    @property
    def anchor(self) -> fx.Node:
        return next(iter(self.outputs))

    def reading(self, replaced: Mapping[fx.Node, fx.Node]) -> Match:
        """The same match after nodes that it reads have been replaced."""
        return replace(self, args=tuple(substitute(a, replaced) for a in self.args))


@dataclass(frozen=True)
class Miss:
    """Why a subgraph that looked like an operator is left alone.

    Attributes:
        reason: one clause a user understands ("x is not the same value twice").
        node: the node at which the formula stopped fitting.
        source_line: ``file.py:line`` of the model's source, or None when the graph does not know.
        how_far: how many nodes had matched; the deepest miss at an anchor is the one worth showing.
    """

    reason: str
    node: fx.Node
    source_line: str | None
    how_far: int


class Recogniser(Protocol):
    """Finds one operator family. ``name`` is what ``options={"disable": [...]}`` and ``explain`` call it."""

    name: str

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        """Yield matches and near misses in graph order. Must not change the graph."""
        ...


def apply(
    graph: fx.Graph, match: Match, region: Mapping[fx.Node, Region], known: Known | None = None
) -> dict[fx.Node, fx.Node] | Refused:
    """Replace a match by its operator, or say which soundness rule or guard forbids it.

    Args:
        graph: the graph to change. Dead interior nodes stay behind for dead-code elimination.
        match: what to replace.
        region: from :func:`regions`. What a gradient flows through may not span two of them; a statistic, which has
            none, may be taken in another grad mode.
        known: handed from match to match of one graph, so that no operator is asked the same twice.

    Returns:
        The new node for each of the match's outputs, or the refusal (the graph is then unchanged).
    """
    if reason := _unsound(match, region):
        return Refused(reason)
    if (place := _place(match, region)) is None:
        return Refused("an output is used before every argument of the operator exists")
    new = Call(match.operator, _under_autocast(match))
    with torch.no_grad():
        values = evaluate(new, {} if known is None else known)
    if isinstance(values, Refused):
        return values
    result = values[id(new)]
    results = result if isinstance(result, tuple) else (result,)
    for node, index in match.outputs.items():
        if difference := _changes(node, results[index]):
            return Refused(f"the operator would return {difference}")
    with graph.inserting_before(place):
        call = insert(graph, new, values, match.anchor, place)
        outputs = {
            node: called(graph, operator.getitem, (call, index), {}, results[index], match.anchor)
            if isinstance(result, tuple)
            else call
            for node, index in match.outputs.items()
        }
    for old, replacement in outputs.items():
        # Not in what dies with it: the operator may stand after parts of the formula.
        old.replace_all_uses_with(replacement, delete_user_cb=lambda user: user not in match.interior)
    return outputs


def _unsound(match: Match, region: Mapping[fx.Node, Region]) -> str | None:
    for node in match.interior:
        if node not in match.outputs and (outside := [u for u in node.users if u not in match.interior]):
            return f"its inner value {node.name} is used outside, by {outside[0].name}"
        if is_random(node):
            return f"it contains the random operator {node.name}"
    if name := _unknown_number(match):
        return f"its {name} is not known when compiling: Dynamo made it symbolic (dynamic=True does)"
    graded = _graded(match)
    for node in match.outputs:
        if node not in graded and value(node).is_floating_point() and region[node].grad_enabled:
            return f"{node.name} may want a gradient, which the operator does not have"
    if name := _dropped(match, graded, region):
        return f"{name} may want a gradient, which the operator does not give it"
    stretches = {region[node].stretch for node in match.interior}
    modes = {region[node].grad_enabled for node in _inner(graded, match)}
    if len(stretches) > 1 or len(modes) > 1:
        return "it spans a mutation, a change of grad mode or an autocast boundary"
    return None


def _unknown_number(match: Match) -> str | None:
    """The first real argument whose value is symbolic: calling the operator with it would guard on it."""
    if not isinstance(match.operator, Operator):
        return None
    arguments = zip(match.operator.schema.arguments, match.args, strict=False)
    return next((a.name for a, given in arguments if isinstance(value(given), torch.SymFloat)), None)


def _graded(match: Match) -> list[fx.Node]:
    """The outputs that the operator has a gradient of: all but the statistics.

    An operator that is not differentiable at all raises where a gradient reaches its inputs: nothing is lost silently.
    """
    op = match.operator
    if not isinstance(op, Operator) or not op.differentiable:
        return list(match.outputs)
    return [n for n, i in match.outputs.items() if op.outputs[i] in op.gradients_of]


def _dropped(match: Match, graded: list[fx.Node], region: Mapping[fx.Node, Region]) -> str | None:
    """The first argument that a gradient would reach through the formula and does not through the operator."""
    op = match.operator
    if not isinstance(op, Operator) or not op.differentiable or not any(region[n].grad_enabled for n in graded):
        return None
    given = {*op.differentiable, *op.same_gradient}
    for name, argument in zip(op.inputs, match.args, strict=False):
        if name not in given and any(may_want_gradient(node, region) for node in nodes_in(argument)):
            return name
    return None


def _inner(outputs: list[fx.Node], match: Match) -> set[fx.Node]:
    """The interior nodes that these outputs are computed by, themselves included."""
    found, todo = set(outputs), list(outputs)
    while todo:
        new = match.interior.intersection(todo.pop().all_input_nodes) - found
        found |= new
        todo += new
    return found


def _place(match: Match, region: Mapping[fx.Node, Region]) -> fx.Node | None:
    """The node before which the operator goes: after all its arguments, before the first use of any output.

    Arguments that come later, such as a weight that is dequantised where it is used, are moved up where they can be.
    """
    if (place := _between(match)) is None and (late := _late(match, region)):
        first = min(_graded(match))
        for node in late:
            first.prepend(node)
        place = _between(match)
    return place


def _late(match: Match, region: Mapping[fx.Node, Region]) -> list[fx.Node]:
    """What has to move before the first output for the arguments to exist there, in order; none if it may not."""
    if not (graded := _graded(match)):
        return []
    first = min(graded)
    late, todo = set[fx.Node](), list(nodes_in(match.args))
    while todo:
        node = todo.pop()
        if node < first or node in late:
            continue
        pure = node.op == "call_function" and not is_random(node) and not is_boundary(node)
        if node in match.interior or region[node] != region[first] or not pure:
            return []
        late.add(node)
        todo += node.all_input_nodes
    return sorted(late)


def _between(match: Match) -> fx.Node | None:
    arguments = list(nodes_in(match.args))
    last = max(arguments) if arguments else None
    candidates = [n for n in _graded(match) if last is None or n > last]  # in the grad mode of what has a gradient
    outside = [u for node in match.outputs for u in node.users if u not in match.interior]
    if not candidates:
        return None
    place = min(candidates)
    return place if not outside or place <= min(outside) else None


def _changes(node: fx.Node, new: torch.Tensor) -> str | None:
    old = value(node)
    if old.dtype != new.dtype:
        return f"{new.dtype} instead of {old.dtype}"
    if not same_sizes(old.shape, new.shape):
        return f"shape {tuple(new.shape)} instead of {tuple(old.shape)}"
    is_output = any(user.op == "output" for user in node.users)
    if is_output and not same_layout(old, new):
        return f"a graph output with strides {new.stride()} instead of {old.stride()}"
    return None


def _under_autocast(match: Match) -> tuple[Any, ...]:
    """The arguments, with the casts that the replaced operators would have made under the ambient autocast."""
    target, args = value(match.anchor).dtype, list(match.args)
    for i in match.autocast:
        if isinstance(args[i], fx.Node) and value(args[i]).dtype != target:
            args[i] = Call(torch.ops.aten._to_copy.default, (args[i],), {"dtype": target})
    return tuple(args)
