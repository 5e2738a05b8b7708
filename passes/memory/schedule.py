"""Where in a graph a value is made, once it is decided what is kept, and when it goes to the host and comes back.

A packed weight (NF4, say) is unpacked for one product and takes several times its packed bytes. Where a plan runs the
same product twice, forward's again and then backward's, one unpacked weight would be alive from the one to the other,
and so would those of a whole layer. Unpacking again costs one more pass over the weight, so only one is ever alive.

An offloaded value leaves as soon as it is made. It is fetched right before backward first reads it, after what backward
computed just before, and by then it is under way: the fetch before it had it started.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection

from torch import fx

from ...kernels.offload import fetch, offload
from ...kernels.operator import Operator
from .joint import base, is_free, is_value, is_view, unpacks


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


# -- by way of the host ------------------------------------------------------------------------------------------------


def by_way_of_host(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    names: Collection[str],
    num_fwd_outputs: int,
    inner: Collection[str] = (),
) -> None:
    """Have values that forward saves wait for backward in host memory; both graphs change in place.

    Args:
        names: of the values, which are outputs of forward and inputs of backward under one name.
        num_fwd_outputs: how many of forward's outputs are the model's own.
        inner: names of residuals that backward computes again. What they are computed from is read before and after,
            and fetched for each.
    """
    (output,) = forward.graph.find_nodes(op="output")
    outputs = list(output.args[0])
    for i, value in enumerate(outputs[num_fwd_outputs:], num_fwd_outputs):
        if isinstance(value, fx.Node) and value.name in names:
            with forward.graph.inserting_after(value):
                outputs[i] = _call(forward.graph, offload, value)
    output.args = (tuple(outputs) if isinstance(output.args[0], tuple) else outputs,)
    forward.recompile()
    waiting = [n for n in backward.graph.find_nodes(op="placeholder") if n.name in names]
    _fetch_before_use(backward.graph, waiting, inner)
    backward.recompile()


def _fetch_before_use(graph: fx.Graph, waiting: list[fx.Node], inner: Collection[str]) -> None:
    order = {n: i for i, n in enumerate(graph.nodes)}
    ends = [i for n, i in order.items() if n.name in inner]
    turns: dict[tuple[fx.Node, int], list[fx.Node]] = {}
    for host in waiting:
        for user in sorted(host.users, key=order.__getitem__):
            turns.setdefault((host, bisect_left(ends, order[user])), []).append(user)
    read = sorted(turns.items(), key=lambda turn: order[turn[1][0]])
    on_device = {host: host.meta["val"] for host in waiting}
    for host in waiting:
        host.meta = {**host.meta, "val": offload.fake(on_device[host])}  # type: ignore[misc]
    for ((host, _), users), following in zip(read, [*read[1:], None], strict=True):
        after = _just_before(users[0], order)
        with graph.inserting_before(users[0]):
            fetched = _call(graph, fetch, after, host, following and following[0][0])
        fetched.meta["val"] = on_device[host]
        host.replace_all_uses_with(fetched, lambda user, users=users: user in users)


def _just_before(node: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
    """What was computed last before a node, of all that is read there or later anyway; else any tensor there is."""
    place = order[node]
    for found in reversed(list(order)[:place]):
        computed = found.op == "call_function" and is_value(found) and not is_view(found)
        if computed and any(order.get(user, 0) >= place for user in found.users):
            return found
    return next(n for n in order if n.op == "placeholder" and is_value(n))


def _call(graph: fx.Graph, operator: Operator, *args: fx.Node | None) -> fx.Node:
    """A call of an operator of ours in a differentiated graph."""
    node = graph.call_function(operator.launch[operator.overload], args)
    assert operator.fake is not None
    node.meta = {"val": operator.fake(*(a if a is None else a.meta["val"] for a in args))}
    return node
