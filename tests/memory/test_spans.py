"""Residuals that span two layers: the same bits, half of the residuals, the predicted peak, and only when asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.compile_fx import compile_fx

from tests.memory.allocations import Watching, peaks
from tests.memory.llama import Layer, Model, assert_same_bits, code_of_inductor, cut_by, gradients, ids
from tests.qlora import batch, qlora
from unsloth.compiler.capture import retrace
from unsloth.kernels.pinned import whole_pages
from unsloth.kernels.rms_norm import rms_norm
from unsloth.passes.memory import within
from unsloth.passes.memory.costs import Sizes
from unsloth.passes.memory.joint import Joint
from unsloth.passes.memory.partition import Partitioner
from unsloth.passes.memory.plan import Plan, Tag
from unsloth.passes.memory.planner import Planner
from unsloth.passes.memory.within import fastest_within
from unsloth.passes.recognise import RECOGNISERS
from unsloth.passes.runner import run_passes

LAYERS, LENGTH = 8, 96
RESIDUAL = 2 * LENGTH * 32 * 4  # bytes of what crosses the border of a layer
ATTENTION = "attention_for_cpu"


@pytest.fixture(autouse=True)
def _whole_stretches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Slices of tokens round in another order; only the test that is about both has them."""
    monkeypatch.setattr(within, "ROWS", ())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Spanning(Partitioner):
    """As many spans as there can be, and as little else as can be kept."""

    def choose(self, joint: Joint, gradients: Sequence[Any]) -> Plan:
        planner = Planner(joint, gradients, Sizes())
        spanned = planner.spanning(planner.pairs())
        assert spanned is not None
        if self.host:
            spanned = spanned.offloading(self.host)
            assert spanned is not None
        plan, self.last_timeline = spanned.smallest
        return plan


def run(model: nn.Module, partitioner: Partitioner, *, dynamic: bool | None = None, lengths: Sequence[int] = (LENGTH,)):
    """Losses and gradients under a partitioner, its plan, and the halves."""
    torch._dynamo.reset()
    halves: dict[str, fx.GraphModule] = {}
    compiled = torch.compile(model, backend=cut_by(partitioner, halves), dynamic=dynamic)
    found = [gradients(compiled, model, ids(length=length)) for length in lengths]
    assert partitioner.last_plan is not None
    return found, partitioner.last_plan, halves


def calls(half: fx.GraphModule, name: str) -> int:
    return sum(name in str(n.target) for n in half.graph.nodes)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("host", [0, 1 << 30], ids=["on the device", "by way of the host"])
def test_the_same_bits(p: float, dynamic: bool, host: int) -> None:
    model, lengths = Model(layers=LAYERS, p=p), (LENGTH, 40) if dynamic else (LENGTH,)
    expected, least, before = run(model, Partitioner(policy="recompute", host=0), dynamic=dynamic, lengths=lengths)
    ours, plan, halves = run(model, Spanning(host=host), dynamic=dynamic, lengths=lengths)
    for one, other in zip(ours, expected, strict=True):
        assert_same_bits(one, other)
    assert len(plan.inner) == 3  # of layers 1, 3 and 5; the first one's, and those of the last two, are kept
    assert set(least.saved) - set(plan.saved) == set(plan.inner)
    assert all(plan.tags[name] is Tag.RECOMPUTE for name in plan.inner)
    assert calls(halves["forward"], ATTENTION) == calls(before["forward"], ATTENTION) == LAYERS
    again = calls(halves["backward"], ATTENTION) - calls(before["backward"], ATTENTION)
    assert again == 2 * len(plan.inner) - len(plan.inner)  # each of those layers runs twice where it ran once


def test_adapters_over_packed_weights() -> None:
    """QLoRA through the recognisers: packed weights, backward of adapters in pieces, norms joined with their sums."""
    model, given = qlora(num_hidden_layers=6), batch(40)

    def step(partitioner: Partitioner) -> tuple[float, dict[str, Tensor]]:
        torch._dynamo.reset()
        cut = cut_by(partitioner)
        run = torch.compile(model, backend=lambda gm, xs: cut(run_passes(retrace(gm), RECOGNISERS, strict=True)[0], xs))
        model.zero_grad(set_to_none=True)
        loss = run(**given).loss
        loss.backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = step(Partitioner(policy="recompute", host=0))
    spanning = Spanning(host=0)
    assert_same_bits(step(spanning), expected)
    assert spanning.last_plan is not None and len(spanning.last_plan.inner) == 2
    assert len(expected[1]) == 6 * 7 * 2


def test_through_inductor_with_dropout() -> None:
    model = Model(layers=5, p=0.3).to(torch.bfloat16)
    results = []
    for partitioner in (Partitioner(policy="recompute", host=0, strict=True), Spanning(host=1 << 30, strict=True)):
        torch._dynamo.reset()
        patches = {"custom_partitioner_fn": partitioner, "emulate_precision_casts": True}
        compiled = torch.compile(model, backend=lambda gm, xs, p=patches: compile_fx(gm, xs, config_patches=p))
        results.append(gradients(compiled, model, ids(length=LENGTH)))
    assert_same_bits(results[1], results[0])


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 128], ids=["", "in slices"])
def test_the_predicted_peak_is_what_is_allocated(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(within, "ROWS", (rows,) if rows else ())
    model, given = Model(layers=LAYERS), ids(length=1000)
    predicted, counted, plan = peaks(model, Watching(0, strict=True, host=0), given)
    assert len(plan.inner) == 3 and plan.rows == rows
    assert 0.97 * counted <= predicted <= 1.05 * counted
    monkeypatch.setattr(Planner, "pairs", lambda self: 0)
    _, without, plan = peaks(model, Watching(0, strict=True, host=0), given)
    assert not plan.inner and counted < without - 2 * 2 * 1000 * 32 * 4


def test_what_waits_in_host_memory_comes_back_for_each_turn() -> None:
    _, plan, halves = run(Model(layers=LAYERS), Spanning(host=1 << 30))
    assert len(plan.offloaded) == LAYERS - 1 - 3 and plan.host_bytes == len(plan.offloaded) * RESIDUAL
    fetched = [n for n in halves["backward"].graph.nodes if "fetch" in str(n.target)]
    names = [n.args[1].name for n in fetched]
    kept = plan.offloaded  # of layers 0, 2, 4 and 6
    assert names == [kept[3], kept[2], kept[2], kept[1], kept[1], kept[0], kept[0]]
    assert [n.args[2] and n.args[2].name for n in fetched] == [*names[1:], None]
    order = {n: i for i, n in enumerate(halves["backward"].graph.nodes)}
    inner = [i for n, i in order.items() if n.name in plan.inner]
    for early, own in ((1, 2), (3, 4), (5, 6)):
        first, second = fetched[early], fetched[own]
        (end,) = (i for i in inner if order[first] < i < order[second])
        assert max(order[user] for user in first.users) <= end


def test_inductor_runs_a_layer_in_both_its_turns() -> None:
    """Neither becomes the other's, and the second is not moved to the first."""
    _, (_, backward) = code_of_inductor(Model(layers=5), Spanning(host=0), ids(length=LENGTH))
    found = re.findall(
        r"= torch\.ops\.aten\._scaled_dot_product_flash_attention_for_cpu(_backward)?\.default\(", backward
    )
    # Layers 4 and 3; 1 for what it hands on, and 2; 1 itself, and 0.
    assert found == ["", "_backward", "", "_backward", "", "", "_backward", "", "_backward", "", "_backward"]


# -- when --------------------------------------------------------------------------------------------------------------


class Headless(Model):
    """Its layers are all that takes memory."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return rms_norm(x, self.norm, 1e-6, 0.0, True)[0].square().mean(), x.detach().sum()


def planned(model: nn.Module, length: int = 600) -> Planner:
    found: list[Planner] = []

    class Grabbing(Partitioner):
        def choose(self, joint: Joint, gradients: Sequence[Any]) -> Plan:
            found.append(Planner(joint, gradients, Sizes()))
            return super().choose(joint, gradients)

    gradients(torch.compile(model, backend=cut_by(Grabbing(policy="keep", strict=True))), model, ids(length=length))
    return found[0]


@pytest.fixture(scope="module")
def planner() -> Planner:
    return planned(Model(layers=LAYERS))


def test_spans_are_for_where_nothing_else_fits(planner: Planner) -> None:
    floor = planner.smallest[0].peak_bytes
    for budget in (floor, floor + 1, planner.fastest[0].peak_bytes):
        assert not fastest_within(planner, budget, 0)[0].inner
    spanned = fastest_within(planner, floor - 1, 0)[0]
    assert spanned.inner and spanned.peak_bytes < floor


def test_as_few_as_it_takes(planner: Planner) -> None:
    floor, least = planner.smallest[0].peak_bytes, fastest_within(planner, 0, 0)[0].peak_bytes
    plans = [fastest_within(planner, least + (floor - least) * i // 20, 0)[0] for i in range(21)]
    assert all(plan.peak_bytes <= least + (floor - least) * i // 20 for i, plan in enumerate(plans))
    counts = [len(plan.inner) for plan in plans]
    assert counts == sorted(counts, reverse=True) and set(counts) == {0, 1, 2, 3}
    for smaller, larger in pairwise(plans):
        assert len(larger.inner) != len(smaller.inner) or larger.seconds <= smaller.seconds


def test_host_memory_that_has_room_for_half() -> None:
    planner = planned(Headless(layers=LAYERS))
    size = planner.sizes.bytes(planner.residuals[0])
    away = planner.offloading(1 << 40)
    assert away is not None and len(away.away) == 7
    floor = away.smallest[0].peak_bytes
    counts = []
    for room in (7, 6, 5, 4):
        plan, _ = fastest_within(planner, floor, room * whole_pages(size))
        assert plan.peak_bytes <= floor and len(plan.offloaded) <= room and len(plan.inner) <= 7 - room
        counts.append(len(plan.inner))
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] > 0
    short, _ = fastest_within(planner, floor, whole_pages(size))
    assert len(short.inner) == 3 and short.peak_bytes > floor
    assert "holds the residuals of 1 layers, and those of 4 take" in short.note


def test_the_price_is_that_of_what_runs_again(planner: Planner) -> None:
    """All that leads to what the layer hands on, attention and all, but not what only its own backward makes."""
    spanned = planner.spanning(1)
    assert spanned is not None
    more = spanned.smallest[0].seconds - planner.smallest[0].seconds
    spanned.price(spanned.smallest[0])
    early = [
        op for op in spanned.liveness.last_walk.operations[spanned.liveness.last_turn :] if op in spanned.joint.early
    ]
    assert more == pytest.approx(sum(map(spanned.sizes.seconds, early)))
    forward = [n for n in spanned.joint.forward if n in spanned.joint.needed and spanned.home.get(n) == ("layers", 1)]
    names = {n.name for n in forward if spanned.liveness.is_operation(n)}
    assert {op.name for op in early} >= {n for n in names if "mm" in n or "attention" in n} and len(early) <= len(names)


def test_what_a_plan_says() -> None:
    length = 600
    partitioner = Partitioner(0, strict=True, host=4 * whole_pages(2 * length * 32 * 4))
    _, plan, _ = run(Headless(layers=LAYERS), partitioner, lengths=(length,))
    words = "compute residuals of 3 of 8 layers (1, 3, 5) again, each from the one before, which spans two layers"
    assert words in plan.words and "offload residuals of 4 of 8 layers (0, 2, 4, 6)" in plan.words


def test_a_budget_below_the_floor_names_the_floor_with_spans(planner: Planner) -> None:
    floor = fastest_within(planner, 0, 0)[0].peak_bytes
    assert floor < planner.smallest[0].peak_bytes
    model = Model(layers=LAYERS)
    compiled = torch.compile(model, backend=cut_by(Partitioner(1 << 10, strict=True, host=0)))
    with pytest.raises(BackendCompilerFailed, match=rf"below the floor of {floor / 2**20:.1f} MiB"):
        compiled(ids(length=600))


# -- near misses -------------------------------------------------------------------------------------------------------


class Skipping(Model):
    """Every layer reads what the third one handed on."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x, third = self.embedding(ids), None
        for i, layer in enumerate(self.layers):
            x = layer(x if third is None else x + third / 8)
            third = x if i == 3 else third
        return rms_norm(x, self.norm, 1e-6, 0.0, True)[0].square().mean(), x


class Returning(Model):
    """The third layer's result is one of the model's."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x, third = self.embedding(ids), None
        for i, layer in enumerate(self.layers):
            x = layer(x)
            third = x if i == 3 else third
        assert third is not None
        return rms_norm(x, self.norm, 1e-6, 0.0, True)[0].square().mean() + third.mean(), third


@pytest.mark.parametrize("kind", [Skipping, Returning])
def test_what_others_read_too_is_kept(kind: type[Model]) -> None:
    model = kind(layers=LAYERS)
    assert 3 not in planned(model, LENGTH).spans
    expected, _, _ = run(model, Partitioner(policy="recompute", host=0))
    ours, plan, _ = run(model, Spanning(host=0))
    assert_same_bits(ours[0], expected[0])
    assert plan.inner


class Choosing(Layer):
    """A layer that looks up what it chooses by its input: made again, it could be another choice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.gather(-1, x.topk(32).indices) / 4


def test_what_must_not_run_twice_is_kept() -> None:
    model = Model(layers=LAYERS)
    model.layers = nn.ModuleList(Choosing(0.0) for _ in range(LAYERS))
    expected, _, before = run(model, Partitioner(policy="recompute", host=0))
    ours, plan, halves = run(model, Spanning(host=0))
    assert_same_bits(ours[0], expected[0])
    assert plan.inner and calls(halves["backward"], "topk") == calls(before["backward"], "topk") == 0


@pytest.mark.parametrize("layers", [1, 3])
def test_a_shallow_model_has_no_pair_between_its_ends(layers: int) -> None:
    found = planned(Model(layers=layers), LENGTH)
    assert found.pairs() == 0 and found.spanning(1) is None
    assert not fastest_within(found, 0, 0)[0].inner


def test_no_span_reaches_from_one_stack_to_another() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(50, 32)
            self.blocks, self.layers = (nn.ModuleList(Layer(0.0) for _ in range(4)) for _ in range(2))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for layer in (*self.blocks, *self.layers):
                x = layer(x)
            return x.square().mean()

    found = planned(Towers(), LENGTH)
    assert sorted(found.spans) == [1, 5] and found.pairs() == 2
