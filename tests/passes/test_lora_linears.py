"""Which adapted linear layers become one operator, which stay apart, and that gradients are eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.passes.recognising import LENGTH
from tests.tracing import targets, trace
from unsloth.compiler.capture import retrace
from unsloth.passes.fuse import FUSIONS
from unsloth.passes.recognise import lora_linear, nf4
from unsloth.passes.runner import PassReport, run_passes

PASSES = (nf4.RECOGNISER, lora_linear.RECOGNISER, *FUSIONS)
WIDTH, RANK = 16, 4


class Adapted(nn.Module):
    """As PEFT computes it, B not zero."""

    def __init__(
        self, out: int, *, bias: bool = False, dropout: float = 0.0, adapter: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, out, bias=bias).requires_grad_(False)
        self.A, self.B = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, out, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.A(self.dropout(x))) * 0.5


class Model(nn.Module):
    def __init__(self, count: int, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Adapted(8 * (i + 1), **options) for i in range(count))

    def each(self, x: Tensor) -> list[Tensor]:
        # Each result is used before the next is computed, as a model reshapes its queries before it makes keys.
        return [F.silu(layer(x)) for layer in self.layers]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.each(x), -1)


def compare(
    model: nn.Module, *inputs: Tensor, dynamic: bool = False, tolerance: float = 1e-5
) -> tuple[list[str], PassReport]:
    """What the rewritten graph calls and the fusion's report; outputs and all gradients are eager's."""
    seen: list[tuple[list[str], PassReport]] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> torch.fx.GraphModule:
        result, reports = run_passes(retrace(gm), PASSES, strict=True)
        seen.append((targets(result), reports[-1]))
        return result

    torch._dynamo.reset()
    results = []
    for run in (model, torch.compile(model, backend=backend, fullgraph=True, dynamic=False)):
        leaves = [i.detach().requires_grad_(i.is_floating_point()) for i in inputs]
        if dynamic:
            for leaf in leaves:
                torch._dynamo.mark_dynamic(leaf, 1)
        model.zero_grad()
        result = run(*leaves)
        outputs = result if isinstance(result, tuple) else (result,)
        sum(o.float().square().sum() * (i + 1) for i, o in enumerate(outputs)).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append([*outputs, *(leaf.grad for leaf in leaves), *(p.grad for p in trained)])
    for ours, eagers in zip(*reversed(results), strict=True):
        assert ours.dtype == eagers.dtype and float(eagers.norm()) > 0
        assert float((ours.double() - eagers.double()).norm() / eagers.double().norm()) <= tolerance
    ((calls, report),) = seen
    return calls, report


def x() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("count", "groups"), [(2, [2]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (7, [3, 2, 2]), (1, [])])
def test_layers_that_share_their_input_become_one(count: int, groups: list[int], dynamic: bool) -> None:
    calls, report = compare(Model(count, bias=count == 3), x(), dynamic=dynamic)
    assert [s.detail for s in report.rewritten] == [f"{n} layers" for n in groups] and not report.missed
    assert sum(c.startswith("lora_linears_") for c in calls) == len(groups)
    assert calls.count("lora_linear") == count - sum(groups)


def test_layers_of_other_inputs_stay_apart() -> None:
    class Two(Model):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.layers[0](x), self.layers[1](x + 1)), -1)

    calls, report = compare(Two(2), x())
    assert calls.count("lora_linear") == 2 and not report.rewritten


def test_layers_of_different_results_stay_apart() -> None:
    """As one, the first result would have a gradient with respect to the second layer: of zero, where it had none."""

    class Results(Model):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            a, b, c = self.each(x)
            return torch.cat((a, b), -1), c

    calls, report = compare(Results(3), x())
    assert [s.detail for s in report.rewritten] == ["2 layers"] and calls.count("lora_linear") == 1


def test_a_layer_that_reads_anothers_result_stays_apart() -> None:
    """Both read x, the second also the first: as its bias, which is an argument like the others."""

    class Chained(Model):
        def forward(self, x: Tensor) -> Tensor:
            first, second = self.layers
            base = F.linear(x, second.base.weight, first(x).mean((0, 1))[: second.base.weight.shape[0]].repeat(2))
            return torch.cat((first(x) * 2, base + second.B(second.A(x)) * 0.5), -1)

    calls, report = compare(Chained(2), x())
    assert not any(c.startswith("lora_linears_") for c in calls)
    assert [s.detail for s in report.missed] == ["an output is used before every argument of the operator exists"]


def test_dropout_gives_each_adapter_an_input_of_its_own() -> None:
    graph = trace(Model(3, dropout=0.5), x())
    result, reports = run_passes(graph, PASSES, strict=True)
    assert targets(result).count("lora_linear") == 3 and not reports[-1].rewritten


def test_under_autocast_with_adapters_in_float32() -> None:
    """Each layer converts x and its adapter for itself, after the layers before it have been used."""

    class Autocast(Model):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    model = Autocast(3)
    for layer in model.layers:
        layer.base.to(torch.bfloat16)
    _, report = compare(model, x(), tolerance=2e-2)
    assert [s.detail for s in report.rewritten] == ["3 layers"]


def test_a_mutation_between_the_layers_keeps_them_apart() -> None:
    class Mutating(Model):
        def __init__(self) -> None:
            super().__init__(2)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            first = self.layers[0](x)
            self.seen.add_(1)
            return torch.cat((first, self.layers[1](x) * self.seen), -1)

    model = Mutating()
    graph = trace(model, x())
    if any(n.target is torch.ops.aten.add_.Tensor for n in graph.graph.nodes):
        _, reports = run_passes(graph, PASSES, strict=True)
        assert "spans a mutation" in reports[-1].missed[0].detail
    else:  # functionalised: nothing lies between them
        _, reports = run_passes(graph, PASSES, strict=True)
        assert len(reports[-1].rewritten) == 1
