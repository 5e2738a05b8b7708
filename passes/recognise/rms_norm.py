"""RMSNorm (arXiv:1910.07467): y = x · rsqrt(mean(x²) + eps) · weight, in the three places where models round.

The spellings differ only in where the result returns to the input's dtype, and in whether the weight is stored around
zero; in float32, where nothing is rounded, they are one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ...kernels.rms_norm import rms_norm
from ..pattern import Found, capture, cast, function, number, widened
from ..rewrite import Match, Miss, value
from ..search import search
from ..vocabulary import mean, rsqrt, sqrt, square

aten = torch.ops.aten
library_rms_norm = function("rms_norm", aten.rms_norm.default)


def rounds_first(node: fx.Node, found: Found) -> str | None:
    if value(found["rounded"]).dtype == value(found["x"]).dtype:
        return None
    return f"it is scaled in {value(found['rounded']).dtype} and not rounded to x's {value(found['x']).dtype}"


def rounds_last(node: fx.Node, found: Found) -> str | None:
    if value(node).dtype == value(found["x"]).dtype:
        return None
    return f"the result is {value(node).dtype} and x is {value(found['x']).dtype}"


x, weight, eps = capture("x"), capture("weight"), number("eps")
xf = widened(x)
variance = mean(square(xf)) + eps
normed = xf * rsqrt(variance) | xf / sqrt(variance)

RMS_NORM = {
    "zero-centred weight": cast(normed * (1 + widened(weight))).where(rounds_last),
    "round, then scale": (weight * capture("rounded", cast(normed))).where(rounds_first),
    "scale, then round": cast(widened(weight) * normed).where(rounds_last),
    "torch.rms_norm": library_rms_norm(x, [number("width")], weight, eps),
}
NEAR = {"nothing scales the normalised value: there is no weight": normed}


class RmsNorm:
    """Finds root-mean-square normalisation."""

    name = "rms_norm"

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        for result in search(graph, RMS_NORM, heart=frozenset({aten.rsqrt.default}), close=3, near=NEAR):
            yield result if isinstance(result, Miss) else _match(*result)


def _match(node: fx.Node, found: Found) -> Match:
    offset = 1.0 if found.variant == "zero-centred weight" else 0.0
    args = (found["x"], found["weight"], found["eps"], offset, found.variant == "round, then scale")
    return Match(rms_norm, args, {node: 0}, found.interior, found.variant)


RECOGNISER = RmsNorm()
