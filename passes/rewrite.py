"""What a recogniser finds, and how a find becomes one operator.

A recogniser only *reads* the graph: it yields a :class:`Match` (these nodes are that operator of these arguments) or
a :class:`Miss` (they nearly are, and this is why not). All mutation happens in :func:`apply`, in one place, behind the
soundness checks, so no pattern has to get them right by itself.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from ..kernels.operator import Operator
from .fakes import fake_execution


@dataclass(frozen=True)
class Match:
    """A subgraph that computes an operator.

    Attributes:
        operator: the operator that replaces the subgraph.
        args: its arguments in schema order: graph nodes and plain numbers, booleans, strings.
        outputs: each node whose value the operator returns, with the index of that output.
        interior: every node that the formula consumed, ``outputs`` included. Nodes other than outputs may have no
            user outside (soundness rule 1).
        variant: which spelling of the formula it was, for ``explain``.
        autocast: positions in ``args`` that the original operators would cast to the ambient autocast dtype. They are
            cast to the first output's dtype where they differ from it.
    """

    operator: Operator
    args: tuple[Any, ...]
    outputs: dict[fx.Node, int]
    interior: frozenset[fx.Node]
    variant: str = ""
    autocast: tuple[int, ...] = ()

    @property
    def anchor(self) -> fx.Node:
        return next(iter(self.outputs))


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


@dataclass(frozen=True)
class Refused:
    """Why a match was not applied."""

    reason: str


def apply(graph: fx.Graph, match: Match, region: dict[fx.Node, int]) -> dict[fx.Node, fx.Node] | Refused:
    """Replace a match by its operator, or say which soundness rule or guard forbids it.

    Args:
        graph: the graph to change. Dead interior nodes stay behind for dead-code elimination.
        match: what to replace.
        region: from :func:`regions`; no match may span two of them.

    Returns:
        The new node for each of the match's outputs, or the refusal (the graph is then unchanged).
    """
    if reason := _unsound(match, region):
        return Refused(reason)
    order = {node: i for i, node in enumerate(graph.nodes)}
    if (place := _place(match, order)) is None:
        return Refused("an output is used before every argument of the operator exists")
    target = value(match.anchor).dtype
    casts = {i for i in match.autocast if value(match.args[i]).dtype != target}
    values = [value(a).to(target) if i in casts else value(a) for i, a in enumerate(match.args)]
    if reason := match.operator.supports(*values):
        return Refused(reason)
    with fake_execution(values), torch.no_grad():
        result = match.operator.overload(*values)
    results = result if isinstance(result, tuple) else (result,)
    for node, index in match.outputs.items():
        if difference := _changes(node, results[index]):
            return Refused(f"the operator would return {difference}")
    return _emit(graph, match, place, casts, target, result)


def _unsound(match: Match, region: dict[fx.Node, int]) -> str | None:
    for node in match.interior:
        if node not in match.outputs and (outside := [u for u in node.users if u not in match.interior]):
            return f"its inner value {node.name} is used outside, by {outside[0].name}"
        if is_random(node):
            return f"it contains the random operator {node.name}"
    if len({region[node] for node in match.interior}) > 1:
        return "it spans a mutation, a change of grad mode or an autocast boundary"
    return None


def _place(match: Match, order: dict[fx.Node, int]) -> fx.Node | None:
    """The node before which the operator goes: after all its arguments, before the first use of any output."""
    last = max((order[a] for a in match.args if isinstance(a, fx.Node)), default=-1)
    outside = [order[u] for node in match.outputs for u in node.users if u not in match.interior]
    candidates = [node for node in match.outputs if order[node] > last]
    if not candidates or (outside and min(outside) <= last):
        return None
    place = min(candidates, key=order.__getitem__)
    return place if not outside or order[place] <= min(outside) else None


def _changes(node: fx.Node, new: torch.Tensor) -> str | None:
    old = value(node)
    if old.dtype != new.dtype:
        return f"{new.dtype} instead of {old.dtype}"
    if old.dim() != new.dim() or not statically_known_true(sym_eq(tuple(old.shape), tuple(new.shape))):
        return f"shape {tuple(new.shape)} instead of {tuple(old.shape)}"
    is_output = any(user.op == "output" for user in node.users)
    if is_output and not statically_known_true(sym_eq(tuple(old.stride()), tuple(new.stride()))):
        return f"a graph output with strides {new.stride()} instead of {old.stride()}"
    return None


def _emit(
    graph: fx.Graph, match: Match, place: fx.Node, casts: set[int], target: torch.dtype, result: Any
) -> dict[fx.Node, fx.Node]:
    def insert(function: Any, args: tuple[Any, ...], val: Any, kwargs: dict[str, Any] | None = None) -> fx.Node:
        node = graph.call_function(function, args, kwargs or {})
        node.meta = {k: v for k, v in match.anchor.meta.items() if k in ("stack_trace", "nn_module_stack", "seq_nr")}
        node.meta["val"] = val
        return node

    with graph.inserting_before(place):
        args = list(match.args)
        for i in sorted(casts):
            cast = value(args[i]).to(target)
            args[i] = insert(torch.ops.aten._to_copy.default, (args[i],), cast, {"dtype": target})
        call = insert(match.operator.overload, tuple(args), result)
        new = {
            node: insert(operator.getitem, (call, index), result[index]) if isinstance(result, tuple) else call
            for node, index in match.outputs.items()
        }
    for old, replacement in new.items():
        old.replace_all_uses_with(replacement)
    return new


def regions(graph: fx.Graph) -> dict[fx.Node, int]:
    """Numbers the stretches of a graph between mutations, changes of grad mode and autocast boundaries."""
    numbers: dict[fx.Node, int] = {}
    number = 0
    for node in graph.nodes:
        number += is_boundary(node)
        numbers[node] = number
        number += is_boundary(node)
    return numbers


def is_boundary(node: fx.Node) -> bool:
    """Whether values before and after a node may not be combined into one operator."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _BOUNDARIES


_BOUNDARIES = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode"}


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers. Attention is tagged as if it did, but without dropout it does not."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
            return bool(given != 0.0)
    return True


def source_line(node: fx.Node) -> str | None:
    """The innermost line of the *model's* source that made a node, as ``modeling_foo.py:88``."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    outside_torch = [f for f in frames if "/torch/" not in f[0]] or frames
    if not outside_torch:
        return None
    path, line = outside_torch[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line}"


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that made a node (``model.layers.3.mlp``), or ``""``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path)
    path = path.replace(".__dict__._modules", "")
    return re.sub(r"^L\.self\.?|^self\.?|^L__self___?", "", path)


def value(node: Any) -> Any:
    """The fake tensor (or number) a node stands for; plain numbers stand for themselves."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)
