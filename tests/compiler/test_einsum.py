"""Einstein sums become products where they are products; values, gradients and strides are torch's."""

from __future__ import annotations

import pytest
import torch

from tests.tracing import dynamo_graph, targets, trace
from unsloth.compiler.capture import retrace
from unsloth.passes.rewrite import value

SIZES = {"b": 2, "h": 3, "q": 5, "k": 7, "d": 4, "e": 6}
PRODUCTS = [
    "bqhd,bkhd->bhqk",
    "bhqd,bhkd->bhqk",
    "bhqk,bkhd->bqhd",
    "b h q k, b h k d -> b q h d",
    "qd,dk->kq",
    "bqd,bdk->bkq",
    "bhqd,bkhd->bkhq",
    "qbd,bdk->qbk",
]


def operands(equation: str) -> list[torch.Tensor]:
    words = equation.replace(" ", "").partition("->")[0].split(",")
    return [torch.randn([SIZES[x] for x in word], dtype=torch.float64, requires_grad=True) for word in words]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("equation", PRODUCTS)
def test_products(equation: str, dynamic: bool) -> None:
    given = operands(equation)

    def function(*tensors):
        return torch.einsum(equation, *tensors)

    gm = trace(function, *given, dynamic=dynamic)
    assert "einsum" not in targets(gm) and targets(gm).count("matmul") == 1
    run = torch.compile(function, backend=lambda g, _: retrace(g), dynamic=dynamic, fullgraph=True)
    ours, theirs = run(*given), function(*given)
    torch.testing.assert_close(ours, theirs)
    assert ours.stride() == theirs.stride()
    weight = torch.randn_like(theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, given, weight), torch.autograd.grad(theirs, given, weight))


@pytest.mark.parametrize(
    "equation", ["bqd,dk->bqk", "bq,bk->bqk", "bqd,bqd->b", "bhq,bhq->bh", "bqhd,hde->bqe", "qq->q", "b...,b...->...b"]
)
def test_other_sums_stay(equation: str) -> None:
    plain = [torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)]
    given = plain if "..." in equation else operands(equation)
    gm = trace(lambda *tensors: torch.einsum(equation, *tensors), *given)
    assert "einsum" in targets(gm)
    torch.testing.assert_close(gm(*given)[0], torch.einsum(equation, *given))


def test_broadcast_sizes_stay() -> None:
    a, b = torch.randn(1, 3, 4, requires_grad=True), torch.randn(2, 5, 4)
    gm = trace(lambda a, b: torch.einsum("bqd,bkd->bqk", a, b), a, b)
    assert "einsum" in targets(gm)


def test_the_field_s_spelling() -> None:
    graph = retrace(dynamo_graph(lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k), *operands("bhqd,bhkd->bhqk")))
    assert targets(graph) == ["transpose", "matmul"]
    (product,) = (n for n in graph.graph.nodes if n.target is torch.ops.aten.matmul.default)
    assert value(product).shape == (2, 3, 5, 7)
