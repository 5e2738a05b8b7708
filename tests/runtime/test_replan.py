"""Plans that are made again: for less after running out of memory, for more tokens than the first batch had."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.memory.llama import Model, cut_by, ids
from tests.runtime.test_smaller import make
from tests.runtime.test_trainer import assert_same, history
from unsloth.compiler.options import Options
from unsloth.passes.memory.costs import Sizes
from unsloth.passes.memory.partition import Partitioner
from unsloth.passes.memory.plan import Plan
from unsloth.passes.memory.planner import Planner
from unsloth.runtime import replan
from unsloth.runtime.replan import REPLANS, Replanned

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """Plans as asked, down to a floor, without compiling anything."""

    def __init__(self, floor: int = 0, limit: float = 0, counted: float = 1) -> None:
        """A plan holds ``limit`` times the tokens that it was made for, which are ``counted`` times the batch's."""
        self.floor, self.limit, self.counted, self.budgets = floor, limit, counted, []

    def compiled(self, function: Any, options: Options, reports: list[Any]) -> Any:
        self.budgets.append(options.memory_budget)
        planned: list[Plan] = []

        def run(tokens: int) -> Any:
            if not planned:
                peak = max(self.floor, options.memory_budget or 10 * GIB)
                seen = int(self.counted * tokens)
                planned.append(Plan("mixed", {}, 0, "", peak_bytes=peak, tokens=seen, limit=int(self.limit * seen)))
                reports.append(
                    SimpleNamespace(partitioner=SimpleNamespace(last_plan=planned[0], last_floor=self.floor))
                )
            return function(tokens)

        return run


def replanned(monkeypatch: pytest.MonkeyPatch, backend: Backend, *, there: int | None = None) -> tuple[Any, list[str]]:
    changes: list[str] = []
    monkeypatch.setattr(replan, "compiled", backend.compiled)
    monkeypatch.setattr(replan, "_within_reach", lambda: there)
    step = Replanned(
        lambda tokens: tokens, Options(), [], tokens=lambda tokens: tokens, changed=lambda: changes.append("changed")
    )
    return step, changes


def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Two plans that turn out too large in the middle of a step, the second later than the first; the budgets of those
    that ran."""
    budgets: list[int | None] = []

    def compiled(function: Any, options: Options, reports: list[Any]) -> Any:
        plan = Plan("mixed", {}, 0, "", peak_bytes=options.memory_budget or GIB)
        calls = 0

        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += torch.is_grad_enabled()
            if calls == torch.is_grad_enabled() == 1:
                budgets.append(options.memory_budget)
                reports.append(SimpleNamespace(partitioner=SimpleNamespace(last_plan=plan, last_floor=0)))
            if calls > len(budgets) and len(budgets) < 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
            return function(*arguments, **named)

        return run

    monkeypatch.setattr(replan, "compiled", compiled)
    monkeypatch.setattr(replan, "_within_reach", lambda: None)
    return budgets


def test_less_each_time_until_the_floor(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    step, changes = replanned(monkeypatch, backend := Backend(floor=int(8.5 * GIB)))
    assert not step.for_less()  # nothing was planned yet
    found = []
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert step(5) == 5
            found.append(step.for_less())
    assert found == [True, True, False, False] and step.replans == len(changes) == 2
    assert backend.budgets == [None, 9 * GIB, int(8.5 * GIB)]
    assert "out of memory under a plan for 10.00 GiB: planned again for 9.00 GiB" in caplog.text


def test_three_times_at_most_and_within_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    step, _ = replanned(monkeypatch, backend := Backend(), there=5 * GIB)
    found = []
    for _ in range(5):
        step(1)
        found.append(step.for_less())
    assert found == [True] * REPLANS + [False] * 2
    assert backend.budgets == [
        None,
        *(int(0.9 * budget) for budget in (5 * GIB, backend.budgets[1], backend.budgets[2])),
    ]


def test_a_batch_beyond_the_guard_is_planned_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, changes = replanned(monkeypatch, Backend(limit=1.5))
    with caplog.at_level(logging.WARNING):
        assert [step(tokens) for tokens in (100, 150, 151, 200, 120, 10_000)] == [100, 150, 151, 200, 120, 10_000]
    assert step.grown == len(changes) == 2 and step.limit == 15_000
    assert "a batch of 151 tokens is more than the memory plan was made for, which holds up to 150" in caplog.text
    step, changes = replanned(monkeypatch, Backend(limit=1.02, counted=0.9))  # a policy's graph counts completions
    assert [step(tokens) for tokens in (100, 100, 101)] == [100, 100, 101] and not changes
    assert step(103) == 103 and len(changes) == 1
    step, changes = replanned(monkeypatch, Backend())  # graphs of one size are compiled for each
    assert [step(tokens) for tokens in (1, 100)] == [1, 100] and not changes and step.limit == 0


def test_training_goes_on_with_the_same_numbers(
    tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three plans, then halves: the effective batch, and with it the log, is what it would have been."""
    whole = history(make(tmp_path / "whole", max_steps=2))
    backend, refused = Backend(), []

    def compiled(function: Any, options: Options, reports: list[Any]) -> Any:
        plan = backend.compiled(lambda _: None, options, reports)

        def run(model: Any, inputs: Any, labels: Any, *rest: Any) -> Any:
            plan(labels.numel())
            if len(labels) > 4:
                refused.append(len(labels))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
            return function(model, inputs, labels, *rest)

        return run

    monkeypatch.setattr(replan, "compiled", compiled)
    monkeypatch.setattr(replan, "_within_reach", lambda: None)
    made = make(tmp_path / "short", max_steps=2, more={"options": {"lowering": "eager"}})
    with caplog.at_level(logging.WARNING):
        assert_same(history(made), whole, 1e-5)
    assert refused == [8] * (REPLANS + 1) and made._smaller.parts == 2 and made._step.replans == REPLANS
    assert caplog.text.count("planned again for") == REPLANS and "from now on 4 at a time" in caplog.text


class Watching(Partitioner):
    """Keeps the graph that it planned."""

    seen: tuple[Any, Sequence[Any]] | None = None

    def choose(self, joint: Any, gradients: Sequence[Any]) -> Plan:
        self.seen = joint, gradients
        return super().choose(joint, gradients)


def test_a_plan_holds_up_to_its_guard() -> None:
    """Evaluated at the sizes of the guard, the plan for a smaller batch is within its budget.

    The guard is on the safe side by what does not grow with the tokens: by half here, where weights are larger than
    activations.
    """
    model, batch = Model(layers=3), ids(2, 64)
    fixed = Partitioner(0, host=0)
    torch.compile(model, backend=cut_by(fixed), dynamic=False)(batch)[0].backward()
    assert fixed.last_plan is not None and (fixed.last_plan.tokens, fixed.last_plan.limit) == (128, 0)
    budget = 3 * fixed.last_plan.peak_bytes
    torch._dynamo.reset()
    partitioner = Watching(budget, host=0)
    torch.compile(model, backend=cut_by(partitioner), dynamic=True)(batch)[0].backward()
    plan = partitioner.last_plan
    assert plan is not None and partitioner.seen is not None and 300 < plan.limit < 1 << 20

    def peak(length: int) -> int:
        joint, gradients = partitioner.seen  # type: ignore[misc]
        ints = next(n.meta["val"] for n in joint.forward if n.op == "placeholder" and "int64" in str(n.meta.get("val")))
        planner = Planner(joint, gradients, Sizes(at={str(ints.shape[1]): length}))
        return planner.liveness.timeline(planner.by_name[name] for name in plan.saved).peak

    assert plan.tokens == 128 and 0.4 * budget < peak(plan.limit // 2) <= budget
