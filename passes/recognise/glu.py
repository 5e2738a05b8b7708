"""Gated linear units: SwiGLU and GEGLU, the activation of one half times the other (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ...kernels.glu import geglu, swiglu
from ..pattern import PRODUCTS, Found, Pattern, capture, gelu, match, silu
from ..rewrite import Match, Miss, value
from ..soundness import same_sizes

gate, up = capture("gate"), capture("up")

GLU: dict[str, Pattern] = {
    "swiglu": silu(gate) * up,
    "geglu": gelu(gate, "none") * up,
    "geglu tanh": gelu(gate, "tanh") * up,
}


class Glu:
    """Finds gated linear units."""

    name = "glu"

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        for node in graph.nodes:
            if node.target in PRODUCTS and isinstance(found := match(GLU, node), Found):
                yield _match(node, found)


def _match(node: fx.Node, found: Found) -> Match | Miss:
    gate, up = value(found["gate"]), value(found["up"])
    if not same_sizes(gate.shape, up.shape):
        reason = f"gate {tuple(gate.shape)} and up {tuple(up.shape)} have different shapes"
        return Miss(reason, node, None, len(found.interior))
    if found.variant == "swiglu":
        return Match(swiglu, (found["gate"], found["up"]), {node: 0}, found.interior, found.variant)
    tanh = found.variant == "geglu tanh"
    return Match(geglu, (found["gate"], found["up"], tanh), {node: 0}, found.interior, found.variant)


RECOGNISER = Glu()
