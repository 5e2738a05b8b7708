"""A traced body put into a graph, in place of the call that it was traced from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree


def splice(graph: fx.Graph, body: fx.GraphModule, arguments: Sequence[Any]) -> Any:
    """Copy the body's nodes, with their metadata, to where the graph inserts; returns what the body returns.

    Args:
        arguments: what stands for the body's placeholders, in order: nodes of the graph, or numbers.
    """
    remaining = iter(arguments)
    copies: dict[fx.Node, Any] = {}
    for node in body.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(remaining)
        elif node.op == "output":
            return pytree.tree_map_only(fx.Node, copies.__getitem__, node.args[0])
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    raise AssertionError("a graph without an output")
