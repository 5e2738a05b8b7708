"""The retrace keeps the mathematics: gradients, mutations, symbolic shapes, source lines, module paths."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from tests.tracing import dynamo_graph, targets, trace
from unsloth.compiler.capture import CaptureError, retrace
from unsloth.compiler.run import sizes_in_graph
from unsloth.passes.rewrite import module_path, source_line


def gradients(function, *args) -> list[torch.Tensor]:
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    return list(torch.autograd.grad(function(*args), leaves))


def assert_same_step(function, *args, dynamic: bool = False) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=lambda gm, _: retrace(gm), dynamic=dynamic, fullgraph=True)
    torch.manual_seed(0)
    expected = gradients(function, *args)
    torch.manual_seed(0)
    torch.testing.assert_close(gradients(compiled, *args), expected)


class Cube(torch.autograd.Function):
    """Its gradient is deliberately not the derivative of its forward: it shows whose backward ran."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 7 * x, None


def test_composite_operators_stay_whole_and_spellings_are_few() -> None:
    def function(x, w):
        y = linear(x.reshape(-1, 4), w).to(torch.float64)
        return silu(y).sum()

    gm = trace(function, torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True))
    assert targets(gm) == ["view", "linear", "_to_copy", "silu", "sum"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_autograd_function_keeps_its_own_gradient(dynamic: bool) -> None:
    def function(x, w):
        return (Cube.apply(linear(x, w), w.detach()) * 2).sum()

    args = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    assert "autograd_function_apply" in targets(trace(function, *args, dynamic=dynamic))
    assert_same_step(function, *args, dynamic=dynamic)


def test_two_autograd_functions_keep_their_own_bodies() -> None:
    def function(x, w):
        return (Cube.apply(Cube.apply(linear(x, w), w) * 0.5, w)).sum()

    assert_same_step(function, torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True))


def test_sizes_in_data_are_the_same_symbols_as_before() -> None:
    def function(x, lengths):
        first, second = torch.split(x, lengths.tolist())
        return first * 2, second * 3, x[x > 0].exp()

    with sizes_in_graph():
        gm = dynamo_graph(function, torch.randn(5, 3, requires_grad=True), torch.tensor([2, 3]))
        graph = retrace(gm)
    before, after = (next(iter(g.graph.find_nodes(op="output"))).args[0] for g in (gm, graph))
    outputs = zip(before, after, strict=True)
    sizes = [(old.meta["example_value"].shape[0], new.meta["val"].shape[0]) for old, new in outputs]
    assert len({old.node.expr for old, _ in sizes}) == len(sizes) == 3
    assert all(old.node.expr == new.node.expr for old, new in sizes)


def test_checkpoint_bodies_are_inlined() -> None:
    def function(x, w):
        return checkpoint(lambda x: torch.dropout(silu(linear(x, w)), 0.5, True), x, use_reentrant=False).sum()

    args = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    assert targets(trace(function, *args)) == ["linear", "silu", "dropout", "sum"]


def test_autograd_function_inside_checkpoint() -> None:
    def function(x, w):
        return checkpoint(lambda x: Cube.apply(linear(x, w), w), x, use_reentrant=False).sum()

    assert_same_step(function, torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True))


def test_in_place_operators_become_functional() -> None:
    def function(x, w):
        y = linear(x, w)
        y[0].mul_(2.0)
        y += 1.0
        return y.relu_().sum()

    gm = trace(function, torch.randn(2, 4), torch.randn(3, 4, requires_grad=True))
    assert not any(name.endswith("_") and not name.startswith("_") for name in targets(gm))
    assert_same_step(function, torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_copied_into_a_tensor_keeps_its_gradient(dynamic: bool) -> None:
    def function(x, w):
        parts = torch.empty(x.shape[0], 4, dtype=torch.float64)
        parts[:, :2].copy_(x * w)  # another dtype
        parts[:, 2:].copy_(w)  # broadcast
        transposed, number = torch.zeros(3, 2).t(), torch.zeros(())
        transposed.copy_(x.sum())
        number.copy_(w.sum())
        return (parts.sin().sum() + parts.view(-1).sum() + transposed.t().view(6).sum() + number * 2).float()

    args = torch.randn(5, 2, requires_grad=True), torch.randn(2, requires_grad=True)
    assert "copy" not in targets(trace(function, *args, dynamic=dynamic))
    assert_same_step(function, *args, dynamic=dynamic)


def test_a_mutated_buffer_is_written_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return (self.linear(x) * self.calls).sum()

    model = Counting()
    compiled = torch.compile(model, backend=lambda gm, _: retrace(gm), fullgraph=True)
    for expected in (1.0, 2.0):
        compiled(torch.randn(2, 4)).backward()
        assert float(model.calls) == expected
    assert model.linear.bias.grad is not None and float(model.linear.bias.grad[0]) == 2 * (1 + 2)


def test_no_grad_regions_stay() -> None:
    def function(x, w):
        with torch.no_grad():
            scale = linear(x, w).abs().mean()
        return (linear(x, w) * scale).sum()

    assert_same_step(function, torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True))


def test_source_lines_module_paths_and_static_inputs_survive() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x.sum()

    model = Outer()
    before = dynamo_graph(model, torch.randn(2, 4))
    gm = retrace(before)
    linears = [n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [module_path(n) for n in linears] == ["layers.0", "layers.1"]
    assert (source_line(linears[0]) or "").startswith(("test_capture.py:", "linear.py:"))
    old, new = ([n for n in g.graph.nodes if n.op == "placeholder"] for g in (before, gm))
    assert [n.name for n in new] == [n.name for n in old]
    for a, b in zip(old, new, strict=True):
        assert b.meta["tensor_dict"] is a.meta["tensor_dict"] and "val" in b.meta
    assert gm._param_name_to_source is before._param_name_to_source


def test_symbolic_shapes_survive() -> None:
    def function(x, w):
        return linear(x, w).transpose(0, 1).reshape(-1).sum()

    gm = trace(function, torch.randn(5, 4), torch.randn(3, 4, requires_grad=True), dynamic=True)
    (node,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert isinstance(node.meta["val"].shape[0], torch.SymInt)
    assert_same_step(
        function, torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True), dynamic=True
    )


def test_a_lost_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from unsloth.compiler import capture

    def function(x, w):
        return Cube.apply(linear(x, w), w).sum()

    gm = dynamo_graph(function, torch.randn(2, 4), torch.randn(3, 4, requires_grad=True))
    broken = retrace(gm)
    for node in list(broken.graph.nodes):
        if node.target is torch.ops.aten.sum.default:
            with broken.graph.inserting_before(node):
                node.args = (broken.graph.call_function(torch.ops.aten.detach.default, (node.args[0],)),)
    broken.recompile()
    monkeypatch.setattr(capture, "make_fx", lambda *_, **__: lambda *_: broken)
    with pytest.raises(CaptureError, match="would lose its gradient with respect to l_w_"):
        retrace(gm)


def test_an_operator_without_a_derivative_loses_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unsloth.compiler.capture._SPELLINGS", {})  # leaves aten.copy, which would raise in backward

    def function(x):
        y = torch.zeros(2)
        y.copy_(x)
        return y.sum()

    with pytest.raises(CaptureError, match="would lose its gradient with respect to"):
        trace(function, torch.randn(2, requires_grad=True))


def test_a_graph_without_tensors_is_refused() -> None:
    graph = torch.fx.Graph()
    graph.output(())
    with pytest.raises(CaptureError, match="no tensor inputs"):
        retrace(torch.fx.GraphModule(nn.Module(), graph))


def test_four_bit_products_keep_their_gradient() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4", compress_statistics=True)
    layers = nn.ModuleList()
    for _ in range(2):
        layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight.data.clone(), requires_grad=False, quant_type="nf4")
        layers.append(layer.to("cpu"))
        if layers[-1].weight.quant_state is None:
            layers[-1].weight = layers[-1].weight._quantize("cpu")

    def function(x):
        for layer in layers:
            x = silu(layer(x))
        return x.sum()

    x = torch.randn(3, 64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=lambda gm, _: retrace(gm), fullgraph=True)
    (expected,) = torch.autograd.grad(function(x), x)
    (got,) = torch.autograd.grad(compiled(x), x)
    assert expected.norm() > 0
    torch.testing.assert_close(got, expected)


def test_autocast_regions_inside_the_graph() -> None:
    """The tracer records a change of autocast; the dtypes after it must be those of the changed state."""

    def function(x, w):
        with torch.autocast("cpu", enabled=False):
            exact = x @ w.t()
        with torch.autocast("cpu", dtype=torch.float16):
            half = linear(x, w)
        return exact, half, linear(x, w)

    args = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gm = dynamo_graph(function, *args)
        products = [n for n in retrace(gm).graph.nodes if n.target in _PRODUCTS]
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
    dtypes = [n.meta["val"].dtype for n in products]
    assert dtypes == [torch.float32, torch.float16, torch.bfloat16]


def test_a_failure_inside_an_autocast_region_restores_the_ambient_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x, w):
        with torch.autocast("cpu", dtype=torch.float16):
            return linear(x, w).sum()

    gm = dynamo_graph(function, torch.randn(2, 4), torch.randn(3, 4, requires_grad=True))
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target == "sum":
            node.target = "no_such_method"
    gm.recompile()
    with pytest.raises(CaptureError, match="no_such_method"):
        retrace(gm)
    assert not torch.is_autocast_enabled("cpu")


_PRODUCTS = {torch.ops.aten.matmul.default, torch.ops.aten.linear.default}


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("L['self'].model.layers.0.mlp", "model.layers.0.mlp"),
        ("L['args'][0].model.layers.0.mlp", "model.layers.0.mlp"),
        ("L['models']['policy'].layers.1", "layers.1"),
        ("L['fn'].1.0", "1.0"),
        ("L['self']._modules['layers']._modules['2']", "layers.2"),
        ("L__self___layers_0", "layers_0"),
        ("L['model'].model.forward.__func__.__closure__[4].cell_contents.__self__.model.norm", "model.model.norm"),
    ],
)
def test_module_paths_begin_below_what_the_function_calls_its_model(given: str, path: str) -> None:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"1": (given, torch.nn.Module)}
    assert module_path(node) == path


def test_numbers_of_modules_are_constants_and_those_of_the_caller_are_not() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps, self.weight = 0.25, nn.Parameter(torch.ones(8))

        def forward(self, x, k):
            return (x + self.eps) * self.weight * k

    graphs = []

    def backend(gm, inputs):
        graphs.append(retrace(gm))
        return graphs[-1].forward

    model = Scale()
    run = torch.compile(model, backend=backend, dynamic=True)
    x = torch.randn(3, 8)
    for k in (0.5, 0.75, 1.25):
        torch.testing.assert_close(run(x, k), model(x, k))
    assert len(graphs) == 1
    (add,) = (n for n in graphs[0].graph.nodes if n.target is torch.ops.aten.add.Tensor)
    assert add.args[1] == 0.25
    model.eps = 0.5
    torch.testing.assert_close(run(x, 0.5), model(x, 0.5))
    assert len(graphs) == 2
