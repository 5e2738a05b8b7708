"""Rotary position embedding of queries and keys together, in the half-rotation layout (arXiv:2104.09864).

Models rotate q and k with the same cos and sin; one kernel reads those once and rotates both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ...kernels.rope import rope
from ..pattern import (
    SUMS,
    Found,
    Pattern,
    capture,
    concatenate,
    first_half,
    match,
    second_half,
)
from ..rewrite import Match, Miss, source_line, value

x, cos, sin = capture("x"), capture("cos"), capture("sin")

ROPE: dict[str, Pattern] = {
    "half rotation": x * cos + concatenate(-second_half(x), first_half(x)) * sin,
}
# A sum of two products, and one step into the rotated half.
_CLOSE = 3


@dataclass(frozen=True)
class _Rotation:
    node: fx.Node
    found: Found


class Rope:
    """Finds rotations, and pairs the two that share cos and sin."""

    name = "rope"

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        waiting: dict[tuple[fx.Node, fx.Node], _Rotation] = {}
        for node in graph.nodes:
            if node.target not in SUMS:
                continue
            found = match(ROPE, node)
            if isinstance(found, Miss):
                if found.how_far >= _CLOSE:
                    yield found
                continue
            rotation = _Rotation(node, found)
            tables = found["cos"], found["sin"]
            if tables in waiting:
                yield _pair(waiting.pop(tables), rotation)
            else:
                waiting[tables] = rotation
        for lone in waiting.values():
            yield _miss(lone, "no second rotation shares its cos and sin")


def _pair(q: _Rotation, k: _Rotation) -> Match | Miss:
    cos, sin = (_table(q.found[name]) for name in ("cos", "sin"))
    if cos is None or sin is None:
        return _miss(q, "cos and sin are not [batch, sequence, head size] spread over the heads")
    args = (q.found["x"], k.found["x"], cos, sin)
    return Match(rope, args, {q.node: 0, k.node: 1}, q.found.interior | k.found.interior, q.found.variant)


def _table(node: fx.Node) -> fx.Node | None:
    """The [batch, sequence, head size] table behind ``unsqueeze(table, 1)``."""
    if node.target is torch.ops.aten.unsqueeze.default and node.args[1] in (1, -3):
        table = node.args[0]
        if isinstance(table, fx.Node) and value(table).dim() == 3:
            return table
    return None


def _miss(rotation: _Rotation, reason: str) -> Miss:
    return Miss(reason, rotation.node, source_line(rotation.node), len(rotation.found.interior))


RECOGNISER = Rope()
