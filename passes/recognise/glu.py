"""Gated linear units (arXiv:2002.05202): the activation of one projection times the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ...kernels.glu import geglu, swiglu
from ..pattern import Found, Pattern, capture, cast, number, widened
from ..rewrite import Match, Miss, value
from ..search import search
from ..soundness import same_sizes
from ..vocabulary import gelu, sigmoid, silu, tanh

aten = torch.ops.aten


def gated(activation: Pattern) -> Pattern:
    return cast(cast(activation) * widened(up)).where(is_elementwise)


def is_elementwise(node: fx.Node, found: Found) -> str | None:
    result, gate, up = value(node), value(found["gate"]), value(found["up"])
    if not same_sizes(gate.shape, up.shape):
        return f"gate {tuple(gate.shape)} and up {tuple(up.shape)} have different shapes"
    return None if result.dtype == gate.dtype else f"the result is {result.dtype} and gate is {gate.dtype}"


gate, up = capture("gate"), capture("up")
g = widened(gate)

GLU = {
    "swiglu": gated(silu(g)),
    "geglu": gated(gelu(g, "none")),
    "geglu tanh": gated(gelu(g, "tanh") | 0.5 * g * (1 + tanh(0.7978845608 * (g + 0.044715 * g**3)))),
}
NEAR = {"the gelu is in its sigmoid form, x · sigmoid(1.702 x)": g * sigmoid(number("slope") * g) * up}


class Glu:
    """Finds gated linear units."""

    name = "glu"

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        activations = frozenset({aten.silu.default, aten.gelu.default, aten.sigmoid.default})
        for result in search(graph, GLU, heart=activations, close=2, near=NEAR):
            yield result if isinstance(result, Miss) else _match(*result)


def _match(node: fx.Node, found: Found) -> Match:
    operator, extra = (swiglu, ()) if found.variant == "swiglu" else (geglu, (found.variant == "geglu tanh",))
    return Match(operator, (found["gate"], found["up"], *extra), {node: 0}, found.interior, found.variant)


RECOGNISER = Glu()
