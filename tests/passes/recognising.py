"""What the tests of recognisers share: find in a function's graph, rewrite it, compare with eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tests.tracing import targets, trace
from unsloth.compiler.capture import retrace
from unsloth.passes.rewrite import Match, Miss, Recogniser
from unsloth.passes.runner import run_passes

Function = Callable[..., Any]
LENGTH = 5
"""The sequence length of the tests' inputs: ``dynamic`` makes every dimension of this size symbolic."""


def find(recogniser: Recogniser, function: Function, *inputs: Tensor, dynamic: bool = False) -> list[Match | Miss]:
    return list(recogniser.find(trace(function, *_marked(inputs, dynamic)).graph))


def assert_misses(recogniser: Recogniser, function: Function, *inputs: Tensor, because: str) -> Miss:
    """Exactly one near miss, its reason, and a source line in the test that called."""
    (miss,) = find(recogniser, function, *inputs)
    assert isinstance(miss, Miss), f"{miss.variant} was found"
    assert because in miss.reason, miss.reason
    assert miss.source_line and miss.source_line.startswith("test_"), miss.source_line
    return miss


def assert_rewrites(
    recogniser: Recogniser,
    function: Function,
    *inputs: Tensor,
    to: str,
    variant: str | None = None,
    count: int = 1,
    dynamic: bool = False,
    tolerance: float = 1e-5,
    after: Sequence[Recogniser] = (),
) -> None:
    """The function becomes ``count`` operators, behind all soundness checks, with eager's results and gradients.

    ``after`` are passes that run first.
    """
    seen: list[str] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> fx.GraphModule:
        result, (*_, report) = run_passes(retrace(gm), [*after, recogniser], strict=True)
        assert len(report.rewritten) == count and not report.missed, report
        assert variant is None or {s.detail for s in report.rewritten} == {variant}, report
        seen.extend(targets(result))
        return result

    torch._dynamo.reset()
    expected = _outputs_and_gradients(function, inputs)
    compiled = torch.compile(function, backend=backend, dynamic=False, fullgraph=True)
    actual = _outputs_and_gradients(compiled, inputs, dynamic)
    assert seen.count(to) == count, seen
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error <= tolerance, error


def _outputs_and_gradients(function: Function, inputs: Sequence[Tensor], dynamic: bool = False) -> list[Tensor]:
    leaves = _marked([i.detach().requires_grad_(i.requires_grad) for i in inputs], dynamic)
    result = function(*leaves)
    outputs = list(result) if isinstance(result, tuple) else [result]
    torch.manual_seed(1)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, [torch.randn_like(o) for o in outputs])
    return [o.detach() for o in outputs] + list(gradients)


def _marked(inputs: Sequence[Tensor], dynamic: bool) -> Sequence[Tensor]:
    for tensor in inputs:
        for dim, size in enumerate(tensor.shape):
            if dynamic and size == LENGTH:
                torch._dynamo.mark_dynamic(tensor, dim)
    return inputs
