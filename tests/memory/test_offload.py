"""Values that wait in host memory: the same numbers, a smaller peak, and copies where the schedule wants them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.memory.llama import Model, assert_same_bits, code_of_inductor, cut_by, gradients, ids
from unsloth.kernels.pinned import whole_pages
from unsloth.passes.memory.costs import Sizes
from unsloth.passes.memory.partition import Partitioner
from unsloth.passes.memory.plan import Plan, Tag
from unsloth.passes.memory.planner import Planner
from unsloth.passes.memory.timeline import Timeline
from unsloth.passes.runner import CompilerWarning

LAYERS = 20
LENGTH = 128
BOUNDARY = 2 * LENGTH * 32 * 4  # bytes of what crosses the border of a layer


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Away(Partitioner):
    """As little as possible on the device, whatever it costs."""

    def choose(self, joint: Any, gradients: Sequence[Any]) -> Plan:
        other = Planner(joint, gradients, Sizes()).offloading(self.host)
        assert other is not None
        plan, self.last_timeline = other.smallest
        return plan


def run(model: Model, partitioner: Partitioner, seen: dict[str, Any] | None = None) -> tuple[Any, Plan, Timeline]:
    torch._dynamo.reset()
    found = gradients(torch.compile(model, backend=cut_by(partitioner, seen)), model, ids(length=LENGTH))
    assert partitioner.last_plan is not None and partitioner.last_timeline is not None
    return found, partitioner.last_plan, partitioner.last_timeline


def test_a_budget_below_the_floor_of_recomputing_is_met_with_the_same_numbers() -> None:
    model = Model(layers=LAYERS)
    expected, least, _ = run(model, Partitioner(policy="recompute", host=0))
    _, floor, _ = run(model, Partitioner(0, host=1 << 30))
    budget = floor.peak_bytes
    assert budget < least.peak_bytes
    seen: dict[str, Any] = {}
    away, plan, timeline = run(model, Partitioner(budget, strict=True, host=1 << 30), seen)
    assert_same_bits(away, expected)
    assert plan.peak_bytes <= budget
    assert timeline.peak == plan.peak_bytes and plan.host_bytes == len(plan.offloaded) * BOUNDARY
    assert len(plan.offloaded) == LAYERS - 1 and plan.tags[plan.offloaded[0]] is Tag.OFFLOAD
    assert f"offload residuals of {LAYERS - 1} of {LAYERS} layers (0–{LAYERS - 2})" in plan.words
    calls = {kind: [n for n in gm.graph.nodes if "unsloth_launch" in str(n.target)] for kind, gm in seen.items()}
    assert [n.args[0].name for n in calls["forward"]] == plan.offloaded
    fetched = [n.args[1].name for n in calls["backward"]]
    assert fetched == plan.offloaded[::-1]  # backward begins with the last layer
    ahead = [n.args[2].name for n in calls["backward"][:-1]]
    assert ahead == fetched[1:] and calls["backward"][-1].args[2] is None


def test_host_memory_limits_what_waits_there() -> None:
    with pytest.warns(CompilerWarning, match="holds the residuals of 5 layers"):
        _, plan, _ = run(Model(layers=LAYERS), Partitioner(0, host=5 * whole_pages(BOUNDARY) + 1))
    assert len(plan.offloaded) == 5


def test_a_budget_that_everything_fits_in_uses_no_host_memory() -> None:
    _, plan, _ = run(Model(layers=4), Partitioner(1 << 40, host=1 << 30))
    assert plan.policy == "keep" and not plan.offloaded


def test_the_link_is_waited_for_where_arithmetic_does_not_hide_it() -> None:
    seconds = {}
    for link in (1e6, 1e15):

        class Slow(Away):
            def choose(self, joint: Any, gradients: Sequence[Any], link: float = link) -> Plan:
                sizes = Sizes()
                sizes.device = sizes.device.__class__(**{**vars(sizes.device), "link": link})
                planner = Planner(joint, gradients, sizes).offloading(self.host)
                assert planner is not None
                plan, self.last_timeline = planner.smallest
                return plan

        _, plan, _ = run(Model(layers=4), Slow(host=1 << 30))
        seconds[link] = plan.seconds
    assert seconds[1e6] - seconds[1e15] == pytest.approx(2 * 3 * BOUNDARY / 1e6, rel=0.05)


def test_inductor_leaves_the_copies_where_they_were_put() -> None:
    """A value leaves right after it is made; it is fetched in its layer's turn, not at backward's start."""
    model = Model(layers=4)
    (loss, found), (forward, backward) = code_of_inductor(model, Away(host=1 << 30), ids(length=LENGTH))
    eager_loss, expected = gradients(model, model, ids(length=LENGTH))
    # One unit at most: the bits of a product depend on the processor.
    assert math.isclose(loss, eager_loss, rel_tol=torch.finfo(torch.float32).eps)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    ours_or_products = r"(?<== torch\.ops\.)unsloth_launch\.\w+|extern_kernels\.mm"
    order = [re.findall(ours_or_products, code) for code in (forward, backward)]
    for calls, kind in zip(order, ("unsloth_launch.offload", "unsloth_launch.fetch"), strict=True):
        places = [i for i, call in enumerate(calls) if call == kind]
        assert len(places) == 3
        products = len(calls) - 3
        between = [b - a - 1 for a, b in pairwise(places)]
        assert min(between) >= products // 8, calls  # a layer's products lie between its value and the next one's
