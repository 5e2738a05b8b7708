"""What a model mutates where autograd or functionalisation does not look is mutated, with eager's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.compiler.test_capture import assert_same_step
from tests.tracing import targets, trace
from unsloth.compiler.backend import compile_graph
from unsloth.compiler.options import Options


class Scattered(torch.autograd.Function):
    """Its backward builds the gradient in place, through a method, an operator and an alias, reading no result."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        total = grad * 3
        total.scatter_add_(-1, index, grad)
        row = total[0]
        row *= 5
        total[1] = 7
        return total, None


def test_mutations_inside_autograd_functions_stay() -> None:
    def function(x, index):
        return Scattered.apply(x * 1, index).sum() * 1

    assert_same_step(function, torch.randn(3, 4, requires_grad=True), torch.tensor([[1], [0], [2]]))


def test_a_dropped_out_value_may_be_mutated() -> None:
    def function(x, p: float):
        y = torch.nn.functional.dropout(x.sin(), p)
        y *= 3
        return y.exp().sum()

    for p in (0.0, 0.5):
        assert_same_step(lambda x, p=p: function(x, p), torch.randn(3, 4, requires_grad=True))
    calls = targets(trace(lambda x: torch.nn.functional.dropout(x, 0.5).sum(), torch.randn(3, requires_grad=True)))
    assert calls == ["dropout", "sum"]


@pytest.mark.parametrize("change", ["add_", "+=", "views"])
def test_what_is_detached_may_be_changed_by_what_is_trained(change: str) -> None:
    """As a table of positions to which a trained embedding is added in place."""

    def function(table, weight):
        places = table.sin().detach()
        if change == "add_":
            places.add_(weight)
            places.mul_(2)
        else:
            places = places.view(4, 3).to(weight.device) if change == "views" else places
            places += weight.view(places.shape)
        return places.exp().sum() + table.sum()

    assert_same_step(function, torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True))


class Clipped(nn.Module):
    """A weight that every step clips in place before it is used, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-3, 3, 12).view(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.weight.sum()
        self.weight.data.clamp_(-1, 1)
        return nn.functional.linear(x, self.weight).sin().sum() + before


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_trained_weight_is_changed_through_its_data(lowering: str, dynamic: bool) -> None:
    def step(module: Clipped, run) -> list[torch.Tensor]:
        loss = run(torch.arange(8.0).view(2, 4))
        loss.backward()
        assert module.weight.grad is not None
        return [loss.detach(), module.weight.grad, module.weight.detach()]

    def backend(gm, inputs):
        return compile_graph(gm, inputs, Options(strict=True, lowering=lowering))

    torch._dynamo.reset()
    eager, ours = Clipped(), Clipped()
    run = torch.compile(ours, backend=backend, dynamic=dynamic, fullgraph=True)
    torch.testing.assert_close(step(ours, run), step(eager, eager))
