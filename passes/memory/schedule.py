"""Where in a graph a value is made, once it is decided what is kept.

A packed weight (NF4, say) is unpacked for one product and takes several times its packed bytes. Where a plan runs the
same product twice, forward's again and then backward's, one unpacked weight would be alive from the one to the other,
and so would those of a whole layer. Unpacking again costs one more pass over the weight, so only one is ever alive.
"""

from __future__ import annotations

from torch import fx

from .joint import base, is_free, is_view, unpacks


def unpack_where_used(graph: fx.Graph) -> int:
    """Make every unpacked weight right before it is used, again if another one was made since; in place.

    Returns:
        how many were made again.
    """
    unpacked = {node for node in graph.nodes if unpacks(node.target) and all(map(is_free, node.all_input_nodes))}
    latest: tuple[fx.Node, fx.Node] | None = None  # a weight, and the node that holds it now
    again = 0
    for node in list(graph.nodes):
        if node in unpacked:
            latest = node, node
            continue
        if is_view(node) or node.op == "output":  # a returned weight is alive to the end anyway
            continue
        for source in node.all_input_nodes:
            weight = base(source)
            if weight not in unpacked:
                continue
            if latest is None or latest[0] is not weight:
                with graph.inserting_before(node):
                    latest = weight, graph.node_copy(weight, lambda n: n)
                again += 1
            if latest[1] is not weight:
                with graph.inserting_before(node):
                    node.replace_input_with(source, _view_of(graph, source, weight, latest[1]))
    if again:
        graph.eliminate_dead_code()
    return again


def _view_of(graph: fx.Graph, source: fx.Node, old: fx.Node, new: fx.Node) -> fx.Node:
    """The view ``source`` of ``old``, taken of ``new`` instead."""
    if source is old:
        return new
    inner = source.args[0]
    assert isinstance(inner, fx.Node)
    replacement = _view_of(graph, inner, old, new)  # first, so that it stands before its view
    return graph.node_copy(source, lambda n: replacement if n is inner else n)
