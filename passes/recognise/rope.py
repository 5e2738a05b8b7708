"""Rotary position embedding (arXiv:2104.09864) of queries and keys, whatever the order of a head's features.

Models rotate q and k by the same cos and sin; one kernel reads those once and rotates both. Where only some features of
each head are rotated, the slice that holds them is what is rotated. How the angles came about (linear, dynamic, YaRN,
LongRoPE or llama3 scaling, sections for several axes) is in cos and sin, which are taken as they are. The kernel has
no gradient of them, so where the angles are trained (Mistral Large 4) the rotation stays as the model wrote it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import fx

from ...kernels.rope import rope, rope_of_one
from ..pattern import Found, Pattern, capture, cast, function, number, widened
from ..reach import outputs_reached
from ..rewrite import Call, Match, Miss, module_path, value
from ..search import search
from ..soundness import same_sizes
from ..vocabulary import cat, doubled, merged, pairs, stack

aten = torch.ops.aten
view_as_complex = function("view_as_complex", aten.view_as_complex.default)
view_as_real = function("view_as_real", aten.view_as_real.default)


def turns_all(node: fx.Node, found: Found) -> str | None:
    """Whether the result is x with every feature turned, and in a dtype that loses nothing of x's gradient."""
    x, result = value(found["x"]), value(node)
    half = found.captures.get("half", x.shape[-1] // 2)
    if half * 2 != x.shape[-1]:
        return f"the last dimension is turned by {half} of {x.shape[-1]}, not by half"
    if not same_sizes(result.shape, x.shape):
        return f"the result is {tuple(result.shape)} and x is {tuple(x.shape)}"
    if result.dtype in (x.dtype, _promoted(found)):
        return None
    return f"the result is {result.dtype} instead of {_promoted(found)}"


def _promoted(found: Found) -> torch.dtype:
    table = found.captures.get("cos", found.captures.get("angles"))
    dtype = value(table).dtype
    return torch.promote_types(value(found["x"]).dtype, dtype.to_real())


x, half = widened(capture("x")), number("half")
cos, sin = capture("cos"), capture("sin")
halves, neighbours = (x[:half], x[half:]), (x[::2], x[1::2])


def per_feature(cos: Pattern, sin: Pattern, turned: Pattern) -> Pattern:
    """cos and sin hold a value for each feature."""
    return cast(x * widened(cos) + widened(turned) * widened(sin)).where(turns_all)


def per_pair(features: tuple[Pattern, Pattern], join: Any, backwards: bool = False) -> Pattern:
    """cos and sin hold a value for each pair of features."""
    first, second = (widened(f) for f in features)
    c, s = widened(cos), widened(sin)
    if backwards:
        return cast(join(first * c + second * s, second * c - first * s)).where(turns_all)
    return cast(join(first * c - second * s, second * c + first * s)).where(turns_all)


def adjacent(first: Pattern, second: Pattern) -> Pattern:
    return merged(stack(first, second))


next_to_each_other = adjacent(-x[1::2], x[::2])
COMPLEX = view_as_real(view_as_complex(pairs(x)) * capture("angles"))

ROPE = {
    "half rotation": per_feature(cos, sin, cat(-x[half:], x[:half])),
    "half rotation backwards": per_feature(cos, sin, cat(x[half:], -x[:half])),
    "interleaved, a table per pair": per_feature(doubled(cos), doubled(sin), next_to_each_other),
    "interleaved": per_feature(cos, sin, next_to_each_other),
    "half rotation, a table per pair": per_pair(halves, cat),
    "half rotation backwards, a table per pair": per_pair(halves, cat, backwards=True),
    "interleaved, written in halves": per_pair(neighbours, cat),
    "interleaved, pair by pair": per_pair(neighbours, adjacent),
    "complex numbers": cast(merged(COMPLEX)).where(turns_all),
}
INTERLEAVED_OUT = frozenset(name for name in ROPE if not name.startswith("half") and not name.endswith("halves"))
INTERLEAVED = INTERLEAVED_OUT | {"interleaved, written in halves"}


class Rope:
    """Finds rotations, and pairs the two of one attention that share cos and sin."""

    name = "rope"

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        hearts = frozenset({aten.neg.default, aten.view_as_complex.default, aten.sub.Tensor})
        order = {node: i for i, node in enumerate(graph.nodes)}
        reached = outputs_reached(graph)
        waiting: dict[Hashable, tuple[fx.Node, Found]] = {}
        found: list[Match] = []
        for result in search(graph, ROPE, heart=hearts, close=4):
            if isinstance(result, Miss):
                yield result
                continue
            key = module_path(result[0]), reached[result[0]], *(_identity(a) for a in _shared(*result))
            if key in waiting and _may_wait(waiting[key][0], result[1]["x"], order):
                found.append(_pair(waiting.pop(key), result))
            else:
                if key in waiting:
                    found.append(_alone(waiting[key]))
                waiting[key] = result
        yield from sorted([*found, *map(_alone, waiting.values())], key=lambda m: order[m.anchor])


def _pair(query: tuple[fx.Node, Found], key: tuple[fx.Node, Found]) -> Match:
    (q, of_q), (k, of_k) = query, key
    args = (of_q["x"], of_k["x"], *_shared(q, of_q))
    return Match(rope, args, {q: 0, k: 1}, of_q.interior | of_k.interior, of_q.variant)


def _alone(rotation: tuple[fx.Node, Found]) -> Match:
    node, found = rotation
    variant = f"{found.variant}, alone"
    return Match(rope_of_one, (found["x"], *_shared(node, found)), {node: 0}, found.interior, variant)


def _may_wait(rotated: fx.Node, other: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether a rotation can be put off until the other tensor is there."""
    return all(order[user] > order[other] for user in rotated.users)


def _shared(node: fx.Node, found: Found) -> tuple[Any, ...]:
    """The operator's arguments after what is rotated: cos, sin and the flags."""
    if found.variant == "complex numbers":
        parts = Call(aten.view_as_real.default, (found["angles"],))
        tables = [Call(aten.select.int, (parts, -1, i)) for i in (0, 1)]
    elif "backwards" in found.variant:  # by the opposite angle
        tables = [found["cos"], Call(aten.neg.default, (found["sin"],))]
    else:
        tables = [found["cos"], found["sin"]]
    narrow = value(node).dtype != _promoted(found)
    return *tables, found.variant in INTERLEAVED, found.variant in INTERLEAVED_OUT, narrow


def _identity(argument: Any) -> Hashable:
    """Equal for the same value, and for the same views of it taken twice."""
    if isinstance(argument, Call):
        return argument.target, tuple(map(_identity, argument.args))
    if isinstance(argument, fx.Node) and getattr(argument.target, "is_view", False) and not argument.kwargs:
        return argument.target, tuple(map(_identity, argument.args))
    return tuple(argument) if isinstance(argument, list) else argument


RECOGNISER = Rope()
