"""Batched functions written out: ``torch.vmap`` in Dynamo's graph becomes the ATen operators that it runs.

Dynamo records a call of vmap (associative scans of state space models make many) as a stretch of nodes between entering
and leaving a functorch level, with wrapped tensors in between. The functional retrace above autograd cannot look into
those. One level deeper, where batching rules have been applied, there is nothing special left: each stretch is traced
there, and its operators, all of which have derivatives, take its place.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._functorch import predispatch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from ..passes.runner import copy_graph
from .splice import splice

_ENTER, _LEAVE = predispatch._vmap_increment_nesting, predispatch._vmap_decrement_nesting


def write_out_vmap(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph without calls of vmap; itself if there are none.

    Args:
        gm: a graph from Dynamo with fake values in ``meta["example_value"]``, under whose fake mode this is called.
    """
    if not any(node.target is _ENTER for node in gm.graph.nodes):
        return gm
    result = copy_graph(gm)
    for stretch in _stretches(result.graph):
        _write_out(result, stretch)
    result.graph.lint()
    result.recompile()
    return result


def _stretches(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes of each outermost call, from entering its level to leaving it."""
    found: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        if node.target is _ENTER:
            depth += 1
            if depth == 1:
                found.append([])
        if depth:
            found[-1].append(node)
        if node.target is _LEAVE:
            depth -= 1
    return found


def _write_out(gm: fx.GraphModule, stretch: list[fx.Node]) -> None:
    inside = set(stretch)
    inputs = list(
        dict.fromkeys(i for n in stretch for i in n.all_input_nodes if i not in inside and i.op != "get_attr")
    )
    outputs = [n for n in stretch if any(user not in inside for user in n.users)]
    body = fx.Graph()
    copies = {i: body.placeholder(i.name) for i in inputs}
    for node in stretch:
        for constant in node.all_input_nodes:
            if constant not in copies and constant.op == "get_attr":
                copies[constant] = body.node_copy(constant)
        copies[node] = body.node_copy(node, copies.__getitem__)
    body.output(tuple(copies[n] for n in outputs))
    fakes = [i.meta["example_value"] for i in inputs]
    # The new graph is differentiated by whoever runs it: what autograd would do on this level is no part of it.
    with preserve_node_meta(), torch.no_grad():
        traced = make_fx(fx.Interpreter(fx.GraphModule(gm, body)).run, tracing_mode="real")(*fakes)
    for node in traced.graph.nodes:  # as Dynamo calls it
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
    with gm.graph.inserting_before(stretch[0]):
        results = splice(gm.graph, traced, inputs)
    for old, new in zip(outputs, results, strict=True):
        new.meta["example_value"] = old.meta["example_value"]
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
    for node in reversed(stretch):
        gm.graph.erase_node(node)
