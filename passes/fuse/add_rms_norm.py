"""A sum and the RMSNorm of it: the residual stream takes a layer's output, and the next layer reads it normalised.

One kernel then reads both addends and writes sum and norm, and adds the stream's gradient inside the norm's backward.
Only where others read the sum too: where none does, there is no second gradient to add.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ...kernels.operator import operator_of
from ...kernels.rms_norm import add_rms_norm, rms_norm
from ..pattern import arguments
from ..reach import outputs_reached
from ..rewrite import Match, Miss, is_tensor, source_line, value
from ..soundness import same_sizes

aten = torch.ops.aten


class AddRmsNorm:
    """Finds norms of sums that are read elsewhere as well."""

    name = "add_rms_norm"

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        reached = outputs_reached(graph)
        taken: set[fx.Node] = set()  # two norms of one sum: the first takes it
        for node in graph.nodes:
            if operator_of(node.target) is not rms_norm or node.args[0] in taken:
                continue
            match = _sum_and_norm(node)
            if match is None:
                continue
            if reached[match.anchor] != reached[node]:
                yield Miss("an output of the graph reads the sum but not its norm", node, source_line(node), 2)
                continue
            taken.add(match.anchor)
            yield match


def _sum_and_norm(node: fx.Node) -> Match | None:
    total, *others = node.args
    if not isinstance(total, fx.Node) or total.target is not aten.add.Tensor or len(total.users) < 2:
        return None
    x, residual, alpha = arguments(total).values()
    if alpha != 1 or not all(is_tensor(t) and _is_alike(t, total) for t in (x, residual)):
        return None
    if any(user.target is not operator.getitem for user in node.users):
        return None
    results: dict[fx.Node, Any] = {user: user.args[1] for user in node.users}
    outputs = {total: 0, **{user: 1 + index for user, index in results.items()}}
    return Match(add_rms_norm, (x, residual, *others), outputs, frozenset({total, node, *results}))


def _is_alike(addend: fx.Node, total: fx.Node) -> bool:
    """Whether an addend is neither converted nor broadcast."""
    a, b = value(addend), value(total)
    return a.dtype == b.dtype and same_sizes(a.shape, b.shape)


FUSION = AddRmsNorm()
