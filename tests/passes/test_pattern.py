"""The pattern language: what each word matches, how it backtracks, and what it says when it fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from tests.tracing import trace
from unsloth.passes.pattern import Found, Pattern, any_of, capture, cast, function, match, neg, number, widened
from unsloth.passes.rewrite import Miss
from unsloth.passes.search import search
from unsloth.passes.vocabulary import cat, gelu, mean, rsqrt, silu, square, view

aten = torch.ops.aten
x, y, n = capture("x"), capture("y"), number("n")


def result_of(computation, *inputs: Tensor) -> fx.Node:
    """The node that computes a function's only result."""
    (output,) = (n for n in trace(computation, *inputs).graph.nodes if n.op == "output")
    return output.args[0][0]


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (2, 6), dtype=dtype)


def found(pattern: Pattern, computation, *inputs: Tensor) -> Found:
    result = match({"it": pattern}, result_of(computation, *inputs))
    assert isinstance(result, Found), result
    return result


def missed(pattern: Pattern, computation, *inputs: Tensor) -> Miss:
    result = match({"it": pattern}, result_of(computation, *inputs))
    assert isinstance(result, Miss), result
    return result


WORDS = {
    "sum": (x + y, lambda x, y: x + y),
    "difference": (x - y, lambda x, y: x - y),
    "product": (x * y, lambda x, y: x * y),
    "quotient": (x / y, lambda x, y: x / y),
    "power": (x**3 * y, lambda x, y: x**3 * y),
    "negation": (-x * y, lambda x, y: -x * y),
    "literals": (1 + x * 0.5, lambda x, y: 1 + 0.5 * x),
    "square of a power": (square(x), lambda x, y: x.pow(2)),
    "square of a product": (square(x), lambda x, y: x * x),
    "square itself": (square(x), lambda x, y: torch.square(x)),
    "inverse root": (rsqrt(x), lambda x, y: torch.rsqrt(x)),
    "inverse root of a power": (rsqrt(x), lambda x, y: x**-0.5),
    "silu": (silu(x), lambda x, y: torch.nn.functional.silu(x)),
    "silu written out": (silu(x), lambda x, y: torch.sigmoid(x) * x),
    "gelu": (gelu(x, "tanh"), lambda x, y: torch.nn.functional.gelu(x, approximate="tanh")),
    "mean": (mean(x), lambda x, y: x.mean(1, keepdim=True)),
    "halves": (cat(-x[n:], x[:n]), lambda x, y: torch.cat((-x[..., 3:], x[..., :3]), dim=-1)),
    "chunks": (cat(-x[n:], x[:n]), lambda x, y: torch.cat((-x.chunk(2, 1)[1], x.chunk(2, 1)[0]), dim=1)),
    "steps": (x[1::2], lambda x, y: x[:, 1::2]),
    "optional view": ((x | view(x)) * y, lambda x, y: x.view(-1, 3) * y.view(-1, 3)),
}


@pytest.mark.parametrize(("pattern", "computation"), WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_words(pattern: Pattern, computation, dynamic: bool) -> None:
    inputs = tensor(), tensor()
    for i in inputs if dynamic else ():
        torch._dynamo.mark_dynamic(i, 0)
    assert found(pattern, computation, *inputs).variant == "it"


def test_captures_are_bound_and_not_consumed() -> None:
    result = found(x + y * n, lambda a, b: a + b * 2.0, tensor(), tensor())
    assert (result["x"].target, result["y"].target, result["n"]) == ("L_a_", "L_b_", 2.0)
    assert {node.target for node in result.interior} == {aten.add.Tensor, aten.mul.Tensor}


def test_commuted_operands_are_tried_again_when_a_choice_fails_later() -> None:
    # The sum can be split two ways, and only the second makes y the same value on both sides.
    result = found((x + y) * -y, lambda a, b: (a + b) * -a, tensor(), tensor())
    assert (result["x"].target, result["y"].target) == ("L_b_", "L_a_")


def test_values_may_have_several_users() -> None:
    result = found(square(x) + mean(square(x)), lambda a: (s := a * a) + s.mean(-1, True), tensor())
    assert len(result.interior) == 3


def test_a_capture_can_name_a_part() -> None:
    assert found(capture("part", -x) * y, lambda a, b: -a * b, tensor(), tensor())["part"].target is aten.neg.default


def test_casts_may_be_there_and_are_recorded() -> None:
    low = tensor(dtype=torch.bfloat16)
    pattern = cast(-cast(x))
    there = found(pattern, lambda a: (-a.float()).to(torch.bfloat16), low)
    assert set(there.casts.values()) == {torch.float32, torch.bfloat16}
    assert there["x"].op == "placeholder"
    assert found(pattern, lambda a: -a, low).casts == {}
    assert len(found(pattern, lambda a: (-a.float()).type_as(a), low).casts) == 2


def test_widened_does_not_cross_a_lossy_conversion() -> None:
    assert found(-widened(x), lambda a: -a.float(), tensor(dtype=torch.bfloat16))["x"].op == "placeholder"
    assert found(-widened(x), lambda a: -a.bfloat16(), tensor())["x"].op == "call_function"
    assert found(-widened(x), lambda a: -a.bfloat16(), tensor(dtype=torch.float16))["x"].op == "call_function"


def test_conversions_of_integers_are_computations() -> None:
    assert found(-cast(x), lambda a: -a.float(), torch.arange(3))["x"].op == "call_function"


MISSES = {
    "repeated": (x * square(x), lambda a, b: a * b.pow(2), "x is not the same value twice"),
    "number": (x + n, lambda a, b: a + b, "n is not a number"),
    "two numbers": (x * n + n, lambda a, b: a * 2.0 + 3.0, "n is not the same number twice"),
    "literal": (x * 2, lambda a, b: a * 3.0, "expected 2, found 3.0"),
    "tensor": (x * y, lambda a, b: a * 3.0, "y is not a tensor"),
    "operator": (-(x * y), lambda a, b: -(a + b), "expected mul, found add"),
    "input": (neg(neg(x)), lambda a, b: -a, "expected neg, found an input of the graph"),
    "factor": (x + y, lambda a, b: torch.add(a, b, alpha=2), "add has alpha=2"),
    "axis": (mean(x), lambda a, b: a.mean(0, keepdim=True), "not over the last dimension alone"),
    "lost dimension": (mean(x), lambda a, b: a.mean(-1), "does not keep its dimension"),
    "mean type": (mean(x), lambda a, b: a.mean(-1, True, dtype=torch.float64), "changes the dtype"),
    "other dimension": (cat(x, y), lambda a, b: torch.cat((a, b), 0), "not along the last dimension"),
    "parts": (cat(x, y), lambda a, b: torch.cat((a, b, a), 1), "expected 2 parts"),
    "rows": (-x[:3], lambda a, b: -a[:1], "expected a part of the last dimension"),
    "form": (gelu(x, "tanh"), lambda a, b: torch.nn.functional.gelu(a), "gelu has approximate=none, not tanh"),
}


@pytest.mark.parametrize(("pattern", "computation", "reason"), MISSES.values(), ids=MISSES)
def test_misses_say_why_and_where(pattern: Pattern, computation, reason: str) -> None:
    miss = missed(pattern, computation, tensor(), tensor())
    assert reason in miss.reason
    assert miss.source_line and miss.source_line.startswith("test_pattern.py:")


def test_the_deepest_dead_end_is_the_explanation() -> None:
    patterns = {"shallow": neg(x), "deep": x * rsqrt(mean(square(y)))}
    node = result_of(lambda a: a * torch.rsqrt(a.pow(3).mean(-1, True)), tensor())
    miss = match(patterns, node)
    assert isinstance(miss, Miss) and miss.reason == "pow has exponent=3, not 2" and miss.how_far == 4


def test_where_asks_for_more_and_lets_the_search_go_on() -> None:
    def is_wide(node: fx.Node, found: Found) -> str | None:
        return None if found["y"].meta["val"].dim() == 2 else "y is narrow"

    result = found((x * y).where(is_wide), lambda a, b: a * b, tensor(), tensor(6))
    assert result["y"].target == "L_a_"
    assert missed((x * y).where(is_wide), lambda a, b: a * b, tensor(6), tensor(6)).reason == "y is narrow"


def test_a_new_function_is_one_line() -> None:
    softplus = function("softplus", aten.softplus.default)
    assert found(softplus(x), lambda a: torch.nn.functional.softplus(a), tensor())["x"].op == "placeholder"
    miss = missed(softplus(x), lambda a: torch.nn.functional.softplus(a, beta=2.0), tensor())
    assert miss.reason == "softplus has beta=2.0"


def test_search_is_outermost_first_and_reports_each_heart_once() -> None:
    def computation(a: Tensor) -> Tensor:
        return a.exp().neg().neg() + a.exp().sigmoid() * 2.0

    graph = trace(computation, tensor()).graph
    exp, sigmoid = function("exp", aten.exp.default), function("sigmoid", aten.sigmoid.default)
    patterns = {"once": -exp(x), "twice": neg(neg(exp(x))), "gated": x * sigmoid(exp(x))}
    results = list(search(graph, patterns, heart=frozenset({aten.exp.default}), close=2))
    matches = [result for result in results if isinstance(result, tuple)]
    assert [f.variant for _, f in matches] == ["twice"]
    (miss,) = (result for result in results if isinstance(result, Miss))
    assert "x is not" in miss.reason


def test_shared_conversions_and_views_stay_outside() -> None:
    low = tensor(dtype=torch.bfloat16)
    graph = trace(lambda a: (-(w := a.float()), w + 1), low).graph
    ((_, alone),) = search(graph, {"it": -widened(x)}, heart=frozenset(), close=1)
    assert {node.target for node in alone.interior} == {aten.neg.default}
    graph = trace(lambda a: -a.float(), low).graph
    ((_, whole),) = search(graph, {"it": -widened(x)}, heart=frozenset(), close=1)
    assert len(whole.interior) == 2


def test_formulas_know_what_they_may_begin_with() -> None:
    products = {aten.mul.Tensor, aten.mul.Scalar}
    assert any_of([(x * y).where(lambda node, found: None)]) == products
    assert any_of([x * y, capture("sum", x + y)]) == products | {aten.add.Tensor, aten.add.Scalar}
    assert products < (any_of([cast(x * y)]) or set())
    for anything in (x, cast(x), x | x * y, x[1:]):
        assert any_of([x * y, anything]) is None
