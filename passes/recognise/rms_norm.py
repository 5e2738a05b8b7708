"""RMSNorm, in the three places where models round: y = x · rsqrt(mean(x²) + eps) · weight.

The spellings differ only in where the result returns to the input's dtype, and whether the weight is stored around
zero; in float32, where nothing is rounded, they are one.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ...kernels.rms_norm import rms_norm
from ..pattern import (
    PRODUCTS,
    Found,
    Pattern,
    capture,
    cast,
    either,
    is_cast,
    match,
    mean,
    number,
    rsqrt,
    sqrt,
    square,
)
from ..rewrite import Match, Miss, value

x, weight, eps = capture("x"), capture("weight"), number("eps")
xf = cast(x)
variance = mean(square(xf)) + eps
normed = either(xf * rsqrt(variance), xf / sqrt(variance))

RMS_NORM: dict[str, Pattern] = {
    "zero-centred weight": cast(normed * (cast(weight) + 1)),  # Gemma
    "round, then scale": weight * cast(normed),  # Llama
    "scale, then round": cast(cast(weight) * normed),  # OLMo 2, T5
}
# Fewer nodes than this have matched by chance: a product with a root in it.
_CLOSE = 4


class RmsNorm:
    """Finds root-mean-square normalisation."""

    name = "rms_norm"

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        taken: set[fx.Node] = set()
        results: list[Match | Miss] = []
        for node in reversed(graph.nodes):  # the outermost conversion belongs to the norm, so it is met first
            if node in taken or not (is_cast(node) or node.target in PRODUCTS):
                continue
            found = match(RMS_NORM, node)
            if isinstance(found, Found):
                taken |= found.interior
                results.append(_match(node, found))
            elif found.how_far >= _CLOSE:
                taken |= set(node.all_input_nodes)  # the same near miss without its outermost step
                results.append(found)
        yield from reversed(results)


def _match(node: fx.Node, found: Found) -> Match | Miss:
    hidden = value(found["x"]).shape[-1]
    shape = value(found["weight"]).shape
    if len(shape) != 1 or shape[0] != hidden:
        reason = f"the weight's shape {tuple(shape)} is not the last dimension of x"
        return Miss(reason, node, None, len(found.interior))
    offset = 1.0 if found.variant == "zero-centred weight" else 0.0
    round_first = found.variant == "round, then scale"
    args = (found["x"], found["weight"], found["eps"], offset, round_first)
    return Match(rms_norm, args, {node: 0}, found.interior, found.variant)


RECOGNISER = RmsNorm()
