"""What the halves of a step allocate on the CPU, against what a plan predicts."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.memory.llama import cut_by
from unsloth.passes.memory.costs import Sizes
from unsloth.passes.memory.joint import Joint
from unsloth.passes.memory.partition import Partitioner
from unsloth.passes.memory.plan import Plan
from unsloth.passes.memory.planner import Planner


class Allocations(TorchDispatchMode):
    """Bytes of the storages that were made since it began and are alive."""

    def __init__(self, standing: set[int]) -> None:
        super().__init__()
        self.readers: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.standing, self.alive, self.peak = standing, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        self.peak = max(self.peak, self.alive)
        return result

    def add(self, tensor: Tensor) -> None:
        at, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if not size or at in self.standing:
            return
        if at not in self.readers:
            self.sizes[at] = size
            self.alive += size
        self.readers[at] = self.readers.get(at, 0) + 1
        weakref.finalize(tensor, self.drop, at)

    def drop(self, at: int) -> None:
        self.readers[at] -= 1
        if not self.readers[at]:
            del self.readers[at]
            self.alive -= self.sizes.pop(at)


class Watching(Partitioner):
    """Plans without modelling fusion, as the interpreter fuses nothing."""

    planner: Planner | None = None

    def choose(self, joint: Joint, gradients: Any) -> Any:
        plan, planner = super().choose(joint, gradients), Planner(joint, gradients, Sizes(), fused=False)
        self.planner = planner.with_inner(plan.inner) or planner
        return plan


def peaks(model: nn.Module, partitioner: Watching, *args: Tensor) -> tuple[int, int, Plan]:
    """Predicted and allocated bytes at the worst moment of a step, without what is there all the time; and the plan."""
    standing = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *args)}
    seen = Allocations(standing)

    def watched(gm: fx.GraphModule) -> Any:
        def run(args: list[Any]) -> Any:
            interpreter = fx.Interpreter(gm)
            with seen:
                return interpreter.boxed_run(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    torch._dynamo.reset()
    torch.compile(model, backend=cut_by(partitioner, run=watched))(*args)[0].backward()
    assert partitioner.planner is not None and partitioner.last_plan is not None
    plan, planner = partitioner.last_plan, partitioner.planner
    timeline = planner.liveness.timeline((planner.by_name[name] for name in plan.saved), (), plan.rows)
    return timeline.peak - timeline.standing.total, seen.peak, plan
