"""Backward of adapted layers in pieces: put together they are the whole, in kernel and reference, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.oracle import DEVICE, assert_same_layout, kernel_forward, reference_forward, symbolic, tensors
from unsloth.kernels.glu import SILU, geglu, swiglu
from unsloth.kernels.lora_backward import ACTIVATIONS, LORA_DOWN_BACKWARD, LORA_UP_BACKWARD, glu_lora_backward
from unsloth.kernels.lora_linear import lora_linear
from unsloth.kernels.lora_linears import LORA_LINEARS
from unsloth.kernels.operator import Operator
from unsloth.kernels.rms_norm import rms_norm

each_run = pytest.mark.parametrize("run", [reference_forward, kernel_forward], ids=["reference", "kernel"])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def assert_near(value: Tensor, truth: Tensor, units: float = 4) -> None:
    """In the 2-norm, in units in the last place of the value's dtype."""
    error = (value.double() - truth).norm() / truth.norm()
    assert error <= units * torch.finfo(value.dtype).eps, float(error)


def layers(count: int, dtype: torch.dtype, width: int = 40) -> tuple[Any, ...]:
    """dys, x, A, weights, Bs, xa, scales: several layers' own, of different sizes."""
    outs, ranks = (48, 33, 16)[:count], (8, 3, 5)[:count]
    return (
        [random(2, 7, out, dtype=dtype, seed=i) for i, out in enumerate(outs)],
        random(2, 7, width, dtype=dtype, seed=3),
        random(sum(ranks), width, dtype=dtype, seed=4),
        [random(out, width, dtype=dtype, seed=5 + i) for i, out in enumerate(outs)],
        [random(out, rank, dtype=dtype, seed=8 + i) for i, (out, rank) in enumerate(zip(outs, ranks, strict=True))],
        random(2, 7, sum(ranks), dtype=dtype, seed=11),
        [2.0, 0.5, 1.5][:count],
    )


def double(values: list[Tensor]) -> list[Tensor]:
    return [v.double() for v in values]


@each_run
@each_dtype
@pytest.mark.parametrize("count", LORA_UP_BACKWARD)
def test_pieces_are_the_whole(count: int, dtype: torch.dtype, run: Callable) -> None:
    dys, x, A, weights, Bs, xa, scales = layers(count, dtype)
    dxa, *dBs = run(LORA_UP_BACKWARD[count], *dys, xa, *Bs, *scales)
    dx, dA = run(LORA_DOWN_BACKWARD[count], *dys, *weights, A, dxa, x, None, None, 0.0)

    wide = [double(dys), x.double(), A.double(), double(weights), double(Bs), xa.double()]
    if count == 1:
        truth = lora_linear.reference_backward(
            wide[0][0],
            wide[1],
            None,
            wide[3][0],
            wide[2],
            wide[4][0],
            wide[5],
            *scales,
            [True, False, False, True, True],
        )
        truth = (truth[0], truth[3], truth[4])
    else:
        needs = [True, True, *[False] * count, *[True] * count]
        truth = LORA_LINEARS[count].reference_backward(
            *wide[0], wide[1], wide[2], *wide[3], *wide[4], wide[5], *scales, needs
        )
        truth = tuple(g for g in truth if g is not None)
    for value, expected in zip((dx, dA, *dBs), truth, strict=True):
        assert value.shape == expected.shape and value.dtype == dtype
        assert_near(value, expected)


@each_run
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("with_weight", [True, False])
def test_a_norm_need_not_run_for_the_gradient_of_a(run: Callable, offset: float, with_weight: bool) -> None:
    dys, z, A, weights, _, dxa, _ = layers(2, torch.bfloat16)
    weight = random(z.shape[-1], seed=20) if with_weight else None
    x, rstd = rms_norm.reference(z, weight, 1e-6, offset or 0.5, True)
    down = LORA_DOWN_BACKWARD[2]
    _, ours = run(down, *dys, *weights, A, dxa, z, rstd, weight, offset or 0.5)
    exact, _ = rms_norm.reference(z.double(), None if weight is None else weight.double(), 1e-6, offset or 0.5, True)
    truth = dxa.double().flatten(0, 1).T @ exact.flatten(0, 1)
    assert_near(ours, truth)
    _, of_norm = run(down, *dys, *weights, A, dxa, x, None, None, 0.0)
    assert_near(of_norm, truth)


@each_run
def test_no_gradient_of_a_where_there_is_no_input(run: Callable) -> None:
    dys, _, A, weights, _, dxa, _ = layers(1, torch.bfloat16)
    dx, dA = run(LORA_DOWN_BACKWARD[1], *dys, *weights, A, dxa, None, None, None, 0.0)
    assert dA.shape == (0,) and dx.norm() > 0


def mlp(dtype: torch.dtype, width: int = 70, act: int = SILU.value) -> tuple[Any, ...]:
    """Arguments of glu_lora_backward."""
    dh, gate, up = (random(2, 9, width, dtype=dtype, seed=i) for i in range(3))
    B1, B2 = random(width, 8, dtype=dtype, seed=5), random(width, 3, dtype=dtype, seed=6)
    return (
        dh,
        gate,
        up,
        random(2, 9, 5, dtype=dtype, seed=3),
        random(2, 9, 11, dtype=dtype, seed=4),
        B1,
        B2,
        2.0,
        0.5,
        act,
    )


@each_run
@each_dtype
@pytest.mark.parametrize(("name", "others"), ACTIVATIONS, ids=["silu", "gelu", "gelu-tanh"])
def test_the_activation_takes_in_its_neighbours(name: str, others: tuple, dtype: torch.dtype, run: Callable) -> None:
    op = {o.name: o for o in (swiglu, geglu)}[name]
    args = mlp(dtype, act=ACTIVATIONS[name, others])
    dgate, dup, dA, dxa, *dBs = run(glu_lora_backward, *args)
    dh, gate, up, dxa_down, xa, B1, B2 = double(list(args[:7]))
    truth = op.reference_backward(dh, gate, up, *others, [True, True])
    for value, expected in zip((dgate, dup), truth, strict=True):
        assert_near(value, expected)
    h = op.reference(gate, up, *others)
    assert_near(dA, dxa_down.flatten(0, 1).T @ h.flatten(0, 1))
    assert_near(dxa, torch.cat([2 * dgate.double() @ B1, 0.5 * dup.double() @ B2], -1))
    for dy, own, scale, dB in zip((dgate, dup), xa.split([8, 3], -1), (2.0, 0.5), dBs, strict=True):
        assert_near(dB, scale * dy.double().flatten(0, 1).T @ own.flatten(0, 1))


@pytest.mark.parametrize("rank", [33, 40])
def test_ranks_that_no_kernel_takes(rank: int) -> None:
    args = list(mlp(torch.bfloat16))
    args[4:7] = random(2, 9, 2 * rank, seed=4), random(70, rank, seed=5), random(70, rank, seed=6)
    assert glu_lora_backward.supports(*args) == f"a rank of (5, {rank}, {rank}) is not between 1 and 32"
    for value, expected in zip(
        kernel_forward(glu_lora_backward, *args), reference_forward(glu_lora_backward, *args), strict=True
    ):
        assert_near(value, expected.double())


@each_run
def test_no_tokens(run: Callable) -> None:
    args = [a[:0] if isinstance(a, Tensor) and a.dim() == 3 else a for a in mlp(torch.bfloat16)]
    assert all(value.shape[:2] == (0, 9) or not value.any() for value in run(glu_lora_backward, *args))


def operators() -> list[Any]:
    dys, x, A, weights, Bs, xa, scales = layers(2, torch.bfloat16)
    rstd = torch.rand(2, 7, device=DEVICE)
    return [
        pytest.param(LORA_UP_BACKWARD[2], (*dys, xa, *Bs, *scales), id="up"),
        pytest.param(LORA_DOWN_BACKWARD[2], (*dys, *weights, A, xa, x, None, None, 0.0), id="down"),
        pytest.param(LORA_DOWN_BACKWARD[2], (*dys, *weights, A, xa, x, rstd, x[0, 0], 1.0), id="down of a norm"),
        pytest.param(glu_lora_backward, mlp(torch.bfloat16), id="glu"),
    ]


@pytest.mark.parametrize(("op", "args"), operators())
def test_contract(op: Operator, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(op.overload, args, test_utils=("test_schema", "test_faketensor"))
    made = kernel_forward(op, *args)
    assert_same_layout(made, reference_forward(op, *args))
    with symbolic(*args) as fakes:
        assert op.supports(*fakes) is None
        for value, expected in zip(tensors(op.overload(*fakes)), made, strict=True):
            assert value.dim() == expected.dim()
        assert isinstance(op.flops(*fakes), torch.SymInt)
    leaf = args[0].clone().requires_grad_()
    result = op.overload(leaf, *args[1:])[0]
    with pytest.raises(NotImplementedError, match="not differentiable"):
        result.sum().backward()
