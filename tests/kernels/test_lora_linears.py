"""lora_linears: both implementations against float64, the update that eager rounds away, and what may be absent."""

from __future__ import annotations

import itertools
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
    random_grads,
)
from unsloth.kernels.lora_linears import LORA_LINEARS

each_count = pytest.mark.parametrize("count", LORA_LINEARS)
each_bias = pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def arguments(
    count: int,
    tokens: tuple[int, ...] = (2, 5),
    width: int = 24,
    outs: tuple[int, ...] = (40, 16, 8),
    ranks: tuple[int, ...] = (3, 8, 2),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    with_bias: bool = False,
) -> tuple[Any, ...]:
    """x, A, weights, biases, Bs, scales; the Bs are not zero, as they start out; only the first bias may be there."""
    outs, ranks = outs[:count], ranks[:count]
    seeds = itertools.count(50 * seed)

    def made(*shape: int, scale: float) -> Tensor:
        return random(*shape, seed=next(seeds)).mul(scale).to(dtype)

    x, A = made(*tokens, width, scale=1), made(sum(ranks), width, scale=width**-0.5)
    weights = [made(out, width, scale=width**-0.5) for out in outs]
    biases = [made(out, scale=1) if with_bias and not i else None for i, out in enumerate(outs)]
    Bs = [made(out, rank, scale=0.1) for out, rank in zip(outs, ranks, strict=True)]
    return x, A, *weights, *biases, *Bs, *(16 / rank for rank in ranks)


def eager(x: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """As PEFT computes it."""
    count = len(rest) // 4
    weights, biases, Bs, scales = (rest[i * count : (i + 1) * count] for i in range(4))
    As = A.split([B.shape[1] for B in Bs])
    return tuple(
        F.linear(x, weight, bias) + F.linear(F.linear(x, own), B) * scale
        for weight, bias, B, scale, own in zip(weights, biases, Bs, scales, As, strict=True)
    )


@each_bias
@each_count
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy(count: int, dtype: torch.dtype, with_bias: bool) -> None:
    def inputs(shape: tuple[Any, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return arguments(count, *shape, dtype=dtype, seed=seed, with_bias=with_bias)

    shapes = [
        ((2, 33), 64, (64, 32, 32), (16, 16, 16)),
        ((37,), 80, (48, 160, 16), (3, 8, 1)),
        ((5, 7), 257, (63, 65, 1), (4, 1, 2)),
        ((1,), 256, (64, 64, 64), (4, 4, 4)),
        ((), 256, (64, 64, 64), (4, 4, 4)),
    ]
    assert_accurate(LORA_LINEARS[count], inputs, eager, dtypes=[dtype], shapes=shapes)


@each_count
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_updates_are_added_before_rounding(count: int, implementation: str) -> None:
    """Of updates 1/5000 of their base products the gradient of x and every y keep all but a tenth, by regression."""
    op = LORA_LINEARS[count]
    if DEVICE == "cpu" and implementation == "kernel":
        pytest.skip("on a CPU the products add to a rounded result, as cuBLAS would")
    args = list(arguments(count, (1 << 13,), 64, (64, 64, 64), (8, 8, 8), torch.bfloat16))
    args[2 + 2 * count : 2 + 3 * count] = [B * 0.002 for B in args[2 + 2 * count : 2 + 3 * count]]
    forward, backward = IMPLEMENTATIONS[implementation]
    outputs = forward(op, *args)
    grads = random_grads(op, outputs)
    dx = backward(op, args, outputs, grads)[0]
    bare = [a if not isinstance(a, Tensor) or i != 1 else a * 0 for i, a in enumerate(args)]
    for got, whole, base in zip((*outputs[:count], dx), in_double(args, grads), in_double(bare, grads), strict=True):
        update = whole - base
        assert float(update.norm() / base.norm()) < 2e-3
        kept = float(((got.double() - base) * update).sum() / update.square().sum())
        assert abs(kept - 1) < 0.1, kept


def in_double(args: Any, grads: Any) -> list[Tensor]:
    """Every y, and the gradient of x."""
    x, *rest = (a.double() if isinstance(a, Tensor) else a for a in args)
    x.requires_grad_()
    ys = eager(x, *rest)
    (dx,) = torch.autograd.grad(ys, [x], [g.double() for g in grads])
    return [*(y.detach() for y in ys), dx]


LAYOUTS = {
    "transposed input": lambda x, *rest: (x.transpose(0, 1).contiguous().transpose(0, 1), *rest),
    "part of a wider input": lambda x, *rest: (x.repeat(1, 1, 2)[..., : x.shape[-1]], *rest),
    "one row for all tokens": lambda x, *rest: (x[:1, :1].expand_as(x), *rest),
    "transposed matrices": lambda x, *rest: (
        x,
        *(a.mT.contiguous().mT if isinstance(a, Tensor) and a.dim() == 2 else a for a in rest),
    ),
    "no tokens": lambda x, *rest: (x[:, :0], *rest),
}


@each_count
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, count: int) -> None:
    op, args = LORA_LINEARS[count], LAYOUTS[layout](*arguments(count, (3, 5), with_bias=True))
    for forward, backward in IMPLEMENTATIONS.values():
        outputs = forward(op, *args)
        grads = random_grads(op, outputs)
        leaves = with_gradients(op, args)
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        truth = eager(*leaves)
        expected = [*truth, *torch.autograd.grad(truth, wanted, grads)]
        present = [n for n, a in zip(op.inputs, args, strict=True) if a is not None and n in op.differentiable]
        made = dict(zip(op.differentiable, backward(op, args, outputs, grads), strict=True))
        for value, other in zip([*outputs[:count], *(made[n] for n in present)], expected, strict=True):
            assert value is not None and value.is_contiguous()
            torch.testing.assert_close(value, other.detach(), rtol=1e-4, atol=1e-5)


def with_gradients(op: Any, args: tuple[Any, ...]) -> list[Any]:
    return [
        a.detach().requires_grad_(name in op.differentiable) if isinstance(a, Tensor) else a
        for name, a in zip(op.inputs, args, strict=True)
    ]


@each_bias
@each_count
def test_contract(count: int, with_bias: bool) -> None:
    args = arguments(count, with_bias=with_bias)
    assert_skips_unneeded(LORA_LINEARS[count], *args)
    opcheck(LORA_LINEARS[count], *args)


@each_count
def test_autograd(count: int) -> None:
    op = LORA_LINEARS[count]
    args = arguments(count, with_bias=True)
    ours, theirs = with_gradients(op, args), with_gradients(op, args)
    *ys, xa = op(*ours)
    assert not xa.requires_grad
    for results in (ys, eager(*theirs)):
        sum((y.square().sum() * (i + 1) for i, y in enumerate(results)), torch.zeros((), device=DEVICE)).backward()
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, Tensor) and mine.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


@each_count
def test_one_result_may_go_unused(count: int) -> None:
    op = LORA_LINEARS[count]
    leaves = with_gradients(op, arguments(count))
    op(*leaves)[0].sum().backward()
    assert float(leaves[2 + 2 * count].grad.norm()) > 0  # B of the first layer
    assert float(leaves[2 + 2 * count + 1].grad.norm()) == 0


@each_count
def test_one_graph_serves_all_lengths(count: int) -> None:
    op, counter = LORA_LINEARS[count], CompileCounterWithBackend("aot_eager")

    def second(*args: Any) -> Tensor:
        return op(*args, *(0.5 for _ in range(count)))[1]

    compiled = torch.compile(second, backend=counter, dynamic=True)
    for length in (5, 6, 9, 17):
        leaves = with_gradients(op, arguments(count, (2, length), with_bias=True))[:-count]
        wanted = [a for a in (leaves[0], leaves[1]) if a is not None]
        ours = torch.autograd.grad(compiled(*leaves).square().sum(), wanted)
        torch.testing.assert_close(ours, torch.autograd.grad(second(*leaves).square().sum(), wanted))
    assert counter.frame_count == 1


@each_count
def test_symbolic_shapes(count: int) -> None:
    x, *rest = arguments(count, (2, 7, 5), with_bias=True)
    assert_symbolic(LORA_LINEARS[count], x, *rest, static=(-2, -1))
    assert_symbolic(LORA_LINEARS[count], x.transpose(0, 1), *rest, static=(-2, -1))


@each_count
def test_supports_says_why_not(count: int) -> None:
    op, (x, A, *rest) = LORA_LINEARS[count], arguments(count)
    assert op.supports(x, A, *rest) is None
    assert "float64" in str(op.supports(x.double(), A, *rest))
    assert "one of the layers' tensors is torch.float32" in str(op.supports(x.half(), A.half(), *rest))
    assert "rows for ranks" in str(op.supports(x, A[:-1], *rest))


@each_count
def test_flops_are_registered(count: int) -> None:
    op, args = LORA_LINEARS[count], arguments(count)
    A = args[1].numel()
    weights, Bs = (sum(a.numel() for a in args[2 + i * count : 2 + (i + 1) * count]) for i in (0, 2))
    with FlopCounterMode(display=False) as counter:
        *ys, _ = op(*with_gradients(op, args))
        assert counter.get_total_flops() == op.flops(*args) == 2 * 10 * (weights + A + Bs)
        torch.cat(ys, -1).sum().backward()
    assert counter.get_total_flops() == 2 * 10 * (2 * weights + 3 * A + 3 * Bs)
