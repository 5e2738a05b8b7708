"""Whatever the plan, the memory floor keeps no unpacked 4-bit weight, and no two are alive at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx

from tests.memory.llama import cut_by
from tests.qlora import LAYERS, PRODUCTS, adapter_gradients, batch, qlora
from unsloth.compiler.capture import retrace
from unsloth.compiler.options import Options
from unsloth.compiler.run import compiled
from unsloth.passes.memory.joint import base
from unsloth.passes.memory.partition import Partitioner
from unsloth.passes.recognise import RECOGNISERS, nf4
from unsloth.passes.rewrite import Recogniser
from unsloth.passes.runner import run_passes

UNPACK = torch.ops.unsloth.nf4_dequantize.default


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("recognisers", [(nf4.RECOGNISER,), RECOGNISERS], ids=["products", "with adapters"])
def test_backward_unpacks_again(policy: str, recognisers: Sequence[Recogniser]) -> None:
    partitioner, halves = Partitioner(policy=policy, strict=True), {}
    cut = cut_by(partitioner, halves)

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graph, _ = run_passes(retrace(gm), recognisers, strict=True)
        return cut(graph, example_inputs)

    torch._dynamo.reset()
    model = qlora()
    actual = adapter_gradients(torch.compile(model, backend=backend), model, batch())
    expected = adapter_gradients(model, model, batch())
    assert all((actual[n] - g).norm() <= 1e-5 * g.norm() for n, g in expected.items())
    saved = [n for n in _outputs(halves["forward"]) if isinstance(n, fx.Node)]
    assert [n for n in saved if base(n).target is UNPACK] == []
    assert partitioner.last_plan is not None and partitioner.last_plan.policy == policy
    for half in halves.values():
        _assert_one_at_a_time(half.graph)
    assert len(_unpacked(halves["forward"].graph)) == PRODUCTS * LAYERS
    # The first three products have no gradient to compute: what they multiply comes from the frozen embedding.
    assert len(_unpacked(halves["backward"].graph)) >= PRODUCTS * LAYERS - 3


def test_through_inductor() -> None:
    torch._dynamo.reset()
    model, reports = qlora(num_hidden_layers=1), []
    run = compiled(model, Options.parse({"strict": True}, passes=[]), reports)
    run(**batch()).loss.backward()
    (report,) = reports
    plan = report.partitioner.last_plan
    assert [name for name in plan.kept if "nf4" in name] == []
    assert [name for name in plan.recomputed if "nf4" in name] and plan.policy == "keep"


def _outputs(gm: fx.GraphModule) -> tuple[Any, ...]:
    (output,) = gm.graph.find_nodes(op="output")
    return output.args[0]


def _unpacked(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=UNPACK)


def _assert_one_at_a_time(graph: fx.Graph) -> None:
    """Each weight has been used for the last time when the next is unpacked, but for those of one operator."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    weights = _unpacked(graph)
    assert all(a.op == "placeholder" for w in weights for a in w.all_input_nodes)
    last = {node: max(order[user] for user in node.users) for node in order if node.users}
    for node in reversed(order):  # a view is used as long as what is made of it is
        if node.users and node.target is not UNPACK and base(node).target is UNPACK:
            last[base(node)] = max(last[base(node)], last[node])
    for weight, following in itertools.pairwise(weights):
        together = {*weight.users} & {*following.users}
        assert last[weight] < order[following] or together, (weight, following)
