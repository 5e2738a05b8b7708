"""Values that wait in host memory: the same numbers, a smaller peak, and copies where the schedule wants them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code

from tests.memory.llama import Model, cut_by, gradients, ids
from unsloth.kernels.pinned import whole_pages
from unsloth.passes.memory.costs import Sizes
from unsloth.passes.memory.liveness import Timeline
from unsloth.passes.memory.partition import Partitioner
from unsloth.passes.memory.plan import Plan, Tag
from unsloth.passes.memory.planner import Planner

LAYERS = 20
LENGTH = 128
BOUNDARY = 2 * LENGTH * 32 * 4  # bytes of what crosses the border of a layer


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Away(Partitioner):
    """What crosses the borders of layers in host memory, or everything that may be, whatever it costs."""

    link: float | None = None
    everything = False

    def choose(self, joint: Any, gradients: Sequence[Any]) -> Plan:
        sizes = Sizes()
        sizes.device = replace(sizes.device, link=self.link or sizes.device.link)
        other = Planner(joint, gradients, sizes).offloading(self.host)
        assert other is not None
        sent = range(other.unsent, len(other.choices[0]))
        rank = max(sent, key=lambda rank: other.choices[0][rank].host) if self.everything else other.unsent
        plan, self.last_timeline = other.price(other.assembled([rank] * len(other.layers)))
        return plan


def run(model: Model, partitioner: Partitioner, seen: dict[str, Any] | None = None) -> tuple[Any, Plan, Timeline]:
    torch._dynamo.reset()
    found = gradients(torch.compile(model, backend=cut_by(partitioner, seen)), model, ids(length=LENGTH))
    assert partitioner.last_plan is not None and partitioner.last_timeline is not None
    return found, partitioner.last_plan, partitioner.last_timeline


def assert_same_bits(ours: Any, expected: Any) -> None:
    assert ours[0] == expected[0] and ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0 and torch.equal(ours[1][name], gradient), name


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
    calls = {kind: _calls(gm) for kind, gm in seen.items()}
    assert [n.args[0].name for n in calls["forward"]["offload"]] == plan.offloaded
    fetched = [n.args[1].name for n in calls["backward"]["fetch"]]
    assert fetched == plan.offloaded[::-1]  # backward begins with the last layer
    assert [n.args[1].name for n in calls["backward"]["prefetch"]] == fetched[-len(calls["backward"]["prefetch"]) :]
    assert all(n.args[2] in calls["backward"]["prefetch"] for n in calls["backward"]["fetch"][1:])


def _calls(gm: fx.GraphModule) -> dict[str, list[Any]]:
    """Our copies in a graph, by name."""
    found: dict[str, list[Any]] = {"offload": [], "settle": [], "prefetch": [], "fetch": []}
    for node in gm.graph.nodes:
        if "unsloth_launch" in str(node.target) and node.target._opname in found:
            found[node.target._opname].append(node)
    return found


def test_everything_may_wait_there_with_the_same_numbers() -> None:
    """Each value leaves once, is held until its copy is done, and comes back before it is read."""
    model = Model(layers=4)
    expected, kept, _ = run(model, Partitioner(policy="keep", host=0))
    seen: dict[str, Any] = {}
    partitioner = Away(host=1 << 30)
    partitioner.everything = True
    found, plan, timeline = run(model, partitioner, seen)
    assert_same_bits(found, expected)
    sent, back = _calls(seen["forward"]), _calls(seen["backward"])
    assert len(plan.offloaded) == len(sent["offload"]) == len(sent["settle"]) == len(back["fetch"]) > 3 * 4
    order = {n: i for i, n in enumerate(seen["forward"].graph.nodes)}
    for copy, done in zip(sent["offload"], sent["settle"], strict=True):
        assert done.args[1:] == (copy, copy.args[0]) and order[copy] < order[done]
        assert max(order[u] for u in copy.args[0].users) == order[done] or order[done] > order[copy]
    order = {n: i for i, n in enumerate(seen["backward"].graph.nodes)}
    for fetched in back["fetch"]:
        reads = [order[u] for u in fetched.users]
        assert min(reads) > order[fetched] > order.get(fetched.args[2], -1)
    assert plan.host_bytes == kept.saved_bytes - plan.saved_bytes or plan.host_bytes > kept.saved_bytes // 2
    assert timeline.peak < kept.peak_bytes


def test_host_memory_limits_what_waits_there() -> None:
    _, plan, _ = run(Model(layers=LAYERS), Partitioner(0, host=5 * whole_pages(BOUNDARY) + 1))
    assert len(plan.offloaded) == 5


def test_a_budget_that_everything_fits_in_uses_no_host_memory() -> None:
    _, plan, _ = run(Model(layers=4), Partitioner(1 << 40, host=1 << 30))
    assert plan.policy == "keep" and not plan.offloaded


def test_the_link_is_waited_for_where_arithmetic_does_not_hide_it() -> None:
    seconds = {}
    for link in (1e6, 1e15):
        partitioner = Away(host=1 << 30)
        partitioner.link = link
        seconds[link] = run(Model(layers=4), partitioner)[1].seconds
    assert seconds[1e6] - seconds[1e15] == pytest.approx(2 * 3 * BOUNDARY / 1e6, rel=0.05)


def test_inductor_leaves_the_copies_where_they_were_put() -> None:
    """A value leaves right after it is made; it is fetched in its layer's turn, not at backward's start."""
    model = Model(layers=3)

    def through(partitioner: Partitioner) -> Any:
        torch._dynamo.reset()
        patches = {"custom_partitioner_fn": partitioner, "emulate_precision_casts": True}
        compiled = torch.compile(model, backend=lambda gm, xs: compile_fx(gm, xs, config_patches=patches))
        return gradients(compiled, model, ids(length=LENGTH))

    partitioner = Away(host=1 << 30)
    partitioner.everything = True
    with torch._inductor.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        (loss, found), (forward, backward) = run_and_get_code(lambda: through(partitioner))
    eager_loss, expected = gradients(model, model, ids(length=LENGTH))
    assert abs(loss - eager_loss) <= 1e-6 * abs(eager_loss) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert partitioner.last_plan is not None
    ours_or_products = r"(?<== torch\.ops\.unsloth_launch\.)\w+|extern_kernels\.mm"
    sent, back = (re.findall(ours_or_products, code) for code in (forward, backward))
    count = len(partitioner.last_plan.offloaded)
    assert Counter(sent)["offload"] == Counter(sent)["settle"] == Counter(back)["fetch"] == count
    assert 0 < Counter(back)["prefetch"] <= count
    for calls, kind in ((sent, "offload"), (sent, "settle"), (back, "prefetch"), (back, "fetch")):
        places = [i for i, call in enumerate(calls) if call == kind]
        assert places[-1] - places[0] > len(calls) // 3, (kind, calls)  # spread over the layers, not all at one end
