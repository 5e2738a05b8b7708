"""Which of a graph's outputs does a value reach? Operators with several results tie those results' outputs together."""

from __future__ import annotations

from torch import fx


def outputs_reached(graph: fx.Graph) -> dict[fx.Node, int]:
    """For every node the graph outputs that are computed from it, one bit each.

    An operator gives each of its results a gradient path to each of its inputs. Where two results reach different
    outputs, making them by one operator would let an output depend on what it did not depend on: harmless numbers (the
    gradient is zero), but a parameter that had no gradient would get one, so the runner refuses it.
    """
    reached = dict.fromkeys(graph.nodes, 0)
    (end,) = (node for node in graph.nodes if node.op == "output")
    results = end.args[0] if isinstance(end.args[0], (tuple, list)) else (end.args[0],)
    for bit, result in enumerate(results):
        if isinstance(result, fx.Node):
            reached[result] |= 1 << bit
    for node in reversed(graph.nodes):
        if node.op != "output":
            for source in node.all_input_nodes:
                reached[source] |= reached[node]
    return reached
