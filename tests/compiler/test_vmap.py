"""vmap in Dynamo's graph is written out as the operators that it runs, with their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.compiler.test_capture import assert_same_step
from tests.tracing import targets, trace


def product_plus(x: Tensor, w: Tensor) -> Tensor:
    """A step of a scan, on rows."""
    return torch.vmap(lambda row, weight: row * weight + torch.linalg.vecdot(row, weight))(x, w).sum()


def nested(x: Tensor, w: Tensor) -> Tensor:
    return torch.vmap(lambda row: torch.vmap(lambda value: (value * w.sin()).sum())(row))(x).square().sum()


def mutating(x: Tensor, w: Tensor) -> Tensor:
    def row(values: Tensor, weights: Tensor) -> Tensor:
        total = values * 2
        total.mul_(weights)
        return total

    return torch.vmap(row, in_dims=(1, 1), out_dims=1)(x, w).exp().sum()


def between(x: Tensor, w: Tensor) -> Tensor:
    """Two calls, the second on what was made of the first's result."""
    first = torch.vmap(torch.mul)(x, w)
    return torch.vmap(torch.add, in_dims=(0, None))(first[1:].relu(), w[0]).sum()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [product_plus, nested, mutating, between])
def test_vmap_is_written_out(function, dynamic: bool) -> None:
    args = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    assert not [t for t in targets(trace(function, *args, dynamic=dynamic)) if "batch_dim" in t or "nesting" in t]
    assert_same_step(function, *args, dynamic=dynamic)
