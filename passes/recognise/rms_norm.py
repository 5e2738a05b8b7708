"""RMSNorm (arXiv:1910.07467): y = x · rsqrt(mean(x²) + eps) · weight, in the three places where models round.

The spellings differ only in where the result returns to the input's dtype, and in whether the weight is stored around
zero; in float32, where nothing is rounded, they are one. What scales the normalised value by anything but a weight per
feature (a gate, a factor per head or position) stays outside: then the norm itself has no weight. The L2 norm, which
divides by the root of the sum, is that norm scaled by a constant.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ...kernels.rms_norm import rms_norm
from ..pattern import Found, capture, cast, function, number, widened
from ..rewrite import Match, Miss, value
from ..search import search
from ..soundness import same_sizes
from ..vocabulary import mean, rsqrt, sqrt, square, sum_of

aten = torch.ops.aten
linear = function("linear", aten.linear.default)
clamp = function("clamp", aten.clamp.default)
library_rms_norm = function("rms_norm", aten.rms_norm.default)


def rounds_first(node: fx.Node, found: Found) -> str | None:
    if value(found["rounded"]).dtype != value(found["x"]).dtype:
        return f"it is scaled in {value(found['rounded']).dtype} and not rounded to x's {value(found['x']).dtype}"
    return scales_features(node, found)


def rounds_last(node: fx.Node, found: Found) -> str | None:
    if value(node).dtype != value(found["x"]).dtype:
        return f"the result is {value(node).dtype} and x is {value(found['x']).dtype}"
    return scales_features(node, found) if "weight" in found.captures else None


def scales_features(node: fx.Node, found: Found) -> str | None:
    shape, width = value(found["weight"]).shape, value(found["x"]).shape[-1]
    if same_sizes(shape, (width,)):
        return None
    return f"what scales it has shape {tuple(shape)}, not one value per feature"


def has_known_width(node: fx.Node, found: Found) -> str | None:
    width = value(found["x"]).shape[-1]
    return rounds_last(node, found) if isinstance(width, int) else "the last dimension is symbolic"


x, weight, eps = capture("x"), capture("weight"), number("eps")
xf = widened(x)
by_root_of_mean = mean(square(xf)) + eps
normed = xf * rsqrt(by_root_of_mean) | xf / sqrt(by_root_of_mean)
l2_normed = xf * rsqrt(sum_of(square(xf)) + eps)

RMS_NORM = {
    "zero-centred weight": cast(normed * (1 + widened(weight))).where(rounds_last),
    "round, then scale": (weight * capture("rounded", cast(normed))).where(rounds_first),
    "scale, then round": cast(widened(weight) * normed).where(rounds_last),
    "torch.rms_norm": library_rms_norm(x, [number("width")], weight, eps),
    "without weight": cast(normed).where(rounds_last),
    "L2 norm": cast(l2_normed).where(has_known_width),
}
# A layer norm is none of ours and none that we miss: Inductor makes one kernel of it and of what stands around it.
LAYER_NORM = "the mean is subtracted: a layer norm"
centred = xf - mean(xf)
layer_normed = cast(centred * rsqrt(mean(square(centred)) + eps) | centred / sqrt(mean(square(centred)) + eps))

NEAR = {
    "the projection of x is scaled by x's norm, not x": linear(x, capture("projection")) * rsqrt(by_root_of_mean),
    "x is given the magnitude of another value": xf * capture("magnitude") / sqrt(clamp(mean(square(xf)), eps)),
    LAYER_NORM: weight * layer_normed | layer_normed,
}


class RmsNorm:
    """Finds root-mean-square normalisation."""

    name = "rms_norm"

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        heart = frozenset({aten.rsqrt.default, aten.sqrt.default})
        for result in search(graph, RMS_NORM, heart=heart, close=3, near=NEAR):
            if not isinstance(result, Miss):
                yield _match(*result)
            elif result.reason != LAYER_NORM:
                yield result


def _match(node: fx.Node, found: Found) -> Match:
    rest: tuple[float, float, bool] = found["eps"], 0.0, found.variant == "round, then scale"
    if found.variant in ("zero-centred weight", "without weight"):
        rest = found["eps"], 1.0, False
    elif found.variant == "L2 norm":  # x / sqrt(n mean + eps)
        n = value(found["x"]).shape[-1]
        rest = found["eps"] / n, n**-0.5, False
    args = found["x"], found.captures.get("weight"), *rest
    return Match(rms_norm, args, {node: 0}, found.interior, found.variant)


RECOGNISER = RmsNorm()
