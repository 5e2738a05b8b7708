"""What a plan keeps, and what it must never run twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function, make_boxed_func

from tests.memory.llama import Model, assert_same, cut_by, gradients, ids, partitioned
from unsloth.kernels.glu import swiglu
from unsloth.kernels.rms_norm import rms_norm
from unsloth.passes.memory.partition import Partitioner
from unsloth.passes.memory.plan import Plan

POLICIES = ["keep", "recompute"]


@dataclass
class Cut:
    """A function's plan, and the two graphs that came of it."""

    plan: Plan
    forward: fx.GraphModule
    backward: fx.GraphModule

    def runs_again(self, name: str) -> bool:
        return any(getattr(n.target, "_opname", "") == name for n in self.backward.graph.nodes)


def cut(function: Callable[..., Tensor], *args: Tensor, policy: str = "keep") -> Cut:
    """Cut a function's joint graph; asserts that the gradients are those of eager."""
    partitioner, seen = partitioned(policy), {}
    given = [[a.detach().clone().requires_grad_(a.requires_grad) for a in args] for _ in range(2)]

    def keep(kind: str) -> Any:
        return lambda gm, _: make_boxed_func(seen.setdefault(kind, gm).forward)

    compiled = aot_function(function, keep("forward"), keep("backward"), partition_fn=partitioner)
    for run, inputs in zip((compiled, function), given, strict=True):
        run(*inputs).sum().backward()
    for ours, eager in zip(*given, strict=True):
        if eager.requires_grad:
            torch.testing.assert_close(ours.grad, eager.grad)
    assert partitioner.last_plan is not None
    return Cut(partitioner.last_plan, seen["forward"], seen["backward"])


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) / 4).to(dtype).requires_grad_()


# -- the fewest bytes --------------------------------------------------------------------------------------------------


def test_a_sum_is_kept_itself_rather_than_its_two_terms() -> None:
    found = cut(lambda x, a, b: (x @ a + x @ b).sin(), leaf(4, 8), leaf(8, 8), leaf(8, 8))
    assert found.plan.kept == ["add"]


def test_a_cast_up_is_computed_again_and_a_cast_down_is_kept() -> None:
    x, w = leaf(4, 8, dtype=torch.bfloat16), leaf(8, 8, dtype=torch.bfloat16)
    found = cut(lambda x, w: (x @ w).float().sin(), x, w)
    assert found.plan.kept == ["mm"] and found.plan.recomputed == ["_to_copy", "cos"]
    assert found.plan.saved_bytes == 4 * 8 * 2
    found = cut(lambda x, w: (x @ w).bfloat16().sin(), leaf(4, 8), leaf(8, 8))
    assert found.plan.kept == ["_to_copy"] and found.plan.saved_bytes == 4 * 8 * 2


def test_one_source_serves_two_readers() -> None:
    found = cut(lambda x, w: (x @ w).exp() + (x @ w).tanh(), leaf(4, 8), leaf(8, 8))
    assert found.plan.kept == ["mm"]


def test_nothing_is_computed_again_for_nothing() -> None:
    found = cut(lambda x, w: (x @ w).exp(), leaf(4, 8), leaf(8, 8))
    assert found.plan.kept == ["exp"] and found.plan.recomputed == []


def test_slices_of_one_value_cost_their_base_once() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        a, b, c = (x @ w).chunk(3, -1)
        return a.sin() * b.sin() * c.sin()

    found = cut(function, leaf(4, 8), leaf(8, 12))
    assert found.plan.kept == ["mm"] and found.plan.saved_bytes == 4 * 12 * 4


def test_a_fused_projection_is_kept_once() -> None:
    """v keeps all of qkv anyway; then the rotated q and k cost nothing more."""

    def function(x: Tensor, w: Tensor, cos: Tensor) -> Tensor:
        q, k, v = (x @ w).split([8, 4, 4], -1)
        return (q.exp() * cos) @ (k.exp() * cos[..., :4]).repeat(1, 2).T @ v.repeat(1, 2)

    found = cut(function, leaf(4, 8), leaf(8, 16), torch.rand(4, 8))
    assert "mm" in found.plan.kept and not [n for n in found.plan.kept if n.startswith(("exp", "mul", "repeat"))]


def test_norms_and_activations_are_computed_again_from_what_is_kept_anyway() -> None:
    def function(x: Tensor, scale: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        y, _ = rms_norm(x @ x.T @ x, scale, 1e-6, 0.0, True)
        gate, up = y @ gate_up, y @ gate_up.flip(0)
        return swiglu(gate, up) @ down

    found = cut(function, leaf(16, 64), leaf(64), leaf(64, 96), leaf(96, 64))
    assert found.runs_again("rms_norm") and found.runs_again("swiglu")
    names = {n.name: str(n.args[0]) for n in found.forward.graph.nodes if n.name in found.plan.kept}
    assert [source for source in names.values() if "rms_norm" in source] and "swiglu" not in str(names)  # rstd


def test_parameters_and_inputs_cost_nothing() -> None:
    found = cut(lambda x, w: x.sin() @ w, leaf(4, 8), leaf(8, 8))
    assert found.plan.kept == [] and found.plan.saved_bytes == 0


def test_products_are_never_computed_again_by_keep() -> None:
    found = cut(lambda x, w: ((x @ w) @ w).softmax(-1) @ w, leaf(8, 8), leaf(8, 8))
    assert (_products(found.forward), _products(found.backward)) == (3, 6)


def test_chains_are_bounded() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        for _ in range(60):
            y = y * y.sigmoid()  # two paths at each step: 2**60 of them from end to end
        return y

    kept = len(cut(function, leaf(2, 4), leaf(4, 4)).plan.kept)
    assert 3 <= kept <= 12


# -- what must not run twice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_an_input_that_forward_overwrites_is_not_read_again(policy: str) -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.register_buffer("scale", torch.rand(8) + 1)

        def forward(self, x: Tensor, given: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x * self.scale.exp() + given.detach().exp()).tanh()
            self.scale.add_(1)  # within the graph: the buffer wants no gradient
            given.mul_(2)  # by the runtime, after the graph: this one does
            return x.sum() + given.sum()

    states = []
    for compiled in (True, False):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Overwriting()
        run = torch.compile(model, backend=cut_by(partitioned(policy))) if compiled else model
        start = torch.ones(8, requires_grad=True)
        states.append(gradients(run, model, torch.linspace(-1, 1, 16).view(2, 8), start * 1))
    assert_same(*states)


@pytest.fixture
def library():
    with torch.library._scoped_library("unsloth_test", "FRAGMENT") as library:
        yield library


class Layer(nn.Module):
    """A residual layer that does something of the test's between two products."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between, self.up, self.down = between, nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.between(self.up(x)))


class Stack(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(between) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def cut_model(model: nn.Module, policy: str, *args: Tensor) -> Cut:
    """Like :func:`cut`, for a model whose module paths matter."""
    torch._dynamo.reset()
    partitioner, seen = partitioned(policy), {}
    run = torch.compile(model, backend=cut_by(partitioner, seen))
    assert_same(gradients(run, model, *args), gradients(model, model, *args))
    assert partitioner.last_plan is not None
    return Cut(partitioner.last_plan, seen["forward"], seen["backward"])


@pytest.mark.parametrize("policy", POLICIES)
def test_an_operator_that_nobody_knows_runs_once(policy: str, library: torch.library.Library) -> None:
    """It may be random without saying so."""
    library.define("noisy(Tensor x) -> Tensor")
    library.impl("noisy", lambda x: x * torch.rand_like(x), "CPU")
    library.impl("noisy", torch.empty_like, "Meta")
    found = cut_model(Stack(lambda x: x * torch.ops.unsloth_test.noisy(x.detach())), policy, torch.ones(4, 8))
    assert not found.runs_again("noisy")


@pytest.mark.parametrize("policy", POLICIES)
def test_eager_random_numbers_are_drawn_once(policy: str) -> None:
    found = cut_model(Stack(lambda x: torch.dropout(x.tanh(), 0.5, True)), policy, torch.ones(4, 8))
    assert not found.runs_again("bernoulli") and not found.runs_again("native_dropout")


def test_attention_without_dropout_may_run_again() -> None:
    def attend(x: Tensor) -> Tensor:
        y = x.view(1, 4, -1, 32)
        return nn.functional.scaled_dot_product_attention(y, y, y).view_as(x)

    found = cut_model(Stack(attend), "recompute", torch.randn(4, 8))
    assert found.runs_again("_scaled_dot_product_flash_attention_for_cpu")
    assert not cut_model(Stack(attend), "keep", torch.randn(4, 8)).runs_again(
        "_scaled_dot_product_flash_attention_for_cpu"
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_choices_are_made_once(policy: str) -> None:
    """Made again from numbers that round otherwise, a router could choose another expert."""
    found = cut_model(Stack(lambda x: x.gather(-1, x.topk(8).indices).repeat(1, 4)), policy, torch.randn(4, 8))
    assert not found.runs_again("topk")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_weight_dequantised_for_backward_is_not_kept(policy: str, library: torch.library.Library) -> None:
    """Forward and backward unpack the same weight, so that it looks like something to keep."""
    library.define("dequantize(Tensor q) -> Tensor")
    library.impl("dequantize", lambda q: q.float() / 8, "CPU")
    library.impl("dequantize", lambda q: q.new_empty(q.shape, dtype=torch.float32), "Meta")

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, q: Tensor) -> Tensor:
            ctx.save_for_backward(q)
            return x @ dequantize(q)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return grads[0] @ dequantize(*ctx.saved_tensors).T, None

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("q", torch.randint(-7, 8, (32, 32), dtype=torch.int8))

        def forward(self, x: Tensor) -> Any:
            return Product.apply(x.tanh(), self.q)

    dequantize = torch.ops.unsloth_test.dequantize.default
    model = Stack(torch.tanh)
    for layer in model.layers:
        layer.between = Quantised()
    found = cut_model(model, policy, torch.randn(4, 8))
    assert found.runs_again("dequantize") and "dequantize" not in " ".join(found.plan.kept)


# -- layers ------------------------------------------------------------------------------------------------------------


def test_every_stack_of_layers_counts() -> None:
    class Towers(nn.Module):
        """Two stacks of layers, as in a vision-language model, with something in between."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Layer(torch.tanh) for _ in range(2))
            self.merge = nn.Linear(8, 8)
            self.layers = nn.ModuleList(Layer(torch.tanh) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            x = self.merge(x).sigmoid()
            for layer in self.layers:
                x = layer(x)
            return x.sin().sum()

    found = cut_model(Towers(), "recompute", torch.randn(4, 8))
    # Outputs of both blocks, of the merger, and of all three layers (the last for the sine).
    assert len(found.plan.kept) == 6 and found.plan.saved_bytes == 6 * 4 * 8 * 4
    assert found.runs_again("addmm") and found.plan.why == "asked for"


def test_without_layers_nothing_expensive_is_repeated() -> None:
    function = (lambda x, w: ((x @ w).sin() @ w).sin(), leaf(4, 8), leaf(8, 8))
    keep, recompute = cut(*function), cut(*function, policy="recompute")
    assert recompute.plan.tags == keep.plan.tags and "no repeated layers" in recompute.plan.why


def test_the_head_does_not_repeat_the_last_layer() -> None:
    model = Model(layers=3)
    keep, recompute = (cut_model(model, policy, ids()) for policy in POLICIES)
    again = _products(recompute.backward) - _products(keep.backward)
    # Per layer qkv, attention, out, both of the adapter, gate_up; never down, whose output is the next layer's input.
    assert again == 3 * 6


def test_plans_are_reproducible() -> None:
    first, second = (cut_model(Model(layers=2), "keep", ids()).plan for _ in range(2))
    other = cut_model(Model(layers=2), "recompute", ids()).plan
    assert first == second and first.digest == second.digest != other.digest
    assert Partitioner(policy="keep").uuid() != Partitioner(policy="recompute").uuid()


def _products(gm: fx.GraphModule) -> int:
    names = [getattr(n.target, "_opname", "") for n in gm.graph.nodes]
    return sum(name in ("mm", "addmm", "bmm") or name.endswith("attention_for_cpu") for name in names)
