"""A toy operator and recogniser: the smallest pass there can be, for tests of the runner and the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from unsloth.kernels.operator import OPERATORS, operator
from unsloth.passes.rewrite import Match, Miss


def _tripled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


def _tripled_backward(grad: torch.Tensor, factor: float, needs: list[bool]) -> tuple[torch.Tensor | None]:
    return (grad * factor if needs[0] else None,)


toy = OPERATORS.get("toy_scale") or operator(
    "toy_scale(Tensor x, float factor) -> (Tensor y)",
    reference=_tripled,
    reference_backward=_tripled_backward,
    forward=_tripled,
    backward=_tripled_backward,
    saves="",
    differentiable="x",
    gradients_of="y",
    supports=lambda x, factor: "only floating point" if not x.dtype.is_floating_point else None,
    flops=lambda x, factor: x.numel(),
    backward_flops=lambda x, factor: x.numel(),
)


class Scale:
    """Recognises ``x * 3.0``; ``change`` may corrupt the match, to see that the runner notices."""

    name = "toy_scale"

    def __init__(self, change: Callable[[Match], Match | Miss] = lambda match: match) -> None:
        self.change = change

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        for node in graph.nodes:
            if node.target is torch.ops.aten.mul.Tensor and node.args[1] == 3.0:
                yield self.change(Match(toy, (node.args[0], 3.0), {node: 0}, frozenset({node})))


class Raising:
    """A pass that always raises."""

    def __init__(self, name: str = "raising") -> None:
        self.name = name

    def find(self, graph: fx.Graph) -> Iterator[Any]:
        raise ValueError("deliberate")
        yield
