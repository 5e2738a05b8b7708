"""bitsandbytes' 4-bit products: each spelling becomes a linear layer, and nothing that only looks like one does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tests.passes.recognising import LENGTH, assert_rewrites, find
from tests.qlora import LAYERS, PRODUCTS, adapter_gradients, batch, in_float64, qlora
from tests.tracing import targets, trace
from unsloth.compiler.options import Options
from unsloth.compiler.run import compiled
from unsloth.passes.recognise.nf4 import RECOGNISER
from unsloth.passes.rewrite import Match
from unsloth.passes.runner import run_passes

F = bnb.functional
gemm_4bit = torch.ops.bitsandbytes.gemm_4bit.default
IN, OUT = 128, 64


class Layer:
    """A quantised weight [OUT, IN], and what multiplies by it as bitsandbytes' own layer does."""

    def __init__(self, kind: str = "nf4", nested: bool = True, dtype: torch.dtype = torch.float32, **more: Any) -> None:
        torch.manual_seed(0)
        weight = torch.randn(OUT, IN, dtype=dtype)
        self.packed, self.state = F.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, **more)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return bnb.matmul_4bit(x, self.packed, quant_state=self.state, bias=bias)

    def unpacked(self) -> Tensor:
        return F.dequantize_4bit(self.packed, self.state)


def activation(*, grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, LENGTH, IN, dtype=dtype, requires_grad=grad)


# -- spellings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_product_with_gradient(nested: bool, dynamic: bool) -> None:
    layer = Layer(nested=nested)
    assert_rewrites(
        RECOGNISER, lambda x: layer(x), activation(), to="nf4_dequantize", variant="autograd function", dynamic=dynamic
    )


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_product_without_gradient(nested: bool) -> None:
    layer = Layer(nested=nested)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return layer(x) + y

    inputs = activation(grad=False), torch.randn(OUT, requires_grad=True)
    assert_rewrites(RECOGNISER, function, *inputs, to="nf4_dequantize", variant="without gradient")


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_an_unpacked_weight(nested: bool) -> None:
    layer = Layer(nested=nested)

    def function(x: Tensor) -> Tensor:
        return linear(x, layer.unpacked())

    assert_rewrites(RECOGNISER, function, activation(), to="nf4_dequantize", variant="unpacked weight")


def test_a_weight_stored_the_other_way_round() -> None:
    layer = Layer()
    x = torch.randn(2, LENGTH, OUT, requires_grad=True)
    with pytest.warns(DeprecationWarning, match="quantized from a"):
        assert_rewrites(RECOGNISER, lambda x: layer(x), x, to="nf4_dequantize", variant="unpacked weight")


@pytest.mark.parametrize("grad", [False, True])
def test_a_frozen_bias(grad: bool) -> None:
    layer, bias = Layer(), torch.randn(OUT)
    assert_rewrites(RECOGNISER, lambda x, y: layer(x, bias) * y, activation(grad=grad), _weights(), to="nf4_dequantize")


def test_codes_stored_as_floats() -> None:
    layer = Layer(quant_storage=torch.bfloat16)
    assert layer.packed.dtype == torch.bfloat16
    assert_rewrites(RECOGNISER, lambda x: layer(x), activation(), to="nf4_dequantize")


def test_a_weight_rounded_otherwise_in_backward() -> None:
    """It was bfloat16: bitsandbytes' backward unpacks it to that, and forward to float32. Ours is float32 in both."""
    layer = Layer(dtype=torch.bfloat16)
    assert_rewrites(RECOGNISER, lambda x: layer(x), activation(), to="nf4_dequantize", tolerance=4e-3)
    x, grad = activation(), torch.randn(2, LENGTH, OUT)
    model = torch.compile(lambda x: layer(x), backend="unsloth", options={"lowering": "eager", "strict": True})
    (actual,) = torch.autograd.grad(model(x), x, grad)
    layer.state.dtype = torch.float32
    torch.testing.assert_close(actual, grad @ layer.unpacked())


def test_arguments_are_the_graphs_inputs() -> None:
    layer = Layer()
    (match,) = find(RECOGNISER, lambda x: layer(x), activation())
    assert isinstance(match, Match)
    x, weight = match.args
    assert str(x.target) == "L_x_"
    assert [a.op for a in weight.args[:5]] == ["placeholder"] * 5, "no view of the codes is left in between"
    assert weight.args[5:] == (OUT, IN, 64, 256, torch.float32)


# -- what is not one ---------------------------------------------------------------------------------------------------


def test_fp4_is_a_miss() -> None:
    layer = Layer("fp4")
    for function in (lambda x: layer(x), lambda x: layer(x.detach()), lambda x: x @ layer.unpacked().t()):
        (miss,) = find(RECOGNISER, function, activation())
        assert not isinstance(miss, Match) and miss.reason == "its weight is fp4, not nf4"
        assert miss.source_line and "test_nf4.py" in (miss.node.meta.get("stack_trace") or "")


def _weights() -> Tensor:
    return torch.randn(OUT, requires_grad=True)


def test_a_trained_bias_is_a_miss() -> None:
    layer = Layer()
    (miss,) = find(RECOGNISER, lambda x, bias: layer(x, bias), activation(), _weights())
    assert not isinstance(miss, Match) and "sum, which is no part of a product" in miss.reason


def test_inference_in_the_cpu_packing_is_not_looked_at() -> None:
    layer = Layer(nested=False)

    def function(x: Tensor) -> Tensor:
        return torch.ops.bitsandbytes.gemv_4bit.default(
            x, layer.packed, (OUT, IN), layer.state.absmax, layer.state.code, 64
        )

    assert find(RECOGNISER, function, activation(grad=False)) == []


def unpack(packed: Tensor, absmax: Tensor, block: int = 64) -> Tensor:
    return torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, block, "nf4", (OUT, IN), torch.float32)


def custom(
    result: Callable[[Tensor], Tensor] = lambda y: y,
    gradients: Callable[..., tuple[Tensor | None, ...]] = lambda grad, packed, absmax, other: (
        grad @ unpack(packed, absmax),
        None,
        None,
        None,
    ),
) -> Callable[[Tensor], Tensor]:
    """The product in an autograd function of our own; ``other`` is another weight's scales."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, packed: Tensor, absmax: Tensor, other: Tensor) -> Tensor:
            ctx.save_for_backward(packed, absmax, other)
            return result(gemm_4bit(x, packed, (OUT, IN), absmax, 64, "nf4"))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return gradients(grad, *ctx.saved_tensors)

    layer = Layer(nested=False)
    other = layer.state.absmax.clone()
    return lambda x: Custom.apply(x, layer.packed, layer.state.absmax, other)  # pyright: ignore[reportReturnType]


SAME_WEIGHT = "not the product with the same weight"
OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "doubled": (custom(lambda y: y * 2), "calls mul, which is no part of a product"),
    "clipped": (
        custom(gradients=lambda g, packed, absmax, _: ((g @ unpack(packed, absmax)).clamp(-1, 1), None, None, None)),
        "calls clamp, which is no part of a product",
    ),
    "other scales": (
        custom(gradients=lambda g, packed, absmax, other: (g @ unpack(packed, other), None, None, None)),
        SAME_WEIGHT,
    ),
    "other blocks": (
        custom(gradients=lambda g, packed, absmax, _: (g @ unpack(packed, absmax, 128), None, None, None)),
        SAME_WEIGHT,
    ),
    "for another input": (
        custom(gradients=lambda g, packed, absmax, _: (None, None, None, g @ unpack(packed, absmax))),
        SAME_WEIGHT,
    ),
    "for nothing": (custom(gradients=lambda *_: (None, None, None, None)), SAME_WEIGHT),
    "for two": (
        custom(gradients=lambda g, packed, absmax, other: (g @ unpack(packed, absmax), None, None, other)),
        "a gradient to something else than x",
    ),
}


@pytest.mark.parametrize(("function", "because"), OTHERS.values(), ids=OTHERS)
def test_another_autograd_function_is_a_miss(function: Callable[[Tensor], Tensor], because: str) -> None:
    (miss,) = find(RECOGNISER, function, activation())
    assert not isinstance(miss, Match) and because in miss.reason, miss
    assert miss.node.target is torch.ops.higher_order.autograd_function_apply
    assert miss.source_line and miss.source_line.startswith("test_nf4.py")


def test_the_same_autograd_function_is_found() -> None:
    """The tests above miss for their reason only."""
    assert_rewrites(RECOGNISER, custom(), activation(), to="nf4_dequantize", variant="autograd function")


def test_other_autograd_functions_are_not_reported() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return 3 * grad * ctx.saved_tensors[0]

    assert find(RECOGNISER, lambda x: Square.apply(x), activation()) == []


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "double_quant", "dynamic"),
    [(torch.float32, True, False), (torch.bfloat16, False, False), (torch.bfloat16, True, True)],
)
def test_every_product_of_a_model_is_found(dtype: torch.dtype, double_quant: bool, dynamic: bool) -> None:
    inputs = batch()
    if dynamic:
        torch._dynamo.mark_dynamic(inputs["input_ids"], 1)
    graph = trace(qlora(dtype, double_quant=double_quant), dynamic=dynamic, **inputs)
    result, (report,) = run_passes(graph, [RECOGNISER], strict=True)
    # The embedding is frozen, so that the first three products have no gradient to compute.
    assert Counter(s.detail for s in report.rewritten) == {
        "without gradient": 3,
        "autograd function": PRODUCTS * LAYERS - 3,
    }
    assert report.missed == [] and all(s.module.endswith("_proj.base_layer") for s in report.rewritten)
    left = targets(result)
    assert left.count("nf4_dequantize") == PRODUCTS * LAYERS
    assert not {"gemm_4bit", "autograd_function_apply"} & set(left)
    for i, name in enumerate(left):
        assert name != "nf4_dequantize" or left[i + 1] == "linear", "each weight right before its product"


@pytest.mark.parametrize(
    ("dtype", "compute_dtype", "found"),
    [
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.bfloat16, True),
        # bitsandbytes multiplies in float32 whatever the ambient autocast says; a linear layer does not.
        (torch.float32, torch.float32, False),
    ],
)
def test_under_autocast(dtype: torch.dtype, compute_dtype: torch.dtype, found: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model = qlora(dtype, compute_dtype=compute_dtype, adapter_dtype=torch.float32)
        _, (report,) = run_passes(trace(model, **batch()), [RECOGNISER], strict=True)
    assert (len(report.rewritten), len(report.missed)) == ((14, 0) if found else (0, 14))
    assert found or "bfloat16 instead of torch.float32" in report.missed[0].detail


def _compiled(model: nn.Module, recognisers: Any = (RECOGNISER,)) -> Any:
    torch._dynamo.reset()
    options = Options.parse({"strict": True, "lowering": "eager"}, passes=[r.name for r in recognisers])
    return compiled(model, options, [], recognisers)


@pytest.mark.parametrize("lengths", [(9,), (9, 12, 17)], ids=["static", "several lengths"])
def test_gradients_equal_eager_in_float32(lengths: tuple[int, ...]) -> None:
    model = qlora()
    run = _compiled(model)
    for length in lengths:
        expected = adapter_gradients(model, model, batch(length))
        actual = adapter_gradients(run, model, batch(length))
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (actual[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_gradients_in_bfloat16_are_no_further_from_the_truth_than_eager() -> None:
    """Over several models, because a product whose terms are added in another order rounds otherwise."""
    ours, eagers = [], []
    for seed in range(5):
        model = qlora(torch.bfloat16, seed=seed)
        exact, inputs = in_float64(model), batch(48 + seed)
        truth = adapter_gradients(exact, exact, inputs)
        eagers.append(_error(adapter_gradients(model, model, inputs), truth))
        ours.append(_error(adapter_gradients(_compiled(model), model, inputs), truth))
    assert math.hypot(*ours) <= 1.1 * math.hypot(*eagers)
    assert max(eagers) < 0.05, "the truth is the same model"


def _error(gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert gradients.keys() == truth.keys()
    difference = torch.cat([(gradients[n].double() - t).flatten() for n, t in truth.items()])
    return float(difference.norm() / torch.cat([t.flatten() for t in truth.values()]).norm())
