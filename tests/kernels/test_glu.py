"""swiglu and geglu: the kernels (interpreted where there is no GPU) and the references, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.accuracy import DEVICE, assert_accurate, relative_error, run
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


# -- accuracy ----------------------------------------------------------------------------------------------------------


@each_operator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 80), (3, 257), (17, 1), (2, 3, 4096)])
def test_accuracy(op: Operator, others: tuple, eager: Callable, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        return random(*shape, dtype=dtype, seed=2 * seed), random(*shape, dtype=dtype, seed=2 * seed + 1)

    assert_accurate(op, inputs, *others, eager=eager)


@each_operator
def test_float64_stays_float64(op: Operator, others: tuple, eager: Callable) -> None:
    gate, up = (random(3, 80, seed=s).double().requires_grad_() for s in (0, 1))
    grad = random(3, 80, seed=2).double()
    y, *gradients = run(op, (gate.detach(), up.detach()), others, grad, kernel=False)
    truth = torch.autograd.grad(eager(gate, up, *others), (gate, up), grad)
    assert all(relative_error(g, t) < 1e-14 for g, t in zip(gradients, truth, strict=True))
    assert y.dtype == torch.float64


@each_operator
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
def test_extreme_gates(op: Operator, others: tuple, eager: Callable, kernel: bool) -> None:
    """Far from zero the gate is open or shut, and nothing overflows on the way."""
    gate = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4]], device=DEVICE)
    up = torch.full_like(gate, 3.0)
    y, dgate, dup = run(op, (gate, up), others, torch.ones_like(gate), kernel=kernel)
    for value, truth in (
        (y, [0, 0, 0, 0, 60, 300, 3e4]),
        (dgate, [0, 0, 0, 1.5, 3, 3, 3]),
        (dup, [0, 0, 0, 0, 20, 100, 1e4]),
    ):
        torch.testing.assert_close(
            value, torch.tensor([truth], device=DEVICE, dtype=torch.float32), atol=1e-6, rtol=1e-6
        )


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
        truth = run(op, (gate.double(), up.double()), others, grad.double(), kernel=False)
        for kernel in (True, False):
            for value, expected in zip(run(op, (gate, up), others, grad, kernel=kernel), truth, strict=True):
                assert value.stride() == fresh
                assert relative_error(value, expected) < 1e-6


def test_halves_of_one_projection_are_read_in_place() -> None:
    gate, up = halves(2, 5, 80)
    (gate_read, up_read), strides, rows, width = module._as_rows(gate, up)
    assert (gate_read.data_ptr(), up_read.data_ptr()) == (gate.data_ptr(), up.data_ptr())
    assert (strides, rows, width) == ([160, 160], 10, 80)


def test_contiguous_tensors_are_one_row() -> None:
    _, _, rows, width = module._as_rows(random(2, 5, 80), random(2, 5, 80))
    assert (rows, width) == (1, 800)
    assert module._tiling(rows, 1 << 20, 2)[1]["EVEN"], "whole blocks need no mask"


# -- contract ----------------------------------------------------------------------------------------------------------


@each_operator
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
def test_unneeded_gradients_are_not_made(
    op: Operator, others: tuple, eager: Callable, needs: Any, kernel: bool
) -> None:
    inputs, grad = (random(3, 80), random(3, 80, seed=1)), random(3, 80, seed=2)
    _, *every = run(op, inputs, others, grad, kernel=kernel)
    _, *some = run(op, inputs, others, grad, needs=needs, kernel=kernel)
    for need, value, expected in zip(needs, some, every, strict=True):
        assert value is None if not need else torch.equal(value, expected)


@each_operator
def test_opcheck(op: Operator, others: tuple, eager: Callable) -> None:
    gate, up = halves(2, 3, 20)
    torch.library.opcheck(op.overload, (gate, up, *others))
    gate, up = random(3, 20).requires_grad_(), random(3, 20, seed=1).requires_grad_()
    torch.library.opcheck(op.overload, (gate, up, *others))


@each_operator
def test_autograd(op: Operator, others: tuple, eager: Callable) -> None:
    """Through the registered operator, also when only one input wants a gradient."""
    gate, up = random(3, 80), random(3, 80, seed=1)
    for wanted in ((gate,), (up,), (gate, up)):
        for x in (gate, up):
            x.requires_grad_(any(x is w for w in wanted))
        ours = torch.autograd.grad(op(gate, up, *others).sum(), wanted)
        truth = torch.autograd.grad(eager(gate, up, *others).sum(), wanted)
        assert all(relative_error(g, t) < 1e-6 for g, t in zip(ours, truth, strict=True))


def test_one_graph_serves_all_lengths() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda gate, up: swiglu(gate, up), backend=counter, dynamic=True)
    for length in (5, 6, 9, 17):
        gate, up = random(2, length, 8).requires_grad_(), random(2, length, 8, seed=1)
        compiled(gate, up).sum().backward()
        assert (
            gate.grad is not None
            and relative_error(gate.grad, torch.autograd.grad(swiglu(gate, up).sum(), gate)[0]) < 1e-6
        )
    assert counter.frame_count == 1


def test_symbolic_shapes_are_not_guarded_on() -> None:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    symbolic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])  # type: ignore[call-arg]
    gate = mode.from_tensor(torch.randn(2, 7, 16), symbolic_context=symbolic)
    with mode:
        assert swiglu.supports(gate, gate) is None
        y = swiglu(gate, gate)
        assert y.shape == gate.shape and y.is_contiguous()
        swiglu.overload_backward(y, gate, gate, [True, True])
        assert str(swiglu.flops(gate, gate)) == str(6 * gate.numel())
    assert not environment.guards


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
