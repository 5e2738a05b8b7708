"""Mutations that functionalisation above autograd does not get right by itself.

In bodies of custom autograd functions nobody functionalises before AOTAutograd does. Eliminating dead code from a graph
goes on in the bodies that it holds, and fx takes a call of ``x.scatter_add_(…)`` whose result nobody reads for dead: a
gradient that a backward formula builds up in place would silently miss a part.

What changes ``parameter.data`` is to leave the parameter's gradient as it is. As a function it would be one more step
between the parameter and its use, without a gradient. What changes ``x.detach()`` gives that a gradient, which is
computed from a changed ``x`` afterwards, and would be detached again.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import has_side_effect

from ..passes.runner import copy_graph

_OPERATORS = {"setitem", "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow"}
_OPERATORS |= {"irshift", "isub", "itruediv", "ixor"}
_DATA = torch._C._autograd._get_data_attr  # pyright: ignore[reportAttributeAccessIssue]


@has_side_effect
def mutate(target: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    """The call itself, of a method or an operator, under a name that fx knows to keep."""
    if target in _OPERATORS:
        return getattr(operator, target)(value, *args, **kwargs)
    return getattr(value, target)(*args, **kwargs)


def keep_mutations(body: fx.GraphModule) -> fx.GraphModule:
    """The body with such mutating calls under another name as an elimination of dead code would take away.

    Calls whose result leads to an output stay as they are, and with them the formulas that passes know.
    """
    body = copy_graph(body)
    live = set(body.graph.find_nodes(op="output"))
    for node in reversed(body.graph.nodes):
        if node in live or not live.isdisjoint(node.users):
            live.add(node)
        elif (name := mutation(node)) is not None:
            node.args = (name, *node.args)
            node.op, node.target = "call_function", mutate
            live.add(node)
    body.recompile()
    return body


def behind_autograd(node: fx.Node) -> fx.Node | None:
    """The trained input that a node of Dynamo's graph changes through its ``data``, unseen by autograd."""
    data = node.args[0] if node.args and mutation(node) is not None else None
    if not isinstance(data, fx.Node) or data.target is not _DATA:
        return None
    (owner,) = data.all_input_nodes
    trained = owner.op == "placeholder" and owner.meta["example_value"].requires_grad
    return owner if trained else None


def detached(node: fx.Node) -> fx.Node | None:
    """What a node of Dynamo's graph changes in place, where that is a ``detach()`` of something, or a view of one.

    In eager it has what changed it in its gradient; functionalised it is detached from the changed whole once more.
    """
    changed = node.args[0] if node.args and mutation(node) is not None else None
    if not isinstance(changed, fx.Node) or not any(_is_trained(n) for n in node.all_input_nodes if n is not changed):
        return None
    part: Any = changed
    while isinstance(part, fx.Node) and part.op in ("call_function", "call_method"):
        if getattr(part.target, "__name__", part.target) == "detach":
            return changed
        part = part.args[0] if part.args and _share_memory(part, part.args[0]) else None
    return None


def _is_trained(node: fx.Node) -> bool:
    return getattr(node.meta.get("example_value"), "requires_grad", False)


def _share_memory(node: fx.Node, other: Any) -> bool:
    values = [n.meta.get("example_value") if isinstance(n, fx.Node) else None for n in (node, other)]
    a, b = (v.untyped_storage()._cdata if isinstance(v, torch.Tensor) else None for v in values)
    return a is not None and a == b


def out_of_place(name: str) -> Any:
    """The function of a name that :func:`mutation` gives, which changes nothing; None where there is none."""
    found = getattr(operator, name[1:], None) if name in _OPERATORS else getattr(torch.Tensor, name[:-1], None)
    return found if callable(found) else None


def mutation(node: fx.Node) -> str | None:
    """The name of the method or operator that changes its first argument, if that is what the node calls."""
    if node.op not in ("call_function", "call_method") or isinstance(node.target, OpOverload):
        return None  # fx knows what a schema says to mutate
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target is getattr(operator, name, None) and name in _OPERATORS:
        return name
    in_place = name.endswith("_") and not name.endswith("__") and hasattr(torch.Tensor, name)
    return name if in_place else None
