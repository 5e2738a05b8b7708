"""The calls that a rewrite puts into a graph: evaluated on fake tensors first, while an operator can still decline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ..kernels.operator import Operator
from .fakes import fake_execution
from .nodes import value


@dataclass(frozen=True)
class Call:
    """An argument that the rewrite has to compute first.

    Attributes:
        target: an operator of ours, or of ATen; ``operator.getitem`` for one of several results.
        args: graph nodes, numbers, lists of them, and further calls.
        kwargs: likewise.
        shared: whether one node serves all matches that ask for the same.
    """

    target: Operator | OpOverload | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    shared: bool = False


@dataclass(frozen=True)
class Refused:
    """Why a match was not applied."""

    reason: str


Known = dict[Any, Any]
"""What :func:`evaluate` has learnt of operators on arguments of a shape; a model's layers share nearly all of it."""


def nodes_in(argument: Any) -> Iterator[fx.Node]:
    """Every graph node in an argument."""
    if isinstance(argument, fx.Node):
        yield argument
    elif isinstance(argument, Call):
        yield from nodes_in((*argument.args, *argument.kwargs.values()))
    elif isinstance(argument, (tuple, list)):
        for part in argument:
            yield from nodes_in(part)


def substitute(argument: Any, replaced: Mapping[fx.Node, fx.Node]) -> Any:
    """The argument after nodes in it have been replaced."""
    return _mapped(argument, lambda node: replaced.get(node, node), lambda call: _rebuilt(call, replaced))


def _rebuilt(call: Call, replaced: Mapping[fx.Node, fx.Node]) -> Call:
    kwargs = {key: substitute(v, replaced) for key, v in call.kwargs.items()}
    return replace(call, args=tuple(substitute(a, replaced) for a in call.args), kwargs=kwargs)


def _mapped(argument: Any, of_node: Callable[[fx.Node], Any], of_call: Callable[[Call], Any]) -> Any:
    if isinstance(argument, fx.Node):
        return of_node(argument)
    if isinstance(argument, Call):
        return of_call(argument)
    if isinstance(argument, (tuple, list)):
        return type(argument)(_mapped(part, of_node, of_call) for part in argument)
    return argument


def evaluate(call: Call, known: Known) -> dict[int, Any] | Refused:
    """The fake result of a call and of every call inside it, by ``id``; or why an operator does not apply."""
    values: dict[int, Any] = {}

    def result(inner: Call) -> Any:
        args = [_mapped(a, value, result) for a in inner.args]
        kwargs = {key: _mapped(a, value, result) for key, a in inner.kwargs.items()}
        if isinstance(inner.target, Operator):
            values[id(inner)] = _answer(inner.target, args, known)
        else:
            values[id(inner)] = inner.target(*args, **kwargs)
        return values[id(inner)]

    try:
        with fake_execution(value(node) for node in nodes_in(call)):
            result(call)
    except _NotSupported as refusal:
        return Refused(str(refusal))
    return values


def _answer(op: Operator, args: list[Any], known: Known) -> Any:
    """An operator's fake result, in tensors of its own; what it says depends on its arguments' metadata alone."""
    first = [next(j for j, other in enumerate(args) if other is a) for a in args]  # which are the same tensor
    key = op, *map(_metadata, args), *first
    if key not in known:
        reason = op.supports(*args)
        known[key] = reason or op.overload(*args)
    answer = known[key]
    if isinstance(answer, str):
        raise _NotSupported(answer)
    if isinstance(answer, tuple):
        return tuple(_empty_like(a) for a in answer)
    return _empty_like(answer)


def _metadata(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        sizes = tuple(map(_metadata, (*argument.shape, *argument.stride(), argument.storage_offset())))
        return sizes, argument.dtype, argument.device, argument.requires_grad
    if isinstance(argument, (list, tuple)):
        return tuple(map(_metadata, argument))
    if isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return argument.node.expr
    return type(argument), argument  # True is not 1


def _empty_like(answer: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(answer.shape, answer.stride(), dtype=answer.dtype, device=answer.device)


class _NotSupported(Exception):
    """An operator's guard said no."""


def insert(graph: fx.Graph, call: Call, values: dict[int, Any], origin: fx.Node, place: fx.Node) -> fx.Node:
    """Emit a call and those inside it before ``place``, which is the graph's insertion point."""

    def inserted(inner: Call) -> fx.Node:
        return insert(graph, inner, values, origin, place)

    args = tuple(_mapped(a, lambda node: node, inserted) for a in call.args)
    kwargs = {key: _mapped(a, lambda node: node, inserted) for key, a in call.kwargs.items()}
    if call.shared and (node := _same_call(_overload(call.target), args, kwargs, place)) is not None:
        return node
    return called(graph, _overload(call.target), args, kwargs, values[id(call)], origin)


def _same_call(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], place: fx.Node
) -> fx.Node | None:
    """A node before ``place`` that is this call."""
    for argument in (a for a in args if isinstance(a, fx.Node)):
        for user in argument.users:
            if user.target is target and user.args == args and user.kwargs == kwargs and user < place:
                return user
    return None


def called(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], val: Any, origin: fx.Node
) -> fx.Node:
    """Emit one call, whose value and place in the model's source are known."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {k: v for k, v in origin.meta.items() if k in ("stack_trace", "nn_module_stack", "seq_nr")}
    node.meta["val"] = val
    return node


def _overload(target: Operator | OpOverload | Callable[..., Any]) -> Callable[..., Any]:
    return target.overload if isinstance(target, Operator) else target
