"""A sum and its norm are one operator in a running graph, and two while memory is planned.

``add_rms_norm`` returns the sum and the norm of the *rounded* sum, so the norm can be had from the sum alone, bit for
bit. As one operator it could not: the norm would be kept beside the sum, or both of the sum's terms. So a joint graph
is planned with ``rms_norm(total)`` in it, and where a half holds both operators they become one again.
"""

from __future__ import annotations

import operator

from torch import fx

from ...kernels.rms_norm import add_rms_norm, rms_norm

SPLIT = "unsloth_split"
"""Marks, in a node's meta, a norm that was taken out of its sum."""


def split_norms(graph: fx.Graph) -> None:
    """Have everything read the norm of a sum from a norm of its own; in place."""
    for node in graph.find_nodes(op="call_function", target=add_rms_norm.overload):
        _, _, *others = node.args
        parts = _parts(graph, node)
        if not any(parts[i].users for i in (1, 2)):
            continue
        with graph.inserting_after(max(parts.values())):
            norm = graph.call_function(rms_norm.overload, (parts[0], *others))
        # What the sum was called with says nothing about the norm, and Inductor lays out arguments by it.
        inherited = {name: value for name, value in node.meta.items() if name != "eager_input_vals"}
        norm.meta = {**inherited, "val": tuple(node.meta["val"][1:]), SPLIT: True}
        copies = _parts(graph, norm)
        for old, new in ((1, 0), (2, 1)):
            parts[old].replace_all_uses_with(copies[new])
            copies[new].meta[SPLIT] = True
    graph.eliminate_dead_code()


def merge_norms(graph: fx.Graph) -> int:
    """Undo :func:`split_norms` where a graph makes the sum too; in place.

    Returns:
        how many norms became one with their sum.
    """
    merged = 0
    for norm in graph.find_nodes(op="call_function", target=rms_norm.overload):
        total, *others = norm.args
        if SPLIT not in norm.meta or not isinstance(total, fx.Node) or total.target is not operator.getitem:
            continue
        made, index = total.args
        if not isinstance(made, fx.Node) or made.target is not add_rms_norm.overload or index != 0:
            continue
        if list(made.args[2:]) != others:
            continue
        parts = _parts(graph, made)
        for user in list(norm.users):
            user.replace_all_uses_with(parts[int(user.args[1]) + 1])  # type: ignore[arg-type]
            graph.erase_node(user)
        graph.erase_node(norm)
        merged += 1
    if merged:
        graph.eliminate_dead_code()
    return merged


def _parts(graph: fx.Graph, node: fx.Node) -> dict[int, fx.Node]:
    """The nodes of a tuple's members by position, those made that are missing, right behind the tuple."""
    parts: dict[int, fx.Node] = {}
    for user in list(node.users):
        if user.target is operator.getitem:
            parts.setdefault(int(user.args[1]), user)  # type: ignore[arg-type]
    for i, value in enumerate(node.meta["val"]):
        if i not in parts:
            with graph.inserting_after(node):
                parts[i] = graph.call_function(operator.getitem, (node, i))
            parts[i].meta = {**node.meta, "val": value}
    return parts
