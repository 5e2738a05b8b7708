"""Copying what recurs gives the graph that tracing every call would have given, mutations included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from tests.tracing import dynamo_graph
from unsloth.compiler import capture
from unsloth.compiler.capture import retrace
from unsloth.compiler.recurring import Recurring

LAYERS, WIDTH = 4, 8


class Layer(nn.Module):
    """Views, products of shared inputs, a conversion, attention, dropout: what a layer of a model has."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = (x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.scale
        q, k, v = self.qkv(normed).view(*x.shape[:-1], 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(x.shape)
        x = x + nn.functional.dropout(y, 0.5, True)
        return x + self.down(silu(self.up(x)).to(x.dtype).contiguous())


class Model(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        mask = positions[None, :] <= positions[:, None]
        for layer in self.layers:
            x = layer(x, mask)
        return x.sum()


def traced_calls(monkeypatch: pytest.MonkeyPatch) -> list[fx.Node]:
    """The calls of Dynamo's graph that retracing has traced, and not copied, from here on."""
    traced: list[fx.Node] = []
    trace_node = capture._Interpreter.trace_node

    def noting(self: Any, n: fx.Node) -> Any:
        traced.extend([n] if n.op.startswith("call") else [])
        return trace_node(self, n)

    monkeypatch.setattr(capture._Interpreter, "trace_node", noting)
    return traced


def one_by_one(gm: fx.GraphModule) -> fx.GraphModule:
    """The retrace without copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recurring, "run", lambda self, node, env, tracer, at, live: live())
        return retrace(gm)


def described(gm: fx.GraphModule) -> list[Any]:
    """All of a graph that later stages read."""

    def metadata(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [metadata(v) for v in value]
        if not isinstance(value, Tensor):
            return str(value)
        return value.dtype, str((tuple(value.shape), value.stride(), value.storage_offset())), value.requires_grad

    def notes(node: fx.Node) -> Any:
        text = node.meta.get("stack_trace"), str(node.meta.get("nn_module_stack")), str(node.meta.get("tensor_meta"))
        return *text, str(node.meta.get("original_aten"))

    return [(n.name, n.target, str((n.args, n.kwargs)), metadata(n.meta.get("val")), notes(n)) for n in gm.graph.nodes]


def assert_same_graph(function: Callable[..., Any], *args: Tensor, dynamic: bool = False) -> fx.GraphModule:
    gm = dynamo_graph(function, *args, dynamic=dynamic)
    ours, theirs = described(retrace(gm)), described(one_by_one(gm))
    # With symbolic sizes each layer would compute the same products of them again.
    if dynamic:
        ours, theirs = ([row[1:2] + row[3:] for row in rows if isinstance(row[3], tuple)] for rows in (ours, theirs))
    assert ours == theirs
    return gm


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_graph_is_the_same(dynamic: bool) -> None:
    assert_same_graph(Model(), torch.randn(2, 6, WIDTH), dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_cost_nothing_but_the_first(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    """What of a model is traced does not grow with its layers."""
    graphs = [dynamo_graph(Model(layers), torch.randn(2, 6, WIDTH), dynamic=dynamic) for layers in (3, 5)]
    traced = traced_calls(monkeypatch)
    counts = [len(traced) for gm in graphs if traced.clear() is None and retrace(gm)]
    assert counts[0] == counts[1] > 0


def test_values_have_memory_of_their_own() -> None:
    values = [n.meta["val"] for n in retrace(dynamo_graph(Model(), torch.randn(2, 6, WIDTH))).graph.nodes if n.users]
    tensors = [v for v in values if isinstance(v, Tensor)]
    assert len({id(v) for v in tensors}) == len(tensors)


def mutates_its_own(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(LAYERS):
        order = torch.arange(x.shape[0]).flip(0)
        back = torch.empty_like(order)
        back[order] = torch.arange(x.shape[0])  # as experts sort their tokens and back
        x = linear(x, w)[order].tanh()[back]
    return x.sum()


def mutates_through_views(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(LAYERS):
        y = linear(x, w)
        left, right = y[:, :3], y[:, 3:]
        left.mul_(2.0)
        y.add_(1.0)
        right[0] = 0.0
        x = torch.cat([left, right], -1) + y.view(-1).view_as(y) * 0.5
    return x.sum()


def mutates_after_all(x: Tensor, w: Tensor) -> Tensor:
    kept = []
    for _ in range(LAYERS):
        y = x @ w  # which nothing saves
        kept.append((y, y[:1]))
        x = x + w[:4]
    for _, view in kept:
        view += 1.0  # of memory that the view was taken of, layers ago
    return sum((y.square().sum() for y, _ in kept), x.sum())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [mutates_its_own, mutates_through_views, mutates_after_all])
def test_mutations_are_kept_in_every_layer(function: Callable[..., Tensor], dynamic: bool) -> None:
    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        args = torch.randn(4, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True)
        return list(torch.autograd.grad(run(*args), args))

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=lambda gm, _: retrace(gm), dynamic=dynamic, fullgraph=True)
    torch.manual_seed(0)
    expected = gradients(function)
    torch.manual_seed(0)
    torch.testing.assert_close(gradients(compiled), expected)


def differ_in_grad_mode(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        scale = linear(x, w)
    return (linear(x, w) * scale + linear(x, w)).sum()


def differ_in_autocast(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        half = linear(x, w)
    with torch.autocast("cpu", torch.float16):
        quarter = linear(x, w)
    return (linear(x, w) + half + quarter).sum()


def differ_in_numbers(x: Tensor, w: Tensor) -> Tensor:
    y = x.masked_fill(x > 0, 0.0) + x.masked_fill(x > 0, -0.0) + x.masked_fill(x > 0, float("nan"))
    return (y + x.add(1) + x.add(True) + x.mul(1) + x.mul(1.0) + linear(y, w)).sum()


def differ_in_which_are_the_same(x: Tensor, w: Tensor) -> Tensor:
    y, z = linear(x, w), linear(w, x)
    return (y * z + y * y + z * z + torch.cat([y, z]).sum() + torch.cat([y, y]).sum()).sum()


def differ_in_strides(x: Tensor, w: Tensor) -> Tensor:
    y = linear(x, w)
    return (y.contiguous().view(-1).sin() + y.t().contiguous().view(-1).sin() + y.t().reshape(-1).sin()).sum()


def differ_in_numbers_known(x: Tensor, w: Tensor) -> Tensor:
    return sum((linear(x, w) * torch.tensor(float(i)) for i in range(3)), x.sum()).sum()


DIFFERENT = [
    differ_in_grad_mode,
    differ_in_autocast,
    differ_in_numbers,
    differ_in_which_are_the_same,
    differ_in_strides,
    differ_in_numbers_known,
]


@pytest.mark.parametrize("function", DIFFERENT)
def test_calls_that_differ_in_anything_are_not_copies(function: Callable[..., Tensor]) -> None:
    assert_same_graph(function, torch.randn(4, 4), torch.randn(4, 4, requires_grad=True))


_LIBRARY = torch.library.Library("unsloth_test_recurring", "FRAGMENT")
_LIBRARY.define("fill(Tensor(a!) x, Tensor y) -> ()")
_LIBRARY.impl("fill", lambda x, y: (x.copy_(y), None)[1], "CompositeExplicitAutograd")
torch.library.register_fake("unsloth_test_recurring::fill", lambda x, y: None, lib=_LIBRARY)


def test_custom_operators_that_mutate() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        total = x.sum()
        for _ in range(3):
            with torch.no_grad():
                filled = torch.empty_like(x)
                torch.ops.unsloth_test_recurring.fill(filled, x * 2)
            total = total + (linear(x, w) * filled).sum()
        return total

    compiled = torch.compile(function, backend=lambda gm, _: retrace(gm), fullgraph=True)
    args = torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)
    torch.testing.assert_close(compiled(*args), function(*args))
