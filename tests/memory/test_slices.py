"""Stretches of layers in slices of tokens: what becomes one, eager's gradients, the predicted peak, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import linear

from tests.memory.allocations import Watching, peaks
from tests.memory.llama import Layer, Model, assert_same, cut_by, gradients, ids
from tests.qlora import adapter_gradients, batch, in_float64, qlora
from unsloth.compiler.capture import retrace
from unsloth.kernels.glu import swiglu
from unsloth.kernels.rms_norm import rms_norm
from unsloth.passes.memory import within
from unsloth.passes.memory.costs import Sizes
from unsloth.passes.memory.joint import Joint
from unsloth.passes.memory.partition import Partitioner
from unsloth.passes.memory.planner import Planner
from unsloth.passes.memory.within import fastest_within
from unsloth.passes.recognise import RECOGNISERS
from unsloth.passes.runner import run_passes

ROWS = 128
SLICES = torch.ops.unsloth.by_slices.default


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(within, "ROWS", (ROWS,))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sliced(model: nn.Module, *args: Tensor, backend: Any = None, dynamic: bool | None = None) -> Any:
    """The compiled model under the smallest plan, its partitioner and its halves."""
    partitioner, halves = Partitioner(0, strict=True), {}
    cut = cut_by(partitioner, halves)
    run = torch.compile(model, backend=backend(cut) if backend else cut, dynamic=dynamic)
    return run, partitioner, halves


def calls(half: fx.GraphModule) -> int:
    return len(half.graph.find_nodes(op="call_function", target=SLICES))


def recognised(cut: Callable[..., Any]) -> Callable[..., Any]:
    """A backend that recognises before it cuts."""
    return lambda gm, xs: cut(run_passes(retrace(gm), RECOGNISERS, strict=True)[0], xs)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout before the MLP"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_gradients_equal_eager(p: float, dynamic: bool) -> None:
    """Trained and frozen weights, one product for gate and up; the last slice is shorter, or there is one alone."""
    model = Model(p=p)
    run, partitioner, halves = sliced(model, dynamic=dynamic)
    for length in (150, 97, 40) if dynamic else (150,):
        assert_same(gradients(run, model, ids(length=length)), gradients(model, model, ids(length=length)))
    assert partitioner.last_plan.rows == ROWS and calls(halves["forward"]) == calls(halves["backward"]) == 3
    assert "gate_up of 3 of 3 layers (0–2) in slices of 128 tokens" in partitioner.last_plan.words


def test_adapters_over_packed_weights() -> None:
    sizes = {"intermediate_size": 256, "max_position_embeddings": 256}
    model = qlora(**sizes)
    run, partitioner, halves = sliced(model, backend=recognised)
    ours, expected = (adapter_gradients(f, model, batch(150)) for f in (run, model))
    assert all((ours[n] - g).norm() <= 1e-5 * g.norm() for n, g in expected.items())
    programs = [n.args[3] for n in halves["backward"].graph.find_nodes(op="call_function", target=SLICES)]
    assert len(programs) == 2 and partitioner.last_plan.rows == ROWS
    for program in programs:
        once, each = program.split('"each":')
        assert once.count("nf4_dequantize") >= 3 and "nf4_dequantize" not in each  # unpacked once, for all slices
        assert "unsloth_launch::" in each and "lora" in each
    assert not any("swiglu" in str(n.target) for half in halves.values() for n in half.graph.nodes)


def test_adapters_backward_in_pieces() -> None:
    """In bfloat16, where backward of adapted layers is cut, and takes what forward's norm saved."""
    sizes = {"intermediate_size": 256, "max_position_embeddings": 256}
    model = qlora(torch.bfloat16, **sizes)
    run, partitioner, halves = sliced(model, backend=recognised)
    truth = in_float64(model, **sizes)
    ours, eager, exact = (
        adapter_gradients(f, m, batch(150)) for f, m in ((run, model), (model, model), (truth, truth))
    )
    error, bar = (sum((g[n].double() - e).norm() ** 2 for n, e in exact.items()) ** 0.5 for g in (ours, eager))
    assert partitioner.last_plan.rows == ROWS and error <= 1.1 * bar
    programs = [n.args[3] for n in halves["backward"].graph.find_nodes(op="call_function", target=SLICES)]
    assert len(programs) == 2 and all("glu_lora_backward" in program for program in programs)


def test_through_inductor_with_several_lengths() -> None:
    model = Model(layers=1)
    run = torch.compile(model, backend="unsloth", dynamic=True, options={"strict": True, "memory_budget": 0})
    for length in (150, 70):
        assert_same(gradients(run, model, ids(length=length)), gradients(model, model, ids(length=length)))


# -- what becomes a stretch --------------------------------------------------------------------------------------------


class Mixing(Layer):
    """An MLP whose activation looks at other tokens."""

    def forward(self, x: Tensor) -> Tensor:
        h, _ = rms_norm(x, self.norms[1], 1e-6, 0.0, True)
        return x + self.down(swiglu(*(self.gate_up(h).cumsum(1) / 100).chunk(2, -1)))


class Dropping(Layer):
    """An MLP with dropout where it is widest."""

    def forward(self, x: Tensor) -> Tensor:
        h, _ = rms_norm(x, self.norms[1], 1e-6, 0.0, True)
        wide = torch.dropout(linear(h, self.gate_up.weight), 0.5, self.training)
        return x + self.down(swiglu(*wide.chunk(2, -1)))


@pytest.mark.parametrize(("kind", "reason"), [(Mixing, "cumsum"), (Dropping, "dropout|bernoulli|random")])
def test_what_does_not_treat_tokens_apart_is_not_sliced(kind: type[Layer], reason: str) -> None:
    model = Model()
    model.layers = nn.ModuleList(kind(0.0) for _ in range(3))
    run, _, halves = sliced(model)
    assert_same(gradients(run, model, ids(length=150)), gradients(model, model, ids(length=150)))
    inside = "".join(n.args[3] for half in halves.values() for n in half.graph.nodes if n.target is SLICES)
    assert "cumsum" not in inside and "dropout" not in inside and "swiglu_backward" not in inside
    torch._dynamo.reset()
    run = torch.compile(model, backend=cut_by(Partitioner(1 << 10, strict=True)))
    told = f"BudgetError.*widest values are made for all tokens at once, because .*({reason})"
    with pytest.raises(BackendCompilerFailed, match=told):
        run(ids(length=150))


def test_attention_stays_whole() -> None:
    model = Model()
    run, _, halves = sliced(model)
    gradients(run, model, ids(length=150))
    for half in halves.values():
        inside = "".join(n.args[3] for n in half.graph.find_nodes(op="call_function", target=SLICES))
        assert "attention" not in inside and any("attention" in str(n.target) for n in half.graph.nodes)
        assert "swiglu" in inside and "rms_norm" in inside  # the norm that only the MLP reads has joined


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, ROWS])
def test_the_predicted_peak_is_what_is_allocated(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(within, "ROWS", (rows,) if rows else ())
    predicted, counted, plan = peaks(Model(), Watching(0, strict=True), ids(length=1000))
    assert plan.rows == rows
    assert 0.97 * counted <= predicted <= 1.05 * counted


# -- when --------------------------------------------------------------------------------------------------------------


def planned(length: int) -> Planner:
    found: list[Planner] = []

    class Grabbing(Partitioner):
        def choose(self, joint: Joint, gradients: Any) -> Any:
            found.append(Planner(joint, gradients, Sizes()))
            return super().choose(joint, gradients)

    model = Model(layers=3)  # too few for residuals that span two
    gradients(torch.compile(model, backend=cut_by(Grabbing(policy="keep", strict=True))), model, ids(length=length))
    return found[0]


def test_slices_lower_the_floor_and_leave_what_fits_alone() -> None:
    planner = planned(600)
    sliced = planner.slicing(ROWS)
    assert sliced is not None and planner.slicing(1200) is None  # there are no more tokens
    floor, lower = planner.smallest[0], sliced.smallest[0]
    working = [p.peak_bytes - planner.liveness.standing.total for p in (lower, floor)]
    assert working[0] < 0.75 * working[1]
    assert fastest_within(planner, planner.fastest[0].peak_bytes, 0)[0].rows == 0
    assert fastest_within(planner, floor.peak_bytes - 1, 0)[0].rows == ROWS
    least = fastest_within(planner, 0, 0)[0]
    assert least.peak_bytes == lower.peak_bytes and least.stretches[0] and least.stretches[1]


def test_more_memory_is_never_slower_with_slices_or_without() -> None:
    planner = planned(600)
    least, most = fastest_within(planner, 0, 0)[0].peak_bytes, planner.fastest[0].peak_bytes
    plans = [fastest_within(planner, least + (most - least) * i // 30, 0)[0] for i in range(31)]
    assert all(p.peak_bytes <= least + (most - least) * i // 30 for i, p in enumerate(plans))
    assert {p.rows for p in plans} == {0, ROWS}
    floor = planner.smallest[0].peak_bytes
    for i, larger in enumerate(plans):
        assert larger.rows == (0 if floor <= least + (most - least) * i // 30 else ROWS)
        for smaller in plans[:i]:
            assert smaller.rows != larger.rows or larger.seconds <= smaller.seconds + 1e-12
