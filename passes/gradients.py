"""Which inputs does an output depend on, differentiably? Asked of autograd itself.

The ``requires_grad`` flags of retraced values say nothing, and a table of differentiable operators would be one more
thing to get wrong. Running a graph on fake tensors builds the real autograd graph at no cost in memory; walking it
from an output to the leaves gives the exact answer, custom operators included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from .nodes import Region, value


def reachable_inputs(outputs: Iterable[Any], inputs: Sequence[Any]) -> list[frozenset[int]]:
    """For each output the indices of the inputs that backward from it would reach.

    Args:
        outputs: values computed from ``inputs`` with gradients enabled; anything but tensors reaches nothing.
        inputs: the tensors (usually fake parameters and activations) to look for.
    """
    leaves = {id(value): i for i, value in enumerate(inputs) if isinstance(value, Tensor)}
    made_by = {value.grad_fn: i for i, value in enumerate(inputs) if isinstance(value, Tensor) and value.grad_fn}
    return [_reach(output, leaves, made_by) for output in outputs]


def _reach(output: Any, leaves: dict[int, int], made_by: dict[Any, int]) -> frozenset[int]:
    if not isinstance(output, Tensor) or not output.requires_grad:
        return frozenset()
    if id(output) in leaves:
        return frozenset({leaves[id(output)]})
    found: set[int] = set()
    seen: set[Any] = set()
    todo = [output.grad_fn]
    while todo:
        function = todo.pop()
        if function is None or function in seen or function.name().endswith("::NotImplemented"):
            continue  # the last raises in backward
        seen.add(function)
        if function in made_by:  # an input that is itself the result of a computation outside the graph
            found.add(made_by[function])
            continue
        variable = getattr(function, "variable", None)
        if variable is not None and id(variable) in leaves:
            found.add(leaves[id(variable)])
        todo.extend(_led_to(function))
    return frozenset(found)


def _led_to(function: Any) -> list[Any]:
    """The functions that a function hands a gradient to.

    A Python function's record has an edge to each tensor that it was given, and says nothing of those for which its
    backward returns None. Our operators say it themselves (``kernels/registration.py``): walked along every edge, an
    operator without a gradient of cos would seem to have one.
    """
    edges = [next_function for next_function, _ in function.next_functions]
    leads_to = getattr(function, "leads_to", None)
    if leads_to is None:
        return edges
    return [edge for edge, given in zip(edges, leads_to, strict=True) if given]


def may_want_gradient(node: fx.Node, region: Mapping[fx.Node, Region]) -> bool:
    """Whether a value in a graph may depend differentiably on an input that wants a gradient.

    Read off the graph before it is changed, so with a doubt it is yes: an operator without a derivative of its own
    counts as having one, except for those that take a tensor only for its shape.

    Args:
        region: from :func:`~unsloth.passes.nodes.regions`. What is computed without gradients wants none.
    """
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        node = todo.pop()
        if node in seen or _is_constant(value(node)):
            continue
        seen.add(node)
        if node.op == "placeholder":
            given = node.meta.get("example_value")
            if isinstance(given, Tensor) and given.requires_grad:
                return True
        elif (node not in region or region[node].grad_enabled) and not _cuts(node):
            todo += node.all_input_nodes
    return False


def _is_constant(result: Any) -> bool:
    """Whether a value is of a type that has no gradient; of several results it is not asked."""
    return isinstance(result, Tensor) and not (result.is_floating_point() or result.is_complex())


def _cuts(node: fx.Node) -> bool:
    name = getattr(node.target, "_opname", "")
    return name == "detach" or name.endswith("_like") or name.startswith("new_")
