"""A plan changes memory and time, never numbers: losses and gradients are the same bits under every budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor.compile_fx import compile_fx

from tests.memory.llama import Model, assert_same_bits, cut_by, gradients, ids
from unsloth.passes.memory.partition import Partitioner

LENGTH = 96


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _budgets(model: Model) -> list[int | None]:
    """Everything, two between, and as little as possible."""
    peaks = []
    for policy in ("keep", "recompute"):
        torch._dynamo.reset()
        partitioner = Partitioner(policy=policy, strict=True)
        gradients(torch.compile(model, backend=cut_by(partitioner)), model, ids(length=LENGTH))
        assert partitioner.last_plan is not None
        peaks.append(partitioner.last_plan.peak_bytes)
    most, least = peaks
    return [None, least + (most - least) * 2 // 3, least + (most - least) // 3, 0]


def test_graphs_run_as_they_are() -> None:
    model = Model(layers=4)
    results, plans = [], []
    for budget in _budgets(model):
        torch._dynamo.reset()
        partitioner = Partitioner(budget, strict=True)
        run = torch.compile(model, backend=cut_by(partitioner))
        results.append(gradients(run, model, ids(length=LENGTH)))
        plans.append(partitioner.last_plan)
        assert plans[-1] is not None and (not budget or plans[-1].peak_bytes <= budget)
    assert len({tuple(p.kept) for p in plans}) == 4  # four plans, not one
    assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_through_inductor_with_dropout() -> None:
    model = Model(layers=2, p=0.3).to(torch.bfloat16)
    results: list[Any] = []
    for budget in _budgets(model)[::3]:
        torch._dynamo.reset()
        partitioner = Partitioner(budget, strict=True)
        patches = {"custom_partitioner_fn": partitioner, "emulate_precision_casts": True}
        run = torch.compile(model, backend=lambda gm, xs, p=patches: compile_fx(gm, xs, config_patches=p))
        results.append(gradients(run, model, ids(length=LENGTH)))
    assert_same_bits(results[1], results[0])
