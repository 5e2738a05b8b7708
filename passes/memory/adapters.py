"""Backward of adapted layers becomes pieces where one can take in what is made for it alone (kernels/lora_backward.py).

It is done in a backward graph, when it is decided what is kept, so that the planner goes on seeing whole operators:

* a gated MLP whose three layers have adapters: what was kept are gate and up, and h = act(gate) · up would be made
  again for the gradient of one A. The activation's backward takes in all products with the widest matrices, h among
  them;
* a norm whose result backward wants for the gradient of A alone, and would have to make again: that gradient is had
  from what the norm was given.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from ...kernels.glu import geglu, swiglu
from ...kernels.lora_backward import ACTIVATIONS, LORA_DOWN_BACKWARD, LORA_UP_BACKWARD, glu_lora_backward
from ...kernels.lora_linear import lora_linear
from ...kernels.lora_linears import LORA_LINEARS
from ...kernels.operator import Operator
from ...kernels.rms_norm import add_rms_norm, rms_norm
from ..rewrite import value


def fuse_adapter_gradients(graph: fx.Graph) -> int:
    """Cut backward of adapted layers into pieces where that spares something; in place.

    Returns:
        how many operators were cut.
    """
    cut = 0
    for act in (swiglu, geglu):
        for node in graph.find_nodes(op="call_function", target=act.overload_backward):
            cut += _cut_mlp(graph, node, act)
    saved = _saved_statistics(graph)
    for count, layers in LORA_LINEARS.items():
        for node in graph.find_nodes(op="call_function", target=layers.overload_backward):
            cut += _cut_layers(graph, node, count, saved)
        for node in graph.find_nodes(op="call_function", target=LORA_DOWN_BACKWARD[count].overload):
            cut += _take_norm_in(graph, node, count, saved)
    if cut:
        graph.eliminate_dead_code()
    return cut


# -- a gated MLP -------------------------------------------------------------------------------------------------------


def _cut_mlp(graph: fx.Graph, node: fx.Node, act: Operator) -> int:
    """Have the activation's backward take in its neighbours', if they are backward of adapted layers."""
    dh, gate, up, *others, needs = node.args
    down, layers = _maker(dh), _only_reader(node)
    if not all(needs) or down is None or layers is None:  # type: ignore[arg-type]
        return 0
    if down.target is not lora_linear.overload_backward or layers.target is not LORA_LINEARS[2].overload_backward:
        return 0
    dy, h, apart, W, A, B, xa, scale, down_needs = down.args
    if apart is not None or list(down_needs) != [True, False, False, True, True]:  # type: ignore[arg-type]
        return 0
    if not isinstance(h, fx.Node) or h.target is not act.overload or list(h.args) != [gate, up, *others]:
        return 0
    # Whether something else reads h as well is for the plan to say, which must not change a bit of a gradient.
    if _members(down).keys() != {0, 3, 4} or set(_members(down)[0].users) != {node}:
        return 0
    members = _members(node)
    dys, saved = _layers_arguments(layers, 2)
    if dys != [members.get(0), members.get(1)] or any(set(m.users) != {layers} for m in members.values()):
        return 0
    if not _all_wanted(layers, 2):
        return 0
    x, A2, W1, W2, B1, B2, xa2, scale1, scale2 = saved
    number = ACTIVATIONS[act.name, tuple(others)]  # type: ignore[index]
    arguments = (dh, gate, up, xa, xa2, B1, B2)  # dxa has the shape of xa
    if glu_lora_backward.supports(*map(value, arguments), scale1, scale2, number) is not None:
        return 0

    with graph.inserting_before(down):
        dxa, dB = _call(graph, LORA_UP_BACKWARD[1], dy, xa, B, scale)
        new_dh, _ = _call(graph, LORA_DOWN_BACKWARD[1], dy, W, A, dxa, None, None, None, 0.0)
    with graph.inserting_before(node):
        dgate, dup, dA, dxa2, dB1, dB2 = _call(
            graph, glu_lora_backward, new_dh, gate, up, dxa, xa2, B1, B2, scale1, scale2, number
        )
    with graph.inserting_before(layers):
        dx, dA2 = _call(graph, LORA_DOWN_BACKWARD[2], dgate, dup, W1, W2, A2, dxa2, x, None, None, 0.0)
    _replace(graph, down, {0: new_dh, 3: dA, 4: dB})
    _replace(graph, layers, {0: dx, 1: dA2, 4: dB1, 5: dB2})
    # From the last reader to the first. A sweep over the whole graph for each layer would be quadratic in the depth.
    for dead in (layers, node, down):
        _erase(graph, dead)
    if not h.users:
        graph.erase_node(h)
    return 1


# -- the input of a norm in place of its output ------------------------------------------------------------------------


def _cut_layers(graph: fx.Graph, node: fx.Node, count: int, saved: _Saved) -> int:
    """Cut backward of layers whose input a norm makes."""
    dys, (x, A, *rest) = _layers_arguments(node, count)
    weights, Bs, (xa, *scales) = rest[:count], rest[count : 2 * count], rest[2 * count :]
    up = LORA_UP_BACKWARD[count]
    if not _all_wanted(node, count) or up.supports(*map(value, (*dys, xa, *Bs)), *scales) is not None:
        return 0
    if (normed := _normed(graph, x, saved)) is None:
        return 0
    with graph.inserting_before(node):
        dxa, *dBs = _call(graph, up, *dys, xa, *Bs, *scales)
        dx, dA = _call(graph, LORA_DOWN_BACKWARD[count], *dys, *weights, A, dxa, *normed)
    _replace(graph, node, {0: dx, 1: dA, **{2 + count + i: dB for i, dB in enumerate(dBs)}})
    graph.erase_node(node)
    return 1


def _take_norm_in(graph: fx.Graph, node: fx.Node, count: int, saved: _Saved) -> int:
    """Give a piece what its input's norm was given."""
    place = 2 * count + 2
    if node.args[place + 1] is not None or (normed := _normed(graph, node.args[place], saved)) is None:
        return 0
    node.args = (*node.args[:place], *normed)
    return 1


_Saved = dict[tuple[fx.Node, Any], fx.Node]
"""rstd that forward saved, by what was normalised and the weight."""


def _saved_statistics(graph: fx.Graph) -> _Saved:
    found: _Saved = {}
    for norm, first in ((rms_norm, 1), (add_rms_norm, 2)):
        for node in graph.find_nodes(op="call_function", target=norm.overload_backward):
            x, weight, rstd = node.args[first : first + 3]
            if isinstance(x, fx.Node) and isinstance(rstd, fx.Node) and rstd.op == "placeholder":
                found[x, weight] = rstd
    return found


def _normed(graph: fx.Graph, x: Any, saved: _Saved) -> tuple[Any, ...] | None:
    """x, rstd, norm_weight and norm_offset in place of a norm's result.

    Also where the norm runs for something else as well: a plan decides that, and must not change a bit of a gradient.
    """
    if not isinstance(x, fx.Node) or x.target is not operator.getitem:
        return None
    norm, index = x.args
    if not isinstance(norm, fx.Node):
        return None
    if norm.target is rms_norm.overload and index == 0:
        (total, weight, _, offset, _), statistic = norm.args, 1
    elif norm.target is add_rms_norm.overload and index == 1:
        (_, _, weight, _, offset, _), statistic = norm.args, 2
        total = _member(graph, norm, 0)
    else:
        return None
    if value(total).dtype != value(x).dtype:
        return None
    rstd = saved.get((total, weight))  # type: ignore[arg-type]
    return total, _member(graph, norm, statistic) if rstd is None else rstd, weight, offset


# -- nodes -------------------------------------------------------------------------------------------------------------


def _layers_arguments(node: fx.Node, count: int) -> tuple[list[Any], list[Any]]:
    """Of backward of layers that share an input: the dys, and x, A, weights, Bs, xa, scales."""
    *saved, _ = node.args[count:]
    return list(node.args[:count]), saved


def _all_wanted(node: fx.Node, count: int) -> bool:
    """Whether the gradients of x, A and the Bs are wanted, and no bias's."""
    return list(node.args[-1]) == [True, True, *[False] * count, *[True] * count]  # type: ignore[arg-type]


def _maker(node: Any) -> fx.Node | None:
    """The operator whose first result a node is."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or node.args[1] != 0:
        return None
    made = node.args[0]
    return made if isinstance(made, fx.Node) else None


def _members(node: fx.Node) -> dict[int, fx.Node]:
    """The results of an operator that are read, by position."""
    return {user.args[1]: user for user in node.users if user.target is operator.getitem and user.users}  # type: ignore


def _member(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    """One of an operator's results, there or made."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == index:
            return user
    with graph.inserting_after(node):
        member = graph.call_function(operator.getitem, (node, index))
    member.meta = {"val": node.meta["val"][index]}
    return member


def _only_reader(node: fx.Node) -> fx.Node | None:
    readers = {reader for member in _members(node).values() for reader in member.users}
    return readers.pop() if len(readers) == 1 else None


def _call(graph: fx.Graph, called: Operator, *args: Any) -> Sequence[fx.Node]:
    """A call of an operator of ours, and its results."""
    node = graph.call_function(called.overload, args)
    assert called.fake is not None
    values = called.fake(*map(value, args))
    node.meta = {"val": values}
    results = [graph.call_function(operator.getitem, (node, i)) for i in range(len(values))]
    for result, made in zip(results, values, strict=True):
        result.meta = {"val": made}
    return results


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Take out an operator of which no result is read."""
    for member in list(node.users):
        graph.erase_node(member)
    graph.erase_node(node)


def _replace(graph: fx.Graph, node: fx.Node, results: dict[int, fx.Node]) -> None:
    """Have everything read an operator's results from elsewhere."""
    for user in list(node.users):
        if user.users:
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
