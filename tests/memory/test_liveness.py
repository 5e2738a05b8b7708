"""Predicted peaks against an allocator that counts the bytes of the two halves as they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tests.memory.allocations import Watching
from tests.memory.llama import Model, cut_by, ids


class Counting(fx.Interpreter):
    """Runs a half and frees what is read no more; counts the bytes of storages that are not the caller's."""

    def __init__(self, gm: fx.GraphModule, standing: set[int]) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.standing, self.peak = standing, 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        alive = [*self.env.values(), result]
        storages = {t.untyped_storage() for t in pytree.tree_leaves(alive) if isinstance(t, Tensor)}
        sizes = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}
        self.peak = max(self.peak, sum(size for at, size in sizes.items() if at not in self.standing))
        return result


def peaks(model: nn.Module, budget: int | None, policy: str, *args: Tensor) -> tuple[int, int]:
    """Predicted and counted bytes at the worst moment, without what is there all the time."""
    partitioner, counted = Watching(budget, policy, strict=True), [0]
    standing = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *args)}

    def counting(gm: fx.GraphModule) -> Any:
        def run(*given: Any) -> Any:
            interpreter = Counting(gm, standing)
            result = interpreter.run(*given)
            counted[0] = max(counted[0], interpreter.peak)
            return result

        return make_boxed_func(run)

    torch._dynamo.reset()
    torch.compile(model, backend=cut_by(partitioner, run=counting))(*args)[0].backward()
    assert partitioner.planner is not None and partitioner.last_plan is not None
    planner = partitioner.planner
    timeline = planner.liveness.timeline(planner.by_name[name] for name in partitioner.last_plan.kept)
    return timeline.peak - timeline.standing.total, counted[0]


@pytest.mark.parametrize(("policy", "budget"), [("keep", None), ("recompute", None), ("auto", 2_400_000)])
def test_the_predicted_peak_is_what_the_halves_hold(policy: str, budget: int | None) -> None:
    predicted, counted = peaks(Model(layers=3), budget, policy, ids(length=200))
    assert 0.97 * counted <= predicted <= 1.05 * counted
