"""Where in a graph a value is made, once it is decided what is kept, and when it goes to the host and comes back.

A packed weight (NF4, say) is unpacked for one product and takes several times its packed bytes. Where a plan runs the
same product twice, forward's again and then backward's, one unpacked weight would be alive from the one to the other,
and so would those of a whole layer. Unpacking again costs one more pass over the weight, so only one is ever alive.

An offloaded value leaves as soon as it is made, and stays in place until its copy is done. It is fetched right before
backward first reads it, and by then it is under way. When is for transfers.py to say, by the graphs as they will run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ...kernels.offload import fetch, offload, prefetch, settle
from ...kernels.operator import Operator
from .costs import Sizes
from .joint import base, is_free, is_value, is_view, maker, nbytes, unpacks
from .liveness import busy
from .transfers import Copy, arrive, depart


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
    layer_of: Mapping[str, Any],
    num_fwd_outputs: int,
    sizes: Sizes,
) -> None:
    """Have values that forward saves wait for backward in host memory; both graphs change in place.

    Args:
        layer_of: the layer of each of these values, which are outputs of forward and inputs of backward under one name.
        num_fwd_outputs: how many of forward's outputs are the model's own.
        sizes: what operators cost, and what the link carries.
    """
    _send(forward.graph, layer_of, num_fwd_outputs, sizes)
    forward.recompile()
    _fetch_before_use(backward.graph, layer_of, sizes)
    backward.recompile()


def _send(graph: fx.Graph, layer_of: Mapping[str, Any], num_fwd_outputs: int, sizes: Sizes) -> None:
    (output,) = graph.find_nodes(op="output")
    outputs = list(output.args[0])
    nodes = list(graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    saved = enumerate(outputs[num_fwd_outputs:], num_fwd_outputs)
    leaving = {value: i for i, value in saved if isinstance(value, fx.Node) and value.name in layer_of}
    values = sorted(leaving, key=order.__getitem__)
    seconds = [busy(n, sizes) for n in nodes]
    copies = [Copy(nbytes(n), order[maker(n)], layer_of[n.name]) for n in values]
    for value, until in zip(values, depart(seconds, copies, sizes.device.link).until, strict=True):
        with graph.inserting_after(value):
            host = _call(graph, offload, value)
        place = nodes[min(max(until, order[value] + 1), order[output])]
        after = _just_before(place, order, value.meta["val"].device)
        with graph.inserting_before(place):
            outputs[leaving[value]] = _call(graph, settle, after, host, value)
    output.args = (tuple(outputs) if isinstance(output.args[0], tuple) else outputs,)


def _fetch_before_use(graph: fx.Graph, layer_of: Mapping[str, Any], sizes: Sizes) -> None:
    nodes = list(graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    waiting = [n for n in graph.find_nodes(op="placeholder") if n.name in layer_of and n.users]
    on_device = {n: n.meta["val"] for n in waiting}
    for n, value in on_device.items():
        n.meta = {**n.meta, "val": offload.fake(value)}  # type: ignore[misc]
    inputs = sum(n.op == "placeholder" for n in nodes)
    first = {n: min(n.users, key=order.__getitem__) for n in waiting}
    read = sorted(first, key=lambda n: order[first[n]])
    seconds = [busy(n, sizes) for n in nodes]
    copies = [Copy(nbytes(n), order[first[n]], layer_of[n.name]) for n in read]
    for host, start in zip(read, arrive(seconds, copies, sizes.device.link).start, strict=True):
        value, start, coming = on_device[host], max(start, inputs), None
        if start < order[first[host]]:
            after = _just_before(nodes[start], order, value.device)
            with graph.inserting_before(nodes[start]):
                coming = _call(graph, prefetch, after, host)
        after = _just_before(first[host], order, value.device)
        with graph.inserting_before(first[host]):
            fetched = _call(graph, fetch, after, host, coming)
        fetched.meta["val"] = value
        mine = (coming, fetched)
        host.replace_all_uses_with(fetched, lambda user, mine=mine: user not in mine)


def _just_before(node: fx.Node, order: dict[fx.Node, int], device: torch.device) -> fx.Node:
    """What was computed last on a device before a node, of all that is read there or later anyway; else any input of
    the graph that is there."""
    place = order[node]
    for found in reversed(list(order)[:place]):
        computed = found.op == "call_function" and is_value(found) and not is_view(found)
        if computed and found.meta["val"].device == device and any(order.get(u, 0) >= place for u in found.users):
            return found
    return next(n for n in order if n.op == "placeholder" and is_value(n) and n.meta["val"].device == device)


def _call(graph: fx.Graph, operator: Operator, *args: fx.Node | None) -> fx.Node:
    """A call of an operator of ours in a differentiated graph."""
    node = graph.call_function(operator.launch[operator.overload], args)
    assert operator.fake is not None
    node.meta = {"val": operator.fake(*(a if a is None else a.meta["val"] for a in args))}
    return node
