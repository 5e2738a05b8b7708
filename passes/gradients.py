"""Which inputs does an output depend on, differentiably? Asked of autograd itself.

The ``requires_grad`` flags of retraced values say nothing, and a table of differentiable operators would be one more
thing to get wrong. Running a graph on fake tensors builds the real autograd graph at no cost in memory; walking it
from an output to the leaves gives the exact answer, custom operators included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


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
        todo.extend(next_function for next_function, _ in function.next_functions)
    return frozenset(found)
