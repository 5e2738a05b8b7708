"""Adapted linear layers that read one input: queries, keys and values, or a gate and its up-projection.

They need nothing of each other, so as one operator they compute the same (kernels/lora_linears.py). Their results are
used at several places of the graph; the operator stands where the first of them was. Layers that lead to different
results of the graph (a cache of keys is one) stay apart: autograd would find a way from each result to all of them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from ...kernels.lora_linear import lora_linear
from ...kernels.lora_linears import LORA_LINEARS
from ..reach import outputs_reached
from ..rewrite import Call, Match, Miss, value

aten = torch.ops.aten
MOST = max(LORA_LINEARS)


class LoraLinears:
    """Finds adapted linear layers that share their input. With dropout an adapter reads another than its base."""

    name = "lora_linears"

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        sharing: dict[tuple[fx.Node, torch.dtype, int], list[fx.Node]] = {}
        leads_to = outputs_reached(graph)
        for node in graph.nodes:
            if node.target is lora_linear.overload and node.args[1] is None and not _xa_is_used(node):
                x = node.args[0]
                sharing.setdefault((_origin(x), value(x).dtype, leads_to[node]), []).append(node)
        for sites in sharing.values():
            while len(sites) > 1:
                # Four layers are two and two, not three and one.
                count = min(len(sites), MOST) if len(sites) != MOST + 1 else 2
                yield _match(sites[:count])
                sites = sites[count:]


def _origin(x: object) -> fx.Node:
    """The value that x is a conversion of: each layer converts its input anew under autocast."""
    assert isinstance(x, fx.Node)
    converts = x.target is aten._to_copy.default and set(x.kwargs) == {"dtype"}
    return _origin(x.args[0]) if converts else x


def _xa_is_used(node: fx.Node) -> bool:
    return any(user.args[1] != 0 for user in node.users)


def _match(sites: list[fx.Node]) -> Match:
    x, _, _, _, _, _, _ = sites[0].args
    _, _, weights, biases, As, Bs, scales = zip(*(site.args for site in sites), strict=True)
    results = [next(user for user in site.users if user.target is operator.getitem) for site in sites]
    return Match(
        LORA_LINEARS[len(sites)],
        (x, Call(aten.cat.default, (list(As),)), *weights, *biases, *Bs, *scales),
        {result: i for i, result in enumerate(results)},
        frozenset({*sites, *results}),
        f"{len(sites)} layers",
    )


FUSION = LoraLinears()
