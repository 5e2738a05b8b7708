"""Rotary position embedding (arXiv:2104.09864) of queries and keys together, in the half-rotation layout.

Models rotate q and k by the same cos and sin; one kernel reads those once and rotates both. Where only the first
features of each head are rotated, the slice that holds them is what is rotated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ...kernels.rope import rope
from ..pattern import Found, capture, cast, function, number, widened
from ..rewrite import Match, Miss, module_path, source_line, value
from ..search import search
from ..vocabulary import cat, stack, unsqueeze, view

aten = torch.ops.aten


def turns_by_half(node: fx.Node, found: Found) -> str | None:
    x, half = value(found["x"]), found["half"]
    if half * 2 != x.shape[-1]:
        return f"the last dimension is turned by {half} of {x.shape[-1]}, not by half"
    dtype = torch.promote_types(x.dtype, value(found["cos"]).dtype)
    return None if value(node).dtype == dtype else f"the result is {value(node).dtype} instead of {dtype}"


x, cos, sin, half = widened(capture("x")), capture("cos"), capture("sin"), number("half")

ROPE = {
    "half rotation": cast(x * widened(unsqueeze(cos, 1)) + cat(-x[half:], x[:half]) * widened(unsqueeze(sin, 1))).where(
        turns_by_half
    )
}

a, b = capture("a"), capture("b")
complex_pairs = function("view_as_complex", aten.view_as_complex.default)
real_pairs = function("view_as_real", aten.view_as_real.default)
NEAR = {
    "it rotates interleaved pairs, not halves": x * cos + view(stack(-x[1::2], x[::2])) * sin,
    "it rotates interleaved pairs as complex numbers, not halves": real_pairs(complex_pairs(a) * cos),
    "cos and sin are stored for one half only": cat(a * cos - b * sin, b * cos + a * sin),
}


class Rope:
    """Finds rotations, and pairs the two of one attention that share cos and sin."""

    name = "rope"

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        hearts = frozenset({aten.neg.default, aten.view_as_complex.default, aten.sub.Tensor})
        waiting: dict[tuple[fx.Node, fx.Node, str], tuple[fx.Node, Found]] = {}
        for result in search(graph, ROPE, heart=hearts, close=4, near=NEAR):
            if isinstance(result, Miss):
                yield result
                continue
            key = result[1]["cos"], result[1]["sin"], module_path(result[0])
            if key in waiting:
                yield _pair(waiting.pop(key), result)
            else:
                waiting[key] = result
        for alone in waiting.values():
            yield _miss(alone, "no second rotation in its module shares its cos and sin")


def _pair(query: tuple[fx.Node, Found], key: tuple[fx.Node, Found]) -> Match:
    (q, of_q), (k, of_k) = query, key
    args = (of_q["x"], of_k["x"], of_q["cos"], of_q["sin"])
    return Match(rope, args, {q: 0, k: 1}, of_q.interior | of_k.interior, of_q.variant)


def _miss(rotation: tuple[fx.Node, Found], reason: str) -> Miss:
    node, found = rotation
    return Miss(reason, node, source_line(node), len(found.interior))


RECOGNISER = Rope()
