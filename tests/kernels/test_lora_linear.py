"""lora_linear: both implementations against float64, the update that eager rounds away, and inputs that are absent."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.oracle import (
    DEVICE,
    IMPLEMENTATIONS,
    assert_accurate,
    assert_skips_unneeded,
    assert_symbolic,
    kernel_backward,
    kernel_forward,
    opcheck,
    random_grads,
)
from unsloth.kernels.lora_linear import lora_linear as op
from unsloth.kernels.operator import operator

ALPHA = 16.0
LORA, RSLORA = (lambda rank: ALPHA / rank), (lambda rank: ALPHA / rank**0.5)

each_optional = pytest.mark.parametrize(
    ("separate", "with_bias"),
    list(itertools.product([False, True], repeat=2)),
    ids=["plain", "bias", "input", "input, bias"],
)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def arguments(
    tokens: tuple[int, ...] = (2, 5),
    sizes: tuple[int, int, int] = (24, 40, 3),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    separate: bool = False,
    with_bias: bool = False,
    scaling: Any = RSLORA,
) -> tuple[Any, ...]:
    """x, adapter_input, weight, bias, A, B, scale for ``sizes`` (in, out, rank); B is not zero, as it starts out."""
    width, out, rank = sizes
    x, z = (random(*tokens, width, dtype=dtype, seed=6 * seed + i) for i in range(2))
    weight, A = (random(n, width, seed=6 * seed + 2 + n).div(width**0.5).to(dtype) for n in (out, rank))
    B = random(out, rank, seed=6 * seed + 4).mul(0.1).to(dtype)
    bias = random(out, dtype=dtype, seed=6 * seed + 5) if with_bias else None
    return x, z if separate else None, weight, bias, A, B, scaling(rank)


def eager(
    x: Tensor, adapter_input: Tensor | None, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """As PEFT computes it."""
    z = x if adapter_input is None else adapter_input
    return F.linear(x, weight, bias) + F.linear(F.linear(z, A), B) * scale


def relative_error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())


# -- accuracy ----------------------------------------------------------------------------------------------------------


@each_optional
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy(dtype: torch.dtype, separate: bool, with_bias: bool) -> None:
    def inputs(shape: tuple[Any, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        tokens, sizes, scaling = shape
        return arguments(tokens, sizes, dtype, seed, separate=separate, with_bias=with_bias, scaling=scaling)

    shapes = [
        ((2, 33), (64, 160, 16), LORA),
        ((2, 33), (160, 64, 16), RSLORA),
        ((37,), (80, 48, 3), RSLORA),
        ((5, 7), (257, 63, 1), LORA),
        ((1,), (64, 64, 4), LORA),
        ((), (64, 64, 4), LORA),
    ]
    assert_accurate(op, inputs, eager, dtypes=[dtype], shapes=shapes)


def in_double(args: tuple[Any, ...]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) else a for a in args]


@each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_update_is_added_before_rounding(dtype: torch.dtype, implementation: str) -> None:
    """Beside a large base product y is rounded once, where eager rounds the base product and the sum."""
    x, z, weight, bias, A, B, scale = arguments((512,), (64, 128, 8), dtype, scaling=LORA)
    args = x, z, weight, bias, A, B * 0.02, scale
    truth = eager(*in_double(args))
    y, _ = IMPLEMENTATIONS[implementation][0](op, *args)
    once = relative_error(truth.to(dtype), truth)
    assert relative_error(y, truth) <= 1.05 * once
    assert relative_error(eager(*args), truth) >= 1.3 * once


@each_implementation
@pytest.mark.parametrize("offset", [None, 64.0], ids=["no bias", "large bias"])
def test_an_update_below_the_rounding_is_not_lost(offset: float | None, implementation: str) -> None:
    """What is left of it in y, by regression: rounding noise averages out over a million values, a lost update not."""
    x, z, weight, _, A, B, scale = arguments((1 << 14,), (64, 64, 8), torch.bfloat16, scaling=LORA)
    bias = None if offset is None else torch.full((64,), offset, dtype=torch.bfloat16, device=DEVICE)
    args = x, z, weight, bias, A, B * 0.001 * (offset or 1), scale
    x_, _, weight_, bias_, A_, B_, _ = in_double(args)
    base, update = F.linear(x_, weight_, bias_), scale * F.linear(F.linear(x_, A_), B_)

    def share_kept(y: Tensor) -> float:
        return float(((y.double() - base) * update).sum() / update.square().sum())

    y, _ = IMPLEMENTATIONS[implementation][0](op, *args)
    assert abs(share_kept(y) - 1) < 0.05
    assert share_kept(eager(*args)) < 0.5


@each_optional
def test_float64_stays_float64(separate: bool, with_bias: bool) -> None:
    args = arguments(dtype=torch.float64, separate=separate, with_bias=with_bias)
    for forward, backward in IMPLEMENTATIONS.values():
        outputs = forward(op, *args)
        (grad,) = random_grads(op, outputs)
        ours = [outputs[0], *(g for g in backward(op, args, outputs, [grad]) if g is not None)]
        for value, expected in zip(ours, eager_and_gradients(args, grad), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def eager_and_gradients(args: tuple[Any, ...], grad: Tensor) -> list[Tensor]:
    """y, and the gradient of each differentiable input that is there."""
    leaves = with_gradients(args)
    y = eager(*leaves)
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


def with_gradients(args: tuple[Any, ...], names: tuple[str, ...] = op.differentiable) -> list[Any]:
    return [
        a.detach().requires_grad_(name in names) if isinstance(a, Tensor) else a
        for name, a in zip(op.inputs, args, strict=False)
    ]


# -- layouts -----------------------------------------------------------------------------------------------------------


def transposed(x: Tensor) -> Tensor:
    """The same values, the last two dimensions exchanged in memory."""
    return x.mT.contiguous().mT


LAYOUTS = {
    "transposed input": lambda x, z, w, *rest: (x.transpose(0, 1).contiguous().transpose(0, 1), z, w, *rest),
    "part of a wider input": lambda x, z, w, *rest: (x.repeat(1, 1, 2)[..., : x.shape[-1]], z, w, *rest),
    "one row for all tokens": lambda x, z, w, *rest: (x[:1, :1].expand_as(x), z[:1, :1].expand_as(z), w, *rest),
    "transposed weights": lambda x, z, w, bias, A, B, s: (x, z, transposed(w), bias, transposed(A), transposed(B), s),
    "no tokens": lambda x, z, w, *rest: (x[:, :0], z[:, :0], w, *rest),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """Whatever the inputs' strides, results are right and lie in memory as fresh tensors do."""
    x, z, *rest = LAYOUTS[layout](*arguments((3, 5), separate=True, with_bias=True))
    for args in ((x, z, *rest), (x, None, *rest)):
        for grad in (random(*x.shape[:-1], 40, seed=9), random(1, seed=9).expand(*x.shape[:-1], 40)):
            truth = eager_and_gradients(args, grad)
            for forward, backward in IMPLEMENTATIONS.values():
                outputs = forward(op, *args)
                ours = [outputs[0], *(g for g in backward(op, args, outputs, [grad]) if g is not None)]
                for value, expected in zip(ours, truth, strict=True):
                    assert value.is_contiguous()
                    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_read_from_new_memory(dtype: torch.dtype) -> None:
    """The first of two products is told to ignore what its result held before, be it NaN."""
    args = arguments(dtype=dtype, with_bias=True)
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
        assert torch.empty(1, device=DEVICE).isnan().all()
        y, xa = kernel_forward(op, *args)
        gradients = kernel_backward(op, args, (y, xa), [torch.ones_like(y)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(bool(t.isfinite().all()) for t in (y, xa, *gradients) if t is not None)


# -- contract ----------------------------------------------------------------------------------------------------------


@each_optional
def test_unneeded_gradients_are_not_made(separate: bool, with_bias: bool) -> None:
    assert_skips_unneeded(op, *arguments(separate=separate, with_bias=with_bias))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.addmm_.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("wanted", "products"),
    [("x", 3), ("A", 2), ("B", 1), ("bias", 0), ("A B", 3), ("x A B", 5), ("x adapter_input A B", 5)],
)
def test_only_the_products_that_are_needed(wanted: str, products: int) -> None:
    args = arguments(separate="adapter_input" in wanted, with_bias=True)
    outputs = kernel_forward(op, *args)
    with Products() as counted:
        kernel_backward(op, args, outputs, outputs[:1], [name in wanted.split() for name in op.differentiable])
    assert counted.count == products


@each_optional
def test_opcheck(separate: bool, with_bias: bool) -> None:
    opcheck(op, *arguments(separate=separate, with_bias=with_bias))


@each_optional
def test_autograd(separate: bool, with_bias: bool) -> None:
    """Through the registered operator, whichever inputs want a gradient; the weight and xa never have one."""
    args = arguments(separate=separate, with_bias=with_bias)
    there = [n for n, a in zip(op.inputs, args, strict=True) if a is not None and n in op.differentiable]
    for count in range(1, len(there) + 1):
        for names in itertools.combinations(there, count):
            leaves = with_gradients(args, names)
            wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
            y, xa = op(*leaves)
            assert not xa.requires_grad
            ours = torch.autograd.grad(y.square().sum(), wanted)
            theirs = torch.autograd.grad(eager(*leaves).square().sum(), wanted)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("separate", [False, True])
def test_x_is_not_kept_where_the_adapter_reads_another_tensor(separate: bool) -> None:
    leaves = with_gradients(arguments(separate=separate))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        _, xa = op(*leaves)
    read = leaves[1] if separate else leaves[0]
    assert sorted(kept) == sorted(t.data_ptr() for t in (read, leaves[2], leaves[4], leaves[5], xa))


def test_what_takes_anothers_place_has_to_be_saved() -> None:
    with pytest.raises(ValueError, match="saves_instead names \\['x'\\]"):
        operator(
            "not_saved(Tensor x, Tensor? z) -> (Tensor y)",
            reference=lambda x, z: x.clone(),
            reference_backward=lambda grad, z, needs: (grad.clone(),),
            forward=lambda x, z: x.clone(),
            backward=lambda grad, z, needs: (grad.clone(),),
            saves="z",
            saves_instead={"z": "x"},
            differentiable="x",
            gradients_of="y",
            supports=lambda x, z: None,
            flops=lambda x, z: 0,
            backward_flops=lambda x, z: 0,
        )


@pytest.mark.parametrize("separate", [False, True])
def test_one_graph_serves_all_lengths(separate: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: op(*args, 0.5)[0], backend=counter, dynamic=True)
    for length in (5, 6, 9, 17):
        leaves = with_gradients(arguments((2, length), separate=separate, with_bias=True)[:-1])
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        ours = torch.autograd.grad(compiled(*leaves).square().sum(), wanted)
        torch.testing.assert_close(ours, torch.autograd.grad(op(*leaves, 0.5)[0].square().sum(), wanted))
    assert counter.frame_count == 1


@each_optional
def test_symbolic_shapes(separate: bool, with_bias: bool) -> None:
    x, z, *rest = arguments((2, 7, 5), separate=separate, with_bias=with_bias)
    assert_symbolic(op, x, z, *rest, static=(-2, -1))
    assert_symbolic(op, x, z, *rest, static=())
    strided = [None if t is None else t.transpose(0, 1) for t in (x, z)]
    assert_symbolic(op, *strided, *rest, static=(-2, -1))


def test_supports_says_why_not() -> None:
    x, _, weight, bias, A, B, scale = arguments(with_bias=True)
    assert op.supports(x, None, weight, bias, A, B, scale) is None
    assert op.supports(*arguments(separate=True, dtype=torch.float16)) is None
    assert "float64" in str(op.supports(*arguments(dtype=torch.float64)))
    half = x.bfloat16(), None, weight.bfloat16(), None
    assert "A is torch.float32 and x is torch.bfloat16" in str(op.supports(*half, A, B, scale))
    assert "B is torch.float32" in str(op.supports(*half, A.bfloat16(), B, scale))
    assert "the adapter's input is" in str(op.supports(x, x.double(), weight, None, A, B, scale))
    assert "of one shape" in str(op.supports(x, x[:1], weight, None, A, B, scale))
    assert "2 dimensions" in str(op.supports(x, None, weight, bias[None], A, B, scale))


@pytest.mark.parametrize("separate", [False, True])
def test_flops_are_registered(separate: bool) -> None:
    args = arguments((2, 5), (24, 40, 3), separate=separate)
    tokens, weight, A, B = 10, 24 * 40, 3 * 24, 40 * 3
    with FlopCounterMode(display=False) as counter:
        y, _ = op(*with_gradients(args))
        assert counter.get_total_flops() == op.flops(*args) == 2 * tokens * (weight + A + B)
        y.sum().backward()
    assert counter.get_total_flops() == 2 * tokens * (2 * weight + 3 * A + 3 * B)
