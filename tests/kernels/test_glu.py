"""swiglu and geglu: the kernels (interpreted where there is no GPU) and the references, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.oracle import (
    DEVICE,
    IMPLEMENTATIONS,
    assert_accurate,
    assert_skips_unneeded,
    assert_symbolic,
    opcheck,
    symbolic,
)
from unsloth.kernels import glu as module
from unsloth.kernels.glu import geglu, swiglu
from unsloth.kernels.operator import Operator

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPERATORS: list[Any] = [
    pytest.param(swiglu, (), lambda gate, up: F.silu(gate) * up, id="swiglu"),
    pytest.param(geglu, (False,), lambda gate, up, tanh: F.gelu(gate) * up, id="geglu"),
    pytest.param(geglu, (True,), lambda gate, up, tanh: F.gelu(gate, approximate="tanh") * up, id="geglu-tanh"),
]
each_operator = pytest.mark.parametrize(("op", "others", "eager"), OPERATORS)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, device=DEVICE)).to(dtype)


def halves(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """gate and up as the two halves of one projection."""
    gate, up = random(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=seed).chunk(2, dim=-1)
    return gate, up


def run(op: Operator, implementation: str, args: tuple[Any, ...], grad: Tensor) -> list[Any]:
    """y and both gradients."""
    forward, backward = IMPLEMENTATIONS[implementation]
    outputs = forward(op, *args)
    return [*outputs, *backward(op, args, outputs, [grad])]


# -- accuracy ----------------------------------------------------------------------------------------------------------


@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy(op: Operator, others: tuple, eager: Callable, dtype: torch.dtype) -> None:
    def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return random(*shape, dtype=dtype, seed=2 * seed), random(*shape, dtype=dtype, seed=2 * seed + 1), *others

    assert_accurate(op, inputs, eager, dtypes=[dtype], shapes=[(1, 80), (3, 257), (17, 1), (2, 3, 4096)])


@each_operator
def test_float64_stays_float64(op: Operator, others: tuple, eager: Callable) -> None:
    gate, up = (random(3, 80, seed=seed).double().requires_grad_() for seed in (0, 1))
    grad = random(3, 80, seed=2).double()
    truth = eager(gate, up, *others)
    ours = run(op, "reference", (gate.detach(), up.detach(), *others), grad)
    for value, expected in zip(ours, [truth, *torch.autograd.grad(truth, (gate, up), grad)], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-13)


@each_operator
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_gates(op: Operator, others: tuple, eager: Callable, implementation: str) -> None:
    """Far from zero the gate is open or shut, and nothing overflows on the way."""
    gate = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4]], device=DEVICE)
    up = torch.full_like(gate, 3.0)
    for value, truth in zip(
        run(op, implementation, (gate, up, *others), torch.ones_like(gate)),
        ([0, 0, 0, 0, 60, 300, 3e4], [0, 0, 0, 1.5, 3, 3, 3], [0, 0, 0, 0, 20, 100, 1e4]),
        strict=True,
    ):
        expected = torch.tensor([truth], device=DEVICE, dtype=torch.float32)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


# -- layouts -----------------------------------------------------------------------------------------------------------


def layouts() -> list[Any]:
    def gate_only() -> tuple[Tensor, Tensor]:
        return halves(2, 5, 80)[0], random(2, 5, 80, seed=1)

    def transposed() -> tuple[Tensor, Tensor]:
        return random(5, 2, 80).transpose(0, 1), random(2, 80, 5, seed=1).transpose(1, 2)

    def repeated() -> tuple[Tensor, Tensor]:
        return random(1, 80).expand(5, 80), random(5, 1, seed=1).expand(5, 80)

    return [
        pytest.param(lambda: halves(2, 5, 80), id="halves"),
        pytest.param(lambda: halves(1, 3), id="halves of one row"),
        pytest.param(lambda: halves(3, 2100), id="halves of several blocks"),
        pytest.param(gate_only, id="one half"),
        pytest.param(transposed, id="transposed"),
        pytest.param(repeated, id="expanded"),
        pytest.param(lambda: (random(7), random(7, seed=1)), id="one dimension"),
        pytest.param(lambda: (random(0, 80), random(0, 80)), id="empty"),
    ]


@each_operator
@pytest.mark.parametrize("make", layouts())
def test_layouts(op: Operator, others: tuple, eager: Callable, make: Callable) -> None:
    """Whatever the inputs' strides, results are right and as contiguous as fresh tensors, in kernel and reference."""
    gate, up = make()
    fresh = torch.empty(gate.shape).stride()
    for grad in (random(*gate.shape, seed=9), random(1, seed=9).expand(gate.shape)):
        truth = run(op, "reference", (gate.double(), up.double(), *others), grad.double())
        for implementation in IMPLEMENTATIONS:
            for value, expected in zip(run(op, implementation, (gate, up, *others), grad), truth, strict=True):
                assert value.stride() == fresh
                torch.testing.assert_close(value, expected.float())


def test_halves_of_one_projection_are_read_in_place() -> None:
    gate, up = halves(2, 5, 80)
    strides, copies, rows, width = module._readable(gate, up)
    assert copies == [None, None]
    assert (strides, rows, width) == ([160, 160], 10, 80)


def test_contiguous_tensors_are_one_row() -> None:
    _, _, rows, width = module._readable(random(2, 5, 80), random(2, 5, 80))
    assert (rows, width) == (1, 800)
    assert module._tiling(rows, 1 << 20, 2)[1]["EVEN"], "whole blocks need no mask"


@pytest.mark.skipif(DEVICE != "cuda", reason="needs 30 GB of GPU memory")
def test_more_elements_than_32_bits_count() -> None:
    gate, up = (
        torch.full((1 << 18, (1 << 13) + 16), value, device=DEVICE, dtype=torch.bfloat16) for value in (1.0, 2.0)
    )
    y = swiglu.forward(gate, up)
    dgate, dup = swiglu.backward(y, gate, up, [True, True])
    for result in (y, dgate, dup):
        assert result.numel() > 1 << 31
        assert torch.equal(result[-1], result[0]) and bool(result[-1].isfinite().all())


# -- contract ----------------------------------------------------------------------------------------------------------


@each_operator
def test_unneeded_gradients_are_not_made(op: Operator, others: tuple, eager: Callable) -> None:
    assert_skips_unneeded(op, random(3, 80), random(3, 80, seed=1), *others)


@each_operator
def test_opcheck(op: Operator, others: tuple, eager: Callable) -> None:
    opcheck(op, *halves(2, 3, 20), *others)
    opcheck(op, random(3, 20), random(3, 20, seed=1), *others)


@each_operator
def test_autograd(op: Operator, others: tuple, eager: Callable) -> None:
    """Through the registered operator, also when only one input wants a gradient."""
    for wanted in ([0], [1], [0, 1]):
        leaves = [random(3, 80, seed=i).requires_grad_(i in wanted) for i in range(2)]
        ours = torch.autograd.grad(op(*leaves, *others).sum(), [leaves[i] for i in wanted])
        theirs = torch.autograd.grad(eager(*leaves, *others).sum(), [leaves[i] for i in wanted])
        torch.testing.assert_close(ours, theirs)


def test_one_graph_serves_all_lengths() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda gate, up: swiglu(gate, up), backend=counter, dynamic=True)
    for length in (5, 6, 9, 17):
        gate, up = random(2, length, 8).requires_grad_(), random(2, length, 8, seed=1)
        ours = torch.autograd.grad(compiled(gate, up).sum(), gate)
        torch.testing.assert_close(ours, torch.autograd.grad(swiglu(gate, up).sum(), gate))
    assert counter.frame_count == 1


@each_operator
def test_symbolic_shapes(op: Operator, others: tuple, eager: Callable) -> None:
    gate, up = random(2, 7, 16), random(2, 7, 16)
    assert_symbolic(op, gate, up, *others)
    assert_symbolic(op, gate, up, *others, static=())
    with symbolic(random(2, 7, 32), static=(-1,)) as (projection,):
        y = op(*projection.chunk(2, dim=-1), *others)
        assert y.is_contiguous() and y.shape[:-1] == projection.shape[:-1]


def test_supports_says_why_not() -> None:
    gate = random(3, 80)
    assert swiglu.supports(gate, gate) is None
    assert geglu.supports(*halves(3, 80, dtype=torch.bfloat16), True) is None
    assert "float64" in str(swiglu.supports(gate.double(), gate.double()))
    assert "bfloat16" in str(swiglu.supports(gate, gate.bfloat16()))
    assert "one shape" in str(swiglu.supports(gate, gate[:1]))
    assert "dimensions" in str(geglu.supports(gate, gate[0], False))


def test_flops_are_registered() -> None:
    gate, up = random(3, 80).requires_grad_(), random(3, 80, seed=1)
    with FlopCounterMode(display=False) as counter:
        y = swiglu(gate, up)
        assert counter.get_total_flops() == swiglu.flops(gate, up) == 6 * 240
        y.sum().backward()
    assert counter.get_total_flops() == (6 + 12) * 240
